//! An OCI runtime, driven by its command line as containerd's runc shim and conmon drive it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use linux::process::ProcessId;
use rustix::process::{
    Pid, WaitId, WaitIdOptions, WaitIdStatus, getpid, set_child_subreaper, waitid,
};
use serde_json::Value;

use crate::run::{DEADLINE, code};
use crate::wait::readable;
use crate::{Bundle, Output, Run, Work, eventually};

/// A runtime under test.
#[derive(Debug, Clone)]
pub struct Runtime {
    /// What reports call it: `runc`, `kata-runtime`.
    pub name: String,
    /// Its program.
    pub program: PathBuf,
    /// Its state directory, as in `--root`.
    pub root: PathBuf,
    /// The configuration file that it is given by `--config`, if any.
    pub config: Option<PathBuf>,
}

impl Runtime {
    /// A runtime with a state directory below `work`.
    ///
    /// # Errors
    ///
    /// When the directory cannot be made, or this process cannot become a subreaper.
    pub fn new(work: &Work, name: &str, program: &Path) -> Result<Self> {
        // Containers must become our children when `create` ends, as they become the shim's: we take their status.
        set_child_subreaper(Some(getpid()))?;
        let root = work.path().join("state").join(name);
        fs::create_dir_all(&root)?;
        Ok(Self { name: name.to_owned(), program: program.to_owned(), root, config: None })
    }

    /// Whether it starts virtual machines.
    pub fn is_kata(&self) -> bool {
        self.name.starts_with("kata")
    }

    /// The runtime with global flags, a command and its arguments.
    pub fn run(&self, args: &[&str]) -> Run {
        let (program, flags) = self.invocation();
        Run::new(program).args(flags).args(args)
    }

    /// Its program and global flags.
    fn invocation(&self) -> (&Path, Vec<OsString>) {
        let mut flags = vec!["--root".into(), self.root.clone().into()];
        if let Some(config) = &self.config {
            flags.extend(["--config".into(), config.into()]);
        }
        (&self.program, flags)
    }

    /// The words of a command line: program, global flags, `args`; for terminals and shell lines.
    pub fn words(&self, args: &[&str]) -> Vec<String> {
        let (program, flags) = self.invocation();
        let words = [program.as_os_str().to_owned()].into_iter().chain(flags);
        let words = words.map(|word| word.to_string_lossy().into_owned());
        words.chain(args.iter().map(|&arg| arg.to_owned())).collect()
    }

    /// A program that daemons can register by path: the runtime itself, or a script in `dir` that adds `--config`.
    ///
    /// # Errors
    ///
    /// When the script cannot be written.
    pub fn registrable(&self, dir: &Path) -> Result<PathBuf> {
        let Some(config) = &self.config else { return Ok(self.program.clone()) };
        fs::create_dir_all(dir)?;
        let script = dir.join(&self.name);
        let (program, config) = (self.program.display(), config.display());
        fs::write(&script, format!("#!/bin/sh\nexec {program} --config {config} \"$@\"\n"))?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        Ok(script)
    }

    /// `run`: the bundle's container from start to exit, with nothing to read.
    ///
    /// # Errors
    ///
    /// When the runtime does not end in time.
    pub fn run_bundle(&self, bundle: &Bundle) -> Result<Output> {
        self.run(&["run", "--bundle"]).arg(&bundle.dir).arg(&bundle.id).output()
    }

    /// `create`, with files as the container's stdio and nothing to read.
    ///
    /// # Errors
    ///
    /// When `create` fails; the message has its stderr.
    pub fn create(&self, bundle: &Bundle) -> Result<Container> {
        self.create_with(bundle, &[], Stdio::null())
    }

    /// `create` with more flags, and with `stdin` as the container's standard input.
    ///
    /// # Errors
    ///
    /// When `create` fails; the message has its stderr.
    pub fn create_with(&self, bundle: &Bundle, flags: &[&str], stdin: Stdio) -> Result<Container> {
        let pid_file = bundle.dir.join("init.pid");
        let (stdout, mut stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
        let (program, global) = self.invocation();
        let mut command = Command::new(program);
        command.args(global).arg("create").arg("--bundle").arg(&bundle.dir);
        command.arg("--pid-file").arg(&pid_file).args(flags).arg(&bundle.id);
        command.stdin(stdin).stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
        let mut child =
            command.spawn().with_context(|| format!("cannot start {}", self.program.display()))?;
        // From now on there may be something to clean up.
        let mut container = Container {
            runtime: self.clone(),
            id: bundle.id.clone(),
            pid: 0,
            stdout,
            stderr: stderr.try_clone()?,
        };
        let pidfd = rustix::process::pidfd_open(
            Pid::from_child(&child),
            rustix::process::PidfdFlags::empty(),
        )?;
        if !readable(&pidfd, DEADLINE)? {
            child.kill()?;
            child.wait()?;
            bail!("`create` did not end within {DEADLINE:?}: {}", text(&mut stderr)?);
        }
        let status = code(child.wait()?);
        ensure!(status == 0, "`create` ended with {status}: {}", text(&mut stderr)?);
        let pid = fs::read_to_string(&pid_file).context("`create` wrote no pid file")?;
        container.pid = pid.parse().with_context(|| format!("a pid file with {pid:?}"))?;
        Ok(container)
    }

    /// `create` and `start`.
    ///
    /// # Errors
    ///
    /// When either fails.
    pub fn start(&self, bundle: &Bundle) -> Result<Container> {
        let container = self.create(bundle)?;
        container.command(&["start"]).text()?;
        Ok(container)
    }
}

/// A container that was created; deleted by force when dropped.
#[derive(Debug)]
pub struct Container {
    runtime: Runtime,
    /// Its id.
    pub id: String,
    /// The host pid that `create` wrote.
    pub pid: u32,
    stdout: File,
    stderr: File,
}

impl Container {
    /// A command with flags, then this container's id: `["kill", "--all"]`.
    pub fn command(&self, words: &[&str]) -> Run {
        self.runtime.run(words).arg(&self.id)
    }

