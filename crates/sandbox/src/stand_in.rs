//! The stand-in: the host process that is a guest process to whoever asked for an exec.
//!
//! containerd's runc shim and conmon kill an exec by its host pid, reap that pid for the exit code and resize its
//! terminal; so there must be one, in the container's cgroup, that relays the streams, forwards the signals it gets and
//! exits as the guest's process does. When it is killed itself, the sandbox process reads the end of its connection and
//! kills the guest's.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use linux::process::Child;
use linux::pty;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};

use crate::control::{Client, Request, Response};
use crate::error::{Chain, Error};
use crate::launch::Report;
use crate::state::VmDir;
use crate::stdio::Stdio;

/// How an exec exits whose sandbox has gone: 128 + SIGKILL.
const KILLED: u8 = 137;

/// What a stand-in shall run.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) vm: VmDir,
    pub(crate) id: String,
    /// The OCI spec's `process`, as JSON.
    pub(crate) process: String,
    pub(crate) terminal: bool,
}

/// Runs the stand-in whose order comes over `channel`, until its process has ended. Answers the exit code for this
/// process.
#[must_use]
pub fn serve(channel: OwnedFd) -> u8 {
    let channel = UnixStream::from(channel);
    let report = |report: &Report| {
        if let Ok(mut line) = serde_json::to_vec(report) {
            line.push(b'\n');
            // `exec` may be gone; the process runs all the same.
            drop((&channel).write_all(&line));
        }
    };
    let mut line = String::new();
    let order = BufReader::new(&channel)
        .read_line(&mut line)
        .and_then(|_| Ok(serde_json::from_str::<Order>(&line)?))
        .map_err(Error::host("read the order from", "exec"));
    let ran = order.and_then(|order| {
        let stdio =
            Stdio::own(order.terminal).map_err(Error::host("keep", "the standard streams"))?;
        join_cgroups(&order.vm);
        run(&order, stdio, || report(&Report::Ready { phases: Vec::new() }))
    });
    ran.unwrap_or_else(|error| {
        report(&Report::Failed { text: Chain(&error).to_string(), kind: error.kind() });
        KILLED
    })
}

/// Runs a process as `order` says with these streams, calls `ready` once it runs, and answers its exit code.
pub(crate) fn run(order: &Order, stdio: Stdio, ready: impl FnOnce()) -> Result<u8, Error> {
    // Before the relay's threads are there: they inherit the mask.
    let signals = forwarded().map_err(Error::host("watch", "signals"))?;
    let mut client = Client::connect_to(&order.vm, &order.id)?;
    let [stdin, stdout, stderr] = stdio.wanted();
    let terminal = stdio.terminal.then(|| stdio.stdin.try_clone()).transpose();
    let terminal = terminal.map_err(Error::host("keep", "the terminal"))?;
    let answer = client.ask(&Request::Exec {
        process: order.process.clone(),
        stdin,
        stdout,
        stderr,
        size: stdio.size(),
        pid: std::process::id(),
    })?;
    let gone = || Error::SandboxGone { id: order.id.clone() };
    let Response::Exec { exec, tokens, vsock } = answer else { return Err(gone()) };
    let relay =
        stdio.relay(&vsock, &tokens).map_err(Error::host("open a stream into", "the guest"))?;
    ready();
    client.send(&Request::WaitExec { exec: exec.clone() })?;
    loop {
        let mut fds = [PollFd::new(&client, PollFlags::IN), PollFd::new(&signals, PollFlags::IN)];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            waited => {
                waited.map_err(io::Error::from).map_err(Error::host("wait for", "the guest"))?
            }
        };
        let [answered, signalled] = [&fds[0], &fds[1]].map(|fd| !fd.revents().is_empty());
        if answered {
            return match client.receive() {
                Ok(Response::Ended { code, written }) => {
                    relay.finish(written);
                    Ok(code)
                }
                Ok(_) => Err(gone()),
                // The sandbox has ended under it.
                Err(Error::SandboxGone { .. }) => Ok(KILLED),
                Err(error) => Err(error),
            };
        }
        if signalled && let Ok(Some(info)) = signals.read_signal() {
            // A container that ends meanwhile has no more use for a signal.
            drop(forward(order, &exec, info.ssi_signo, terminal.as_ref()));
        }
    }
}

/// Passes a signal on; a window change becomes a resize.
fn forward(
    order: &Order,
    exec: &str,
    signal: u32,
    terminal: Option<&OwnedFd>,
) -> Result<(), Error> {
    let exec = exec.to_owned();
    let request = if signal.cast_signed() == Signal::SIGWINCH as i32 {
        let Some(size) = terminal.and_then(|terminal| pty::window_size(terminal.as_fd()).ok())
        else {
            return Ok(());
        };
        Request::ResizeExec { exec, rows: size.rows, columns: size.columns }
    } else {
        Request::SignalExec { exec, signal }
    };
    Client::connect_to(&order.vm, &order.id)?.ask(&request).map(|_| ())
}

/// Waits for `child`, a sandbox process that the caller started, and passes on to it the signals that the caller gets.
/// Answers its exit code; 128 + the signal where one ended it.
///
/// # Errors
///
/// When signals cannot be watched, or somebody else took the child's status.
pub fn attend(child: &mut Child) -> Result<u8, Error> {
    let signals = forwarded().map_err(Error::host("watch", "signals"))?;
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(child.pidfd(), PollFlags::IN),
            PollFd::new(&signals, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            waited => waited
                .map_err(io::Error::from)
                .map_err(Error::host("wait for", "the sandbox process"))?,
        };
        let ended = !fds[0].revents().is_empty();
        if ended {
            let status = child.wait().map_err(Error::host("wait for", "the sandbox process"))?;
            let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
            return Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(KILLED));
        }
        if let Ok(Some(info)) = signals.read_signal()
            && let Some(signal) =
                rustix::process::Signal::from_named_raw(info.ssi_signo.cast_signed())
        {
            // One that has just ended is noticed in the next round.
            drop(child.signal(signal));
        }
    }
}

/// Every signal that has a meaning to the process rather than to its stand-in.
fn forwarded() -> io::Result<SignalFd> {
    let mut set = SigSet::all();
    for own in [
        Signal::SIGCHLD,
        Signal::SIGPIPE,
        Signal::SIGSEGV,
        Signal::SIGBUS,
        Signal::SIGFPE,
        Signal::SIGILL,
        Signal::SIGTRAP,
        Signal::SIGABRT,
        Signal::SIGSYS,
        Signal::SIGTTIN,
        Signal::SIGTTOU,
        Signal::SIGTSTP,
    ] {
        set.remove(own);
    }
    set.thread_block()?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC)?)
}

/// Joins the container's cgroups, by which its processes are told and counted. Where one is gone, so is the container.
fn join_cgroups(vm: &VmDir) {
    let Ok(Some(sandbox)) = vm.read() else { return };
    for directory in &sandbox.cgroups {
        let join = |directory: &Path| {
            let mut file =
                std::fs::OpenOptions::new().write(true).open(directory.join("cgroup.procs"))?;
            file.write_all(std::process::id().to_string().as_bytes())
        };
        if let Err(error) = join(directory) {
            tracing::debug!(%error, directory = %directory.display(), "not joined");
        }
    }
}
