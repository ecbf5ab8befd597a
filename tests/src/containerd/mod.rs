//! containerd by its own client: our shim beside containerd's runc shim.

mod events;
mod faults;
mod install;
mod tasks;

use std::cell::{Ref, RefCell};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;
use testkit::containerd::{Containerd, Setup};
use testkit::{Run, Runtime, Work, eventually, image};

use crate::Bench;
use crate::case::Case;
use crate::report::{Report, Verdict};

const SUITE: &str = "containerd";

/// The image that the daemon has.
pub(crate) const IMAGE: &str = "docker.io/library/busybox:latest";

/// What a case is given.
pub(crate) struct Ctr {
    daemon: Rc<RefCell<Containerd>>,
    work: Rc<Work>,
    /// `ctr run`'s words for the runtime under test.
    runtime: Vec<String>,
    /// Whether it starts virtual machines.
    pub(crate) is_kata: bool,
    /// containerd's namespace.
    namespace: String,
}

/// A task that was started with `run -d`; removed by force when dropped.
pub(crate) struct Task<'a> {
    ctr: &'a Ctr,
    /// Its id.
    pub(crate) id: String,
}

impl Ctr {
    /// `ctr` with these words.
    pub(crate) fn run(&self, words: &[&str]) -> Run {
        self.daemon().ctr(&["--namespace", &self.namespace]).args(words)
    }

    pub(crate) fn daemon(&self) -> Ref<'_, Containerd> {
        self.daemon.borrow()
    }

    /// The same with a new daemon, which ends with what is answered.
    pub(crate) fn with_own_daemon(&self) -> Result<Self> {
        let dir = self.work.path().join(self.id());
        let shims = Some(self.work.path().join("shims"));
        let daemon = Containerd::start_with(&dir, None, Setup { shims, cri: None })?;
        load(&daemon, &self.work, &self.namespace, &dir)?;
        Ok(Self {
            daemon: Rc::new(RefCell::new(daemon)),
            work: Rc::clone(&self.work),
            runtime: self.runtime.clone(),
            is_kata: self.is_kata,
            namespace: self.namespace.clone(),
        })
    }

    /// Kills containerd and starts it again.
    pub(crate) fn crash(&self) -> Result<()> {
        self.daemon.borrow_mut().crash()
    }

    /// A new container's id.
    pub(crate) fn id(&self) -> String {
        self.work.id()
    }

    /// The words of `ctr run` up to the image, with flags, the container in the run's cgroup.
    pub(crate) fn words(&self, flags: &[&str], id: &str) -> Vec<String> {
        let cgroup = format!("/{}/{id}", self.work.mark());
        let words = ["run", "--cgroup", &cgroup].into_iter().map(str::to_owned);
        let words = words.chain(self.runtime.iter().cloned());
        words.chain(flags.iter().map(|&flag| flag.to_owned())).collect()
    }

    /// `ctr run --rm` of a shell line with flags.
    pub(crate) fn once_run(&self, flags: &[&str], line: &str) -> Run {
        let id = self.id();
        let run = self.run(&[]).args(self.words(flags, &id));
        run.args(["--rm", IMAGE, &id, "sh", "-c", line])
    }

    /// `ctr run --rm` of a shell line; what it wrote.
    pub(crate) fn once(&self, line: &str) -> Result<String> {
        self.once_run(&[], line).text()
    }

    /// `ctr run -d` of a shell line with flags.
    pub(crate) fn start(&self, flags: &[&str], line: &str) -> Result<Task<'_>> {
        let task = Task { ctr: self, id: self.id() };
        let run = self.run(&[]).args(self.words(flags, &task.id));
        run.args(["-d", "--null-io", IMAGE, &task.id, "sh", "-c", line]).text()?;
        Ok(task)
    }

    /// A task that sleeps until SIGTERM.
    pub(crate) fn sleeper(&self) -> Result<Task<'_>> {
        self.start(&[], "trap 'exit 9' TERM; sleep 1000 & wait")
    }

    /// The status of a task, as `ctr task ls` has it; empty where there is none.
    pub(crate) fn status(&self, id: &str) -> Result<String> {
        let table = self.run(&["task", "ls"]).text()?;
        let line = table.lines().find(|line| line.split_whitespace().next() == Some(id));
        let word = line.and_then(|line| line.split_whitespace().nth(2));
        Ok(word.unwrap_or_default().to_owned())
    }
}