    /// `kill` with this signal.
    ///
    /// # Errors
    ///
    /// When it fails.
    pub fn kill(&self, signal: &str) -> Result<()> {
        self.command(&["kill"]).arg(signal).text().map(drop)
    }

    /// `exec` in the foreground.
    pub fn exec(&self, args: &[&str]) -> Run {
        self.command(&["exec"]).args(args)
    }

    /// `exec` of a shell line, whose output is taken.
    ///
    /// # Errors
    ///
    /// When it does not end with 0.
    pub fn shell(&self, line: &str) -> Result<String> {
        self.exec(&["sh", "-c", line]).text()
    }

    /// What `state` answers.
    ///
    /// # Errors
    ///
    /// When it fails or is not JSON.
    pub fn state(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.command(&["state"]).text()?)?)
    }

    /// The status in `state`.
    ///
    /// # Errors
    ///
    /// As for [`Container::state`].
    pub fn status(&self) -> Result<String> {
        Ok(self.state()?["status"].as_str().unwrap_or("none").to_owned())
    }

    /// Waits for the container's process, which is our child as it is the shim's, and takes its exit code.
    ///
    /// # Errors
    ///
    /// When it does not end in time, or is not our child.
    pub fn wait(&self) -> Result<i32> {
        reap(self.pid)
    }

    /// Waits until `state` says so.
    ///
    /// # Errors
    ///
    /// When it does not in time.
    pub fn wait_for(&self, status: &str) -> Result<()> {
        eventually(Duration::from_secs(30), &format!("{} is {status}", self.id), || {
            Ok((self.status()? == status).then_some(()))
        })
    }

    /// What the container has written to its standard output so far.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn stdout(&mut self) -> Result<String> {
        text(&mut self.stdout)
    }

    /// What the container, and `create`, have written to standard error so far.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn stderr(&mut self) -> Result<String> {
        text(&mut self.stderr)
    }

    /// `delete`.
    ///
    /// # Errors
    ///
    /// When it fails.
    pub fn delete(&self) -> Result<()> {
        self.command(&["delete"]).text().map(drop)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // A test that failed left it; one that succeeded makes this a no-op. Failures show in the residue check.
        drop(self.command(&["delete", "--force"]).within(Duration::from_mins(1)).output());
        if self.pid != 0 {
            drop(take_status(self.pid, WaitIdOptions::NOHANG));
        }
    }
}

/// Waits for the process `pid`, a child of ours by birth or adoption, and takes its exit code.
///
/// # Errors
///
/// When it does not end in time, or is not our child.
pub fn reap(pid: u32) -> Result<i32> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).context("not a pid")?;
    let pidfd = rustix::process::pidfd_open(raw, rustix::process::PidfdFlags::empty())
        .with_context(|| format!("there is no process {pid}"))?;
    ensure!(readable(&pidfd, DEADLINE)?, "process {pid} did not end within {DEADLINE:?}");
    let status = take_status(pid, WaitIdOptions::empty())?.context("it has no status")?;
    let code =
        status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal));
    code.context("neither exited nor killed")
}

/// Waits until nobody has this pid, for processes that are not our children.
///
/// # Errors
///
/// When it does not end in time.
pub fn gone(process: ProcessId) -> Result<()> {
    eventually(Duration::from_secs(30), &format!("process {} ends", process.pid), || {
        Ok((!process.is_alive()).then_some(()))
    })
}

fn take_status(pid: u32, options: WaitIdOptions) -> Result<Option<WaitIdStatus>> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).context("not a pid")?;
    waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | options)
        .with_context(|| format!("process {} is no child of ours", pid.as_raw_nonzero()))
}

/// Takes the status of every adopted orphan that has ended, so that no zombie is taken for a leftover.
pub fn reap_orphans() {
    while let Ok(Some(_)) = waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {}
}

fn text(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    let mut file = file.try_clone()?;
    let end = file.stream_position()?;
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    // The container writes through the same open file: its place must stay.
    file.seek(std::io::SeekFrom::Start(end.max(bytes.len() as u64)))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
