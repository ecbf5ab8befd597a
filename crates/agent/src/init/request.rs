//! What PID 1 tells a `container-init`, and what it is told back.
//!
//! The request is JSON in a memfd, which comes with the process's standard streams as the first message of a
//! `SOCK_SEQPACKET` socket pair, see unix(7). The answers, and the word to start, are messages of it too. Its other end closes with the successful execve(2) of the user's program.

use std::path::PathBuf;

use crate::marks::Marks;
use protocol::oci;
use serde::{Deserialize, Serialize};

/// What to become.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) container: String,
    /// The directory of the container's cgroup.
    pub(crate) cgroup: PathBuf,
    pub(crate) process: oci::Process,
    pub(crate) seccomp: Option<oci::LinuxSeccomp>,
    /// Rows and columns of the terminal, if the process shall have one.
    pub(crate) terminal: Option<(u16, u16)>,
    pub(crate) role: Role,
}

/// Which process of a container to become.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Role {
    /// Its first, which makes the container.
    Init(Box<oci::Spec>),
    /// One more, in the namespaces of a process that is there.
    Exec { member: u32, user_namespace: bool },
}

/// What a `container-init` says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Report {
    /// The process is there; its pid in the guest's root pid namespace.
    Forked(u32, Marks),
    /// The terminal's master is attached to this message.
    Terminal,
    /// All is ready for the user's program; a container's init now waits for the word to start it.
    Ready(Marks),
    /// It could not be done, in runc's words where clients read them.
    Failed(String),
}

/// The word that comes with a request, and the standard streams.
pub(crate) const ORDER: &[u8] = b"order";

/// The word to start the user's program.
pub(crate) const START: &[u8] = b"start";
