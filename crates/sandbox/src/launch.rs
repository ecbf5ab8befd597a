//! What passes between `create` and the sandbox process that it starts: one socket, one JSON object a line each way.
//!
//! `create` sends a [`Launch`]; the sandbox process answers with [`Report`]s. To [`Report::Hooks`] `create` answers with a
//! [`HooksDone`]; [`Report::Ready`] or [`Report::Failed`] is the last. When `create` dies, the sandbox process reads the
//! end of the socket and gives up too. Where the caller stays for the container's whole life (`run`, `do`), the socket
//! stays open as long: its end is the caller's, and then the container's.

use std::io;
use std::os::unix::net::UnixStream as SyncStream;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use crate::config::Config;
use crate::error::{Error, ErrorKind};
use crate::state::Root;

/// Everything that a sandbox process needs to know.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Launch {
    pub(crate) root: Root,
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    /// `config.json`.
    pub(crate) spec: Value,
    /// Annotations already applied.
    pub(crate) config: Config,
    pub(crate) systemd_cgroup: bool,
    /// Whether the sandbox process's standard streams are one terminal in raw mode, for a process with a terminal.
    pub(crate) terminal: bool,
    /// Whether the container shall not outlive the caller.
    pub(crate) foreground: bool,
    /// The program that runs the `device` role, with its first arguments.
    pub(crate) device_program: (PathBuf, Vec<String>),
}

/// What the sandbox process reports.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Report {
    /// Its namespaces are there: the hooks of the runtime's namespace may run.
    Hooks,
    /// The container, or the process, is created; what took how long until then, in milliseconds since the beginning.
    Ready { phases: Vec<(String, u64)> },
    /// It is not, and nothing of it runs any more.
    Failed { text: String, kind: ErrorKind },
}

/// The hooks have run.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct HooksDone;

/// The other end of the launch channel, as the sandbox process sees it.
pub(crate) struct Caller {
    read: BufReader<tokio::net::unix::OwnedReadHalf>,
    write: tokio::net::unix::OwnedWriteHalf,
}

impl Caller {
    pub(crate) fn new(channel: SyncStream) -> io::Result<Self> {
        channel.set_nonblocking(true)?;
        let (read, write) = UnixStream::from_std(channel)?.into_split();
        Ok(Self { read: BufReader::new(read), write })
    }

    pub(crate) async fn report(&mut self, report: &Report) -> io::Result<()> {
        let mut line = serde_json::to_vec(report)?;
        line.push(b'\n');
        self.write.write_all(&line).await
    }

    /// Has `create` run the hooks of the runtime namespace.
    pub(crate) async fn run_hooks(&mut self) -> Result<(), Error> {
        self.report(&Report::Hooks).await.map_err(|_| Self::lost())?;
        let mut line = String::new();
        self.read.read_line(&mut line).await.map_err(|_| Self::lost())?;
        let HooksDone = serde_json::from_str(&line).map_err(|_| Self::lost())?;
        Ok(())
    }

    pub(crate) fn lost() -> Error {
        Error::Told {
            text: "`create` ended, or a hook failed, before the container was created".into(),
            kind: ErrorKind::Unavailable,
        }
    }

    /// Waits for the caller's end. Cancel safe: the caller says nothing more.
    pub(crate) async fn gone(&mut self) {
        let mut line = String::new();
        while self.read.read_line(&mut line).await.is_ok_and(|length| length > 0) {
            line.clear();
        }
    }
}
