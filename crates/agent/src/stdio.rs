//! The processes' standard streams, and the raw vsock streams that they are joined with.
//!
//! Each stream that the host will open is a pipe, or the master of a terminal, kept under a random token. The host
//! may open its side whenever it likes, also after the process has ended: until then the pipe holds what was
//! written and the process waits when it is full. Nothing is ever buffered beyond the pipe and one block, but for
//! what a terminal held when its process ended.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use protocol::{STREAM_PORT, Token};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use crate::error::{Doing, Error};
use crate::sys;

/// What a pipe holds, and how much is moved at once: large, as each move costs an interrupt of the guest.
const BLOCK: usize = 256 * 1024;

/// How long a new stream may take to say its token.
const TOKEN_DEADLINE: Duration = Duration::from_secs(10);

/// How long an ended exec's streams can still be opened.
const LATE: Duration = Duration::from_mins(1);

/// Our end of a process's stream.
#[derive(Debug)]
pub(crate) enum End {
    /// The host writes, the process reads.
    Input(AsyncFd<OwnedFd>),
    /// The process writes, the host reads.
    Output(Arc<Source>),
    /// Both.
    Terminal(Arc<Source>),
}

/// What a process writes into: the read end of a pipe, or a terminal's master.
#[derive(Debug)]
pub(crate) struct Source {
    fd: AsyncFd<OwnedFd>,
    /// How many bytes were ever taken out. Outlives the source, for who asks after the host has gone.
    taken: Arc<AtomicU64>,
    /// Taken out, not yet relayed.
    pending: Mutex<VecDeque<u8>>,
    put_aside: Notify,
}

impl Source {
    /// Takes over `fd`.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&fd)?;
        Ok(Self {
            fd: sys::watched(fd)?,
            taken: Arc::default(),
            pending: Mutex::default(),
            put_aside: Notify::new(),
        })
    }

    /// What is left of it when it has gone: how much was written to it.
    pub(crate) fn meter(self: &Arc<Self>) -> Meter {
        Meter { source: Arc::downgrade(self), taken: Arc::clone(&self.taken) }
    }

    /// Reads into `buffer`; 0 is the end. Cancel safe.
    async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let pending = self.take_pending(buffer);
            if pending > 0 {
                return Ok(pending);
            }
            let mut ready = tokio::select! {
                biased;
                () = self.put_aside.notified() => continue,
                ready = self.fd.readable() => ready?,
            };
            if let Ok(size) = ready.try_io(|fd| self.read_now(fd.get_ref(), buffer)) {
                return size;
            }
        }
    }

    fn read_now(&self, fd: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
        match rustix::io::read(fd, buffer) {
            Ok(size) => {
                self.taken.fetch_add(size as u64, Ordering::Relaxed);
                Ok(size)
            }
            // The last process that had the terminal open has closed it.
            Err(Errno::IO) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    fn pending(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_pending(&self, buffer: &mut [u8]) -> usize {
        let mut pending = self.pending();
        let size = pending.len().min(buffer.len());
        for (to, from) in buffer.iter_mut().zip(pending.drain(..size)) {
            *to = from;
        }
        size
    }

    /// Takes out what a terminal holds. Only reading it tells how much that is: the kernel moves it there late.
    fn set_aside(&self) {
        // No terminal holds more; who still writes to it shall not keep us here.
        const MOST: usize = 256 * 1024;
        let mut buffer = [0; 4096];
        let mut pending = self.pending();
        while pending.len() < MOST
            && let Ok(size) = self.read_now(self.fd.get_ref(), &mut buffer)
            && size > 0
        {
            pending.extend(&buffer[..size]);
        }
        self.put_aside.notify_one();
    }

    /// Sets a terminal's size.
    pub(crate) fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        let size =
            rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(rustix::termios::tcsetwinsize(self.fd.get_ref(), size)?)
    }
}

/// Tells how much was written to a [`Source`].
#[derive(Debug, Clone)]
pub(crate) struct Meter {
    source: Weak<Source>,
    taken: Arc<AtomicU64>,
}

impl Meter {
    /// The bytes ever written to a pipe, those included that it still holds.
    pub(crate) fn pipe(&self) -> u64 {
        let held = self
            .source
            .upgrade()
            .and_then(|source| rustix::io::ioctl_fionread(source.fd.get_ref()).ok());
        self.taken.load(Ordering::Relaxed) + held.unwrap_or_default()
    }

    /// The bytes ever written to a terminal, those included that it still holds.
    pub(crate) fn terminal(&self) -> u64 {
        if let Some(source) = self.source.upgrade() {
            source.set_aside();
        }
        self.taken.load(Ordering::Relaxed)
    }

    /// The terminal, unless the host has closed it.
    pub(crate) fn source(&self) -> Option<Arc<Source>> {
        self.source.upgrade()
    }
}

/// A pipe for a process's input: the process's end, and ours.
pub(crate) fn input() -> io::Result<(OwnedFd, End)> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    rustix::pipe::fcntl_setpipe_size(&write, BLOCK)?;
    set_nonblocking(&write)?;
    Ok((read, End::Input(sys::watched(write)?)))
}

/// A pipe for a process's output: the process's end, and ours.
pub(crate) fn output() -> io::Result<(OwnedFd, Arc<Source>)> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    rustix::pipe::fcntl_setpipe_size(&write, BLOCK)?;
    Ok((write, Arc::new(Source::new(read)?)))
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)
}

/// The streams that the host has not yet opened.
#[derive(Debug, Default)]
pub(crate) struct Streams(Mutex<HashMap<Token, Waiting>>);

