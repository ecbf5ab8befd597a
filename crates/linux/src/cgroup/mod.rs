//! Host-side cgroups of one sandbox: cgroups(7), in v1 hierarchies, in the v2 one, and in both at once ("hybrid").
//!
//! A [`Cgroup`] is one path in every hierarchy that is mounted. What to limit is the caller's policy and comes as plain
//! numbers in [`Limits`]; what a host cannot do is an error only when it was asked for.

mod freezer;
mod hierarchy;
mod limits;
mod removal;
mod systemd;
mod tight;
mod usage;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::ledger::{Ledger, Undo};
use hierarchy::Hierarchy;

pub use limits::{Limits, Throttle, Throttled};
pub use removal::remove_directory;
pub use tight::Tight;
pub use usage::Usage;

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

impl Error {
    fn host(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Host { action, path: path.to_owned(), source }
    }
}

impl Cgroup {
    /// Makes the cgroup that the OCI spec's `linux.cgroupsPath` names, in every hierarchy that is mounted, and puts the
    /// process `first` in it. What goes with the sandbox is in `ledger` before it is made.
    ///
    /// A path that is not absolute is taken below the root, as runc does. Missing parents are made and stay, as runc's
    /// do: siblings share them. A cgroup that is there already and has processes is joined, and is not ours to remove.
    ///
    /// # Errors
    ///
    /// [`Error::BadPath`], [`Error::NoHierarchy`], [`Error::Systemd`] or [`Error::Host`].
    pub fn create(
        path: &str,
        driver: Driver,
        first: u32,
        ledger: &mut Ledger,
    ) -> Result<Self, Error> {
        Self::create_in(&hierarchy::mounted()?, path, driver, first, ledger)
    }

    fn create_in(
        hierarchies: &[Hierarchy],
        path: &str,
        driver: Driver,
        first: u32,
        ledger: &mut Ledger,
    ) -> Result<Self, Error> {
        let (relative, unit) = match driver {
            Driver::Cgroupfs => (hierarchy::relative(path)?, None),
            Driver::Systemd => {
                let unit = systemd::Unit::parse(path)?;
                (unit.relative(), Some(unit))
            }
        };
        let directories: Vec<_> =
            hierarchies.iter().map(|hierarchy| hierarchy.directory(&relative)).collect();
        for directory in &directories {
            if !relative.as_os_str().is_empty() && !removal::is_populated(&directory.path) {
                ledger
                    .record(Undo::RemoveCgroup { path: directory.path.clone() })
                    .map_err(Error::host("record cgroup", &directory.path))?;
            }
        }
        if let Some(unit) = &unit {
            unit.start(first)?;
        }
        for (hierarchy, directory) in hierarchies.iter().zip(&directories) {
            hierarchy.make(directory)?;
        }
        let cgroup = Self { directories };
        cgroup.add(first)?;
        Ok(cgroup)
    }

    /// The cgroup that a process is in now.
    ///
    /// # Errors
    ///
    /// When there is no such process.
    pub fn of_process(pid: u32) -> Result<Self, Error> {
        let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
        let text = fs::read_to_string(&path).map_err(Error::host("read", &path))?;
        let directories = hierarchy::mounted()?
            .iter()
            .filter_map(|hierarchy| hierarchy.directory_of(&text))
            .collect();
        Ok(Self { directories })
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
        for directory in &self.directories {
            let path = directory.path.join("cgroup.procs");
            fs::write(&path, pid.to_string())
                .map_err(Error::host("put a process in cgroup", &directory.path))?;
        }
        Ok(())
    }

    /// Sets limits. May be called again at any time.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for what was asked and cannot be; [`Error::Set`].
    pub fn apply(&self, limits: &Limits) -> Result<(), Error> {
        limits::apply(self, limits)
    }

    /// Stops all its processes and waits until they have stopped.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] where there is no freezer; [`Error::Host`] when they did not stop in time.
    pub fn freeze(&self) -> Result<(), Error> {
        freezer::set(self, true)
    }

    /// Lets its processes run again.
    ///
    /// # Errors
    ///
    /// As [`Cgroup::freeze`].
    pub fn thaw(&self) -> Result<(), Error> {
        freezer::set(self, false)
    }

    /// What it has used. What no hierarchy tells is 0.
    #[must_use]
    pub fn usage(&self) -> Usage {
        usage::read(self)
    }

    /// Limits its memory to what it uses now and `room` bytes more, without swap, until the answer is dropped. `None` where
    /// memory is not controlled.
    ///
    /// # Errors
    ///
    /// [`Error::Set`].
    pub fn tighten(&self, room: u64) -> Result<Option<Tight>, Error> {
        tight::tighten(self, room)
    }

    /// The processes in it and below it, by pid.
    ///
    /// # Errors
    ///
    /// [`Error::Host`].
    pub fn pids(&self) -> Result<Vec<u32>, Error> {
        let mut pids = BTreeSet::new();
        for directory in &self.directories {
            let found = removal::pids_below(&directory.path);
            pids.extend(found.map_err(Error::host("list processes of cgroup", &directory.path))?);
        }
        Ok(pids.into_iter().collect())
    }

    /// Kills what is in it and removes it.
    ///
    /// # Errors
    ///
    /// [`Error::Host`] when it would not go in time.
    pub fn remove(&self) -> Result<(), Error> {
        // Newest first, as the ledger would: the freezer must let go before the rest can be killed.
        for directory in self.directories.iter().rev() {
            remove_directory(&directory.path)
                .map_err(Error::host("remove cgroup", &directory.path))?;
        }
        Ok(())
    }

    /// The directory that has `controller`, v1 or v2, and whether it is v2.
    fn controller(&self, controller: &str) -> Option<&Directory> {
        let v1 = self
            .directories
            .iter()
            .find(|directory| directory.controllers.iter().any(|known| known == controller));
        v1.or_else(|| {
            self.unified().filter(|directory| {
                fs::read_to_string(directory.path.join("cgroup.controllers"))
                    .is_ok_and(|known| known.split_whitespace().any(|known| known == controller))
            })
        })
    }

    fn unified(&self) -> Option<&Directory> {
        self.directories.iter().find(|directory| directory.unified)
    }
}
