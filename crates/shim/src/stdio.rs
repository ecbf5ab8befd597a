//! Joining a process's streams into the guest with what containerd gave for its standard streams: named pipes, or files.
//!
//! The pipes are opened by us, so they can be waited for instead of blocking a thread each. Of every pipe we hold both
//! ends: a containerd that is restarted is then neither the end of a process's input nor a broken pipe to its output, as
//! with containerd's own shims.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Write};
use std::time::Duration;

use sandbox::Streams;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::error::Error;

/// One read of a relay: as much as a pipe holds.
const CHUNK: usize = 64 << 10;

/// How long output that was written before a process ended may take to reach a reader who is slow, or not there.
const DELIVERY: Duration = Duration::from_secs(10);

/// What containerd gave for a process's standard streams. An empty path: no such stream.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stdio {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

impl Stdio {
    /// Which of stdin, stdout and stderr the process shall have.
    pub(crate) fn wanted(&self) -> [bool; 3] {
        [&self.stdin, &self.stdout, &self.stderr].map(|path| !path.is_empty())
    }

    /// Opens what containerd gave, before there is anything to relay.
    ///
    /// # Errors
    ///
    /// When something is not there, or is of a kind that we do not know.
    pub(crate) fn open(&self) -> Result<Opened, Error> {
        let input = (!self.stdin.is_empty()).then(|| Input::open(&self.stdin)).transpose()?;
        let stdout = (!self.stdout.is_empty()).then(|| Output::open(&self.stdout)).transpose()?;
        let wants_stderr = !self.terminal && !self.stderr.is_empty();
        let stderr = wants_stderr.then(|| Output::open(&self.stderr)).transpose()?;
        Ok(Opened { input, stdout, stderr })
    }
}

/// The host's side of a process's standard streams.
#[derive(Debug)]
pub(crate) struct Opened {
    input: Option<Input>,
    stdout: Option<Output>,
    stderr: Option<Output>,
}

#[derive(Debug)]
struct Input {
    read: pipe::Receiver,
    /// While it is open the process's input does not end.
    keep: pipe::Sender,
}

impl Input {
    fn open(path: &str) -> Result<Self, Error> {
        let failed = |error| Error::host("open", path)(error);
        let read = pipe::OpenOptions::new().open_receiver(path).map_err(failed)?;
        let failed = |error| Error::host("open", path)(error);
        let keep = pipe::OpenOptions::new().open_sender(path).map_err(failed)?;
        Ok(Self { read, keep })
    }
}

#[derive(Debug)]
enum Output {
    Pipe(pipe::Sender),
    File(File),
}

impl Output {
    /// `path` is a named pipe's, or a URI as containerd's clients make them for logs.
    fn open(path: &str) -> Result<Self, Error> {
        let failed = |error| Error::host("open", path)(error);
        if let Some(file) = path.strip_prefix("file://") {
            let file = File::options().create(true).append(true).open(file).map_err(failed)?;
            return Ok(Self::File(file));
        }
        let pipe = path.strip_prefix("fifo://").unwrap_or(path);
        if let Some((scheme, _)) = pipe.split_once("://") {
            return Err(Error::Unsupported {
                what: format!(
                    "output to {scheme}:// is not supported; use a named pipe or file://"
                ),
            });
        }
        let sender = pipe::OpenOptions::new().read_write(true).open_sender(pipe).map_err(failed)?;
        Ok(Self::Pipe(sender))
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Pipe(pipe) => pipe.write_all(bytes).await,
            Self::File(file) => file.write_all(bytes),
        }
    }
}

/// Streams being relayed; those that are left end when it is dropped.
#[derive(Debug)]
pub(crate) struct Relay {
    outputs: [Option<watch::Receiver<Progress>>; 2],
    keep: RefCell<Option<pipe::Sender>>,
    tasks: Vec<AbortHandle>,
}

/// How far an output has come.
#[derive(Debug, Default, Clone, Copy)]
struct Progress {
    delivered: u64,
    ended: bool,
}

impl Relay {
    /// Starts to relay.
    pub(crate) fn start(opened: Opened, streams: Streams) -> Self {
        let Opened { input, stdout, stderr } = opened;
        let Streams { stdin, stdout: from_stdout, stderr: from_stderr, tty } = streams;
        let (from_tty, to_tty) = tty.map(UnixStream::into_split).unzip();
        let from_stdout = from_tty.map(Source::Terminal).or(from_stdout.map(Source::Stream));
        let to_guest = to_tty.map(Sink::Terminal).or(stdin.map(Sink::Stream));

        let mut relay = Self { outputs: [None, None], keep: RefCell::new(None), tasks: Vec::new() };
        let outputs = [(from_stdout, stdout), (from_stderr.map(Source::Stream), stderr)];
        for (index, (from, to)) in outputs.into_iter().enumerate() {
            let (Some(from), Some(to)) = (from, to) else { continue };
            let (progress, watched) = watch::channel(Progress::default());
            relay.outputs[index] = Some(watched);
            relay.tasks.push(spawn_local(relay_output(from, to, progress)).abort_handle());
        }
        if let (Some(to), Some(Input { read, keep })) = (to_guest, input) {
            relay.keep.replace(Some(keep));
            relay.tasks.push(spawn_local(relay_input(read, to)).abort_handle());
        }
        relay
    }

