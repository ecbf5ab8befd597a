//! The one directory of a test run.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::bundle;

/// The directory below which a test run makes everything, and the mark by which its things are known on the host.
#[derive(Debug)]
pub struct Work {
    dir: TempDir,
    mark: String,
    next: AtomicU32,
}

impl Work {
    /// Makes the directory, with a small root file system from Debian's static busybox in it.
    ///
    /// # Errors
    ///
    /// When busybox is not installed or the directory cannot be made.
    pub fn new() -> Result<Self> {
        let mark = format!("kt{}", std::process::id());
        let dir = tempfile::Builder::new()
            .prefix(&format!("{mark}-"))
            .tempdir()
            .context("cannot make a directory for the tests")?;
        let work = Self { dir, mark, next: AtomicU32::new(0) };
        bundle::make_rootfs(&work.rootfs())?;
        Ok(work)
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The root file system that bundles and images are copied from.
    pub fn rootfs(&self) -> PathBuf {
        self.path().join("rootfs")
    }

    /// A short word that is in the name of every container, cgroup and namespace of this run and of no other.
    pub fn mark(&self) -> &str {
        &self.mark
    }

    /// A new container id, with the mark in it.
    pub fn id(&self) -> String {
        format!("{}-{}", self.mark, self.next.fetch_add(1, Ordering::Relaxed))
    }
}
