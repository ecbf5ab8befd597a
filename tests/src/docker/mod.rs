//! Docker, with Debian's client and a daemon of our own.

mod daemon;
mod lifecycle;
mod limits;
mod names;
mod network;
mod policies;
mod privileges;
mod resources;
mod shared;
mod storage;
mod volumes;

use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Result, ensure};
use testkit::docker::{self, IMAGE};
use testkit::{Run, eventually};

use crate::Bench;
use crate::case::Case;
use crate::report::{Report, Verdict};

const SUITE: &str = "docker";

/// What a case is given.
pub(crate) struct Docker {
    daemon: Rc<docker::Docker>,
    /// The name under which the runtime is registered.
    pub(crate) runtime: String,
    /// Whether it starts virtual machines.
    pub(crate) is_kata: bool,
    mark: String,
}

/// A container that was started with `run -d`; removed by force when dropped.
pub(crate) struct Running<'a> {
    docker: &'a Docker,
    /// Its id, in full.
    pub(crate) id: String,
}

impl Docker {
    /// `docker` with these words.
    pub(crate) fn run(&self, words: &[&str]) -> Run {
        self.daemon.run(words)
    }

    /// `docker` with these words, to be started beside the test.
    pub(crate) fn client(&self, words: &[&str]) -> std::process::Command {
        self.daemon.command(words)
    }

    /// `docker run --rm` of a shell line with flags; what it wrote.
    pub(crate) fn once(&self, flags: &[&str], line: &str) -> Result<String> {
        self.once_run(flags, line).text()
    }

    /// `docker run --rm` of a shell line with flags.
    pub(crate) fn once_run(&self, flags: &[&str], line: &str) -> Run {
        let run = self.run(&["run", "--rm", "--runtime", &self.runtime]);
        run.args(flags).args([IMAGE, "sh", "-c", line])
    }

    /// `docker run -d` of a shell line with flags.
    pub(crate) fn start(&self, flags: &[&str], line: &str) -> Result<Running<'_>> {
        let run = self.run(&["run", "-d", "--runtime", &self.runtime]);
        let id = run.args(flags).args([IMAGE, "sh", "-c", line]).text()?;
        Ok(Running { docker: self, id })
    }

    /// A container that sleeps.
    pub(crate) fn sleeper(&self, flags: &[&str]) -> Result<Running<'_>> {
        self.start(flags, "trap 'exit 0' TERM; sleep 1000 & wait")
    }

    /// A shell line on what published ports take for the host.
    pub(crate) fn host(&self, line: &str) -> Run {
        self.daemon.host(line)
    }

    /// The network namespace of the daemon.
    pub(crate) fn host_netns(&self) -> PathBuf {
        self.daemon.netns()
    }

    /// A name that no other container or network has.
    pub(crate) fn name(&self, word: &str) -> String {
        format!("{}-{word}", self.mark)
    }

    /// A new directory for volumes, removed with the run.
    pub(crate) fn directory(&self) -> Result<PathBuf> {
        Ok(tempfile::Builder::new().prefix(&format!("{}-", self.mark)).tempdir()?.keep())
    }
}

impl Running<'_> {
    /// `docker WORDS ID`.
    pub(crate) fn run(&self, words: &[&str]) -> Run {
        self.docker.run(words).arg(&self.id)
    }

    /// `docker exec` of a shell line with flags; what it wrote.
    pub(crate) fn exec(&self, flags: &[&str], line: &str) -> Result<String> {
        self.exec_run(flags, line).text()
    }

    /// `docker exec` of a shell line with flags.
    pub(crate) fn exec_run(&self, flags: &[&str], line: &str) -> Run {
        self.docker.run(&["exec"]).args(flags).arg(&self.id).args(["sh", "-c", line])
    }

    /// A field of `docker inspect`, by a Go template.
    pub(crate) fn inspect(&self, field: &str) -> Result<String> {
        self.run(&["inspect", "--format", field]).text()
    }

    /// Waits until `docker logs` has this.
    pub(crate) fn wait_for_log(&self, word: &str) -> Result<()> {
        eventually(Duration::from_mins(1), &format!("{word:?} is in the log"), || {
            let output = self.run(&["logs"]).output()?;
            let text = format!("{}{}", output.text(), output.stderr);
            Ok(text.contains(word).then_some(()))
        })
    }

    /// `docker rm -f`.
    pub(crate) fn remove(self) -> Result<()> {
        self.run(&["rm", "-f"]).text().map(drop)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        drop(self.run(&["rm", "-f"]).output());
    }
}

