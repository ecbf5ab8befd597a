//! Child processes: made with the fds they shall have and no others, tied to their parent's life, told apart from
//! strangers that got the same pid later.

#![expect(unsafe_code, reason = "what a child does between fork and exec has no safe form")]

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::{fs, process};

use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// A process, told apart from a later one with the same pid by its start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its pid on the host.
    pub pid: u32,
    /// When it started, in clock ticks since boot: field 22 of `/proc/<pid>/stat`, proc(5).
    pub start_time: u64,
}

impl ProcessId {
    /// The process that has `pid` now, or nothing where there is none, or only its zombie.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, field 2, may hold spaces and brackets: count from behind its end.
        let fields: Vec<_> = stat[stat.rfind(')')? + 2..].split(' ').collect();
        let zombie = matches!(*fields.first()?, "Z" | "X");
        let start_time = fields.get(19)?.parse().ok()?;
        (!zombie).then_some(Self { pid, start_time })
    }

    /// The calling process.
    ///
    /// # Errors
    ///
    /// When `/proc` is not mounted.
    pub fn own() -> io::Result<Self> {
        Self::of(process::id())
            .ok_or_else(|| io::Error::other("/proc has no entry for this process"))
    }

    /// Whether it still runs. A zombie does not.
    #[must_use]
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Sends it a signal; `false` where it has ended.
    ///
    /// # Errors
    ///
    /// What pidfd_send_signal(2) says, but for ESRCH.
    pub fn signal(self, signal: Signal) -> io::Result<bool> {
        let Some(fd) = self.open()? else { return Ok(false) };
        match pidfd_send_signal(&fd, signal) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::SRCH) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// A pidfd of it, which becomes readable when it ends; nothing where it has ended.
    ///
    /// # Errors
    ///
    /// What pidfd_open(2) says, but for ESRCH.
    pub fn open(self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else {
            return Ok(None);
        };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            // EINVAL: the pid is a thread's now.
            Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // The pidfd is of whoever has the pid now; only then is it safe to compare.
        Ok(self.is_alive().then_some(fd))
    }
}

/// A child process to be made.
#[derive(Debug)]
pub struct Command {
    command: process::Command,
    passed: Vec<OwnedFd>,
    new_session: bool,
    controlling_terminal: bool,
    die_with_parent: bool,
}

impl Command {
    /// A child that will run `program`, with this process's environment and the null device as its stdio.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let mut command = process::Command::new(program);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self {
            command,
            passed: Vec::new(),
            new_session: false,
            controlling_terminal: false,
            die_with_parent: false,
        }
    }

    /// Sets `argv[0]`.
    pub fn name(&mut self, name: impl AsRef<OsStr>) -> &mut Self {
        self.command.arg0(name);
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(&mut self, args: impl IntoIterator<Item = S>) -> &mut Self {
        self.command.args(args);
        self
    }

    /// Replaces the environment.
    pub fn environment<K: AsRef<OsStr>, V: AsRef<OsStr>>(
        &mut self,
        variables: impl IntoIterator<Item = (K, V)>,
    ) -> &mut Self {
        self.command.env_clear().envs(variables);
        self
    }

    /// Sets the working directory.
    pub fn directory(&mut self, path: &Path) -> &mut Self {
        self.command.current_dir(path);
        self
    }

    /// Sets the standard streams.
    pub fn stdio(&mut self, stdin: Stdio, stdout: Stdio, stderr: Stdio) -> &mut Self {
        self.command.stdin(stdin).stdout(stdout).stderr(stderr);
        self
    }

    /// Gives the child `fd`, under the number that is returned, for the child's arguments to name. All other fds of
    /// ours that are close-on-exec, as every fd that Rust opens is, stay behind.
    pub fn pass(&mut self, fd: OwnedFd) -> RawFd {
        let number = fd.as_raw_fd();
        self.passed.push(fd);
        number
    }

    /// Makes the child the leader of a session of its own, see setsid(2).
    pub fn new_session(&mut self) -> &mut Self {
        self.new_session = true;
        self
    }

    /// Makes the child the leader of a session of its own whose terminal is the child's standard input.
    pub fn controlling_terminal(&mut self) -> &mut Self {
        self.controlling_terminal = true;
        self.new_session()
    }

    /// Has the kernel kill the child when the calling *thread* ends, see `PR_SET_PDEATHSIG`(2const). Only a thread
    /// that lives as long as its process may start such children.
    pub fn die_with_parent(&mut self) -> &mut Self {
        self.die_with_parent = true;
        self
    }

    /// Starts the child.
    ///
    /// # Errors
    ///
    /// When the program cannot be executed, with execve(2)'s error.
    pub fn spawn(mut self) -> io::Result<Child> {
        let passed: Vec<RawFd> = self.passed.iter().map(AsRawFd::as_raw_fd).collect();
        let (new_session, die_with_parent) = (self.new_session, self.die_with_parent);
        let controlling_terminal = self.controlling_terminal;
        let parent = rustix::process::getpid();
        let prepare = move || {
            if new_session {
                rustix::process::setsid()?;
            }
            if controlling_terminal {
                // SAFETY: the standard library has put the child's stdin there before it calls this.
                let stdin = unsafe { BorrowedFd::borrow_raw(0) };
                rustix::process::ioctl_tiocsctty(stdin)?;
            }
            if die_with_parent {
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                // The parent may have died before the call above; then nobody will send the signal.
                if rustix::process::getppid() != Some(parent) {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
            }
            for &fd in &passed {
                // SAFETY: the parent holds the fd in `self.passed`, so the child's copy of its table has it open.
                let fd = unsafe { BorrowedFd::borrow_raw(fd) };
                rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
            }
            Ok(())
        };
        // SAFETY: `prepare` runs in the child between fork and exec: it makes only async-signal-safe system
        // calls, allocates nothing and takes no lock.
        unsafe { self.command.pre_exec(prepare) };
        let child = self.command.spawn()?;
        drop(self.passed);
        let pid = Pid::from_child(&child);
        // The child is ours and not yet waited for, so its pid cannot be another's.
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        Ok(Child { child, pidfd })
    }
}

/// A child process that was started.
#[derive(Debug)]
pub struct Child {
    child: process::Child,
    pidfd: OwnedFd,
}

impl Child {
    /// Its pid.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its pid with its start time, for the ledger.
    ///
    /// # Errors
    ///
    /// When it has ended already.
    pub fn id(&self) -> io::Result<ProcessId> {
        ProcessId::of(self.pid())
            .ok_or_else(|| io::Error::other("the process ended as soon as it was started"))
    }

    /// Becomes readable when it has ended.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Sends it a signal. One that has ended is a success.
    ///
    /// # Errors
    ///
    /// What pidfd_send_signal(2) says, but for ESRCH.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for its end and takes its status.
    ///
    /// # Errors
    ///
    /// When somebody else took the status.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }
}

/// Takes over the fd that this process was started with under `number`, as its arguments say. It becomes close-on-exec.
///
/// # Errors
///
/// When no fd of that number is open.
pub fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    if number < 3 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a standard stream"));
    }
    // SAFETY: fcntl on a number; one that is not open is an error.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and it came with exec: no Rust value of this process owns it yet.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Takes the status of any child that has ended, without waiting: a subreaper's duty to its adopted orphans.