    /// Lets the process's input end once all that is in the pipe has been read and its other writers have gone.
    pub(crate) fn close_input(&self) {
        self.keep.take();
    }

    /// Waits until so many bytes of stdout (or the terminal) and of stderr have been delivered, or never will be.
    pub(crate) async fn finish(&self, written: [u64; 2]) {
        for (output, bytes) in self.outputs.iter().zip(written) {
            let Some(output) = output else { continue };
            let mut output = output.clone();
            let reached = output.wait_for(|progress| progress.ended || progress.delivered >= bytes);
            if timeout(DELIVERY, reached).await.is_err() {
                warn!("nobody reads the output of a process that has ended: some of it is lost");
            }
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// A stream from the guest.
enum Source {
    Stream(UnixStream),
    Terminal(OwnedReadHalf),
}

impl Source {
    async fn read(&mut self, chunk: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Stream(stream) => stream.read(chunk).await,
            Self::Terminal(half) => half.read(chunk).await,
        }
    }
}

/// A stream to the guest. Dropping it ends the process's input; a terminal's stays open, as terminals do.
enum Sink {
    Stream(UnixStream),
    Terminal(OwnedWriteHalf),
}

impl Sink {
    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Stream(stream) => stream.write_all(bytes).await,
            Self::Terminal(half) => half.write_all(bytes).await,
        }
    }
}

async fn relay_output(mut from: Source, mut to: Output, progress: watch::Sender<Progress>) {
    let mut chunk = vec![0; CHUNK];
    loop {
        let length = match from.read(&mut chunk).await {
            Ok(0) | Err(_) => break,
            Ok(length) => length,
        };
        if let Err(error) = to.write(&chunk[..length]).await {
            debug!(%error, "an output cannot be written any more");
            break;
        }
        progress.send_modify(|progress| progress.delivered += length as u64);
    }
    progress.send_modify(|progress| progress.ended = true);
}

async fn relay_input(mut from: pipe::Receiver, mut to: Sink) {
    let mut chunk = vec![0; CHUNK];
    loop {
        match from.read(&mut chunk).await {
            Ok(0) | Err(_) => return,
            // A process that does not read its input any more.
            Ok(length) if to.write(&chunk[..length]).await.is_err() => return,
            Ok(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Relay, Stdio};
    use sandbox::Streams;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::path::Path;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;
    use tokio::task::LocalSet;

    fn pipe(dir: &Path, name: &str) -> String {
        let path = dir.join(name);
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
        path.to_string_lossy().into_owned()
    }

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        LocalSet::new().block_on(&runtime, test);
    }

    #[test]
    fn what_a_process_wrote_is_there_and_the_pipe_ends_when_the_relay_does() {
        let dir = tempfile::tempdir().unwrap();
        let stdio = Stdio { stdout: pipe(dir.path(), "out"), ..Stdio::default() };
        run(async {
            let (ours, mut guest) = UnixStream::pair().unwrap();
            let streams = Streams { stdout: Some(ours), ..Streams::default() };
            let relay = Relay::start(stdio.open().unwrap(), streams);
            // A reader that comes late, as a containerd that was restarted does.
            guest.write_all(b"last line").await.unwrap();
            let mut reader = File::options().read(true).open(&stdio.stdout).unwrap();
            relay.finish([9, 0]).await;
            drop(relay); // a grandchild still holds `guest`
            tokio::task::yield_now().await;
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            assert_eq!(text, "last line");
        });
    }

    #[test]
    fn an_input_ends_only_when_it_is_closed_and_its_writer_has_gone() {
        let dir = tempfile::tempdir().unwrap();
        let stdio = Stdio { stdin: pipe(dir.path(), "in"), ..Stdio::default() };
        run(async {
            let (ours, mut guest) = UnixStream::pair().unwrap();
            let streams = Streams { stdin: Some(ours), ..Streams::default() };
            let relay = Relay::start(stdio.open().unwrap(), streams);
            for text in ["one", "two"] {
                let mut writer = File::options().write(true).open(&stdio.stdin).unwrap();
                writer.write_all(text.as_bytes()).unwrap();
                drop(writer);
                let mut bytes = [0; 3];
                guest.read_exact(&mut bytes).await.unwrap();
                assert_eq!(&bytes, text.as_bytes());
            }
            relay.close_input();
            assert_eq!(guest.read(&mut [0]).await.unwrap(), 0);
        });
    }

    #[test]
    fn output_to_a_file_is_appended_and_to_anything_else_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("log");
        std::fs::write(&file, "old ").unwrap();
        let stdout = format!("file://{}", file.display());
        let stdio = Stdio { stdout, ..Stdio::default() };
        run(async {
            let (ours, mut guest) = UnixStream::pair().unwrap();
            let streams = Streams { stdout: Some(ours), ..Streams::default() };
            let relay = Relay::start(stdio.open().unwrap(), streams);
            guest.write_all(b"new").await.unwrap();
            relay.finish([3, 0]).await;
        });
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "old new");
        let stdio = Stdio { stdout: "tcp://x".into(), ..Stdio::default() };
        run(async { assert!(stdio.open().unwrap_err().to_string().contains("tcp://")) });
    }
}
