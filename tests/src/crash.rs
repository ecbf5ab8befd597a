//! SIGKILL at every step: after `delete --force` no process, mount, link, cgroup or file may be left.
//!
//! The steps of a start are the lines of the sandbox's ledger, `<root>/vms/<id>/ledger`: one line is written before each
//! thing that is taken from the host.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use linux::process::ProcessId;
use rustix::process::Signal;
use testkit::residue::Host;
use testkit::run::code;
use testkit::runtime::reap_orphans;
use testkit::{Bundle, Runtime, Work, eventually};

use crate::Bench;
use crate::case::{Case, case, skip};
use crate::report::Report;

const SUITE: &str = "crash";

const CASES: &[Case<Crash>] = &[
    case("the command killed at ten moments of create", |crash| {
        let whole = crash.time_of_create()?;
        for part in 0..10 {
            crash.kill_command(&["create"], whole * part / 10)?;
        }
        Ok(())
    }),
    case("the command killed at moments of run", |crash| {
        let whole = crash.time_of_create()?;
        for part in [3, 7, 11] {
            crash.kill_command(&["run"], whole * part / 10)?;
        }
        Ok(())
    }),
    case("the command killed in the middle of delete --force", delete_killed),
    case("the sandbox process killed at each ledger line of create", |crash| {
        crash.at_each_line(Role::Sandbox)
    }),
    case("the hypervisor killed at each ledger line of create", |crash| {
        crash.at_each_line(Role::Hypervisor)
    }),
    case("the device process killed at each ledger line of create", |crash| {
        crash.at_each_line(Role::Device)
    }),
    case("each process killed in a created container", |crash| crash.in_status(Moment::Created)),
    case("each process killed during start", |crash| crash.in_status(Moment::Starting)),
    case("each process killed in a running container", |crash| crash.in_status(Moment::Running)),
];

/// What a case is given.
struct Crash {
    work: Rc<Work>,
    runtime: Runtime,
    host: Host,
}

/// A process of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    StandIn,
    Sandbox,
    Hypervisor,
    Device,
}

/// When to kill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    Created,
    Starting,
    Running,
}

const ROLES: [Role; 4] = [Role::StandIn, Role::Sandbox, Role::Hypervisor, Role::Device];

impl Crash {
    fn bundle(&self) -> Result<Bundle> {
        Bundle::shell(&self.work, "exec sleep 1000")
    }

    /// Starts the runtime with a command on the bundle; its output goes nowhere.
    fn spawn(&self, command: &[&str], bundle: &Bundle) -> Result<Child> {
        let bundle_dir = bundle.dir.to_string_lossy();
        let mut words = command.to_vec();
        if command != ["start"] && command[0] != "delete" {
            words.extend(["--bundle", &*bundle_dir]);
        }
        words.push(&bundle.id);
        let words = self.runtime.words(&words);
        let mut child = Command::new(&words[0]);
        child.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        child.spawn().with_context(|| format!("cannot start {}", words[0]))
    }

    /// How long an undisturbed `create` takes.
    fn time_of_create(&self) -> Result<Duration> {
        let began = Instant::now();
        let container = self.runtime.create(&self.bundle()?)?;
        let took = began.elapsed();
        drop(container);
        Ok(took)
    }

    /// Kills the command itself after a time.
    fn kill_command(&self, command: &[&str], after: Duration) -> Result<()> {
        let before = self.host.snapshot()?;
        let bundle = self.bundle()?;
        let mut child = self.spawn(command, &bundle)?;
        pause(after);
        child.kill()?;
        child.wait()?;
        self.clean(&bundle, &before, &format!("{command:?} killed after {after:?}"))
    }

    /// `delete --force`, which must succeed; then the host must be as it was.
    fn clean(
        &self,
        bundle: &Bundle,
        before: &testkit::residue::Snapshot,
        what: &str,
    ) -> Result<()> {
        let delete = self.runtime.run(&["delete", "--force", &bundle.id]);
        let outcome = delete.text().and_then(|_| self.host.expect(before));
        outcome.with_context(|| what.to_owned())
    }

    fn needs_vm(&self) -> Result<()> {
        if self.runtime.is_kata() {
            Ok(())
        } else {
            Err(skip("a runtime that starts virtual machines"))
        }
    }

    /// Kills `role` as soon as it is there and the ledger has `n` lines, for each n that a create reaches.
    fn at_each_line(&self, role: Role) -> Result<()> {
        self.needs_vm()?;
        let mut line = 1;
        loop {
            let before = self.host.snapshot()?;
            let bundle = self.bundle()?;
            let mut create = self.spawn(&["create"], &bundle)?;
            let end = Instant::now() + testkit::run::DEADLINE;
            let mut killed = false;
            let status = loop {
                if let Some(status) = create.try_wait()? {
                    break code(status);
                }
                if !killed && ledger_lines(&self.runtime.root) >= line {
                    killed = kill(role)?;
                }
                ensure!(
                    Instant::now() < end,
                    "create hangs after {role:?} was killed at line {line}"
                );
                pause(Duration::from_millis(1));
            };
            // A machine that dies while it is made of a template is replaced by one that boots.
            ensure!(
                !killed || status != 0 || role != Role::Sandbox || role_is_gone(role),
                "create succeeded without {role:?}"
            );
            let lines = ledger_lines(&self.runtime.root);
            self.clean(&bundle, &before, &format!("{role:?} killed at line {line} of the ledger"))?;
            if !killed {
                ensure!(line > 1, "{role:?} was never seen; the ledger had {lines} lines");
                return Ok(());
            }
            line += 1;
        }
    }

