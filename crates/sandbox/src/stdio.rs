//! Joining a process's standard streams on the host with its raw vsock streams into the guest.
//!
//! Plain threads and blocking calls: what stands behind the host's fds is the caller's (pipes, terminals, files), so
//! it can neither be made non-blocking, which its other holders would see, nor always be polled. The sandbox process (for a
//! container's init) and the stand-in (for an exec) share this code.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use hypervisor::{Port, VsockAddress};
use linux::pty;
use protocol::agent::ProcessCreated;
use rustix::fs::FileType;
use serde::{Deserialize, Serialize};

/// One read of a relay. Large, since each read costs the guest and the vsock device a round.
const CHUNK: usize = 256 << 10;

/// A relay's stack: it calls read and write.
const STACK: usize = 64 << 10;

/// The tokens of a process's streams; an empty one: no such stream. See `ProcessCreated` in agent.proto.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Tokens {
    pub(crate) stdin: Vec<u8>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) tty: Vec<u8>,
}

impl From<ProcessCreated> for Tokens {
    fn from(created: ProcessCreated) -> Self {
        Self {
            stdin: created.stdin,
            stdout: created.stdout,
            stderr: created.stderr,
            tty: created.tty,
        }
    }
}

/// A process's standard streams on the host.
#[derive(Debug)]
pub(crate) struct Stdio {
    /// Read.
    pub(crate) stdin: OwnedFd,
    /// Written.
    pub(crate) stdout: OwnedFd,
    /// Written.
    pub(crate) stderr: OwnedFd,
    /// All three are one terminal, in raw mode.
    pub(crate) terminal: bool,
}

impl Stdio {
    /// Takes copies of this process's own standard streams.
    ///
    /// # Errors
    ///
    /// When one is not open.
    pub(crate) fn own(terminal: bool) -> io::Result<Self> {
        Ok(Self {
            stdin: io::stdin().as_fd().try_clone_to_owned()?,
            stdout: io::stdout().as_fd().try_clone_to_owned()?,
            stderr: io::stderr().as_fd().try_clone_to_owned()?,
            terminal,
        })
    }

    /// Which of stdin, stdout and stderr are worth a stream: the null device is not.
    pub(crate) fn wanted(&self) -> [bool; 3] {
        [&self.stdin, &self.stdout, &self.stderr].map(|fd| !is_null(fd))
    }

    /// The terminal's rows and columns.
    pub(crate) fn size(&self) -> Option<(u16, u16)> {
        let size = self.terminal.then(|| pty::window_size(&self.stdin).ok())??;
        Some((size.rows, size.columns))
    }

    /// Opens the streams and starts to relay.
    ///
    /// # Errors
    ///
    /// When the guest does not take a stream.
    pub(crate) fn relay(self, vsock: &VsockAddress, tokens: &Tokens) -> io::Result<Relay> {
        let open = |token: &[u8]| -> io::Result<UnixStream> {
            let mut stream = vsock.connect_blocking(Port(protocol::STREAM_PORT))?;
            stream.write_all(token)?;
            Ok(stream)
        };
        let mut relay = Relay { outputs: [None, None] };
        if !tokens.tty.is_empty() {
            let stream = open(&tokens.tty)?;
            relay.outputs[0] = Some(output(stream.try_clone()?, self.stdout)?);
            input(self.stdin, stream)?;
            return Ok(relay);
        }
        if !tokens.stdout.is_empty() {
            relay.outputs[0] = Some(output(open(&tokens.stdout)?, self.stdout)?);
        }
        if !tokens.stderr.is_empty() {
            relay.outputs[1] = Some(output(open(&tokens.stderr)?, self.stderr)?);
        }
        if !tokens.stdin.is_empty() {
            input(self.stdin, open(&tokens.stdin)?)?;
        }
        Ok(relay)
    }
}

fn is_null(fd: &OwnedFd) -> bool {
    rustix::fs::fstat(fd).is_ok_and(|stat| {
        // (1, 3) is the null device; see devices.txt of the kernel.
        FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
            && stat.st_rdev == rustix::fs::makedev(1, 3)
    })
}

/// Streams being relayed.
#[derive(Debug)]
pub(crate) struct Relay {
    outputs: [Option<Arc<Progress>>; 2],
}

impl Relay {
    /// Waits until at least so many bytes of stdout (or the terminal) and of stderr have reached the host's fds, or can
    /// never reach them because one side has closed. Blocks for as long as the fds' readers do.
    pub(crate) fn finish(&self, written: [u64; 2]) {
        for (output, bytes) in self.outputs.iter().zip(written) {
            if let Some(progress) = output {
                progress.wait_for(bytes);
            }
        }
    }
}

/// How far an output has come.
#[derive(Debug, Default)]
struct Progress {
    /// Bytes delivered, and whether no more will be.
    state: Mutex<(u64, bool)>,
    changed: Condvar,
}

impl Progress {
    fn update(&self, change: impl FnOnce(&mut (u64, bool))) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    fn wait_for(&self, bytes: u64) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let reached =
            self.changed.wait_while(state, |(delivered, ended)| *delivered < bytes && !*ended);
        drop(reached);
    }
}

fn output(stream: UnixStream, to: OwnedFd) -> io::Result<Arc<Progress>> {
    let progress = Arc::new(Progress::default());
    let mine = Arc::clone(&progress);
    thread::Builder::new().name("output".into()).stack_size(STACK).spawn(move || {
        let mut to = File::from(to);
        let mut from = &stream;
        let mut chunk = vec![0; CHUNK];
        loop {
            match from.read(&mut chunk) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => break,
                Ok(length) => {
                    // A reader that has gone is told to the guest by closing the stream: EPIPE there as here.
                    if to.write_all(&chunk[..length]).is_err() {
                        break;
                    }
                    mine.update(|(delivered, _)| *delivered += length as u64);
                }
            }
        }
        drop(stream.shutdown(Shutdown::Both));
        mine.update(|(_, ended)| *ended = true);
    })?;
    Ok(progress)
}

fn input(from: OwnedFd, mut stream: UnixStream) -> io::Result<()> {
    thread::Builder::new().name("input".into()).stack_size(STACK).spawn(move || {
        // Its end is the guest's end of file; an error is the guest's, whose process no longer reads.
        let copied = copy(&mut File::from(from), &mut stream);
        drop(copied.and_then(|()| stream.shutdown(Shutdown::Write)));
    })?;
    Ok(())
}

/// As [`io::copy`], which would probe for splice(2) and falls back to small chunks on terminals.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    loop {
        match from.read(&mut chunk) {
            Ok(0) => return Ok(()),
            // A terminal whose other side has gone.
            Err(error) if error.raw_os_error() == Some(5) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
            Ok(length) => to.write_all(&chunk[..length])?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Relay, output};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn finish_waits_for_the_last_byte_and_not_for_the_end_of_the_stream() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let relay = Relay { outputs: [Some(output(ours, writer.into()).unwrap()), None] };
        guest.write_all(b"last line\n").unwrap();
        relay.finish([10, 0]); // a grandchild still holds `guest`
        let mut text = [0; 10];
        reader.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"last line\n");
    }

    #[test]
    fn a_reader_that_has_gone_ends_the_guests_stream() {
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let relay = Relay { outputs: [Some(output(ours, writer.into()).unwrap()), None] };
        drop(reader);
        guest.write_all(b"nobody reads this").unwrap();
        relay.finish([1000, 0]);
        let mut rest = Vec::new();
        assert_eq!(guest.read_to_end(&mut rest).unwrap_or(0), 0);
    }
}
