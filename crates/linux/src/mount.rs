//! Mounts of the calling thread's mount namespace: mount(2), `mount_setattr`(2), `open_tree`(2), mount_namespaces(7).
//!
//! A mount that others can swap under our feet is made in two steps: [`Tree::open`] finds the source once and holds
//! it, [`Tree::attach`] puts it on a target that is held open too. Names are not looked up in between.

#![expect(unsafe_code, reason = "mount_setattr(2) has no wrapper")]

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, statx};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount,
    mount_change, move_mount, open_tree,
};

/// What a mount tells its peers, and hears from them: mount_namespaces(7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Propagation {
    /// Nothing, either way.
    Private,
    /// Both ways.
    Shared,
    /// It hears, and tells nothing.
    Slave,
    /// Nothing, and it cannot be bound elsewhere.
    Unbindable,
}

/// The per-mount attributes that we set. Those that are false are left as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(clippy::struct_excessive_bools, reason = "a set of independent flags")]
pub struct Attributes {
    /// No writing.
    pub read_only: bool,
    /// Set-user-id bits do nothing.
    pub no_suid: bool,
    /// Device files cannot be opened.
    pub no_dev: bool,
    /// Nothing can be executed.
    pub no_exec: bool,
}

impl Attributes {
    /// Only [`Attributes::read_only`].
    pub const READ_ONLY: Self =
        Self { read_only: true, no_suid: false, no_dev: false, no_exec: false };

    fn bits(self) -> u64 {
        [
            (self.read_only, libc::MOUNT_ATTR_RDONLY),
            (self.no_suid, libc::MOUNT_ATTR_NOSUID),
            (self.no_dev, libc::MOUNT_ATTR_NODEV),
            (self.no_exec, libc::MOUNT_ATTR_NOEXEC),
        ]
        .into_iter()
        .filter_map(|(wanted, bit)| wanted.then_some(bit))
        .fold(0, |bits, bit| bits | bit)
    }
}

/// A mount, or a tree of mounts, that has been cloned and is not yet attached anywhere. Dropping it undoes it.
#[derive(Debug)]
pub struct Tree {
    fd: OwnedFd,
}

impl Tree {
    /// Clones the mount that `source` is on, with `source` as its root; with `recursive`, the mounts below it too.
    ///
    /// # Errors
    ///
    /// What `open_tree`(2) says.
    pub fn open(source: &Path, recursive: bool) -> io::Result<Self> {
        Self::open_at(CWD, source, recursive)
    }

    /// As [`Tree::open`], for what `source` (an `O_PATH` fd will do) has open.
    ///
    /// # Errors
    ///
    /// What `open_tree`(2) says.
    pub fn of(source: impl AsFd, recursive: bool) -> io::Result<Self> {
        Self::open_at(source.as_fd(), Path::new(""), recursive)
    }

    fn open_at(directory: BorrowedFd<'_>, path: &Path, recursive: bool) -> io::Result<Self> {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
        Ok(Self { fd: open_tree(directory, path, flags)? })
    }

    /// Sets attributes, with `recursive` on every mount of the tree.
    ///
    /// # Errors
    ///
    /// What `mount_setattr`(2) says.
    pub fn set(&self, attributes: Attributes, recursive: bool) -> io::Result<()> {
        set_attributes_at(self.fd.as_fd(), Path::new(""), attributes, recursive)
    }

    /// Sets the propagation of every mount of the tree.
    ///
    /// # Errors
    ///
    /// What `mount_setattr`(2) says.
    pub fn set_propagation(&self, propagation: Propagation) -> io::Result<()> {
        let attributes = libc::mount_attr {
            attr_set: 0,
            attr_clr: 0,
            propagation: bits(propagation),
            userns_fd: 0,
        };
        mount_setattr(self.fd.as_fd(), Path::new(""), true, &attributes)
    }

