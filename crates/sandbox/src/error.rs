//! What can go wrong with a sandbox.
//!
//! - A variant's text says what we were doing and to what; it never repeats its source. Whoever prints an error prints the
//!   chain ([`Chain`]), so that each fact appears once.
//! - Callers branch on [`Error::kind`], never on text.
//! - An error is either returned or logged, not both. Logging happens at the doors.

use std::error::Error as StdError;
use std::path::PathBuf;
use std::{fmt, io};

use serde::{Deserialize, Serialize};

use crate::status::{Operation, Status};

/// The class of a failure: what a caller can do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// The sandbox, container or process does not exist.
    NotFound,
    /// One by that id exists already.
    AlreadyExists,
    /// The request can never succeed as written.
    InvalidArgument,
    /// The request is lawful, but not in the present status.
    InvalidState,
    /// This hypervisor, guest or host cannot do it; the message names which.
    Unsupported,
    /// The other side went away or did not answer in time; the same request may succeed later.
    Unavailable,
    /// Our fault, or a host fault we have no better word for.
    Internal,
}

/// A failure of a sandbox operation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The id cannot be a container's. The first words are runc's.
    #[error("invalid container ID format: {why}")]
    InvalidId {
        /// What is wrong with it.
        why: String,
    },
    /// There is a container by that id. The words are runc's.
    #[error("container with given ID already exists: {id}")]
    IdTaken {
        /// The id.
        id: String,
    },
    /// No container by that id under the runtime's root. The first words are runc's; containerd's runc shim and Docker
    /// look for "does not exist".
    #[error("container does not exist: {id}")]
    NoSuchContainer {
        /// The id asked for.
        id: String,
    },
    /// The operation is not lawful now; see [`Status::allows`].
    #[error("{}", status.refusal(*operation, id))]
    WrongStatus {
        /// The container.
        id: String,
        /// What was asked.
        operation: Operation,
        /// What the container's status was when we looked.
        status: Status,
    },
    /// The bundle or its spec cannot be run.
    #[error("{what}")]
    InvalidSpec {
        /// The member and what is wrong with it.
        what: String,
    },
    /// A file that should be JSON or TOML is not, or has a member that we do not know.
    #[error("cannot understand {}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What the parser said, with line and column.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The request cannot be done by a VM, or not yet.
    #[error("{what}")]
    Unsupported {
        /// What, why, and what to do instead.
        what: String,
    },
    /// A call on the host failed.
    #[error("cannot {action} {}", path.display())]
    Host {
        /// A verb phrase: `create cgroup`.
        action: &'static str,
        /// The object of the verb.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A hook failed, or did not end in time.
    #[error("error running {when} hook {}: {what}", path.display())]
    Hook {
        /// `prestart`, `poststop`.
        when: &'static str,
        /// Its program.
        path: PathBuf,
        /// Its exit status and last words.
        what: String,
    },
    /// The virtual machine.
    #[error(transparent)]
    Hypervisor(#[from] hypervisor::Error),
    /// The root file system or a mount.
    #[error(transparent)]
    Storage(#[from] storage::Error),
    /// A network interface.
    #[error(transparent)]
    Network(#[from] network::Error),
    /// A cgroup of the host.
    #[error(transparent)]
    Cgroup(#[from] linux::cgroup::Error),
    /// The guest image.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// The guest's agent refused, with its own words and kind.
    #[error("{message}")]
    Agent {
        /// The agent's text. It comes from the guest: shown, escaped, never parsed.
        message: String,
        /// The class the agent gave it.
        kind: ErrorKind,
    },
    /// The guest did not do something in time.
    #[error("the guest did not {what} within {seconds} s; its console is in {}", console.display())]
    GuestTimeout {
        /// A verb phrase.
        what: &'static str,
        /// The deadline.
        seconds: u64,
        /// The console's log.
        console: PathBuf,
    },
    /// The sandbox process went away during the request.
    #[error("the sandbox process of {id} ended during the request")]
    SandboxGone {
        /// The container.
        id: String,
    },
    /// An error that another process of ours met, told by its chain.
    #[error("{text}")]
    Told {
        /// The chain.
        text: String,
        /// Its class.
        kind: ErrorKind,
    },
}

impl Error {
    /// The class of this failure.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::InvalidId { .. }
            | Self::InvalidSpec { .. }
            | Self::Syntax { .. }
            | Self::Cgroup(_) => ErrorKind::InvalidArgument,
            Self::IdTaken { .. } => ErrorKind::AlreadyExists,
            Self::NoSuchContainer { .. } => ErrorKind::NotFound,
            Self::WrongStatus { .. } => ErrorKind::InvalidState,
            Self::Unsupported { .. } | Self::Hypervisor(hypervisor::Error::Unsupported { .. }) => {
                ErrorKind::Unsupported
            }
            Self::GuestTimeout { .. } | Self::SandboxGone { .. } => ErrorKind::Unavailable,
            Self::Agent { kind, .. } | Self::Told { kind, .. } => *kind,
            Self::Host { .. }
            | Self::Hook { .. }
            | Self::Hypervisor(_)
            | Self::Storage(_)
            | Self::Network(_)
            | Self::Image(_) => ErrorKind::Internal,
        }
    }

    /// Makes a `map_err` argument out of a verb phrase and its object.
    pub(crate) fn host(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Host { action, path, source }
    }

    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::InvalidSpec { what: what.into() }
    }
}

/// Prints an error and all its sources on one line, `a: b: c`.
#[derive(Debug)]
pub struct Chain<'a>(pub &'a dyn StdError);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

/// Makes text that came from a guest fit for a terminal and a log: control characters are escaped, and no more than a
/// screenful is kept.
pub(crate) fn from_guest(text: &str) -> String {
    const LONGEST: usize = 2000;
    let mut escaped = String::new();
    for character in text.chars().take(LONGEST) {
        if character.is_control() {
            escaped.extend(character.escape_default());
        } else {
            escaped.push(character);
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::{Chain, Error, ErrorKind, from_guest};
    use std::io;

    #[test]
    fn a_chain_says_each_thing_once() {
        let error =
            Error::host("create cgroup", "/sys/fs/cgroup/x")(io::Error::from_raw_os_error(13));
        assert_eq!(error.kind(), ErrorKind::Internal);
        assert_eq!(
            Chain(&error).to_string(),
            "cannot create cgroup /sys/fs/cgroup/x: Permission denied (os error 13)"
        );
    }

    #[test]
    fn a_guest_cannot_write_escape_sequences_to_a_terminal() {
        assert_eq!(from_guest("a\u{1b}[2Jb\n"), "a\\u{1b}[2Jb\\n");
    }
}
