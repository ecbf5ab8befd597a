//! The door of a sandbox process: what the short-lived `kata-runtime` processes and the stand-ins ask of it.
//!
//! A Unix socket in the VM's directory, mode 0700, so only its owner gets here. One JSON object a line each way: a
//! [`Request`], then its [`Response`]. A connection that asked for a process (a container's init, or an exec) is that
//! process's life line: when it ends before the process has, the guest's process is killed, since whoever stood for it on
//! the host is gone.

use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use hypervisor::VsockAddress;
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind};
use crate::state::{ContainerDir, VmDir};
use crate::stdio::Tokens;

/// The longest request or answer. A process with a large environment is the largest of them.
pub(crate) const LONGEST_LINE: u64 = 8 << 20;

/// A request, and the container that it is about.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Asked {
    pub(crate) container: String,
    pub(crate) request: Request,
}

/// Something asked of a sandbox process about one container. An empty `exec` is the container's init.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Request {
    /// Create the container, whose directory and record are there.
    Create(Box<NewContainer>),
    /// Run the user's program of a created container.
    Start,
    /// Send a signal to a process, or to every process of the container.
    Signal {
        exec: String,
        signal: u32,
        all: bool,
    },
    /// Run one more process.
    Exec {
        /// The OCI spec's `process`.
        process: String,
        streams: [bool; 3],
        size: Option<(u16, u16)>,
        /// The host process that will stand for it.
        pid: u32,
    },
    /// Tell a process's terminal its size, as rows and columns.
    Resize {
        exec: String,
        rows: u16,
        columns: u16,
    },
    /// Wait for a process's end.
    Wait {
        exec: String,
    },
    /// Freeze, thaw.
    Pause,
    Resume,
    /// Change limits; the OCI spec's `linux.resources`, as JSON.
    Update {
        resources: String,
    },
    /// Figures.
    Stats,
    /// The processes of the container in the guest.
    Processes,
    /// Wait until nothing of a container that has ended is left in the sandbox.
    Release,
    /// Nobody is there who would delete the container: it shall go with its process.
    Disown,
}

/// A container to be created in a sandbox.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct NewContainer {
    /// The spec that the guest is given.
    pub(crate) spec: String,
    /// What the guest sees of the host's files.
    pub(crate) files: storage::Plan,
    /// Which of stdin, stdout and stderr will be opened.
    pub(crate) streams: [bool; 3],
    /// The terminal's rows and columns, where there is one.
    pub(crate) size: Option<(u16, u16)>,
    /// The mount namespace in which the host's files are; that of the container's process where it is none.
    pub(crate) origin: Option<PathBuf>,
}

/// The answer to a [`Request`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Response {
    /// Done.
    Done,
    /// A process is there; an empty `exec` is a container's init. For that one also what took how long until then, in
    /// milliseconds.
    Process { exec: String, tokens: Tokens, vsock: VsockAddress, phases: Vec<(String, u64)> },
    /// A process has ended: its exit code, and what it had written to stdout (or its terminal) and stderr.
    Ended { code: u8, written: [u64; 2] },
    /// Figures.
    Stats(Box<Stats>),
    /// Processes.
    Processes(Processes),
    /// It could not be done.
    Failed { text: String, kind: ErrorKind },
}

/// The processes of a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Processes {
    /// The host's pids that stand for them: one stand-in for each.
    pub host: Vec<u32>,
    /// The guest's own.
    pub guest: Vec<GuestProcess>,
}

/// A process in the guest, with its pid in the guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the columns of ps(1)")]
pub struct GuestProcess {
    pub pid: u32,
    pub ppid: u32,
    pub uid: u32,
    pub cpu_ms: u64,
    pub tty: String,
    pub command: String,
}

/// A container's figures, as its cgroup in the guest has them. Bytes and microseconds.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[expect(missing_docs, reason = "named as in the kernel's cgroup-v2.rst")]
pub struct Stats {
    pub cpu_usage_us: u64,
    pub cpu_user_us: u64,
    pub cpu_system_us: u64,
    pub cpu_periods: u64,
    pub cpu_throttled_periods: u64,
    pub cpu_throttled_us: u64,
    pub memory_usage: u64,
    pub memory_limit: u64,
    pub memory_peak: u64,
    pub swap_usage: u64,
    pub memory_stat: std::collections::BTreeMap<String, u64>,
    pub pids: u64,
    pub pids_limit: u64,
    pub oom_kills: u64,
}

/// [`Asked`], not owned.
#[derive(Serialize)]
struct AskedRef<'a> {
    container: &'a str,
    request: &'a Request,
}

/// A connection to a sandbox process, from a synchronous program.
#[derive(Debug)]
pub(crate) struct Client {
    stream: BufReader<UnixStream>,
    id: String,
}

impl Client {
    /// Connects to the sandbox process of `container`.
    pub(crate) fn connect(container: &ContainerDir) -> Result<Self, Error> {
        Self::connect_to(container.vm(), container.id().as_str())
    }

    pub(crate) fn connect_to(vm: &VmDir, id: &str) -> Result<Self, Error> {
        let gone = |_| Error::SandboxGone { id: id.to_owned() };
        let stream = UnixStream::connect(vm.control()).map_err(gone)?;
        Ok(Self { stream: BufReader::new(stream), id: id.to_owned() })
    }

    /// Limits how long [`Self::receive`] waits.
    pub(crate) fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.get_ref().set_read_timeout(timeout)
    }

    /// Sends a request; its answer comes by [`Self::receive`].
    pub(crate) fn send(&mut self, request: &Request) -> Result<(), Error> {
        let gone = |_| Error::SandboxGone { id: self.id.clone() };
        let asked = AskedRef { container: &self.id, request };
        let mut line = serde_json::to_vec(&asked).map_err(io::Error::from).map_err(gone)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).map_err(gone)
    }

    /// Receives the next answer; a failure told by the sandbox process is an error here.
    pub(crate) fn receive(&mut self) -> Result<Response, Error> {
        let gone = |_| Error::SandboxGone { id: self.id.clone() };
        let mut line = Vec::new();
        io::Read::take(&mut self.stream, LONGEST_LINE)
            .read_until(b'\n', &mut line)
            .map_err(gone)?;
        match serde_json::from_slice(&line).map_err(io::Error::from).map_err(gone)? {
            Response::Failed { text, kind } => Err(Error::Told { text, kind }),
            response => Ok(response),
        }
    }

    /// Asks and waits for the answer.
    pub(crate) fn ask(&mut self, request: &Request) -> Result<Response, Error> {
        self.send(request)?;
        self.receive()
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.get_ref().as_fd()
    }
}