/// The cases of the suite.
const ALL: &[&[Case<Docker>]] = &[
    lifecycle::CASES,
    network::CASES,
    names::CASES,
    shared::CASES,
    storage::CASES,
    volumes::CASES,
    privileges::CASES,
    limits::CASES,
    resources::CASES,
    daemon::CASES,
    policies::CASES,
];

/// Runs the suite.
pub(crate) fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    run_cases(bench, SUITE, ALL, report)
}

/// Runs Docker in Docker: a suite of its own, since it takes minutes where machines are emulated.
pub(crate) fn run_nested(bench: &Bench, report: &mut Report) -> Result<()> {
    run_cases(bench, "nested", &[privileges::NESTED], report)
}

/// Runs what takes long: hundreds of starts.
pub(crate) fn run_soak(bench: &Bench, report: &mut Report) -> Result<()> {
    run_cases(bench, "soak", &[policies::SOAK], report)
}

fn run_cases(
    bench: &Bench,
    suite: &'static str,
    all: &[&[Case<Docker>]],
    report: &mut Report,
) -> Result<()> {
    if bench.list || !all.iter().any(|cases| bench.wants(cases)) {
        for cases in all {
            bench.list_cases(suite, cases, report);
        }
        return Ok(());
    }
    let missing = docker::missing_programs();
    if !missing.is_empty() {
        let reason = format!("needs {}", missing.join(", "));
        for runtime in &bench.runtimes {
            let verdict = Verdict::Skipped(reason.clone());
            report.add(suite, "the daemon starts", &runtime.name, verdict, Duration::ZERO);
        }
        return Ok(());
    }
    let before = bench.host.snapshot()?;
    let daemon = {
        let programs: Vec<_> = bench
            .runtimes
            .iter()
            .map(|runtime| runtime.registrable(&bench.work.path().join("bin")))
            .collect::<Result<_>>()?;
        let runtimes: Vec<_> = bench
            .runtimes
            .iter()
            .zip(&programs)
            .map(|(runtime, program)| (runtime.name.as_str(), program.as_path()))
            .collect();
        Rc::new(docker::Docker::start(&bench.work, &runtimes)?)
    };
    for runtime in &bench.runtimes {
        let docker = Docker {
            daemon: Rc::clone(&daemon),
            runtime: runtime.name.clone(),
            is_kata: runtime.is_kata(),
            mark: bench.work.mark().to_owned(),
        };
        for cases in all {
            bench.cases(suite, &runtime.name, &docker, cases, report);
        }
    }
    let log = daemon.last_words();
    drop(daemon);
    let left = bench.host.expect(&before);
    let verdict = left.map_or_else(
        |error| Verdict::Failed(format!("{error:#}\nthe daemon's last words:\n{log}")),
        |()| Verdict::Passed,
    );
    report.add(suite, "the daemon's end leaves nothing behind", "all", verdict, Duration::ZERO);
    Ok(())
}

/// That `code` is what docker's client ended with, and that it said `word`.
pub(crate) fn refused(run: Run, code: i32, word: &str) -> Result<()> {
    let output = run.output()?.ended(code)?;
    let text = output.stderr.to_lowercase();
    ensure!(text.contains(word), "no {word:?} in {output}");
    Ok(())
}
