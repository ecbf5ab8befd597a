//! Makes a container's root file system and mounts visible in a guest through one shared directory.
//!
//! [`plan`] decides, from the OCI spec and what a probe sees, which host directories and files are bound below the
//! share and what the guest mounts; [`attach`] does it; [`detach`] undoes it.
//!
//! # Who is trusted
//!
//! The bundle comes from the caller's side and may be clumsy, or name paths that an unprivileged user can swap: sources
//! are resolved once, when they are planned, and opened later without following any symlink. The guest can be hostile
//! and may write below the share: everything there is made and opened relative to held directories, without following
//! symlinks. The share's own directories are no place for a guest to write, though: whoever serves the share should
//! make its mount read-only in its own mount namespace (not recursively), which the binds below it do not notice.
//!
//! # What becomes of mount options
//!
//! `ro` and `rro` of binds are enforced on the host. All options also stay in the guest's spec, where the guest's kernel
//! honours `nosuid`, `nodev`, `noexec` and the rest. Of propagation, `slave` and `shared` make the host's later mounts
//! below the source show up in the guest; nothing that a guest mounts is ever seen by the host, so `shared` is no more
//! than `slave`. `idmap` is refused.

#![forbid(unsafe_code)]

mod attach;
mod disks;
mod plan;
mod probe;
mod view;

use std::io;
use std::path::{Path, PathBuf};

use linux::mount::Propagation;
use protocol::oci;
use serde::{Deserialize, Serialize};

pub use attach::{attach, detach, share_file};
pub use disks::{Disk, disks};
pub use plan::plan;
pub use probe::probe;
pub use view::enter_view;

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
    /// Where it is the root of a tmpfs: that one's size in bytes.
    pub tmpfs_size: Option<u64>,
}

/// What to bind below the share, and what the guest mounts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The container's id.
    pub container_id: String,
    /// In the order to be made. The first is the root.
    pub binds: Vec<Bind>,
    /// What the guest will mount on in a root that it cannot write: made on the host where it is missing, as paths in
    /// the root, with whether they are directories.
    pub mount_points: Vec<(PathBuf, bool)>,
    /// The container's root as the guest sees it: the guest spec's `root.path`.
    pub guest_root: String,
    /// The guest spec's `mounts`, in the spec's order.
    pub guest_mounts: Vec<oci::Mount>,
    /// The host's sockets that the guest's mounts have as sources.
    pub sockets: Vec<Socket>,
    /// The host's block devices that the guest has as disks.
    pub disks: Vec<Disk>,
    /// What the user should know, one sentence each.
    pub warnings: Vec<String>,
}

/// A Unix stream socket of the host that a container can connect to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    /// The host's, a path without symlinks.
    pub source: PathBuf,
    /// Where the agent listens in its stead: the source of the guest's mount.
    pub guest_path: String,
}

/// One bind mount below the share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// The host's directory or file, a path without symlinks.
    pub source: PathBuf,
    /// Where, relative to the share: `<container>/rootfs`, `<container>/mounts/0`.
    pub name: PathBuf,
    /// Enforced on the host: the guest cannot write whatever it does.
    pub read_only: ReadOnly,
    /// With the mounts below it.
    pub recursive: bool,
    /// Whether `source` is a directory.
    pub is_directory: bool,
    /// [`Propagation::Slave`] where mounts that the host makes below `source` later show up, or
    /// [`Propagation::Private`].
    pub propagation: Propagation,
}

/// What of a bind mount cannot be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReadOnly {
    /// All can be written.
    No,
    /// The mount itself, but not those below it: `ro`, as runc takes it.
    Top,
    /// The mount and all below it: `rro`.
    All,
}

/// A failure to share a container's files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The container's id cannot be a file's name.
    #[error("invalid container id `{id}`")]
    ContainerId {
        /// The id.
        id: String,
    },
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

impl Error {
    fn host<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        move |source| Self::Host { action, path: path.to_owned(), source: source.into() }
    }
}
