//! Makes a container's root file system and mounts visible in a guest through one shared directory.
//!
//! [`plan`] decides, from the OCI spec alone and without touching anything, which host directories and files are bound
//! below the share and what the guest mounts; [`attach`] does it; [`detach`] undoes it.

#![forbid(unsafe_code)]

use std::io;
use std::path::{Path, PathBuf};

use linux::ledger::Ledger;
use linux::mount::Propagation;
use protocol::oci;

/// What a container is made from.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// The container's id; it becomes a file name.
    pub container_id: &'a str,
    /// The bundle, an absolute path: what relative paths of the spec are relative to.
    pub bundle: &'a Path,
    /// The spec.
    pub spec: &'a oci::Spec,
}

/// What is at the source of a bind mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A Unix socket.
    Socket,
    /// A named pipe.
    Fifo,
    /// A block device.
    Block,
    /// A character device.
    Character,
    /// Nothing.
    Missing,
}

/// A source as a probe saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// What it is, symlinks followed.
    pub kind: Kind,
    /// Its path without symlinks.
    pub path: PathBuf,
    /// The type of the file system that it is the root of a mount of (`tmpfs`), if it is one.
    pub fstype: Option<String>,
    /// The size of that file system in bytes.
    pub size: u64,
}

/// What to bind below the share, and what the guest mounts.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The container's id.
    pub container_id: String,
    /// In the order to be made.
    pub binds: Vec<Bind>,
    /// The container's root as the guest sees it: the guest spec's `root.path`.
    pub guest_root: String,
    /// The guest spec's `mounts`, in the spec's order.
    pub guest_mounts: Vec<oci::Mount>,
    /// What the user should know, one sentence each.
    pub warnings: Vec<String>,
}

/// One bind mount below the share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// The host's directory or file.
    pub source: PathBuf,
    /// Where, relative to the share: `<container>/rootfs`, `<container>/mounts/0`.
    pub name: PathBuf,
    /// Enforced on the host: the guest cannot write whatever it does.
    pub read_only: bool,
    /// With the mounts below it.
    pub recursive: bool,
    /// Whether `source` is a directory.
    pub is_directory: bool,
    /// Whether mounts that the host makes below `source` later show up.
    pub propagation: Propagation,
}

/// A failure to share a container's files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The spec's root is not usable.
    #[error("invalid root: {problem}")]
    Root {
        /// What is wrong.
        problem: String,
    },
    /// A mount of the spec is not usable.
    #[error("invalid mount {destination}: {problem}")]
    Mount {
        /// Its destination in the container.
        destination: String,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// A call on the host failed.
    #[error("cannot {action} {}", path.display())]
    Host {
        /// A verb phrase: `bind`.
        action: &'static str,
        /// The object of the verb.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Decides how the container's files get into the guest. Pure, but for `probe`.
///
/// # Errors
///
/// [`Error::Root`] or [`Error::Mount`], naming the first that is wrong; what `probe` says.
pub fn plan(
    input: &Input<'_>,
    probe: impl Fn(&Path) -> Result<Source, Error>,
) -> Result<Plan, Error> {
    let _ = (input, probe);
    Err(Error::Root { problem: "not yet".to_owned() })
}

/// What is at `path` on this host: the probe for [`plan`].
///
/// # Errors
///
/// [`Error::Host`], but not for what is missing.
pub fn probe(path: &Path) -> Result<Source, Error> {
    let kind = Kind::Missing;
    Ok(Source { kind, path: path.to_owned(), fstype: None, size: 0 })
}

/// Makes the binds of `plan` below `share`, in the calling thread's mount namespace. What is made on disk goes into
/// `ledger` before.
///
/// # Errors
///
/// [`Error::Host`]; what was bound before is undone.
pub fn attach(plan: &Plan, share: &Path, ledger: &mut Ledger) -> Result<(), Error> {
    let _ = (plan, share, ledger);
    Ok(())
}

/// Undoes what [`attach`] made for a container, in the calling thread's mount namespace. What is not there is a success.
///
/// # Errors
///
/// [`Error::Host`].
pub fn detach(container_id: &str, share: &Path) -> Result<(), Error> {
    let _ = (container_id, share);
    Ok(())
}
