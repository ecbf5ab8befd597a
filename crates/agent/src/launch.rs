//! Starting a `container-init`, and following it until the user's program runs.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::time::Duration;

use rustix::fs::MemfdFlags;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendFlags, SocketFlags, SocketType,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::{Doing, Error};
use crate::init::request::{Report, Request, Role, START};
use crate::sys;

/// How long a container may take to be set up. Its file systems may be slow, but not for ever.
const DEADLINE: Duration = Duration::from_mins(1);

const KILLED: &str = "the process was killed while it was set up";

/// The line to a `container-init`.
#[derive(Debug)]
pub(crate) struct Control(AsyncFd<OwnedFd>);

/// A process that is ready, or already running.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) pid: u32,
    pub(crate) terminal: Option<OwnedFd>,
    pub(crate) control: Control,
}

/// Starts the process of `request` with these standard streams: a container's init up to its user's program, an
/// exec into it.
///
/// # Errors
///
/// When it cannot be set up, with the reason that it gave.
pub(crate) async fn launch(request: &Request, stdio: [Stdio; 3]) -> Result<Launched, Error> {
    let control = spawn(request, stdio)?;
    let mut pid = None;
    let mut terminal = None;
    let follow = async {
        loop {
            match control.receive().await? {
                Some((Report::Forked(number), _)) => pid = Some(number),
                Some((Report::Terminal, fd)) => terminal = fd,
                Some((Report::Failed(text), _)) => return Err(Error::Setup(text)),
                Some((Report::Ready, _)) => return Ok(()),
                // An exec says nothing more when it has become its program; an init must wait for the word.
                None if matches!(request.role, Role::Exec { .. }) => return Ok(()),
                None => return Err(Error::Setup(KILLED.to_owned())),
            }
        }
    };
    let followed = tokio::time::timeout(DEADLINE, follow).await;
    match followed.unwrap_or(Err(Error::Deadline {
        what: "setting up the process",
        seconds: DEADLINE.as_secs(),
    })) {
        Ok(()) => {}
        Err(error) => {
            if let Some(pid) = pid {
                // It has ended by itself, or shall now; either way the reaper takes it.
                drop(sys::kill(pid, libc::SIGKILL.unsigned_abs()));
            }
            return Err(error);
        }
    }
    let pid = pid.ok_or_else(|| Error::Setup(KILLED.to_owned()))?;
    Ok(Launched { pid, terminal, control })
}

fn spawn(request: &Request, [stdin, stdout, stderr]: [Stdio; 3]) -> Result<Control, Error> {
    let action = || "start the process that sets up containers".to_owned();
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .doing(action)?;
    rustix::io::ioctl_fionbio(&ours, true).doing(action)?;
    let memory = rustix::fs::memfd_create("kata-request", MemfdFlags::CLOEXEC).doing(action)?;
    let mut memory = File::from(memory);
    let json = serde_json::to_vec(request).map_err(io::Error::from).doing(action)?;
    memory.write_all(&json).doing(action)?;
    let mut command = linux::process::Command::new("/proc/self/exe");
    let control = command.pass(theirs).to_string();
    let request = command.pass(memory.into()).to_string();
    command
        .name("kata-agent")
        .args(["container-init", &control, &request])
        .environment::<&str, &str>([])
        .stdio(stdin, stdout, stderr);
    command.spawn().doing(action)?;
    Ok(Control(sys::watched(ours).doing(action)?))
}

impl Control {
    /// Has a container's init run the user's program, and waits until it does.
    ///
    /// # Errors
    ///
    /// When a hook, or the program, could not be run.
    pub(crate) async fn start(&self) -> Result<(), Error> {
        let sent = self
            .0
            .async_io(Interest::WRITABLE, |socket| {
                Ok(rustix::net::send(socket, START, SendFlags::NOSIGNAL)?)
            })
            .await;
        // It may have been killed meanwhile; then its exit tells.
        if sent.is_err() {
            return Ok(());
        }
        let failed = async {
            while let Some((report, _)) = self.receive().await? {
                if let Report::Failed(text) = report {
                    return Err(Error::Setup(text));
                }
            }
            Ok(())
        };
        let seconds = DEADLINE.as_secs();
        tokio::time::timeout(DEADLINE, failed)
            .await
            .unwrap_or(Err(Error::Deadline { what: "starting the process", seconds }))
    }

    /// The next report, with the fd attached to it; nothing when the other side has gone. Cancel safe.
    async fn receive(&self) -> Result<Option<(Report, Option<OwnedFd>)>, Error> {
        let received = self.0.async_io(Interest::READABLE, receive).await;
        received.doing(|| "hear from the process that sets up containers".to_owned())
    }
}

fn receive(socket: &OwnedFd) -> io::Result<Option<(Report, Option<OwnedFd>)>> {
    let mut bytes = vec![0; 64 * 1024];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let message = match rustix::net::recvmsg(socket, &mut slices, &mut ancillary, flags) {
        // It went before it read what we had sent.
        Err(rustix::io::Errno::CONNRESET) => return Ok(None),
        message => message?,
    };
    let fd = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    if message.bytes == 0 {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(&bytes[..message.bytes])?, fd)))
}

/// Sends a report, from the other side, with a fd attached to it.
///
/// # Errors
///
/// When PID 1 listens no more.
pub(crate) fn report(
    control: &OwnedFd,
    report: &Report,
    attached: Option<std::os::fd::BorrowedFd<'_>>,
) -> io::Result<()> {
    let bytes = serde_json::to_vec(report)?;
    let fds: Vec<_> = attached.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        ancillary.push(rustix::net::SendAncillaryMessage::ScmRights(&fds));
    }
    let slices = [IoSlice::new(&bytes)];
    rustix::net::sendmsg(control, &slices, &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}
