//! The stand-in: the host process that is a guest process to whoever asked for it.
//!
//! containerd's runc shim and conmon know a container, and an exec, by a host pid: they find its cgroup and its network
//! namespace by it, kill it, reap it for the exit code and resize its terminal. So there is one for each, in the
//! container's cgroup, that relays the streams, forwards the signals it gets and exits as the guest's process does. When
//! it is killed itself, the sandbox process reads the end of its connection and kills the guest's process.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use linux::process::Child;
use linux::pty;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};

use crate::control::{Client, NewContainer, Request, Response};
use crate::error::{Chain, Error};
use crate::hooks;
use crate::launch::{Channel, Go, Init, Order, Process, Report};
use crate::state::{ContainerId, VmDir};
use crate::stdio::Stdio;

/// How a process exits whose sandbox has gone: 128 + SIGKILL.
const KILLED: u8 = 137;

/// The index of `lo`, in every network namespace.
const LOOPBACK: u32 = 1;

/// Runs the stand-in whose order comes over `channel`, until its process has ended. Answers the exit code for this
/// process.
#[must_use]
pub fn serve(channel: OwnedFd) -> u8 {
    let mut channel = Channel::inherited(channel);
    let order = channel.hear().map_err(Error::host("read the order from", "its caller"));
    let ran = order.and_then(|order: Order| {
        let stdio =
            Stdio::own(order.terminal).map_err(Error::host("keep", "the standard streams"))?;
        if let Process::Init(init) = &order.what {
            join_namespaces(init)?;
            if stdio.terminal {
                // Refused for the caller's own terminal, which its session keeps: it forwards what happens to it.
                drop(pty::make_controlling(&stdio.stdin));
            }
            let lost = |_| Error::SandboxGone { id: order.id.clone() };
            channel.tell(&Report::Joined).map_err(lost)?;
            let Go = channel.hear().map_err(lost)?;
            // The spec has these run in the container's namespaces, with paths of the runtime's: here is both, as far as
            // the host goes.
            hooks::run("createContainer", &init.hooks, init.state.as_bytes())?;
        } else {
            join_cgroups(&order.vm, &order.id);
        }
        run(order, stdio, Some(&mut channel))
    });
    ran.unwrap_or_else(|error| {
        let report = Report::Failed { text: Chain(&error).to_string(), kind: error.kind() };
        // The caller may be gone; then nobody is there to be told.
        drop(channel.tell(&report));
        KILLED
    })
}

/// Enters the namespaces that the container's process is in on the host.
fn join_namespaces(init: &Init) -> Result<(), Error> {
    match &init.netns {
        Some(path) => {
            linux::namespace::enter(path).map_err(Error::host("enter network namespace", path))?;
        }
        None => new_network()?,
    }
    linux::namespace::unshare_mounts().map_err(Error::host("create", "a mount namespace"))
}

/// Gives the calling thread a network namespace of its own, whose `lo` is up.
pub(crate) fn new_network() -> Result<(), Error> {
    linux::namespace::unshare_network()
        .and_then(|()| linux::link::bring_up(LOOPBACK))
        .map_err(Error::host("create", "a network namespace"))
}

