//! What can go wrong in a device process.

use std::io;
use std::path::PathBuf;

/// A failure of a device process.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An inherited file descriptor is closed, of another kind, or named twice.
    #[error("descriptor {fd}, named as {name}, is not {expected}")]
    Descriptor {
        /// Its number.
        fd: i32,
        /// The field of the configuration.
        name: &'static str,
        /// What it should be: `a listening Unix socket`.
        expected: &'static str,
    },
    /// A step of building the jail failed.
    #[error("cannot {action}")]
    Jail {
        /// A verb phrase: `leave the network namespace`.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The shared directory is not there or cannot be mounted.
    #[error("cannot share {}", path.display())]
    Share {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// System calls cannot be limited.
    #[error("cannot limit the system calls of the device process")]
    Seccomp {
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A device cannot go on.
    #[error("the {device} device stopped")]
    Device {
        /// `vsock` or `fs`.
        device: &'static str,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