impl Task<'_> {
    /// Waits until the task has this status.
    pub(crate) fn wait_for(&self, status: &str) -> Result<()> {
        eventually(Duration::from_mins(1), &format!("{} is {status}", self.id), || {
            Ok((self.ctr.status(&self.id)? == status).then_some(()))
        })
    }

    /// `ctr task exec` of a shell line with flags.
    pub(crate) fn exec(&self, flags: &[&str], line: &str) -> Run {
        let exec = self.ctr.id();
        let run = self.ctr.run(&["task", "exec", "--exec-id", &exec]).args(flags);
        run.args([&self.id, "sh", "-c", line])
    }

    /// `ctr task kill`.
    pub(crate) fn kill(&self, signal: &str) -> Run {
        self.ctr.run(&["task", "kill", "--signal", signal, &self.id])
    }

    /// `ctr task delete`; the exit code that it tells of.
    pub(crate) fn delete(&self) -> Result<u32> {
        let output = self.ctr.run(&["task", "delete", &self.id]).output()?.success()?;
        let (_, told) = output.stderr.split_once("non-zero exit code ").unwrap_or(("", "0"));
        let digits: String = told.chars().take_while(char::is_ascii_digit).collect();
        Ok(digits.parse()?)
    }

    /// The pid that containerd has for it.
    pub(crate) fn pid(&self) -> Result<u32> {
        let table = self.ctr.run(&["task", "ls"]).text()?;
        let line = table.lines().find(|line| line.starts_with(&self.id)).unwrap_or_default();
        Ok(line.split_whitespace().nth(1).unwrap_or_default().parse()?)
    }
}

impl Drop for Task<'_> {
    fn drop(&mut self) {
        drop(self.ctr.run(&["task", "delete", "--force", &self.id]).output());
        drop(self.ctr.run(&["container", "delete", &self.id]).output());
    }
}

/// A directory in which containerd finds the shim of `runtime`.
pub(crate) fn shims(work: &Work, runtime: &Runtime) -> Result<PathBuf> {
    let dir = work.path().join("shims");
    std::fs::create_dir_all(&dir)?;
    let link = dir.join("containerd-shim-kata-v2");
    if !link.exists() {
        symlink(std::fs::canonicalize(&runtime.program)?, link)?;
    }
    Ok(dir)
}

fn runtime_words(runtime: &Runtime) -> Vec<String> {
    if !runtime.is_kata() {
        return vec!["--runtime".into(), "io.containerd.runc.v2".into()];
    }
    let mut words = vec!["--runtime".to_owned(), "io.containerd.kata.v2".to_owned()];
    if let Some(config) = &runtime.config {
        words.extend(["--runtime-config-path".into(), config.display().to_string()]);
    }
    words
}

/// Runs the suite.
pub(crate) fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let all: [&[Case<Ctr>]; 4] = [tasks::CASES, events::CASES, faults::CASES, install::CASES];
    if bench.list || !all.iter().any(|cases| bench.wants(cases)) {
        for cases in all {
            bench.list_cases(SUITE, cases, report);
        }
        return Ok(());
    }
    let before = bench.host.snapshot()?;
    let dir = bench.work.path().join("ct");
    let kata = bench.runtimes.iter().find(|runtime| runtime.is_kata());
    let shims = kata.map(|runtime| shims(&bench.work, runtime)).transpose()?;
    let daemon = Containerd::start_with(&dir, None, Setup { shims, cri: None })?;
    let namespace = bench.work.mark().to_owned();
    load(&daemon, &bench.work, &namespace, &dir)?;
    let daemon = Rc::new(RefCell::new(daemon));
    for runtime in &bench.runtimes {
        let ctr = Ctr {
            daemon: Rc::clone(&daemon),
            work: Rc::clone(&bench.work),
            runtime: runtime_words(runtime),
            is_kata: runtime.is_kata(),
            namespace: namespace.clone(),
        };
        for cases in all {
            bench.cases(SUITE, &runtime.name, &ctr, cases, report);
        }
    }
    let log = daemon.borrow().last_words();
    drop(daemon);
    testkit::residue::remove_cgroups(bench.work.mark());
    let left = bench.host.expect(&before);
    let verdict = left.map_or_else(
        |error| Verdict::Failed(format!("{error:#}\nthe daemon's last words:\n{log}")),
        |()| Verdict::Passed,
    );
    report.add(SUITE, "the daemon's end leaves nothing behind", "all", verdict, Duration::ZERO);
    Ok(())
}

/// Gives the daemon the image.
fn load(daemon: &Containerd, work: &Work, namespace: &str, dir: &Path) -> Result<()> {
    let config = json!({"Cmd": ["sh"], "Env": ["PATH=/bin:/usr/bin:/sbin:/usr/sbin"]});
    let archive = image::archive(work, dir, IMAGE, &config)?;
    daemon.ctr(&["--namespace", namespace, "images", "import"]).arg(archive).text()?;
    Ok(())
}
