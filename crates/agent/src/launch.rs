//! Starting a `container-init`, and following it until the user's program runs.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::MemfdFlags;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendFlags, SocketFlags, SocketType,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::{Doing, Error};
use crate::init::request::{ORDER, Report, Request, Role, START};
use crate::marks::Marks;
use crate::sys;

/// How long a container may take to be set up. Its file systems may be slow, but not for ever.
const DEADLINE: Duration = Duration::from_mins(1);

/// How long the next `container-init` is not started after one was employed: what that becomes has the processor first.
const PAUSE: Duration = Duration::from_millis(200);

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
    pub(crate) marks: Marks,
}

/// A `container-init` that has been started and not yet been told what to become. To start one takes longer than all that
/// it does then, so one is kept waiting.
#[derive(Debug, Default)]
pub(crate) struct Spare(Mutex<Option<Control>>);

impl Spare {
    /// Starts one, unless one is waiting.
    pub(crate) fn keep(&self) -> Result<(), Error> {
        let mut spare = self.waiting();
        if spare.is_none() {
            *spare = Some(spawn()?);
        }
        Ok(())
    }

    /// Starts the next one when the guest has had time for what it was asked to run.
    fn keep_later(self: &Arc<Self>) {
        let spare = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(PAUSE).await;
            if let Err(error) = spare.keep() {
                crate::console::err(&format!("kata-agent: {}", error.chain()));
            }
        });
    }

    /// Tells one what to become.
    fn employ(self: &Arc<Self>, order: &File, stdio: &[OwnedFd; 3]) -> Result<Control, Error> {
        let action = || "tell a process what to become".to_owned();
        let waiting = self.waiting().take();
        self.keep_later();
        if let Some(control) = waiting
            && control.order(order, stdio).is_ok()
        {
            return Ok(control);
        }
        // There is none, or it was killed.
        let control = spawn()?;
        control.order(order, stdio).doing(action)?;
        Ok(control)
    }

    fn waiting(&self) -> MutexGuard<'_, Option<Control>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts the process of `request` with these standard streams: a container's init up to its user's program, an
/// exec into it.
///
/// # Errors
///
/// When it cannot be set up, with the reason that it gave.
pub(crate) async fn launch(
    spare: &Arc<Spare>,
    request: &Request,
    stdio: [OwnedFd; 3],
) -> Result<Launched, Error> {
    let mut marks = Marks::default();
    marks.mark("launch");
    let control = spare.employ(&written(request)?, &stdio)?;
    drop(stdio);
    marks.mark("employed");
    let mut pid = None;
    let mut terminal = None;
    let follow = async {
        loop {
            match control.receive().await? {
                Some((Report::Forked(number, of_init), _)) => {
                    pid = Some(number);
                    marks.append(of_init);
                }
                Some((Report::Terminal, fd)) => terminal = fd,
                Some((Report::Failed(text), _)) => return Err(Error::Setup(text)),
                Some((Report::Ready(of_process), _)) => {
                    marks.append(of_process);
                    return Ok(());
                }
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
    marks.mark("launched");
    Ok(Launched { pid, terminal, control, marks })
}

/// The request as a file, which can be as long as it likes.
fn written(request: &Request) -> Result<File, Error> {
    let action = || "write down what a process shall become".to_owned();
    let json = serde_json::to_vec(request).map_err(io::Error::from).doing(action)?;
    let memory = rustix::fs::memfd_create("kata-request", MemfdFlags::CLOEXEC).doing(action)?;
    let mut memory = File::from(memory);
    memory.write_all(&json).doing(action)?;
    Ok(memory)
}

fn spawn() -> Result<Control, Error> {
    let action = || "start the process that sets up containers".to_owned();
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .doing(action)?;
    rustix::io::ioctl_fionbio(&ours, true).doing(action)?;
    let mut command = linux::process::Command::new("/proc/self/exe");
    let control = command.pass(theirs).to_string();
    command.name("kata-agent").args(["container-init", &control]).environment::<&str, &str>([]);
    command.spawn().doing(action)?;
    Ok(Control(sys::watched(ours).doing(action)?))
}

impl Control {
    /// Gives a process that waits for it its request and its standard streams.
    fn order(&self, request: &File, stdio: &[OwnedFd; 3]) -> io::Result<()> {
        let [stdin, stdout, stderr] = stdio.each_ref().map(AsFd::as_fd);
        let fds = [request.as_fd(), stdin, stdout, stderr];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(rustix::net::SendAncillaryMessage::ScmRights(&fds));
        let slices = [IoSlice::new(ORDER)];
        rustix::net::sendmsg(self.0.get_ref(), &slices, &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }

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

/// Waits, on the other side, for the request and the standard streams. Nothing where they will never come.
///
/// # Errors
///
/// When what comes is not that.
pub(crate) fn wait_for_order(control: &OwnedFd) -> io::Result<Option<(File, [OwnedFd; 3])>> {
    let mut bytes = [0; ORDER.len()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let message = rustix::net::recvmsg(control, &mut slices, &mut ancillary, flags)?;
    if message.bytes == 0 {
        return Ok(None);
    }
    let mut fds = ancillary.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
        _ => Vec::new(),
    });
    let mut next = || fds.next().ok_or(io::ErrorKind::UnexpectedEof);
    Ok(Some((next()?.into(), [next()?, next()?, next()?])))
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
