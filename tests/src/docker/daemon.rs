//! The daemon and its helpers are killed, and what users then see: with live-restore containers go on, without it nothing is
//! left.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use linux::process::ProcessId;
use rustix::process::Signal;
use testkit::eventually;

use super::{Docker, Running};
use crate::case::{Case, case, has, same};

pub(super) const CASES: &[Case<Docker>] = &[
    case("dockerd restarted, cleanly and by SIGKILL: containers go on and are served", restarted),
    case("the containerd shim killed: the container ends, and is removed", shim_killed),
    case("the runtime killed during docker run, start, exec, stop and rm", runtime_killed),
];

const DEADLINE: Duration = Duration::from_mins(1);

fn restarted(docker: &Docker) -> Result<()> {
    let container = docker.start(
        &[],
        "trap 'echo stopped; exit 9' TERM; echo began; while :; do \
                                       sleep 0.1; done",
    )?;
    container.wait_for_log("began")?;
    let pid = container.inspect("{{.State.Pid}}")?;
    for signal in [Signal::TERM, Signal::KILL] {
        docker.daemon.restart(signal)?;
        same("running", container.inspect("{{.State.Running}}")?.as_str(), "true")?;
        same("pid", container.inspect("{{.State.Pid}}")?, pid.clone())?;
        same("exec", container.exec(&[], "echo on")?.as_str(), "on")?;
        has(&container.run(&["logs"]).text()?, "began")?;
    }
    container.run(&["stop", "-t", "60"]).text()?;
    same("exit code", container.inspect("{{.State.ExitCode}}")?.as_str(), "9")?;
    has(&container.run(&["logs"]).text()?, "stopped")?;
    container.remove()
}

fn parent(pid: u32) -> Result<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    Ok(line.context("no PPid")?.trim().parse()?)
}

fn kill(pid: u32) -> Result<()> {
    let process = ProcessId::of(pid).with_context(|| format!("no process {pid}"))?;
    process.signal(Signal::KILL).map(drop).map_err(Into::into)
}

fn shim_killed(docker: &Docker) -> Result<()> {
    let container = docker.sleeper(&[])?;
    let pid = container.inspect("{{.State.Pid}}")?.parse()?;
    let shim = parent(pid)?;
    let name = fs::read_to_string(format!("/proc/{shim}/comm"))?;
    has(&name, "containerd-shim")?;
    kill(shim)?;
    eventually(DEADLINE, "docker sees that the container has ended", || {
        Ok((container.inspect("{{.State.Running}}")? == "false").then_some(()))
    })?;
    container.run(&["start"]).text()?;
    same("exec", container.exec(&[], "echo again")?.as_str(), "again")?;
    container.remove()
}

/// Starts `docker WORDS`, kills the first process of the runtime that is there with `command` among its arguments, and
/// answers the client's exit code.
fn killed_in(docker: &Docker, words: &[&str], command: &str, id: &str) -> Result<i32> {
    let mut client = docker.client(words).spawn()?;
    let mut killed = false;
    let status = eventually(DEADLINE, &format!("docker {words:?} ends"), || {
        if let Some(status) = client.try_wait()? {
            return Ok(Some(status));
        }
        if !killed && let Some(pid) = runtime_process(docker, command, id) {
            // It may have ended meanwhile.
            killed = kill(pid).is_ok();
        }
        Ok(None)
    })?;
    Ok(status.code().unwrap_or(-1))
}

/// A process of the runtime's command line that does `command` to a container of this daemon.
fn runtime_process(docker: &Docker, command: &str, id: &str) -> Option<u32> {
    // The daemon's state is in this run's directory, and so the runtime's is.
    let ours = format!("/{}-", docker.mark);
    let entries = fs::read_dir("/proc").ok()?.flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(|pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|&byte| byte == 0).collect();
        let has = |word: &str| words.contains(&word.as_bytes());
        // Our own client has none of the runtime's flags.
        let of_ours = String::from_utf8_lossy(&line).contains(&ours);
        has(command) && has("--log-format") && of_ours && (id.is_empty() || has(id))
    })
}

fn runtime_killed(docker: &Docker) -> Result<()> {
    let name = docker.name("killed");
    let run = ["run", "-d", "--name", &name, "--runtime", &docker.runtime];
    let sleep = [testkit::docker::IMAGE, "sleep", "1000"];
    killed_in(docker, &[&run[..], &sleep[..]].concat(), "create", "")?;
    docker.run(&["rm", "-f", &name]).text()?;
    let container = docker.sleeper(&[])?;
    let goes_on = |container: &Running<'_>| -> Result<()> {
        same("exec", container.exec(&[], "echo on")?.as_str(), "on")
    };
    killed_in(docker, &["exec", &container.id, "true"], "exec", &container.id)?;
    goes_on(&container)?;
    killed_in(docker, &["pause", &container.id], "pause", &container.id)?;
    if container.inspect("{{.State.Paused}}")? == "true" || container.exec(&[], "true").is_err() {
        drop(container.run(&["unpause"]).output());
    }
    killed_in(docker, &["stop", "-t", "20", &container.id], "kill", &container.id)?;
    killed_in(docker, &["rm", "-f", &container.id], "delete", &container.id)?;
    let rest = docker.run(&["ps", "-aq", "--no-trunc"]).text()?;
    if rest.contains(&container.id) {
        container.run(&["rm", "-f"]).text()?;
    }
    ensure!(!docker.run(&["ps", "-aq", "--no-trunc"]).text()?.contains(&container.id), "it stays");
    Ok(())
}
