//! A Docker daemon of our own, with its containerd, in a network namespace of its own.
//!
//! The namespace keeps its bridge, its addresses and its packet filter rules away from the host's, and takes all of
//! them along when it goes. "The host" of a published port is that namespace: see [`Docker::host`].

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;
use serde_json::json;

use crate::containerd::{Containerd, Daemon, end_processes_naming, inside, unmount_below};
use crate::{Run, Work};

/// A running Docker daemon; ended, with all its containers, when dropped.
#[derive(Debug)]
pub struct Docker {
    daemon: RefCell<Daemon>,
    containerd: Option<Containerd>,
    netns: Netns,
    dir: PathBuf,
    client: PathBuf,
    mark: String,
}

/// The image that every daemon has: busybox.
pub const IMAGE: &str = "busybox";

impl Docker {
    /// Starts a daemon with these runtimes, name and program, registered by path, and loads the image.
    ///
    /// # Errors
    ///
    /// When Docker is not installed or does not become ready.
    pub fn start(work: &Work, runtimes: &[(&str, &Path)]) -> Result<Self> {
        // Short: paths of sockets have 107 bytes at most.
        let dir = work.path().join("d");
        fs::create_dir_all(&dir)?;
        let netns = work.mark().to_owned();
        Run::new("ip").args(["netns", "add", &netns]).text().context("`ip netns` is needed")?;
        let namespace = Netns(netns.clone());
        Run::new("ip").args(["-n", &netns, "link", "set", "lo", "up"]).text()?;
        let containerd = Containerd::start(&dir.join("c"), Some(&netns))?;
        fs::write(dir.join("daemon.json"), configuration(work, runtimes).to_string())?;
        let daemon = Daemon::start(
            daemon_command(&dir, &netns, &containerd.address),
            &dir.join("dockerd.log"),
        )?;
        let docker = Self {
            daemon: RefCell::new(daemon),
            containerd: Some(containerd),
            netns: namespace,
            dir,
            client: client(),
            mark: work.mark().to_owned(),
        };
        docker.wait_and_load(work)?;
        Ok(docker)
    }

    fn wait(&self) -> Result<()> {
        let ready = || {
            let version = self.run(&["version"]).within(Duration::from_secs(10)).output();
            version.is_ok_and(|output| output.code == 0)
        };
        self.daemon.borrow_mut().wait_ready(ready)
    }

    /// Ends the daemon by a signal, and starts it again; containers live on.
    ///
    /// # Errors
    ///
    /// When it does not become ready again.
    pub fn restart(&self, signal: Signal) -> Result<()> {
        self.daemon.borrow_mut().end(signal)?;
        let address = self.containerd.as_ref().map(|containerd| containerd.address.clone());
        let command = daemon_command(&self.dir, &self.netns.0, &address.unwrap_or_default());
        self.daemon.replace(Daemon::start(command, &self.dir.join("dockerd-again.log"))?);
        self.wait()
    }

    fn wait_and_load(&self, work: &Work) -> Result<()> {
        self.wait()?;
        let line = format!(
            "tar -C '{}' -c . | '{}' import - {IMAGE}",
            work.rootfs().display(),
            self.client.display()
        );
        Run::shell(&line).env("DOCKER_HOST", self.address()).text()?;
        Ok(())
    }

    /// The daemon's pid.
    pub fn pid(&self) -> u32 {
        self.daemon.borrow().pid()
    }

    /// What `DOCKER_HOST` must be.
    pub fn address(&self) -> String {
        format!("unix://{}/docker.sock", self.dir.display())
    }

    /// The docker client's program.
    pub fn client(&self) -> &Path {
        &self.client
    }

    /// The docker client with these arguments.
    pub fn run(&self, args: &[&str]) -> Run {
        Run::new(&self.client).env("DOCKER_HOST", self.address()).args(args)
    }

    /// The docker client with these arguments, to be started beside the test.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.client);
        command.env("DOCKER_HOST", self.address()).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// A shell line where `docker` is this daemon's client.
    pub fn shell(&self, line: &str) -> Run {
        let client = self.client.display();
        Run::shell(&format!("docker() {{ '{client}' \"$@\"; }}; {line}"))
            .env("DOCKER_HOST", self.address())
    }

