//! The device process of a machine: it serves virtio-vsock and virtio-fs to the hypervisor, and streams to us.

use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use linux::process::{Child, Command};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
    recvmsg, socketpair,
};
use tokio::io::Interest;
use tokio::sync::mpsc;

use crate::error::host;
use crate::processes::readable;
use crate::{Error, GuestStream, Port, VmSpec};

/// The guest's context id: each machine has a back end of its own, so all have the same.
const GUEST_CID: u64 = 3;

/// Streams to one port that wait to be taken.
const BACKLOG: usize = 16;

/// The paths of a machine's sockets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sockets {
    /// The hypervisor's vhost-user connection for virtio-vsock.
    pub(crate) vsock: PathBuf,
    /// The hypervisor's vhost-user connection for virtio-fs.
    pub(crate) fs: PathBuf,
    /// Streams into the guest.
    pub(crate) streams: PathBuf,
}

impl Sockets {
    pub(crate) fn of(dir: &Path) -> Self {
        Self {
            vsock: dir.join("vhost-vsock.sock"),
            fs: dir.join("vhost-fs.sock"),
            streams: dir.join("vsock.sock"),
        }
    }
}

/// A device process that was just started.
#[derive(Debug)]
pub(crate) struct BackEnds {
    pub(crate) child: Child,
    /// As long as this is open the process serves.
    pub(crate) lifeline: OwnedFd,
    pub(crate) host_streams: HostStreams,
}

/// The listening sockets of a device process. A hypervisor may connect to them before the process is there.
#[derive(Debug)]
pub(crate) struct Listeners {
    vsock: UnixListener,
    fs: Option<UnixListener>,
    streams: UnixListener,
}

impl Listeners {
    pub(crate) fn bind(sockets: &Sockets, with_fs: bool) -> Result<Self, Error> {
        let bind = |path: &Path| UnixListener::bind(path).map_err(host("listen on", path));
        Ok(Self {
            vsock: bind(&sockets.vsock)?,
            fs: if with_fs { Some(bind(&sockets.fs)?) } else { None },
            streams: bind(&sockets.streams)?,
        })
    }
}

/// Starts the device process of `spec`, its words going to `log`.
pub(crate) fn start(spec: &VmSpec, listeners: Listeners, log: OwnedFd) -> Result<BackEnds, Error> {
    let (program, arguments) = &spec.device_program;
    let made = || -> io::Result<_> {
        let lifeline = UnixStream::pair()?;
        let flags = SocketFlags::CLOEXEC;
        Ok((lifeline, socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?))
    };
    let ((lifeline, their_lifeline), (host_streams, their_host_streams)) =
        made().map_err(host("make sockets for", program))?;

    let mut command = Command::new(program);
    let config = device::Config {
        lifeline: command.pass(their_lifeline.into()),
        vsock_listener: command.pass(listeners.vsock.into()),
        guest_cid: GUEST_CID,
        streams_listener: command.pass(listeners.streams.into()),
        host_streams: command.pass(their_host_streams),
        fs: spec.share.as_ref().zip(listeners.fs).map(|(share, listener)| device::Fs {
            listener: command.pass(listener.into()),
            directory: share.path.clone(),
        }),
    };
    let config =
        serde_json::to_string(&config).map_err(|error| host("configure", program)(error.into()))?;
    command.args(arguments).args([config]).environment::<&str, &str>([]);
    command.stdio(Stdio::null(), Stdio::null(), log.into()).die_with_parent();
    let child = command.spawn().map_err(host("start", program))?;
    let host_streams = HostStreams::start(host_streams).map_err(host("watch", program))?;
    Ok(BackEnds { child, lifeline: lifeline.into(), host_streams })
}

/// The streams that the guest opens to us, sorted by port.
#[derive(Debug)]
pub(crate) struct HostStreams {
    takers: Takers,
}

type Takers = Arc<Mutex<HashMap<u32, mpsc::Sender<GuestStream>>>>;

impl HostStreams {
    fn start(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        let socket = readable(socket)?;
        let takers = Takers::default();
        let ours = Arc::clone(&takers);
        // Ends with the device process, which holds the other end.
        tokio::spawn(async move {
            while let Ok(Some((port, stream))) = socket.async_io(Interest::READABLE, receive).await
            {
                let Some(taker) = locked(&ours).get(&port).cloned() else { continue };
                let registered = stream
                    .set_nonblocking(true)
                    .and_then(|()| tokio::net::UnixStream::from_std(stream));
                if let Ok(stream) = registered {
                    // Nobody takes it: the drop tells the guest.
                    drop(taker.try_send(Box::new(stream)));
                }
            }
        });
        Ok(Self { takers })
    }

    /// From now on streams to `port` go to the receiver that is returned, and to no earlier one.
    pub(crate) fn listen(&self, port: Port) -> mpsc::Receiver<GuestStream> {
        let (taker, streams) = mpsc::channel(BACKLOG);
        locked(&self.takers).insert(port.0, taker);
        streams
    }
}

fn locked(takers: &Takers) -> MutexGuard<'_, HashMap<u32, mpsc::Sender<GuestStream>>> {
    // No holder can panic between two changes of the map.
    takers.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One message: a port and its stream. Nothing at the end.
fn receive(socket: &OwnedFd) -> io::Result<Option<(u32, UnixStream)>> {
    let mut port = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut port)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let stream = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok(match (message.bytes, stream) {
        (4, Some(stream)) => Some((u32::from_le_bytes(port), stream.into())),
        // End of file, or not what was agreed: the device process is not to be trusted any more.
        _ => None,
    })
}
