//! What is left when a part dies, and bad input.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testkit::{Run, eventually};

use super::{Ctr, IMAGE, Task};
use crate::case::{Case, case, has, same, skip};

pub(super) const CASES: &[Case<Ctr>] = &[
    case("a shim that is killed leaves a task that exited with 137 and nothing else", shim_killed),
    case("a hypervisor that is killed leaves a task that exited with 137", hypervisor_killed),
    case("a device process that is killed leaves a task that exited with 137", device_killed),
    case("containerd that is killed finds its tasks again", daemon_killed),
    case("a configuration that is not there is an error that names it", bad_configuration),
    case("a bundle that makes no sense leaves no shim", bad_bundle),
    case("the shim says what it is", version),
];

fn kill(pid: u32) -> Result<()> {
    Run::new("kill").args(["-9", &pid.to_string()]).text().map(drop)
}

/// The task's own process, and what it has started, by the words on their command lines.
fn child_of(pid: u32, word: &str) -> Result<u32> {
    let table = Run::new("ps").args(["-o", "pid=,args=", "--ppid", &pid.to_string()]).text()?;
    let line = table.lines().find(|line| line.contains(word));
    let line = line.with_context(|| format!("no {word} under {pid}: {table}"))?;
    Ok(line.split_whitespace().next().unwrap_or_default().parse()?)
}

/// The shim's process: the parent of the task's, or the task's own.
fn shim(ctr: &Ctr, task: &Task<'_>) -> Result<u32> {
    let pid = task.pid()?;
    if ctr.is_kata {
        return Ok(pid);
    }
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit(") ").next().unwrap_or_default();
    Ok(fields.split(' ').nth(1).unwrap_or_default().parse()?)
}

fn gone_with_137(task: &Task<'_>) -> Result<()> {
    eventually(Duration::from_secs(30), "the task is not running", || {
        let status = task.ctr.status(&task.id)?;
        // UNKNOWN: containerd has noticed, and not yet cleaned up.
        Ok((status.is_empty() || status == "STOPPED").then_some(()))
    })?;
    if task.ctr.status(&task.id)? == "STOPPED" {
        same("exit code", task.delete()?, 137)?;
    }
    Ok(())
}

fn shim_killed(ctr: &Ctr) -> Result<()> {
    let task = ctr.sleeper()?;
    kill(shim(ctr, &task)?)?;
    gone_with_137(&task)?;
    let id = task.id.clone();
    drop(task);
    // The id can be used again, once containerd has cleaned up.
    let output = eventually(Duration::from_secs(30), "containerd has cleaned up", || {
        let run = ctr.run(&[]).args(ctr.words(&["--rm", IMAGE, &id, "echo", "again"], &id));
        let output = run.output()?;
        Ok((!output.stderr.contains("already exists")).then_some(output))
    })?;
    same("output", output.success()?.text().as_str(), "again")
}

fn needs_machine(ctr: &Ctr) -> Result<()> {
    if ctr.is_kata { Ok(()) } else { Err(skip("a virtual machine")) }
}

fn hypervisor_killed(ctr: &Ctr) -> Result<()> {
    needs_machine(ctr)?;
    let task = ctr.sleeper()?;
    kill(child_of(task.pid()?, "qemu")?)?;
    task.wait_for("STOPPED")?;
    gone_with_137(&task)
}

fn device_killed(ctr: &Ctr) -> Result<()> {
    needs_machine(ctr)?;
    let task = ctr.sleeper()?;
    kill(child_of(task.pid()?, "device")?)?;
    task.wait_for("STOPPED")?;
    gone_with_137(&task)
}

fn daemon_killed(ctr: &Ctr) -> Result<()> {
    // A daemon of its own: others would find another process under its name.
    let own = ctr.with_own_daemon()?;
    let task = own.sleeper()?;
    own.crash()?;
    task.wait_for("RUNNING")?;
    same("an exec", task.exec(&[], "echo still here").text()?.as_str(), "still here")?;
    task.kill("SIGKILL").text()?;
    task.wait_for("STOPPED")?;
    same("exit code", task.delete()?, 137)
}

fn bad_configuration(ctr: &Ctr) -> Result<()> {
    needs_machine(ctr)?;
    let id = ctr.id();
    let mut words = ctr.words(&["--rm", IMAGE, &id, "true"], &id);
    if let Some(at) = words.iter().position(|word| word == "--runtime-config-path") {
        words.drain(at..at + 2);
    }
    let flags = ["--runtime-config-path", "/no/such/config.toml"].map(str::to_owned);
    words.splice(1..1, flags);
    let output = ctr.run(&[]).args(words).output()?;
    ensure!(output.code != 0, "it ran: {output}");
    has(&output.stderr, "/no/such/config.toml")?;
    same("status", ctr.status(&id)?.as_str(), "")
}

fn bad_bundle(ctr: &Ctr) -> Result<()> {
    needs_machine(ctr)?;
    // What CRI would never write: a container of a sandbox that is not named.
    for annotation in [
        "io.kubernetes.cri.container-type=container",
        "io.kubernetes.cri.container-type=pod",
        "io.kubernetes.cri-o.ContainerType=container",
    ] {
        let output = ctr.once_run(&["--annotation", annotation], "true").output()?;
        ensure!(output.code != 0, "it ran: {output}");
        has(&output.stderr, "annotation")?;
    }
    let sandbox = "io.kubernetes.cri.sandbox-id=no-such-sandbox";
    let flags = ["--annotation", "io.kubernetes.cri.container-type=container"];
    let run = ctr.once_run(&[&flags[..], &["--annotation", sandbox]].concat(), "true");
    has(&run.output()?.stderr, "sandbox no-such-sandbox")
}

fn version(ctr: &Ctr) -> Result<()> {
    needs_machine(ctr)?;
    let shim = ctr.work.path().join("shims/containerd-shim-kata-v2");
    has(&Run::new(&shim).arg("-v").text()?, "containerd-shim-kata-v2")?;
    let info = Run::new(&shim).arg("-info").output()?.success()?;
    has(&String::from_utf8_lossy(&info.stdout), "io.containerd.kata.v2")?;
    let output = Run::new(&shim).args(["-no-such-flag"]).output()?.ended(1)?;
    has(&output.stderr, "no-such-flag")
}
