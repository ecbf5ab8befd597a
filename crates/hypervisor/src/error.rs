//! What can go wrong with a machine.

use std::io;
use std::path::PathBuf;

use crate::{Port, VmExit};

/// A failure of a hypervisor driver.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No driver by that name.
    #[error("there is no hypervisor `{name}`; there is: qemu")]
    NoSuchDriver {
        /// The name asked for.
        name: String,
    },
    /// The driver does not claim this in its [`Capabilities`].
    #[error("{driver} cannot {operation}")]
    Unsupported {
        /// The driver's name.
        driver: &'static str,
        /// A verb phrase: `add a disk while running`.
        operation: &'static str,
    },
    /// A program that a machine needs is not there or cannot be started.
    #[error("cannot start {}; install it (Debian: {package}) or name it in the configuration", program.display())]
    Program {
        /// The program.
        program: PathBuf,
        /// Debian's package of it.
        package: &'static str,
        /// What execve(2) said.
        source: io::Error,
    },
    /// The hypervisor ended by itself.
    #[error("{driver} ended {exit}")]
    Ended {
        /// The driver's name.
        driver: &'static str,
        /// How.
        exit: VmExit,
    },
    /// The hypervisor refused a command.
    #[error("{driver} refused to {operation}: {message}")]
    Refused {
        /// The driver's name.
        driver: &'static str,
        /// A verb phrase: `add a network interface`.
        operation: &'static str,
        /// Its own words.
        message: String,
    },
    /// No answer in time.
    #[error("{driver} did not {operation} within {seconds} s")]
    Timeout {
        /// The driver's name.
        driver: &'static str,
        /// A verb phrase.
        operation: &'static str,
        /// The deadline.
        seconds: u64,
    },
    /// The guest does not take a stream to this port.
    #[error("the guest took no stream to its port {}", port.0)]
    Connect {
        /// The port.
        port: Port,
        /// What the carrier said.
        source: io::Error,
    },
    /// A call on the host failed.
    #[error("cannot {action} {}", path.display())]
    Host {
        /// A verb phrase: `listen on`.
        action: &'static str,
        /// The object of the verb.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Adds the verb and the path that [`io::Error`] lacks.
pub(crate) fn host(
    action: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(io::Error) -> Error {
    let path = path.into();
    move |source| Error::Host { action, path, source }
}