    /// Attaches it on what `target` (an `O_PATH` fd will do) has open.
    ///
    /// # Errors
    ///
    /// What `move_mount`(2) says: ENOTDIR where one is a directory and the other is not.
    pub fn attach(self, target: impl AsFd) -> io::Result<()> {
        let flags =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        Ok(move_mount(&self.fd, "", target, "", flags)?)
    }
}

/// Binds `source` on `target`; with `recursive`, with the mounts below it.
///
/// # Errors
///
/// What `open_tree`(2) or `move_mount`(2) says.
pub fn bind(source: &Path, target: &Path, recursive: bool) -> io::Result<()> {
    let target =
        File::from(rustix::fs::open(target, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?);
    Tree::open(source, recursive)?.attach(&target)
}

/// Sets attributes of the mount at `target`; with `recursive` (the "r" of `rro`), of all mounts below it too.
///
/// # Errors
///
/// What `mount_setattr`(2) says: EINVAL where `target` is not a mount point.
pub fn set_attributes(target: &Path, attributes: Attributes, recursive: bool) -> io::Result<()> {
    set_attributes_at(CWD, target, attributes, recursive)
}

fn set_attributes_at(
    directory: BorrowedFd<'_>,
    path: &Path,
    attributes: Attributes,
    recursive: bool,
) -> io::Result<()> {
    let attributes =
        libc::mount_attr { attr_set: attributes.bits(), attr_clr: 0, propagation: 0, userns_fd: 0 };
    mount_setattr(directory, path, recursive, &attributes)
}

fn mount_setattr(
    directory: BorrowedFd<'_>,
    path: &Path,
    recursive: bool,
    attributes: &libc::mount_attr,
) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: `path` is a C string and `attributes` is as long as we say; the kernel only reads both, and both
    // outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            directory.as_raw_fd(),
            path.as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn bits(propagation: Propagation) -> u64 {
    match propagation {
        Propagation::Private => libc::MS_PRIVATE,
        Propagation::Shared => libc::MS_SHARED,
        Propagation::Slave => libc::MS_SLAVE,
        Propagation::Unbindable => libc::MS_UNBINDABLE,
    }
}

/// Sets the propagation of the mount at `target`; with `recursive`, of all mounts below it too.
///
/// # Errors
///
/// What mount(2) says: EINVAL where `target` is not a mount point.
pub fn set_propagation(target: &Path, propagation: Propagation, recursive: bool) -> io::Result<()> {
    let mut flags = match propagation {
        Propagation::Private => MountPropagationFlags::PRIVATE,
        Propagation::Shared => MountPropagationFlags::SHARED,
        Propagation::Slave => MountPropagationFlags::DOWNSTREAM,
        Propagation::Unbindable => MountPropagationFlags::UNBINDABLE,
    };
    flags.set(MountPropagationFlags::REC, recursive);
    Ok(mount_change(target, flags)?)
}

/// Makes `directory` a mount point of its own and a shared one: what is mounted below it later shows up in mount
/// namespaces that were copied from this one, and is not told to anybody else.
///
/// # Errors
///
/// What mount(2) says.
pub fn share(directory: &Path) -> io::Result<()> {
    if !is_mount_point(directory)? {
        bind(directory, directory, false)?;
    }
    // Out of the peer group of the mount that it was bound from first: that one is not to hear of ours.
    set_propagation(directory, Propagation::Private, false)?;
    set_propagation(directory, Propagation::Shared, false)
}

/// Mounts an empty tmpfs on `target`, of at most `size` bytes where given.
///
/// # Errors
///
/// What mount(2) says.
pub fn tmpfs(target: &Path, mode: u32, size: Option<u64>) -> io::Result<()> {
    let data = match size {
        Some(size) => format!("mode={mode:o},size={size}"),
        None => format!("mode={mode:o}"),
    };
    let data = CString::new(data)?;
    Ok(mount("tmpfs", target, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, data.as_c_str())?)
}

/// Unmounts `target` and all that is mounted below it, lazily: it is gone from the namespace at once, and from the
/// kernel when the last user has let it go. A symlink at `target` is not followed. What is not there or not mounted
/// is a success.
///
/// # Errors
///
/// What umount2(2) says, but for EINVAL, ENOENT and ENOTDIR.
pub fn unmount(target: &Path) -> io::Result<()> {
    match rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Unmounts until nothing is mounted at `target` any more: mounts can be stacked.
///
/// # Errors
///
/// As [`unmount`], and as [`is_mount_point`]; also when there seems to be no end.
pub fn unmount_all(target: &Path) -> io::Result<()> {
    const MOST: u32 = 1000;
    for _ in 0..MOST {
        match is_mount_point(target) {
            Ok(true) => unmount(target)?,
            Ok(false) => return Ok(()),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                return Ok(());
            }
            // A mount whose server is gone: FUSE says ENOTCONN to any look at it.
            Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => unmount(target)?,
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other(format!("{} is mounted again and again", target.display())))
}

/// Whether something is mounted at `path`. Does not follow a symlink there.
///
/// # Errors
///
/// What statx(2) says. Needs Linux 5.8.
pub fn is_mount_point(path: &Path) -> io::Result<bool> {
    is_mount_root(CWD, path)
}

/// As [`is_mount_point`], for `path` below an open directory, or the directory itself where it is empty.
///
/// # Errors
///
/// What statx(2) says. Needs Linux 5.8.
pub fn is_mount_root(directory: impl AsFd, path: &Path) -> io::Result<bool> {
    const MOUNT_ROOT: u64 = 0x2000; // STATX_ATTR_MOUNT_ROOT
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::EMPTY_PATH;
    let stat = statx(directory, path, flags, StatxFlags::empty())?;
    Ok(stat.stx_attributes.bits() & MOUNT_ROOT != 0)
}

/// Makes `new_root` (a mount point) the root of the mount namespace and lets the old root go.
///
/// # Errors
///
/// What `pivot_root`(2) says.
pub fn pivot(new_root: &Path) -> io::Result<()> {
    std::env::set_current_dir(new_root)?;
    // The old root is stacked on the new one; see the notes of pivot_root(2) on `pivot_root(".", ".")`.
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    std::env::set_current_dir("/")
}

/// Makes an empty file at `path` for a file to be bound on; one that is there stays.
///
/// # Errors
///
/// What open(2) says; ELOOP where a symlink is there.
pub fn touch(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
}

/// One line of `/proc/<pid>/mountinfo`, proc_pid_mountinfo(5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountInfo {
    /// The mount's id.
    pub id: u64,
    /// The id of the mount it is on.
    pub parent: u64,
    /// The directory of the file system that is its root.
    pub root: PathBuf,
    /// Where it is mounted, relative to the reader's root.
    pub target: PathBuf,
    /// Per-mount options.
    pub options: String,
    /// Propagation: `shared:7`, `master:3`; none for a private mount.
    pub tags: Vec<String>,
    /// The file system's type.
    pub fstype: String,
    /// What was mounted; `none` and the like where there is no device.
    pub source: PathBuf,
    /// Options of the file system.
    pub super_options: String,
}

/// The mounts of the calling thread's namespace, in the order they were made.
///
/// # Errors
///
/// When `/proc` is not mounted.
pub fn list() -> io::Result<Vec<MountInfo>> {
    Ok(parse(&fs::read("/proc/thread-self/mountinfo")?))
}

/// Parses the contents of a mountinfo file. Lines that are not as proc(5) says are left out.
#[must_use]
pub fn parse(mountinfo: &[u8]) -> Vec<MountInfo> {
    mountinfo.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountInfo> {
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let path = |field: &[u8]| PathBuf::from(std::ffi::OsString::from_vec(unescape(field)));
    let mut fields = line.split(|&byte| byte == b' ');
    let id = text(fields.next()?).parse().ok()?;
    let parent = text(fields.next()?).parse().ok()?;
    let _device = fields.next()?;
    let (root, target, options) =
        (path(fields.next()?), path(fields.next()?), text(fields.next()?));
    let tags = fields.by_ref().take_while(|&field| field != b"-").map(text).collect();
    let (fstype, source) = (text(fields.next()?), path(fields.next()?));
    let super_options = fields.next().map(text).unwrap_or_default();
    Some(MountInfo { id, parent, root, target, options, tags, fstype, source, super_options })
}

/// Blanks and backslashes are written as `\` and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(octal.unwrap_or(first));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::{
        Attributes, MountInfo, bind, is_mount_point, list, parse, pivot, set_attributes, share,
        tmpfs, touch, unmount, unmount_all,
    };
    use crate::namespace::unshare_mounts;
    use std::fs;
    use std::path::Path;

    /// Runs `test` on a thread with mounts of its own, with an empty directory.
    fn with_mounts(test: impl FnOnce(&Path) + Send) {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                unshare_mounts().unwrap();
                test(dir.path());
            });
        });
    }

    #[test]
    fn stacked_mounts_are_all_unmounted_and_nothing_mounted_is_a_success() {
        with_mounts(|dir| {
            for _ in 0..3 {
                tmpfs(dir, 0o700, Some(1 << 20)).unwrap();
            }
            assert!(is_mount_point(dir).unwrap());
            let mounted = list().unwrap();
            assert_eq!(mounted.iter().filter(|mount| mount.target == dir).count(), 3);
            unmount_all(dir).unwrap();
            assert!(!is_mount_point(dir).unwrap());
            unmount_all(dir).unwrap();
            unmount(&dir.join("not/there")).unwrap();
        });
    }

    #[test]
    fn a_file_is_bound_read_only_on_an_empty_one() {
        with_mounts(|dir| {
            let (source, target) = (dir.join("source"), dir.join("target"));
            fs::write(&source, "text").unwrap();
            drop(touch(&target).unwrap());
            bind(&source, &target, false).unwrap();
            set_attributes(&target, Attributes::READ_ONLY, false).unwrap();
            assert_eq!(fs::read_to_string(&target).unwrap(), "text");
            assert!(fs::write(&target, "x").is_err());
            fs::write(&source, "more").unwrap();
        });
    }

    #[test]
    fn a_shared_directory_is_a_mount_point_that_tells_its_copies_only() {
        with_mounts(|dir| {
            share(dir).unwrap();
            share(dir).unwrap();
            let mounted = list().unwrap();
            let here: Vec<_> = mounted.iter().filter(|mount| mount.target == dir).collect();
            let [mount] = here[..] else { panic!("{here:?}") };
            assert!(mount.tags.iter().any(|tag| tag.starts_with("shared:")), "{:?}", mount.tags);
            assert!(!mount.tags.iter().any(|tag| tag.starts_with("master:")), "{:?}", mount.tags);
        });
    }

    #[test]
    fn a_new_root_is_all_there_is() {
        with_mounts(|dir| {
            tmpfs(dir, 0o755, None).unwrap();
            fs::write(dir.join("marker"), "").unwrap();
            pivot(dir).unwrap();
            let names: Vec<_> =
                fs::read_dir("/").unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(names, ["marker"]);
        });
    }

    #[test]
    fn a_mountinfo_line_is_parsed_with_its_escapes_and_any_number_of_tags() {
        let text = b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue\n\
                     bad line\n\
                     40 36 0:5 / /plain ro - tmpfs none rw\n";
        let mounts = parse(text);
        assert_eq!(
            mounts[0],
            MountInfo {
                id: 36,
                parent: 35,
                root: "/mnt1".into(),
                target: "/mnt 2".into(),
                options: "rw,noatime".into(),
                tags: vec!["master:1".into(), "shared:7".into()],
                fstype: "ext3".into(),
                source: "/dev/root".into(),
                super_options: "rw,errors=continue".into(),
            }
        );
        assert_eq!((mounts.len(), mounts[1].tags.len()), (2, 0));
    }
}
