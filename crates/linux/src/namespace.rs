//! Namespaces: namespaces(7), network_namespaces(7).
//!
//! A namespace belongs to a thread. Whoever needs to act in another network namespace does so in [`inside`], a closure
//! on a thread of its own, so that no thread of the caller's ever is where others do not expect it.

#![expect(unsafe_code, reason = "unshare(2) is unsafe in rustix for its CLONE_FILES alone")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{panic, thread};

use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::mount;

/// A network namespace, held open.
#[derive(Debug)]
pub struct Network {
    file: File,
    path: PathBuf,
}

impl Network {
    /// The one that `path` names: a bind mount such as `/run/netns/x`, or `/proc/<pid>/ns/net`.
    ///
    /// # Errors
    ///
    /// When it cannot be opened, or is not a network namespace.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        match rustix::fs::fstatfs(&file)?.f_type {
            NSFS_MAGIC => Ok(Self { file, path: path.to_owned() }),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} is not a network namespace", path.display()),
            )),
        }
    }

    /// The one that a process is in.
    ///
    /// # Errors
    ///
    /// When there is no such process.
    pub fn of_process(pid: u32) -> io::Result<Self> {
        Self::open(Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// The calling thread's.
    ///
    /// # Errors
    ///
    /// When `/proc` is not mounted.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// The path that it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it can be told from others by: device and inode of its file, see namespaces(7).
    ///
    /// # Errors
    ///
    /// What fstat(2) says.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        let metadata = self.file.metadata()?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// Moves the calling *thread* into it, for good. For a process that has one thread yet; others use [`inside`].
    ///
    /// # Errors
    ///
    /// What setns(2) says.
    pub fn enter(&self) -> io::Result<()> {
        Ok(move_into_link_name_space(self.as_fd(), Some(LinkNameSpaceType::Network))?)
    }

    /// Runs `action` in it, on a thread of its own, and waits for it.
    ///
    /// # Errors
    ///
    /// When it cannot be entered, and what `action` says.
    pub fn inside<T: Send, E: From<io::Error> + Send>(
        &self,
        action: impl FnOnce() -> Result<T, E> + Send,
    ) -> Result<T, E> {
        on_own_thread(|| {
            self.enter()?;
            action()
        })
    }
}

impl AsFd for Network {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

const NSFS_MAGIC: rustix::fs::FsWord = 0x6e73_6673;

/// Moves the calling *thread* into the network namespace at `path`, for good; see [`Network::enter`].
///
/// # Errors
///
/// As [`Network::open`], and what setns(2) says.
pub fn enter(path: &Path) -> io::Result<()> {
    Network::open(path)?.enter()
}

/// Gives the calling process a mount namespace of its own: mounts of the host still come in, ours do not go out.
///
/// For a process that has one thread yet: only the calling thread moves.
///
/// # Errors
///
/// What unshare(2) and mount(2) say.
pub fn unshare_mounts() -> io::Result<()> {
    unshare(UnshareFlags::NEWNS)?;
    Ok(mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?)
}

/// Gives the calling thread an empty network namespace; for a process that has one thread yet. Only `lo` is in it, down.
///
/// # Errors
///
/// What unshare(2) says.
pub fn unshare_network() -> io::Result<()> {
    unshare(UnshareFlags::NEWNET)
}

/// Gives the calling thread a working directory, root and umask of its own: unshare(2)'s `CLONE_FS`.
///
/// # Errors
///
/// What unshare(2) says.
pub fn unshare_working_directory() -> io::Result<()> {
    unshare(UnshareFlags::FS)
}

fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: the one flag that can break I/O safety is CLONE_FILES, and no caller passes it.
    Ok(unsafe { unshare_unsafe(flags) }?)
}

/// Makes a network namespace and binds it on `path`, as ip-netns(8) does; it lives until that is unmounted.
///
/// # Errors
///
/// When `path` cannot be made, or what unshare(2) and mount(2) say.
pub fn create_network(path: &Path) -> io::Result<Network> {
    drop(mount::touch(path)?);
    on_own_thread(|| {
        unshare_network()?;
        mount::bind(Path::new("/proc/thread-self/ns/net"), path, false)
    })?;
    Network::open(path)
}

/// Unmounts and removes what [`create_network`] made. What is not there is a success.
///
/// # Errors
///
/// What umount2(2) or unlink(2) says.
pub fn remove_network(path: &Path) -> io::Result<()> {
    mount::unmount_all(path)?;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Runs `action` in the network namespace at `path`, on a thread of its own, and waits for it.
///
/// # Errors
///
/// When the namespace cannot be entered, and what `action` says.
pub fn inside<T: Send, E: From<io::Error> + Send>(
    path: &Path,
    action: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    Network::open(path)?.inside(action)
}

/// Runs `action` in the mount namespace at `path` (`/proc/<pid>/ns/mnt`), on a thread of its own, and waits for it. Its
/// root and working directory are that namespace's. Mounts cloned there ([`crate::mount::Tree`]) can be attached here.
///
/// # Errors
///
/// When the namespace cannot be entered, and what `action` says.
pub fn inside_mounts<T: Send, E: From<io::Error> + Send>(
    path: &Path,
    action: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    let namespace = File::open(path)?;
    on_own_thread(|| {
        // setns(2) wants root and working directory to be this thread's own.
        unshare(UnshareFlags::FS)?;
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))
            .map_err(io::Error::from)?;
        action()
    })
}

fn on_own_thread<T: Send, E: From<io::Error> + Send>(
    action: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("namespace".into()).spawn_scoped(scope, action)?;
        thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use super::{Network, create_network, inside, remove_network};
    use std::io;
    use std::path::Path;

    #[test]
    fn a_new_network_namespace_has_only_a_loopback_and_the_caller_stays_outside() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("netns");
        let before = Network::current().unwrap().identity().unwrap();
        let made = create_network(&path).unwrap();
        let names = inside(&path, || {
            let dev = std::fs::read_to_string("/proc/thread-self/net/dev")?;
            let identity = Network::current()?.identity()?;
            Ok::<_, io::Error>((dev, identity))
        });
        let (dev, identity) = names.unwrap();
        assert_eq!(dev.lines().skip(2).filter(|line| !line.trim().starts_with("lo:")).count(), 0);
        assert_eq!(identity, made.identity().unwrap());
        assert_ne!(identity, before);
        assert_eq!(Network::current().unwrap().identity().unwrap(), before);
        remove_network(&path).unwrap();
        remove_network(&path).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_is_no_namespace_is_refused_by_name() {
        let error = Network::open(Path::new("/dev/null")).unwrap_err();
        assert_eq!(error.to_string(), "/dev/null is not a network namespace");
        let error = Network::open(Path::new("/no/such/netns")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
