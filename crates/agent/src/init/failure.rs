//! Why a process could not be set up, in words for the client.

use std::io;

use crate::error::words;

/// The whole chain, as text: it travels to PID 1 and from there to the client.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Failure(pub(super) String);

/// Adds what was being done to an error.
pub(super) trait During<T> {
    /// Says which action failed: "mount /proc".
    fn during(self, action: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> During<T> for Result<T, E> {
    fn during(self, action: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| Failure(format!("{}: {}", action(), words(&error.into()))))
    }
}
