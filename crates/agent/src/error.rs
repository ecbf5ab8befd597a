//! What can go wrong in the agent, and how the host is told.

use std::error::Error as _;
use std::fmt::Write as _;
use std::io;

use nix::errno::Errno;
use ttrpc::Code;

/// A failure of a request. Clients of runc parse some of these texts, so they are runc's.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// There is no container of that id.
    #[error("container {id} does not exist")]
    NoContainer { id: String },
    /// There is no such exec.
    #[error("process {exec} does not exist in container {id}")]
    NoProcess { id: String, exec: String },
    /// The process has ended: nothing can be done to it any more.
    #[error("process already finished")]
    Finished,
    /// The request is not lawful in the container's status.
    #[error("{0}")]
    WrongState(&'static str),
    /// The id is taken.
    #[error("{what} with given ID already exists: {id}")]
    Exists { what: &'static str, id: String },
    /// The request cannot be understood or honoured.
    #[error("{0}")]
    Invalid(String),
    /// What the process that sets up a container said when it failed.
    #[error("{0}")]
    Setup(String),
    /// A call on the guest's kernel failed.
    #[error("cannot {action}")]
    Guest { action: String, source: io::Error },
    /// The network could not be configured.
    #[error("cannot {action}")]
    Network { action: String, source: Box<rtnetlink::Error> },
    /// Something took longer than it may.
    #[error("{what} took longer than {seconds} s")]
    Deadline { what: &'static str, seconds: u64 },
}

impl Error {
    /// The error of having failed to do `action`.
    pub(crate) fn guest(action: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Guest { action: action.into(), source: source.into() }
    }

    fn code(&self) -> Code {
        match self {
            Self::NoContainer { .. } | Self::NoProcess { .. } | Self::Finished => Code::NOT_FOUND,
            Self::WrongState(_) => Code::FAILED_PRECONDITION,
            Self::Exists { .. } => Code::ALREADY_EXISTS,
            Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::Deadline { .. } => Code::DEADLINE_EXCEEDED,
            Self::Setup(_) | Self::Guest { .. } | Self::Network { .. } => Code::INTERNAL,
        }
    }

    /// The whole chain of causes in one line.
    pub(crate) fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = self.source();
        while let Some(error) = source {
            let words = match error.downcast_ref::<io::Error>() {
                Some(error) => words(error),
                None => error.to_string(),
            };
            write!(text, ": {words}").expect("a string takes everything");
            source = error.source();
        }
        text
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error.chain()))
    }
}

/// An error of the kernel in the words that Go's programs, and so the readers of runc's errors, have for it.
pub(crate) fn words(error: &io::Error) -> String {
    let Some(number) = error.raw_os_error() else { return error.to_string() };
    let text = Errno::from_raw(number).desc();
    let mut letters = text.chars();
    let first = letters.next().map(|letter| letter.to_ascii_lowercase());
    // "I/O error" keeps its capital.
    if letters.clone().next().is_some_and(|letter| !letter.is_lowercase()) {
        return text.to_owned();
    }
    first.into_iter().chain(letters).collect()
}

/// Adds what was being done to a failure.
pub(crate) trait Doing<T> {
    /// Says which action failed, in words that follow "cannot".
    fn doing(self, action: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, action: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::guest(action(), source))
    }
}

#[cfg(test)]
mod tests {
    use super::{Error, words};
    use std::io;

    #[test]
    fn kernel_errors_are_said_as_go_says_them() {
        let say = |number| words(&io::Error::from_raw_os_error(number));
        assert_eq!(say(2), "no such file or directory");
        assert_eq!(say(13), "permission denied");
        assert_eq!(say(8), "exec format error");
        assert_eq!(say(5), "I/O error");
    }

    #[test]
    fn a_chain_says_each_fact_once() {
        let error = Error::guest("mount /x", io::Error::from_raw_os_error(2));
        assert_eq!(error.chain(), "cannot mount /x: no such file or directory");
    }
}
