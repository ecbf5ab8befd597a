//! What becomes of a pod when a part of it dies.

use std::fs;

use anyhow::{Context, Result, ensure};
use testkit::cri::PATIENCE;
use testkit::pods::Pod;
use testkit::{Run, eventually};

use super::{EXITED, Pods};
use crate::case::{Case, case, same, skip};

pub(super) const CASES: &[Case<Pods>] = &[
    case("a pod whose shim is killed has exited, and is removed without a trace", shim_killed),
    case(
        "a pod whose machine is killed has exited, and is removed without a trace",
        machine_killed,
    ),
    case("a pod lives on when containerd is killed", daemon_killed),
    case("no container joins a pod that has ended", dead_pod),
];

/// The shim of a pod, or a process that it has started, by a word on its command line.
fn process(pod: &Pod<'_>, parent: Option<u32>, word: &str) -> Result<u32> {
    for entry in fs::read_dir("/proc")?.flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let is_child = parent.is_none_or(|parent| status.contains(&format!("PPid:\t{parent}\n")));
        let named = parent.is_some() || line.contains(&pod.id);
        if is_child && named && line.contains(word) {
            return Ok(pid);
        }
    }
    None.with_context(|| format!("pod {} has no {word}", pod.id))
}

fn kill(pid: u32) -> Result<()> {
    Run::new("kill").args(["-9", &pid.to_string()]).text().map(drop)
}

/// That containers and pod have ended, and both can be removed.
fn ended(pods: &Pods, pod: &Pod<'_>, ids: &[String]) -> Result<()> {
    for id in ids {
        let status = eventually(PATIENCE, "the container has exited", || {
            Ok(Some(pods.status(id)?).filter(|status| status.state == EXITED))
        })?;
        ensure!([137, 255].contains(&status.exit_code), "exit code {}", status.exit_code);
    }
    eventually(PATIENCE, "the pod is not ready", || {
        Ok((pods.pod_status(pod)?.state == 1).then_some(()))
    })?;
    pod.stop()?;
    pod.remove()
}

fn shim_killed(pods: &Pods) -> Result<()> {
    let pod = pods.pod()?;
    let ids = [pod.run_line("one", "sleep 1000")?, pod.run_line("two", "sleep 1000")?];
    kill(process(&pod, None, "containerd-shim")?)?;
    ended(pods, &pod, &ids)
}

fn machine_killed(pods: &Pods) -> Result<()> {
    if !pods.is_kata {
        return Err(skip("a virtual machine"));
    }
    for word in ["qemu", "device"] {
        let pod = pods.pod()?;
        let ids = [pod.run_line("one", "sleep 1000")?, pod.run_line("two", "sleep 1000")?];
        let shim = process(&pod, None, "containerd-shim")?;
        kill(process(&pod, Some(shim), word)?)?;
        ended(pods, &pod, &ids)?;
    }
    Ok(())
}

fn daemon_killed(pods: &Pods) -> Result<()> {
    // A node of its own: others would find another process under its name.
    let pods = &pods.on_own_node()?;
    let pod = pods.pod()?;
    let id = pod.run_line("one", "sleep 1000")?;
    same("before", pod.text(&id, "echo here")?.as_str(), "here")?;
    pods.node.crash()?;
    let text = eventually(PATIENCE, "containerd answers", || Ok(pod.text(&id, "echo here").ok()))?;
    same("after", text.as_str(), "here")?;
    pod.stop_container(&id)?;
    same("exit code", pods.exited(&id)?.exit_code, 137)
}

fn dead_pod(pods: &Pods) -> Result<()> {
    let pod = pods.pod()?;
    pod.stop()?;
    let error = pod.run_line("one", "true").err().context("a container joined a stopped pod")?;
    ensure!(!error.to_string().is_empty());
    Ok(())
}
