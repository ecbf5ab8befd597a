//! A containerd of our own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use linux::process::ProcessId;
use rustix::process::Signal;

use crate::{Run, eventually};

/// A daemon of ours: a child process that is ended when dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Daemon {
    /// Starts `command` with its output in `log`.
    ///
    /// # Errors
    ///
    /// When the program cannot be started.
    pub fn start(mut command: Command, log: &Path) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let file = File::create(log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        Ok(Self { child, name, log: log.to_owned() })
    }

    /// Waits until `ready` says so, or the daemon ends.
    ///
    /// # Errors
    ///
    /// With the end of its log, when it ended or is not ready in time.
    pub fn wait_ready(&mut self, mut ready: impl FnMut() -> bool) -> Result<()> {
        let outcome = eventually(Duration::from_mins(1), "the daemon is ready", || {
            if let Some(status) = self.child.try_wait()? {
                bail!("it ended with {status}");
            }
            Ok(ready().then_some(()))
        });
        outcome.with_context(|| format!("{}: {}", self.name, self.last_words()))
    }

    /// The end of its log.
    pub fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it.
    pub fn kill(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }

    /// Sends it a signal that ends it, and waits for that.
    ///
    /// # Errors
    ///
    /// When it does not end.
    pub fn end(&mut self, signal: Signal) -> Result<()> {
        let id = ProcessId::of(self.child.id()).context("it has ended already")?;
        id.signal(signal)?;
        eventually(Duration::from_mins(1), "the daemon ends", || {
            Ok(self.child.try_wait()?.map(drop))
        })
    }

    /// Asks it to end, and kills it if it does not within 20 seconds.
    pub fn stop(&mut self) {
        if let Some(id) = ProcessId::of(self.child.id()) {
            drop(id.signal(Signal::TERM));
            let ended = eventually(Duration::from_secs(20), "the daemon ends", || {
                Ok(self.child.try_wait()?.map(drop))
            });
            if ended.is_err() {
                drop(self.child.kill());
            }
        }
        drop(self.child.wait());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What a containerd shall have beside its defaults.
#[derive(Debug, Default)]
pub struct Setup {
    /// A directory of shims, before all others.
    pub shims: Option<PathBuf>,
    /// The CRI plugin's configuration, as TOML; without it there is no CRI plugin.
    pub cri: Option<String>,
}

/// A running containerd with its own root, state and socket.
#[derive(Debug)]
pub struct Containerd {
    daemon: Daemon,
    /// Its socket.
    pub address: PathBuf,
    dir: PathBuf,
    netns: Option<String>,
    setup: Setup,
}

impl Containerd {
    /// Starts one below `dir`, in the network namespace `netns` of `ip netns` where that is given.
    ///
    /// # Errors
    ///
    /// When containerd is not installed or does not become ready.
    pub fn start(dir: &Path, netns: Option<&str>) -> Result<Self> {
        Self::start_with(dir, netns, Setup::default())
    }

    /// As [`Self::start`], with `setup`.
    ///
    /// # Errors
    ///
    /// When containerd is not installed or does not become ready.
    pub fn start_with(dir: &Path, netns: Option<&str>, setup: Setup) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let address = dir.join("ctd.sock");
        let cri = match &setup.cri {
            None => "disabled_plugins = ['io.containerd.grpc.v1.cri']",
            Some(_) => "",
        };
        let config = format!(
            "version = 2\nroot = '{0}/root'\nstate = '{0}/state'\n{cri}\n\
             [grpc]\naddress = '{0}/ctd.sock'\n{1}",
            dir.display(),
            setup.cri.as_deref().unwrap_or_default()
        );
        fs::write(dir.join("containerd.toml"), config)?;
        let netns = netns.map(str::to_owned);
        let daemon = daemon(dir, netns.as_deref(), &setup, &address)?;
        Ok(Self { daemon, address, dir: dir.to_owned(), netns, setup })
    }

    /// Kills the daemon, whatever it is doing, and starts it again: shims live on meanwhile.
    ///
    /// # Errors
    ///
    /// When it does not become ready.
    pub fn crash(&mut self) -> Result<()> {
        self.daemon.kill();
        self.daemon = daemon(&self.dir, self.netns.as_deref(), &self.setup, &self.address)?;
        Ok(())
    }

    /// The end of the daemon's log, for messages.
    pub fn last_words(&self) -> String {
        self.daemon.last_words()
    }

    /// The daemon's pid.
    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// `ctr` for this containerd.
    pub fn ctr(&self, args: &[&str]) -> Run {
        Run::new("ctr").arg("--address").arg(&self.address).args(args)
    }
}

fn daemon(dir: &Path, netns: Option<&str>, setup: &Setup, address: &Path) -> Result<Daemon> {
    let mut command = inside(netns, "containerd");
    command.arg("--config").arg(dir.join("containerd.toml"));
    if let Some(shims) = &setup.shims {
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", shims.display()));
    }
    let mut daemon = Daemon::start(command, &dir.join("containerd.log"))?;
    let probe = || {
        let version = Run::new("ctr").arg("--address").arg(address).arg("version");
        version.within(Duration::from_secs(10)).output().is_ok_and(|output| output.code == 0)
    };
    daemon.wait_ready(probe)?;
    Ok(daemon)
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.daemon.stop();
        end_processes_naming(&self.dir);
        unmount_below(&self.dir);
    }
}

/// Unmounts what a killed daemon or shim left below `dir`; the innermost first.
pub fn unmount_below(dir: &Path) {
    let dir = dir.to_string_lossy().into_owned();
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for point in table.lines().rev().filter_map(|line| line.split(' ').nth(4)) {
        if point.starts_with(&dir) {
            drop(Run::new("umount").args(["-l", point]).output());
        }
    }
}

/// Kills what still has `dir` on its command line: shims of containers that a failed test left.
pub fn end_processes_naming(dir: &Path) {
    let dir = dir.to_string_lossy();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if pid != std::process::id() && String::from_utf8_lossy(&line).contains(&*dir) {
            drop(ProcessId::of(pid).map(|id| id.signal(Signal::KILL)));
        }
    }
}

/// A command in a network namespace of `ip netns`, or here.
pub fn inside(netns: Option<&str>, program: &str) -> Command {
    let Some(netns) = netns else { return Command::new(program) };
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{netns}")).arg(program);
    command
}
