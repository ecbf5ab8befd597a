//! Paths in a container's root, which its image's author has made: no link in it may lead out of it.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// As many links as the kernel follows, path_resolution(7).
const MOST_LINKS: usize = 40;

/// What to make where a path ends, if nothing is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Make {
    Directory,
    File,
}

/// Opens `path` in `root` with `O_PATH`, and makes it, and the directories above it, where they are missing.
pub(super) fn ensure(root: BorrowedFd<'_>, path: &Path, make: Make) -> io::Result<OwnedFd> {
    if let Ok(fd) = find(root, path) {
        return Ok(fd);
    }
    let path = resolve(root, path)?;
    let mut here = rustix::io::fcntl_dupfd_cloexec(root, 3)?;
    let mut names = path.components().peekable();
    while let Some(name) = names.next() {
        let Component::Normal(name) = name else { continue };
        let is_last = names.peek().is_none();
        let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let next = match rustix::fs::openat(&here, name, flags, Mode::empty()) {
            Err(Errno::NOENT) => {
                if is_last && make == Make::File {
                    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                    drop(rustix::fs::openat(&here, name, flags, Mode::from_raw_mode(0o644))?);
                } else {
                    rustix::fs::mkdirat(&here, name, Mode::from_raw_mode(0o755))?;
                }
                rustix::fs::openat(&here, name, flags, Mode::empty())?
            }
            next => next?,
        };
        here = next;
    }
    Ok(here)
}

/// Opens `path` in `root` with `O_PATH`.
pub(super) fn find(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let path = path.strip_prefix("/").unwrap_or(path);
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    Ok(rustix::fs::openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)?)
}

/// Where `path` leads in `root`, links followed, as a path without links relative to it. What is missing is taken
/// as it is, so that a dangling link leads to where its target would be.
fn resolve(root: BorrowedFd<'_>, path: &Path) -> io::Result<PathBuf> {
    let mut links = 0;
    let mut todo: VecDeque<OsString> = names(path).collect();
    let mut done = PathBuf::new();
    while let Some(name) = todo.pop_front() {
        if name == ".." {
            done.pop();
            continue;
        }
        done.push(&name);
        let flags = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let how = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(fd) = rustix::fs::openat2(root, &done, how, Mode::empty(), flags) else {
            continue;
        };
        let Ok(target) = rustix::fs::readlinkat(fd.as_fd(), "", Vec::new()) else { continue };
        links += 1;
        if links > MOST_LINKS {
            return Err(Errno::LOOP.into());
        }
        let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
        done.pop();
        if target.is_absolute() {
            done.clear();
        }
        for name in names(&target).collect::<Vec<_>>().into_iter().rev() {
            todo.push_front(name);
        }
    }
    Ok(done)
}

fn names(path: &Path) -> impl Iterator<Item = OsString> + '_ {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        _ => None,
    })
}

/// A path for calls that take no fd: the kernel's link to what the fd is of.
pub(super) fn of(fd: BorrowedFd<'_>) -> PathBuf {
    use std::os::fd::AsRawFd;
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::{Make, ensure, resolve};
    use std::fs::{self, File};
    use std::os::fd::AsFd;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    #[test]
    fn a_dangling_link_leads_to_where_its_target_would_be() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        symlink("../run/resolve/stub.conf", dir.path().join("etc/resolv.conf")).unwrap();
        let root = File::open(dir.path()).unwrap();
        ensure(root.as_fd(), Path::new("/etc/resolv.conf"), Make::File).unwrap();
        assert!(dir.path().join("run/resolve/stub.conf").is_file());
    }

    #[test]
    fn no_link_leads_out_of_the_root() {
        let dir = tempfile::tempdir().unwrap();
        symlink("../../../../outside", dir.path().join("a")).unwrap();
        symlink("/absolute", dir.path().join("b")).unwrap();
        let root = File::open(dir.path()).unwrap();
        assert_eq!(resolve(root.as_fd(), Path::new("/a/x")).unwrap(), Path::new("outside/x"));
        assert_eq!(resolve(root.as_fd(), Path::new("/b/../c")).unwrap(), Path::new("c"));
        ensure(root.as_fd(), Path::new("/a/x"), Make::Directory).unwrap();
        assert!(dir.path().join("outside/x").is_dir());
    }

    #[test]
    fn a_link_to_itself_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        symlink("loop", dir.path().join("loop")).unwrap();
        let root = File::open(dir.path()).unwrap();
        assert!(resolve(root.as_fd(), Path::new("/loop/x")).is_err());
    }
}
