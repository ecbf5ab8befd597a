//! podman, with Debian's client and conmon.

mod cases;

use std::rc::Rc;
use std::time::Duration;

use anyhow::{Result, anyhow};
use testkit::console::Terminal;
use testkit::podman::{self, IMAGE};
use testkit::{Run, eventually};

use crate::Bench;
use crate::report::{Report, Verdict};

const SUITE: &str = "podman";

/// What a case is given.
pub(crate) struct Podman {
    rig: Rc<podman::Podman>,
    /// The runtime's program, which `--runtime` takes.
    program: String,
    /// Whether it starts virtual machines.
    pub(crate) is_kata: bool,
    mark: String,
}

/// A container that was started with `run -d`; removed by force when dropped.
pub(crate) struct Running<'a> {
    podman: &'a Podman,
    /// Its id, in full.
    pub(crate) id: String,
}

impl Podman {
    /// `podman --runtime PROGRAM` with these words.
    pub(crate) fn run(&self, words: &[&str]) -> Run {
        let all: Vec<_> = ["--runtime", &self.program].iter().chain(words).copied().collect();
        self.rig.run(&all)
    }

    /// `podman run` of a shell line with flags, and what `more` says before them.
    fn run_line(&self, more: &[&str], flags: &[&str], line: &str) -> Run {
        let parent = self.rig.cgroup_parent();
        let run = self.run(&[&["run", "--cgroup-parent", &parent], more, flags].concat());
        run.args([IMAGE, "sh", "-c", line])
    }

    /// `podman run --rm` of a shell line with flags.
    pub(crate) fn once(&self, flags: &[&str], line: &str) -> Run {
        self.run_line(&["--rm"], flags, line)
    }

    /// `podman run -d` of a shell line with flags.
    pub(crate) fn start(&self, flags: &[&str], line: &str) -> Result<Running<'_>> {
        let id = self.run_line(&["-d"], flags, line).text()?;
        Ok(Running { podman: self, id })
    }

    /// A container that sleeps.
    pub(crate) fn sleeper(&self, flags: &[&str]) -> Result<Running<'_>> {
        self.start(flags, "trap 'exit 0' TERM; sleep 1000 & wait")
    }

    /// Starts podman on a terminal of ours.
    pub(crate) fn on_terminal(&self, words: &[&str]) -> Result<Terminal> {
        let all: Vec<_> = ["--runtime", &self.program].iter().chain(words).copied().collect();
        let (words, environment) = self.rig.words(&all);
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        let mut environment: Vec<_> =
            environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
        environment.push(("TERM", "xterm"));
        Terminal::start(&words, &environment)
    }

    /// A shell line on what published ports take for the host.
    pub(crate) fn host(&self, line: &str) -> Run {
        self.rig.host(line)
    }

    /// A name that no other container or network has.
    pub(crate) fn name(&self, word: &str) -> String {
        format!("{}-{word}", self.mark)
    }

    /// A file's path in the rig's directory.
    pub(crate) fn path(&self, name: &str) -> String {
        self.rig.dir().join(name).to_string_lossy().into_owned()
    }

    /// The cgroup below which all of a case's containers and pods are.
    pub(crate) fn cgroup_parent(&self) -> String {
        self.rig.cgroup_parent()
    }
}

impl Running<'_> {
    /// `podman WORDS ID`.
    pub(crate) fn run(&self, words: &[&str]) -> Run {
        self.podman.run(words).arg(&self.id)
    }

    /// `podman exec` of a shell line with flags.
    pub(crate) fn exec(&self, flags: &[&str], line: &str) -> Run {
        self.podman.run(&["exec"]).args(flags).arg(&self.id).args(["sh", "-c", line])
    }

    /// A field of `podman inspect`, by a Go template.
    pub(crate) fn inspect(&self, field: &str) -> Result<String> {
        self.run(&["inspect", "--format", field]).text()
    }

    /// Waits until `podman logs` has this.
    pub(crate) fn wait_for_log(&self, word: &str) -> Result<()> {
        eventually(Duration::from_mins(1), &format!("{word:?} is in the log"), || {
            let output = self.run(&["logs"]).output()?;
            let text = format!("{}{}", output.text(), output.stderr);
            Ok(text.contains(word).then_some(()))
        })
    }

    /// `podman rm -f`.
    pub(crate) fn remove(self) -> Result<()> {
        self.run(&["rm", "-f", "-t", "0"]).text().map(drop)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        drop(self.run(&["rm", "-f", "-t", "0", "-i"]).output());
    }
}

/// Runs the suite.
pub(crate) fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    if bench.list || !bench.wants(cases::CASES) {
        bench.list_cases(SUITE, cases::CASES, report);
        return Ok(());
    }
    let missing = podman::missing_programs();
    if !missing.is_empty() {
        let reason = format!("needs {}", missing.join(", "));
        for runtime in &bench.runtimes {
            let verdict = Verdict::Skipped(reason.clone());
            report.add(SUITE, "podman starts", &runtime.name, verdict, Duration::ZERO);
        }
        return Ok(());
    }
    let before = bench.host.snapshot()?;
    let rig = Rc::new(podman::Podman::start(&bench.work)?);
    for runtime in &bench.runtimes {
        let program = runtime.registrable(&bench.work.path().join("bin"))?;
        let podman = Podman {
            rig: Rc::clone(&rig),
            program: program
                .to_str()
                .ok_or_else(|| anyhow!("not UTF-8: {}", program.display()))?
                .to_owned(),
            is_kata: runtime.is_kata(),
            mark: bench.work.mark().to_owned(),
        };
        bench.cases(SUITE, &runtime.name, &podman, cases::CASES, report);
    }
    drop(rig);
    let left = bench.host.expect(&before);
    let verdict =
        left.map_or_else(|error| Verdict::Failed(format!("{error:#}")), |()| Verdict::Passed);
    report.add(SUITE, "podman's end leaves nothing behind", "all", verdict, Duration::ZERO);
    Ok(())
}