#[must_use]
pub fn reap_any() -> Option<(u32, ExitStatus)> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
    match waitid(Id::All, flags).ok()? {
        WaitStatus::Exited(pid, code) => {
            Some((pid.as_raw().cast_unsigned(), ExitStatus::from_raw(code << 8)))
        }
        WaitStatus::Signaled(pid, signal, _) => {
            Some((pid.as_raw().cast_unsigned(), ExitStatus::from_raw(signal as i32)))
        }
        _ => None,
    }
}

/// Reads `file` to its end, at most `limit` bytes.
///
/// # Errors
///
/// When it cannot be read, or holds more than `limit`.
pub fn read_bounded(file: &mut File, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("more than {limit} bytes"),
        ));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::{Command, ProcessId};
    use rustix::process::Signal;
    use std::fs::File;
    use std::io::Read;
    use std::process::Stdio;

    #[test]
    fn a_child_gets_the_fds_it_was_passed() {
        let (mut read, write) = std::io::pipe().unwrap();
        let mut command = Command::new("/bin/sh");
        let number = command.pass(write.into());
        command.args(["-c", &format!("echo hello >/proc/self/fd/{number}")]);
        let mut child = command.spawn().unwrap();
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello\n");
        assert!(child.wait().unwrap().success());
    }

    #[test]
    fn a_zombie_is_not_alive_and_a_stranger_is_not_it() {
        let mut command = Command::new("/bin/sleep");
        command.args(["600"]).stdio(Stdio::null(), Stdio::null(), Stdio::null());
        let mut child = command.spawn().unwrap();
        let id = child.id().unwrap();
        assert!(id.is_alive());
        assert!(!ProcessId { start_time: id.start_time + 1, ..id }.is_alive());
        assert!(!ProcessId { start_time: id.start_time + 1, ..id }.signal(Signal::KILL).unwrap());
        assert!(id.signal(Signal::KILL).unwrap());
        child.wait().unwrap();
        assert!(!id.is_alive());
    }

    #[test]
    fn a_missing_program_is_an_error_that_names_nothing_else() {
        let error = Command::new("/no/such/program").spawn().unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    }

    #[test]
    fn reading_is_bounded() {
        let mut zero = File::open("/dev/zero").unwrap();
        assert!(super::read_bounded(&mut zero, 10).is_err());
    }
}
