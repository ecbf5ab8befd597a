//! The ledger: what a sandbox has taken from the host, and how to give it back.
//!
//! A sandbox takes things that can outlive a crashed process: cgroups, network links, processes, mounts, directories.
//! Each is written down here before it is taken. Whoever comes next (the same process on its error path, `delete
//! --force`, containerd running our `delete` after a shim was killed) gives all of it back from this file alone: it
//! needs no configuration, no hypervisor driver and no guest.
//!
//! # Invariants
//!
//! - An entry is in the file before the thing it names exists. A process is the one exception: its pid is known only
//!   afterwards. The kernel covers the gap, since every child is started with
//!   [`die_with_parent`](crate::process::Command::die_with_parent).
//! - Undoing is idempotent: a thing already gone, or never made, is a success.
//! - Entries are undone newest first, as a stack unwinds.
//! - The file goes only when everything in it has been undone. Until then it stays whole, so that `delete` can be
//!   tried again.
//!
//! The file is one JSON object a line. A process killed in the middle of a line leaves a torn tail; by the first
//! invariant nothing was taken for it, and [`Ledger::open`] drops it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::process::ProcessId;

/// One thing taken from the host, told as the way to give it back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "undo", rename_all = "kebab-case")]
pub enum Undo {
    /// Kill a process and wait until it has ended.
    Kill(ProcessId),
    /// Unmount a path, lazily, with all that is mounted below it.
    Unmount {
        /// The mount point.
        path: PathBuf,
    },
    /// Delete a network link.
    DeleteLink {
        /// The network namespace it is in, as a path that can be opened.
        netns: PathBuf,
        /// That namespace's inode, namespaces(7): another one that has the path by then is left alone.
        inode: u64,
        /// Its name there.
        name: String,
    },
    /// Remove the ingress queueing discipline, and with it all filters, of a link that is not ours.
    DeleteIngress {
        /// The network namespace it is in, as a path that can be opened.
        netns: PathBuf,
        /// That namespace's inode, namespaces(7): another one that has the path by then is left alone.
        inode: u64,
        /// The link's name there.
        name: String,
    },
    /// Remove a cgroup directory, killing what is still in it.
    RemoveCgroup {
        /// Its directory, in one hierarchy.
        path: PathBuf,
    },
    /// Remove a directory tree, or a file, that is ours alone. Never follows a symlink or crosses a mount.
    RemoveTree {
        /// Its root.
        path: PathBuf,
    },
}

/// The host, as far as undoing needs it. Tests pass a fake; production passes the host itself.
pub trait Host {
    /// Gives one thing back. A thing that is not there counts as given back.
    ///
    /// # Errors
    ///
    /// When the thing is there and would not go.
    fn undo(&self, entry: &Undo) -> io::Result<()>;
}

/// An open ledger. One process has it open at a time: the holder of the sandbox's lock.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    file: File,
    entries: Vec<Undo>,
}

impl Ledger {
    /// Opens the ledger at `path`, making it if there is none.
    ///
    /// # Errors
    ///
    /// When the file cannot be opened or read, or a whole line in it is not an entry.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut file =
            OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
        let entries = bytes[..whole]
            .split_inclusive(|&byte| byte == b'\n')
            .map(serde_json::from_slice)
            .collect::<Result<_, _>>()
            .map_err(io::Error::from)?;
        file.set_len(whole as u64)?;
        Ok(Self { path: path.to_owned(), file, entries })
    }

    /// Writes down that the caller is about to take something.
    ///
    /// # Errors
    ///
    /// When the entry could not be written. The caller must then not take the thing.
    pub fn record(&mut self, entry: Undo) -> io::Result<()> {
        let mut line = serde_json::to_vec(&entry)?;
        line.push(b'\n');
        self.file.write_all(&line)?;
        self.entries.push(entry);
        Ok(())
    }

    /// Gives everything back, newest first, and then removes the file.
    ///
    /// One thing that will not go does not keep the rest: all are tried.
    ///
    /// # Errors
    ///
    /// The first failure. The file is kept, for another try.
    pub fn settle(self, host: &impl Host) -> io::Result<()> {
        let mut outcome = Ok(());
        for entry in self.entries.iter().rev() {
            outcome = outcome.and(host.undo(entry));
        }
        outcome.and_then(|()| fs::remove_file(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::{Host, Ledger, Undo};
    use std::cell::RefCell;
    use std::fs::OpenOptions;
    use std::io::{self, Write};
    use std::path::PathBuf;

    /// A host that remembers what it was asked, and cannot unmount `stuck`.
    #[derive(Default)]
    struct FakeHost {
        asked: RefCell<Vec<Undo>>,
        stuck: Option<PathBuf>,
    }

    impl Host for FakeHost {
        fn undo(&self, entry: &Undo) -> io::Result<()> {
            self.asked.borrow_mut().push(entry.clone());
            match entry {
                Undo::Unmount { path } if self.stuck.as_ref() == Some(path) => {
                    Err(io::ErrorKind::ResourceBusy.into())
                }
                _ => Ok(()),
            }
        }
    }

    fn mount(path: &str) -> Undo {
        Undo::Unmount { path: path.into() }
    }

    #[test]
    fn what_was_taken_last_is_given_back_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let mut ledger = Ledger::open(&path).unwrap();
        ledger.record(mount("/outer")).unwrap();
        ledger.record(mount("/outer/inner")).unwrap();

        let host = FakeHost::default();
        ledger.settle(&host).unwrap();

        assert_eq!(*host.asked.borrow(), [mount("/outer/inner"), mount("/outer")]);
        assert!(!path.exists());
    }

    #[test]
    fn a_line_torn_by_a_kill_is_dropped_and_the_rest_is_settled() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        Ledger::open(&path).unwrap().record(mount("/a")).unwrap();
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"undo\":\"unmount\",\"pa").unwrap();

        let host = FakeHost::default();
        Ledger::open(&path).unwrap().settle(&host).unwrap();

        assert_eq!(*host.asked.borrow(), [mount("/a")]);
    }

    #[test]
    fn a_failure_keeps_the_file_but_stops_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let mut ledger = Ledger::open(&path).unwrap();
        for path in ["/a", "/stuck", "/c"] {
            ledger.record(mount(path)).unwrap();
        }
        let host = FakeHost { stuck: Some("/stuck".into()), ..FakeHost::default() };

        let error = ledger.settle(&host).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
        assert_eq!(host.asked.borrow().len(), 3);

        Ledger::open(&path).unwrap().settle(&FakeHost::default()).unwrap();
        assert!(!path.exists());
    }
}
