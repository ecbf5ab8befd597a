//! The guest image: a kernel, and an initial file system with the agent and the kernel modules that a guest needs.
//!
//! Nothing is compiled and nothing installed: [`build`] takes Debian's stock cloud kernel out of its package, or a kernel
//! of the user's. The same inputs give the same bytes. The directory of an image holds the two files, named after their
//! contents, and `manifest.json`, which is written last: whoever opens an image finds the old one or the new one.
//!
//! This crate runs no virtual machine and knows nothing of hypervisors.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::{env, fs, io};

mod build;
mod cpio;
mod elf;
mod error;
mod kernel;
mod library;
mod manifest;
mod modules;
mod package;
mod tool;

pub use build::{KernelSource, Recipe, build};
pub use error::Error;
pub use kernel::KernelFormat;
pub use manifest::{Manifest, Part};
pub use package::Package;

use error::host;
use manifest::sha256;

/// In the initial file system: the modules to be loaded at boot, an absolute path a line, in order.
pub const MODULE_LIST: &str = "/etc/kata/modules";

const MANIFEST: &str = "manifest.json";

/// An image that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    directory: PathBuf,
    manifest: Manifest,
}

impl Image {
    /// Opens the image in `directory` and checks that its parts are there in their full size, which costs next to
    /// nothing. See [`Image::verify`].
    ///
    /// # Errors
    ///
    /// [`Error::NotBuilt`] where there is none, [`Error::Damaged`] where a part is missing or the manifest unreadable.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let path = directory.join(MANIFEST);
        let json = fs::read(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => Error::NotBuilt { directory: directory.to_owned() },
            _ => host("read", &path)(source),
        })?;
        let damaged = |what: String| Error::Damaged { path: path.clone(), what };
        let manifest: Manifest = serde_json::from_slice(&json)
            .map_err(|error| damaged(format!("cannot be read: {error}")))?;
        if manifest.version != manifest::VERSION {
            return Err(damaged(format!("is of version {}", manifest.version)));
        }
        let image = Self { directory: directory.to_owned(), manifest };
        for part in image.manifest.parts() {
            let path = directory.join(&part.file);
            let size = fs::metadata(&path)
                .map_err(|error| Error::Damaged {
                    path: path.clone(),
                    what: format!("is missing: {error}"),
                })?
                .len();
            if size != part.size {
                let what = format!("has {size} bytes instead of {}", part.size);
                return Err(Error::Damaged { path, what });
            }
        }
        Ok(image)
    }

    /// Opens the first image of [`directories`].
    ///
    /// # Errors
    ///
    /// As [`Image::open`], for the first directory that has a manifest, or else for the last.
    pub fn find() -> Result<Self, Error> {
        let mut found = Err(Error::NotBuilt { directory: default_directory() });
        for directory in directories() {
            found = Self::open(&directory);
            if !matches!(found, Err(Error::NotBuilt { .. })) {
                break;
            }
        }
        found
    }

    /// Reads every part and compares it with the manifest.
    ///
    /// # Errors
    ///
    /// [`Error::Damaged`] for the first part that differs.
    pub fn verify(&self) -> Result<(), Error> {
        for part in self.manifest.parts() {
            let path = self.directory.join(&part.file);
            let found = sha256(&fs::read(&path).map_err(host("read", &path))?);
            if found != part.sha256 {
                let what = format!("has the SHA-256 {found} instead of {}", part.sha256);
                return Err(Error::Damaged { path, what });
            }
        }
        Ok(())
    }

    /// The kernel file.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.directory.join(&self.manifest.kernel.file)
    }

    /// The initial file system.
    #[must_use]
    pub fn initrd(&self) -> PathBuf {
        self.directory.join(&self.manifest.initrd.file)
    }

    /// The modules that a guest loads when its kernel asks for them.
    #[must_use]
    pub fn library(&self) -> Option<PathBuf> {
        self.manifest.library.as_ref().map(|part| self.directory.join(&part.file))
    }

    /// What it is made of.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }
}

/// Where images are looked for: the user's own directory before the system's.
#[must_use]
pub fn directories() -> Vec<PathBuf> {
    let own = default_directory();
    let mut all = vec![own];
    all.extend([SYSTEM_DIRECTORY.into()]);
    all.dedup();
    all
}

/// Where [`build`] puts an image that is asked for without a directory: the system's directory for root, else below
/// `$XDG_DATA_HOME`, or `~/.local/share` where that is not set.
#[must_use]
pub fn default_directory() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return SYSTEM_DIRECTORY.into();
    }
    let home = || env::var_os("HOME").map(|home| Path::new(&home).join(".local/share"));
    env::var_os("XDG_DATA_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(home)
        .map_or_else(|| SYSTEM_DIRECTORY.into(), |data| data.join("kata-containers"))
}

const SYSTEM_DIRECTORY: &str = "/usr/share/kata-containers";
