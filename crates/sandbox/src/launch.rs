//! What passes between `create` and the two processes that it starts: one socket each, one JSON object a line each way.
//!
//! ```text
//! create                     stand-in (the container's pid)        sandbox process (the machine)
//!   Order ------------------> namespaces, terminal
//!         <---------- Joined
//!   Launch -----------------------------------------------------> cgroup, namespaces, control.sock
//!   (hooks run here)                                               machine boots
//!         <----------------------------------------------- Listening
//!   Go ---------------------> asks over control.sock: create -----> container
//!         <---------- Ready / Failed
//! ```
//!
//! For a container that joins a sandbox there is no third column: its stand-in asks the sandbox process that is there.
//! When `create` dies, both read the end of their sockets and give up. Where the caller stays for the container's whole
//! life (`run`, `do`), the stand-in's socket stays open as long: its end is the caller's, and then the container's.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use protocol::oci::{Hook, LinuxResources};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::error::ErrorKind;
use crate::state::VmDir;

/// Everything that a new sandbox process needs to know.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Launch {
    /// Its directory.
    pub(crate) vm: VmDir,
    /// The first container, whose id the guest's host name falls back on.
    pub(crate) id: String,
    /// The first container's host name: the guest's.
    pub(crate) hostname: String,
    /// The first container's limits: the machine's size.
    pub(crate) resources: Option<LinuxResources>,
    /// The first container's cgroup directories: the machine's.
    pub(crate) cgroups: Vec<PathBuf>,
    /// The network namespace whose interfaces the guest gets.
    pub(crate) netns: PathBuf,
    /// Annotations already applied.
    pub(crate) config: Config,
    /// The program that runs the `device` role, with its first arguments.
    pub(crate) device_program: (PathBuf, Vec<String>),
}

/// What a stand-in shall stand for.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    /// Where the sandbox process is asked.
    pub(crate) vm: VmDir,
    /// The container.
    pub(crate) id: String,
    /// Whether its standard streams are one terminal in raw mode, for a process with a terminal.
    pub(crate) terminal: bool,
    /// The process.
    pub(crate) what: Process,
}

/// A process that a stand-in has run.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Process {
    /// One more process in a container: the OCI spec's `process`, as JSON.
    Exec(String),
    /// A new container's init.
    Init(Box<Init>),
}

/// A new container.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Init {
    /// The network namespace to be in; a new one where there is none.
    pub(crate) netns: Option<PathBuf>,
    /// The spec that the guest is given.
    pub(crate) spec: String,
    /// What the guest sees of the host's files.
    pub(crate) files: storage::Plan,
    /// The spec's hooks of the container's namespaces, with the state they read.
    pub(crate) hooks: Vec<Hook>,
    pub(crate) state: String,
    /// Whether the container shall not outlive the caller.
    pub(crate) foreground: bool,
}

/// What either process reports.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Report {
    /// The stand-in is in its namespaces: the hooks of the runtime's namespace may run.
    Joined,
    /// The machine of the pool runs: its sandbox process waits for its launch.
    Claimed,
    /// The sandbox process takes requests.
    Listening,
    /// The process is there; what took how long until then, in milliseconds since the machine's beginning.
    Ready { phases: Vec<(String, u64)> },
    /// It is not, and nothing of it runs any more.
    Failed { text: String, kind: ErrorKind },
}

/// To the stand-in: the hooks have run, the sandbox process listens.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Go;

/// One end of such a socket. An error, also its end, means that the other process has gone.
#[derive(Debug)]
pub(crate) struct Channel(BufReader<UnixStream>);

impl Channel {
    /// Both ends; one is passed to a child.
    pub(crate) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok((Self(BufReader::new(ours)), theirs.into()))
    }

    /// The end of a process that listens at `path`; it has so long for each thing that it says.
    pub(crate) fn connect(path: &Path, patience: Duration) -> io::Result<Self> {
        let socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(patience))?;
        Ok(Self(BufReader::new(socket)))
    }

    /// The end that this process was started with.
    pub(crate) fn inherited(fd: OwnedFd) -> Self {
        Self(BufReader::new(UnixStream::from(fd)))
    }

    pub(crate) fn tell(&mut self, message: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        self.0.get_mut().write_all(&line)
    }

    pub(crate) fn hear<T: DeserializeOwned>(&mut self) -> io::Result<T> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }

    /// The socket, to wait for its end. Nothing more may have been said.
    pub(crate) fn into_socket(self) -> UnixStream {
        self.0.into_inner()
    }

    /// The socket, to poll for its end.
    pub(crate) fn socket(&self) -> &UnixStream {
        self.0.get_ref()
    }
}
