//! What can go wrong at containerd's door, and the status code by which containerd is told.

use std::io;
use std::path::PathBuf;

use containerd_shim_protos::ttrpc;
use sandbox::{Chain, ErrorKind};
use ttrpc::{Code, get_status};

/// A failure of the shim.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The command line.
    #[error("{what}")]
    Usage {
        /// What is wrong with it.
        what: String,
    },
    /// The engine.
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    /// No container, or no process of it, by that id.
    #[error("{what} not found")]
    NotFound {
        /// `container x`, `exec y of container x`.
        what: String,
    },
    /// One by that id is there already.
    #[error("{what} already exists")]
    AlreadyExists {
        /// As for [`Error::NotFound`].
        what: String,
    },
    /// The process has ended. containerd's clients look for these words.
    #[error("process already finished: {what}")]
    Finished {
        /// As for [`Error::NotFound`].
        what: String,
    },
    /// The process is not in a state for it.
    #[error("cannot {operation} {what}: it is {state}")]
    WrongState {
        /// `delete`.
        operation: &'static str,
        /// As for [`Error::NotFound`].
        what: String,
        /// `running`.
        state: &'static str,
    },
    /// The sandbox that a container belongs to does not run.
    #[error("the sandbox {sandbox} of this container does not run; remove its pod")]
    NoSandbox {
        /// The sandbox's id.
        sandbox: String,
    },
    /// A request that cannot be done.
    #[error("{what}")]
    Invalid {
        /// What is wrong with it.
        what: String,
    },
    /// A request that this shim does not do.
    #[error("{what}")]
    Unsupported {
        /// What, and why.
        what: String,
    },
    /// A message that cannot be read or written.
    #[error("cannot {action} {what}")]
    Message {
        /// `decode`.
        action: &'static str,
        /// What kind of message.
        what: &'static str,
        /// What the codec said.
        source: containerd_shim_protos::protobuf::Error,
    },
    /// A call on the host failed.
    #[error("cannot {action} {}", path.display())]
    Host {
        /// A verb phrase.
        action: &'static str,
        /// Its object.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The ttrpc server.
    #[error("cannot serve on {address}")]
    Serve {
        /// The socket.
        address: String,
        /// What it said.
        source: ttrpc::Error,
    },
}

impl Error {
    pub(crate) fn usage(what: impl Into<String>) -> Self {
        Self::Usage { what: what.into() }
    }

    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid { what: what.into() }
    }

    /// Makes a `map_err` argument out of a verb phrase and its object.
    pub(crate) fn host<E: Into<io::Error>>(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> Self {
        let path = path.into();
        move |source| Self::Host { action, path, source: source.into() }
    }

    /// The status code that containerd's errdefs package turns into an error to be told by its kind.
    fn code(&self) -> Code {
        match self {
            Self::NotFound { .. } | Self::Finished { .. } => Code::NOT_FOUND,
            Self::AlreadyExists { .. } => Code::ALREADY_EXISTS,
            Self::WrongState { .. } => Code::FAILED_PRECONDITION,
            Self::NoSandbox { .. } => Code::UNAVAILABLE,
            Self::Invalid { .. } | Self::Usage { .. } | Self::Message { .. } => {
                Code::INVALID_ARGUMENT
            }
            Self::Unsupported { .. } => Code::UNIMPLEMENTED,
            Self::Host { .. } | Self::Serve { .. } => Code::UNKNOWN,
            Self::Sandbox(error) => match error.kind() {
                ErrorKind::NotFound => Code::NOT_FOUND,
                ErrorKind::AlreadyExists => Code::ALREADY_EXISTS,
                ErrorKind::InvalidArgument => Code::INVALID_ARGUMENT,
                ErrorKind::InvalidState => Code::FAILED_PRECONDITION,
                ErrorKind::Unsupported => Code::UNIMPLEMENTED,
                ErrorKind::Unavailable => Code::UNAVAILABLE,
                ErrorKind::Internal => Code::UNKNOWN,
            },
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(get_status(error.code(), Chain(&error).to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::Error;
    use containerd_shim_protos::ttrpc::{self, Code};

    #[test]
    fn containerd_is_told_the_kind_and_the_chain() {
        let error = Error::host("mount", "/x")(std::io::Error::from_raw_os_error(13));
        let ttrpc::Error::RpcStatus(status) = error.into() else { panic!() };
        assert_eq!(status.message, "cannot mount /x: Permission denied (os error 13)");
        let finished = Error::Finished { what: "container x".into() };
        let ttrpc::Error::RpcStatus(status) = finished.into() else { panic!() };
        assert_eq!(status.code(), Code::NOT_FOUND);
    }
}