/// Has the sandbox process run what `order` says, with these streams, tells `caller` once it runs, and answers its exit
/// code.
pub(crate) fn run(
    order: Order,
    stdio: Stdio,
    mut caller: Option<&mut Channel>,
) -> Result<u8, Error> {
    // Before the relay's threads are there: they inherit the mask.
    let signals = forwarded().map_err(Error::host("watch", "signals"))?;
    let terminal = stdio.terminal.then(|| stdio.stdin.try_clone()).transpose();
    let terminal = terminal.map_err(Error::host("keep", "the terminal"))?;
    let Order { vm, id, what, .. } = order;
    let files = match &what {
        Process::Init(init) => Some(init.files.clone()),
        Process::Exec(_) => None,
    };
    let foreground = matches!(&what, Process::Init(init) if init.foreground);
    let mut client = Client::connect_to(&vm, &id)?;
    let answer = client.ask(&request(what, &stdio))?;
    let gone = || Error::SandboxGone { id: id.clone() };
    let Response::Process { exec, tokens, vsock, phases } = answer else { return Err(gone()) };
    let relay =
        stdio.relay(&vsock, &tokens).map_err(Error::host("open a stream into", "the guest"))?;
    let mut forward = Forward { client: Client::connect_to(&vm, &id)?, exec: &exec, terminal };
    if let Some(files) = &files {
        // From here on paths are the container's. Only `podman cp` and the like miss it where it does not work.
        drop(storage::enter_view(files, &vm.share()));
    }
    client.send(&Request::Wait { exec: exec.clone() })?;
    if let Some(caller) = &mut caller
        && caller.tell(&Report::Ready { phases }).is_err()
        && files.is_some()
    {
        forward.disown();
        return Ok(KILLED);
    }
    loop {
        // Somebody who stays for the container's whole life says nothing more: what can be read is its end.
        let caller = caller.as_ref().filter(|_| foreground);
        let watched = caller.map_or(client.as_fd(), |caller| caller.socket().as_fd());
        let [answered, signalled, left] = wait_for([client.as_fd(), signals.as_fd(), watched])?;
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
        if left {
            forward.disown();
            return Ok(KILLED);
        }
        if signalled && let Ok(Some(info)) = signals.read_signal() {
            forward.signal(info.ssi_signo);
        }
    }
}

fn wait_for<const N: usize>(fds: [BorrowedFd<'_>; N]) -> Result<[bool; N], Error> {
    let mut fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    loop {
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => {}
            waited => {
                waited.map_err(io::Error::from).map_err(Error::host("wait for", "the guest"))?;
                return Ok(fds.each_ref().map(|fd| !fd.revents().is_empty()));
            }
        }
    }
}

fn request(what: Process, stdio: &Stdio) -> Request {
    let (streams, size) = (stdio.wanted(), stdio.size());
    match what {
        Process::Exec(process) => Request::Exec { process, streams, size, pid: std::process::id() },
        Process::Init(init) => {
            let Init { spec, files, .. } = *init;
            Request::Create(Box::new(NewContainer { spec, files, streams, size, origin: None }))
        }
    }
}

/// Passes on what happens to the stand-in.
struct Forward<'a> {
    client: Client,
    exec: &'a str,
    terminal: Option<OwnedFd>,
}

impl Forward<'_> {
    /// A window change becomes a resize.
    fn signal(&mut self, signal: u32) {
        let exec = self.exec.to_owned();
        let request = if signal.cast_signed() == Signal::SIGWINCH as i32 {
            let size = self.terminal.as_ref().and_then(|tty| pty::window_size(tty).ok());
            let Some(size) = size else { return };
            Request::Resize { exec, rows: size.rows, columns: size.columns }
        } else {
            Request::Signal { exec, signal, all: false }
        };
        // A process that ends meanwhile has no more use for it.
        drop(self.client.ask(&request));
    }

    /// Whoever would delete the container has gone.
    fn disown(&mut self) {
        drop(self.client.ask(&Request::Disown));
    }
}

/// Waits for `child`, a stand-in that the caller started, and passes on to it the signals that the caller gets. Answers
/// its exit code; 128 + the signal where one ended it.
///
/// # Errors
///
/// When signals cannot be watched, or somebody else took the child's status.
pub fn attend(child: &mut Child) -> Result<u8, Error> {
    let signals = forwarded().map_err(Error::host("watch", "signals"))?;
    loop {
        let [ended, _] = wait_for([child.pidfd(), signals.as_fd()])?;
        if ended {
            let status = child.wait().map_err(Error::host("wait for", "the container"))?;
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
fn join_cgroups(vm: &VmDir, id: &str) {
    let Ok(id) = ContainerId::new(id) else { return };
    let Ok(Some(record)) = vm.container(&id).read() else { return };
    join_each(&record.cgroups, std::process::id());
}

/// Puts a process in each of these cgroup directories, as far as they are there.
pub(crate) fn join_each(directories: &[std::path::PathBuf], pid: u32) {
    for directory in directories {
        let join = |directory: &Path| {
            let mut file =
                std::fs::OpenOptions::new().write(true).open(directory.join("cgroup.procs"))?;
            file.write_all(pid.to_string().as_bytes())
        };
        if let Err(error) = join(directory) {
            tracing::debug!(%error, directory = %directory.display(), "not joined");
        }
    }
}