#[derive(Debug)]
struct Waiting {
    container: String,
    exec: String,
    end: End,
}

impl Streams {
    /// Keeps `end` for the host to open, and returns the token it needs for that.
    pub(crate) fn offer(&self, container: &str, exec: &str, end: End) -> Result<Token, Error> {
        let mut token = Token::default();
        let mut filled = 0;
        while filled < token.len() {
            let flags = rustix::rand::GetRandomFlags::empty();
            filled += rustix::rand::getrandom(&mut token[filled..], flags)
                .doing(|| "make a token".to_owned())?;
        }
        let waiting = Waiting { container: container.to_owned(), exec: exec.to_owned(), end };
        self.table().insert(token, waiting);
        Ok(token)
    }

    /// Closes those of a removed container.
    pub(crate) fn forget_container(&self, id: &str) {
        self.table().retain(|_, waiting| waiting.container != id);
    }

    /// Closes those of an exec that has ended and whose exit was told, after a while: its streams may be on their
    /// way.
    pub(crate) fn forget_exec_later(self: &Arc<Self>, id: &str, exec: &str) {
        let (streams, id, exec) = (Arc::clone(self), id.to_owned(), exec.to_owned());
        tokio::spawn(async move {
            tokio::time::sleep(LATE).await;
            streams.table().retain(|_, waiting| waiting.container != id || waiting.exec != exec);
        });
    }

    /// Takes the host's streams from now on; the task ends only with an error.
    pub(crate) fn listen(self: &Arc<Self>) -> Result<JoinHandle<io::Error>, Error> {
        let address = VsockAddr::new(VMADDR_CID_ANY, STREAM_PORT);
        let listener =
            VsockListener::bind(address).doing(|| format!("listen on vsock port {STREAM_PORT}"))?;
        Ok(tokio::spawn(Arc::clone(self).accept(listener)))
    }

    /// Ends only with an error: without streams the guest is of no use.
    async fn accept(self: Arc<Self>, listener: VsockListener) -> io::Error {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    tokio::spawn(Arc::clone(&self).join(stream));
                }
                Err(error) => return error,
            }
        }
    }

    async fn join(self: Arc<Self>, mut stream: VsockStream) {
        let mut token = Token::default();
        let said = tokio::time::timeout(TOKEN_DEADLINE, stream.read_exact(&mut token)).await;
        if !matches!(said, Ok(Ok(_))) {
            return;
        }
        let waiting = self.table().remove(&token);
        // How a relay ends is between the host and the process: both have seen it.
        drop(match waiting.map(|waiting| waiting.end) {
            Some(End::Input(pipe)) => relay_input(stream, &pipe).await,
            Some(End::Output(source)) => relay_output(&source, stream).await,
            Some(End::Terminal(source)) => relay_terminal(&source, stream).await,
            None => Ok(()),
        });
    }

    fn table(&self) -> MutexGuard<'_, HashMap<Token, Waiting>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// From the host to the process, until either has had enough.
async fn relay_input(mut stream: VsockStream, pipe: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut buffer = vec![0; BLOCK];
    loop {
        let size = tokio::select! {
            size = stream.read(&mut buffer) => size?,
            // A pipe that nobody reads any more is in error.
            broken = pipe.ready(Interest::ERROR) => return broken.map(drop),
        };
        if size == 0 {
            return Ok(());
        }
        write_all(pipe, &buffer[..size]).await?;
    }
}

async fn write_all(fd: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let written = fd
            .async_io(Interest::WRITABLE, |fd| Ok(rustix::io::writev(fd, &[IoSlice::new(bytes)])?))
            .await?;
        bytes = &bytes[written..];
    }
    Ok(())
}

/// From the process to the host. When the host goes first, the caller closes the pipe and the process gets EPIPE.
async fn relay_output(source: &Source, stream: VsockStream) -> io::Result<()> {
    let (mut from_host, mut to_host) = tokio::io::split(stream);
    // Closing is the end of the stream; what is still on its way then arrives none the less.
    tokio::select! {
        result = copy_out(source, &mut to_host) => result,
        gone = drain(&mut from_host) => gone,
    }
}

async fn copy_out(source: &Source, to_host: &mut (impl AsyncWriteExt + Unpin)) -> io::Result<()> {
    let mut buffer = vec![0; BLOCK];
    loop {
        let size = source.read(&mut buffer).await?;
        if size == 0 {
            return Ok(());
        }
        to_host.write_all(&buffer[..size]).await?;
    }
}

/// Reads and drops what comes, until the host closes.
async fn drain(from_host: &mut (impl AsyncReadExt + Unpin)) -> io::Result<()> {
    let mut buffer = [0; 64];
    while from_host.read(&mut buffer).await? > 0 {}
    Ok(())
}

/// Both ways. When the host goes first, the caller closes the terminal and its processes get SIGHUP.
async fn relay_terminal(source: &Source, stream: VsockStream) -> io::Result<()> {
    let (mut from_host, mut to_host) = tokio::io::split(stream);
    let input = async {
        let mut buffer = vec![0; BLOCK];
        loop {
            let size = from_host.read(&mut buffer).await?;
            if size == 0 {
                return Ok(());
            }
            // A terminal whose processes have all gone takes no input; its output may still be on the way.
            if write_all(&source.fd, &buffer[..size]).await.is_err() {
                return drain(&mut from_host).await;
            }
        }
    };
    tokio::select! {
        result = copy_out(source, &mut to_host) => result,
        result = input => result,
    }
}