    /// Kills each role at a moment of a container's life, then deletes the container.
    fn in_status(&self, moment: Moment) -> Result<()> {
        self.needs_vm()?;
        for role in ROLES {
            let before = self.host.snapshot()?;
            let bundle = self.bundle()?;
            let container = match moment {
                Moment::Running => self.runtime.start(&bundle)?,
                Moment::Created | Moment::Starting => self.runtime.create(&bundle)?,
            };
            let starting = (moment == Moment::Starting).then(|| self.spawn(&["start"], &bundle));
            ensure!(kill(role)?, "there is no {role:?} process in a container that is {moment:?}");
            if let Some(start) = starting {
                start?.wait()?;
            }
            let status = container.wait().with_context(|| format!("{role:?} killed"))?;
            ensure!(status != 0, "{role:?} killed, and the container's exit code is 0");
            container.wait_for("stopped")?;
            self.clean(
                &bundle,
                &before,
                &format!("{role:?} killed in a container that is {moment:?}"),
            )?;
        }
        Ok(())
    }
}

fn delete_killed(crash: &Crash) -> Result<()> {
    for after in [0, 5, 20, 50] {
        let before = crash.host.snapshot()?;
        let bundle = crash.bundle()?;
        let container = crash.runtime.start(&bundle)?;
        let mut delete = crash.spawn(&["delete", "--force"], &bundle)?;
        pause(Duration::from_millis(after));
        delete.kill()?;
        delete.wait()?;
        crash.clean(&bundle, &before, &format!("delete --force killed after {after} ms"))?;
        drop(container);
    }
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "the moment of a kill is what is varied")]
fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// The lines in the fullest ledger below `root`.
fn ledger_lines(root: &Path) -> usize {
    let count = |path: &Path| {
        fs::read(path).map_or(0, |bytes| bytes.split(|&byte| byte == b'\n').count() - 1)
    };
    let entries = fs::read_dir(root.join("vms")).into_iter().flatten().flatten();
    entries.map(|entry| count(&entry.path().join("ledger"))).max().unwrap_or(0)
}

/// Kills the processes of a role below this one; whether there was any.
fn kill(role: Role) -> Result<bool> {
    let mut found = false;
    for process in processes(role) {
        found |= process.signal(Signal::KILL)?;
    }
    Ok(found)
}

fn role_is_gone(role: Role) -> bool {
    eventually(Duration::from_secs(10), "it ends", || {
        reap_orphans();
        Ok(processes(role).is_empty().then_some(()))
    })
    .is_ok()
}

/// The live processes of a role. We are a subreaper, so that all sandboxes of this run are below us.
fn processes(role: Role) -> Vec<ProcessId> {
    let own = std::process::id();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_string_lossy().parse().ok());
    pids.filter(|&pid: &u32| plays(pid, role) && is_below(pid, own))
        .filter_map(ProcessId::of)
        .collect()
}

fn plays(pid: u32, role: Role) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<_> = line.split(|&byte| byte == 0).take(3).collect();
    let program = String::from_utf8_lossy(words.first().copied().unwrap_or_default());
    // Our roles are started by `/proc/self/exe`: the role is the first argument.
    let role_word = words.get(1).map(|word| String::from_utf8_lossy(word));
    match role {
        Role::StandIn => role_word.is_some_and(|word| word == "stand-in"),
        Role::Sandbox => role_word.is_some_and(|word| word == "sandbox"),
        Role::Device => role_word.is_some_and(|word| word == "device"),
        Role::Hypervisor => {
            program.rsplit('/').next().is_some_and(|name| name.starts_with("qemu-system"))
        }
    }
}

fn is_below(mut pid: u32, ancestor: u32) -> bool {
    while pid > 1 {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let Some((_, fields)) = stat.rsplit_once(')') else { return false };
        pid = fields.split_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or(0);
        if pid == ancestor {
            return true;
        }
    }
    false
}

/// Runs the suite.
pub(crate) fn run(bench: &Bench, report: &mut Report) {
    for runtime in &bench.runtimes {
        let (work, runtime) = (Rc::clone(&bench.work), runtime.clone());
        let name = runtime.name.clone();
        let crash = Crash { work, runtime, host: bench.host.clone() };
        bench.cases(SUITE, &name, &crash, CASES, report);
    }
}
