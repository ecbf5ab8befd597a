//! How single figures are taken.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;
use testkit::containerd::Daemon;
use testkit::docker::{Docker, IMAGE};
use testkit::{Container, Output, Runtime, eventually};

/// How much goes through a TCP stream.
const STREAM_MIB: u64 = 256;

/// The memory of all host processes of these containers, in MiB, each shared page divided by those who share it.
pub(super) fn pss_mib(runtime: &Runtime, containers: &[Container]) -> Result<f64> {
    let mut roots: Vec<u32> = containers.iter().map(|container| container.pid).collect();
    // Machines are not below the processes that stand for containers.
    for vm in fs::read_dir(runtime.root.join("vms")).into_iter().flatten().flatten() {
        let record = fs::read(vm.path().join("sandbox.json")).unwrap_or_default();
        let record: Value = serde_json::from_slice(&record).unwrap_or_default();
        roots.extend(record["process"]["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()));
    }
    let kib =
        roots.into_iter().try_fold(0.0, |sum, pid| Ok::<_, anyhow::Error>(sum + pss_kib(pid)?));
    Ok(kib? / 1024.0)
}

fn pss_kib(pid: u32) -> Result<f64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss")?;
    let own: f64 = line.split_whitespace().next().unwrap_or_default().parse()?;
    children(pid).into_iter().try_fold(own, |sum, child| Ok(sum + pss_kib(child)?))
}

fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_whitespace().filter_map(|word| word.parse().ok()).collect::<Vec<_>>()
        })
        .collect()
}

/// How long a shell line takes, by the host's clock and with the exec around it: a guest's clock is what is tested.
pub(super) fn seconds_inside(container: &Container, line: &str) -> Result<f64> {
    let began = Instant::now();
    container.shell(&format!("{{ {line}; }} >/dev/null 2>&1"))?;
    Ok(began.elapsed().as_secs_f64())
}

/// The phases of a start in a runtime's log: words like `created_ms=12`.
pub(super) fn boot_phases(log: &str) -> Vec<(String, f64)> {
    let words = log.split(|c: char| c.is_whitespace() || c == '"');
    words
        .filter_map(|word| {
            let (name, ms) = word.split_once("_ms=")?;
            Some((name.to_owned(), ms.parse::<f64>().ok()? / 1e3))
        })
        .collect()
}

/// A container with a web server, and a web server beside it on the host; each serves a file of zeros.
pub(super) struct Servers<'a> {
    docker: &'a Docker,
    id: String,
    address: String,
    _host: Daemon,
}

impl<'a> Servers<'a> {
    /// Starts both; `dir` is where the host's file is made.
    pub(super) fn start(docker: &'a Docker, runtime: &str, dir: &Path) -> Result<Self> {
        File::create(dir.join("zeros"))?.set_len(STREAM_MIB << 20)?;
        let mut command = docker.host_command("busybox");
        command.args(["httpd", "-f", "-p", "172.31.250.1:8081", "-h"]).arg(dir);
        let host = Daemon::start(command, &dir.join("httpd.log"))?;
        let line = format!(
            "dd if=/dev/zero of=/dev/shm/zeros bs=1M count={STREAM_MIB} 2>/dev/null && exec httpd -f -h /dev/shm"
        );
        let run = docker.run(&["run", "-d", "--shm-size", "512m", "--runtime", runtime]);
        let id = run.args([IMAGE, "sh", "-c", &line]).text()?;
        let mut servers = Self { docker, id, address: String::new(), _host: host };
        let format = "{{.NetworkSettings.IPAddress}}";
        servers.address = docker.run(&["inspect", "--format", format, &servers.id]).text()?;
        Ok(servers)
    }

    /// Mbit/s to and from the container.
    pub(super) fn throughput(&self) -> Result<[(&'static str, f64); 2]> {
        let to =
            ["exec", &self.id, "wget", "-q", "-O", "/dev/null", "http://172.31.250.1:8081/zeros"];
        let address = &self.address;
        let from = format!("curl -sS -o /dev/null http://{address}/zeros");
        Ok([
            ("host to container", timed(|| self.docker.run(&to).output())?),
            ("container to host", timed(|| self.docker.host(&from).output())?),
        ])
    }
}

/// Mbit/s of the first try that succeeds: the server may not listen yet.
fn timed(transfer: impl Fn() -> Result<Output>) -> Result<f64> {
    let mut last = String::new();
    let seconds = eventually(Duration::from_mins(1), "the stream goes through", || {
        let began = Instant::now();
        let output = transfer()?;
        last = output.to_string();
        Ok((output.code == 0).then(|| began.elapsed().as_secs_f64()))
    });
    let seconds = seconds.context(last)?;
    let megabits = f64::from(u32::try_from(STREAM_MIB)?) * 8.388_608;
    Ok(megabits / seconds)
}

impl Drop for Servers<'_> {
    fn drop(&mut self) {
        drop(self.docker.run(&["rm", "-f", &self.id]).output());
    }
}

#[cfg(test)]
mod tests {
    use super::{boot_phases, pss_kib};

    #[test]
    fn the_memory_of_this_process_is_more_than_nothing() {
        assert!(pss_kib(std::process::id()).unwrap() > 100.0);
    }

    #[test]
    fn phases_are_the_words_in_milliseconds() {
        let log = "{\"level\":\"debug\",\"msg\":\"container created agent_ms=250 created_ms=1500\"}\n{\"msg\":\"other\"}\n";
        let expected = [("agent".to_owned(), 0.25), ("created".to_owned(), 1.5)];
        assert_eq!(boot_phases(log), expected);
    }
}
