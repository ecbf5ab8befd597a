//! The host as the ledger's [`Host`]: how each thing taken is given back.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, statat, unlinkat};
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};

use crate::cgroup;
use crate::ledger::{Host, Undo};
use crate::link;
use crate::mount;
use crate::namespace;
use crate::process::ProcessId;

/// How long a killed process may take to end.
const DEADLINE: Duration = Duration::from_secs(10);

/// This machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct ThisHost;

impl Host for ThisHost {
    fn undo(&self, entry: &Undo) -> io::Result<()> {
        match entry {
            Undo::Kill(process) => kill(*process),
            Undo::Unmount { path } => mount::unmount_all(path),
            Undo::DeleteLink { netns, inode, name } => {
                in_netns(netns, *inode, || link::delete(name))
            }
            Undo::DeleteIngress { netns, inode, name } => {
                in_netns(netns, *inode, || link::delete_ingress(name))
            }
            Undo::RemoveCgroup { path } => cgroup::remove_directory(path),
            Undo::RemoveTree { path } => remove_tree(path),
        }
        .map_err(|error| explained(entry, &error))
    }
}

/// The same kind of error, saying what could not be undone.
fn explained(entry: &Undo, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("cannot undo {entry:?}: {error}"))
}

/// A process that is not ours to wait for is seen to end by its pidfd.
fn kill(process: ProcessId) -> io::Result<()> {
    let Some(pidfd) = process.open()? else { return Ok(()) };
    match pidfd_send_signal(&pidfd, Signal::KILL) {
        Ok(()) => {}
        Err(Errno::SRCH) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    let deadline = Instant::now() + DEADLINE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&left)) {
            Ok(0) => {
                let text = format!("process {} does not end", process.pid);
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A namespace that is gone has taken all that was in it along.
fn in_netns(
    netns: &Path,
    inode: u64,
    action: impl FnOnce() -> io::Result<()> + Send,
) -> io::Result<()> {
    match namespace::Network::open(netns) {
        Ok(found) if found.identity()?.1 == inode => found.inside(action),
        Ok(_) => Ok(()),
        // ESRCH: the process of a /proc path is a zombie. InvalidInput: a plain file is left where it was bound.
        Err(error)
            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput)
                || error.raw_os_error() == Some(libc::ESRCH) =>
        {
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// Removes a file or a directory with all that is in it. Symlinks are removed, not followed; at a mount point it
/// stops with EBUSY before anything below it is touched.
///
/// # Errors
///
/// What openat(2) or unlinkat(2) says. What is not there is a success.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match openat(CWD, path.parent().unwrap_or(Path::new("/")), flags, Mode::empty()) {
        Ok(parent) => remove_at(parent.as_fd(), Path::new(name)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn remove_at(parent: BorrowedFd<'_>, name: &Path) -> io::Result<()> {
    let gone = |result: rustix::io::Result<()>| match result {
        Err(Errno::NOENT) | Ok(()) => Ok(()),
        Err(error) => Err(io::Error::from(error)),
    };
    let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(()),
        stat => stat?,
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return gone(unlinkat(parent, name, AtFlags::empty()));
    }
    // NOFOLLOW: it may have become a symlink since. Then this fails, which is right.
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    let directory: OwnedFd = match openat(parent, name, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        directory => directory?,
    };
    if mount::is_mount_root(&directory, Path::new(""))? {
        let text = format!("something is mounted on {}", name.display());
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
    }
    let mut names = Vec::new();
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        let bytes = entry.file_name().to_bytes();
        if bytes != b"." && bytes != b".." {
            names.push(std::ffi::OsString::from(os_str(bytes)));
        }
    }
    for child in names {
        remove_at(directory.as_fd(), Path::new(&child))?;
    }
    gone(unlinkat(parent, name, AtFlags::REMOVEDIR))
}

fn os_str(bytes: &[u8]) -> &std::ffi::OsStr {
    std::os::unix::ffi::OsStrExt::from_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::{ThisHost, remove_tree};
    use crate::ledger::{Host, Undo};
    use crate::process::{Command, ProcessId};
    use crate::{mount, namespace};
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_tree_is_removed_and_what_its_symlinks_name_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, outside) = (dir.path().join("tree"), dir.path().join("outside"));
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "").unwrap();
        fs::write(tree.join("a/file"), "").unwrap();
        symlink(&outside, tree.join("a/b/link")).unwrap();
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
        assert!(outside.join("kept").exists());
        remove_tree(&tree).unwrap();
        remove_tree(&tree.join("x/y")).unwrap();

        symlink(&outside, &tree).unwrap();
        remove_tree(&tree).unwrap();
        assert!(outside.join("kept").exists());
        assert!(!tree.is_symlink());
    }

    #[test]
    fn a_tree_with_a_mount_in_it_is_kept_until_that_is_unmounted() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (tree, outside) = (dir.path().join("tree"), dir.path().join("outside"));
        fs::create_dir_all(tree.join("m")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "").unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                namespace::unshare_mounts().unwrap();
                mount::bind(&outside, &tree.join("m"), false).unwrap();
                let entry = Undo::RemoveTree { path: tree.clone() };
                let error = ThisHost.undo(&entry).unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::ResourceBusy, "{error}");
                ThisHost.undo(&Undo::Unmount { path: tree.join("m") }).unwrap();
                ThisHost.undo(&Undo::Unmount { path: tree.join("m") }).unwrap();
                ThisHost.undo(&entry).unwrap();
                ThisHost.undo(&Undo::Unmount { path: tree.join("m") }).unwrap();
            });
        });
        assert!(outside.join("kept").exists());
        assert!(!tree.exists());
    }

    #[test]
    fn a_process_is_killed_once_and_a_later_one_with_its_pid_is_left_alone() {
        let mut command = Command::new("/bin/sleep");
        command.args(["600"]);
        let mut child = command.spawn().unwrap();
        let id = child.id().unwrap();
        let stranger = ProcessId { start_time: id.start_time + 1, ..id };
        ThisHost.undo(&Undo::Kill(stranger)).unwrap();
        assert!(id.is_alive());
        ThisHost.undo(&Undo::Kill(id)).unwrap();
        assert!(!child.wait().unwrap().success());
        ThisHost.undo(&Undo::Kill(id)).unwrap();
    }

    #[test]
    fn a_link_in_a_namespace_that_is_gone_is_gone() {
        let netns = "/no/such/netns".into();
        let name = "eth0".to_owned();
        ThisHost.undo(&Undo::DeleteIngress { netns, inode: 1, name: name.clone() }).unwrap();
        // There, but another one: nothing is done in it.
        let netns = "/proc/self/ns/net".into();
        ThisHost.undo(&Undo::DeleteLink { netns, inode: 1, name }).unwrap();
    }
}