    /// A shell line in the network namespace of the daemon: what the host is to published ports.
    pub fn host(&self, line: &str) -> Run {
        Run::new("nsenter")
            .arg(format!("--net=/run/netns/{}", self.netns.0))
            .args(["sh", "-c", line])
    }

    /// A path to the network namespace of the daemon.
    pub fn netns(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.netns.0)
    }

    /// A program to be started in the network namespace of the daemon.
    pub fn host_command(&self, program: &str) -> Command {
        inside(Some(&self.netns.0), program)
    }

    /// The end of the daemon's log, for messages.
    pub fn last_words(&self) -> String {
        self.daemon.borrow().last_words()
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let all = "ids=$(docker ps -aq); [ -z \"$ids\" ] || docker rm -f $ids";
        drop(self.shell(all).within(Duration::from_mins(1)).output());
        self.daemon.borrow_mut().stop();
        drop(self.containerd.take());
        end_processes_naming(&self.dir);
        // Mounts that a killed daemon left.
        unmount_below(&self.dir);
        crate::residue::remove_cgroups(&self.mark);
    }
}

/// A network namespace of `ip netns`, deleted when dropped.
#[derive(Debug)]
struct Netns(String);

impl Drop for Netns {
    fn drop(&mut self) {
        drop(Run::new("ip").args(["netns", "delete", &self.0]).output());
    }
}

fn daemon_command(dir: &Path, netns: &str, containerd: &Path) -> Command {
    let mut command = inside(Some(netns), "dockerd");
    command.args(["--host", &format!("unix://{}/docker.sock", dir.display())]);
    command.arg("--containerd").arg(containerd);
    command.arg("--config-file").arg(dir.join("daemon.json"));
    command.arg("--data-root").arg(dir.join("data")).arg("--exec-root").arg(dir.join("x"));
    command.arg("--pidfile").arg(dir.join("docker.pid"));
    command
}

fn configuration(work: &Work, runtimes: &[(&str, &Path)]) -> serde_json::Value {
    // `runc` is reserved: Docker registers it itself.
    let named: serde_json::Map<_, _> = runtimes
        .iter()
        .filter(|(name, _)| *name != "runc")
        .map(|(name, path)| ((*name).to_owned(), json!({"path": path})))
        .collect();
    json!({
        "runtimes": named,
        "bip": "172.31.250.1/24",
        "cgroup-parent": format!("/{}", work.mark()),
        "storage-driver": storage_driver(work),
        "live-restore": true,
        "log-level": "warn",
        "shutdown-timeout": 5,
    })
}

/// overlay2 where the work directory's file system takes overlays, else vfs.
fn storage_driver(work: &Work) -> &'static str {
    let probe = work.path().join("overlay-probe");
    let line = "mkdir -p l u w m && mount -t overlay -o lowerdir=l,upperdir=u,workdir=w overlay m \
                && umount m";
    let made = fs::create_dir_all(&probe).is_ok();
    let works =
        made && Run::shell(line).directory(&probe).output().is_ok_and(|output| output.code == 0);
    drop(fs::remove_dir_all(&probe));
    if works { "overlay2" } else { "vfs" }
}

/// Debian's client where it is, since another one in PATH may be older than the daemon.
fn client() -> PathBuf {
    let debian = Path::new("/usr/bin/docker");
    if debian.exists() { debian.to_owned() } else { PathBuf::from("docker") }
}

/// Whether the programs of the rig are there; else which are not.
pub fn missing_programs() -> Vec<&'static str> {
    let needed = ["dockerd", "docker", "containerd", "runc", "ip", "iptables", "nsenter"];
    let there = |name: &str| {
        Command::new("sh").args(["-c", &format!("command -v {name} >/dev/null")]).status()
    };
    needed.into_iter().filter(|name| !there(name).is_ok_and(|status| status.success())).collect()
}
