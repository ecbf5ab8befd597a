//! A container's view of the file system: built beside the guest's, then made the only one.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, umount2};
use protocol::oci::{self, LinuxNamespaceType, Spec};
use rustix::fs::{FileType, Mode, OFlags};

use super::failure::{During, Failure};
use super::paths::{self, Make};
use super::{devices, mounts};

/// A container's root, not yet entered.
#[derive(Debug)]
pub(super) struct Root {
    pub(super) fd: OwnedFd,
}

/// Mounts the root and all that belongs below it, in a mount namespace of the process's own. A container with a user
/// namespace needs the guest's `sysfs`.
pub(super) fn build(spec: &Spec, sysfs: Option<&OwnedFd>) -> Result<Root, Failure> {
    set_names(spec)?;
    set_sysctls(spec, |name| !name.starts_with("net."))?;
    let path = spec.root().as_ref().ok_or_else(|| Failure("the spec has no root".to_owned()))?;
    let path = path.path();
    let linux = spec.linux().as_ref();
    let propagation = linux.and_then(|linux| linux.rootfs_propagation().as_deref());
    // Nothing that a container mounts may reach the guest, unless it is asked for.
    let flags = if propagation.is_some_and(|word| word.ends_with("shared")) {
        MsFlags::MS_SHARED | MsFlags::MS_REC
    } else {
        MsFlags::MS_SLAVE | MsFlags::MS_REC
    };
    change(Path::new("/"), flags)?;
    if flags.contains(MsFlags::MS_SHARED) {
        change(&mount_point_of(path)?, MsFlags::MS_PRIVATE)?;
    }
    nix::mount::mount(
        Some(path),
        path,
        None::<&str>,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        None::<&str>,
    )
    .during(|| format!("mount the root filesystem {}", path.display()))?;
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, directory, Mode::empty())
        .during(|| format!("open the root filesystem {}", path.display()))?;
    for mount in spec.mounts().iter().flatten() {
        mounts::mount(fd.as_fd(), mount, sysfs.map(AsFd::as_fd))?;
    }
    // Who mounts a whole /dev brings its devices along.
    let dev_is_given = spec.mounts().iter().flatten().any(|mount| {
        mount.destination() == Path::new("/dev") && libcontainer::rootfs::utils::is_bind(mount)
    });
    if !dev_is_given {
        devices::make(fd.as_fd(), spec, sysfs.is_some())?;
    }
    Ok(Root { fd })
}

/// Hides and protects what the spec says, and makes `root` the root.
pub(super) fn seal(spec: &Spec, root: Root) -> Result<(), Failure> {
    if let Some(process) = spec.process() {
        // As runc does. On a file system that refuses it, the change of directory will tell.
        drop(paths::ensure(root.fd.as_fd(), process.cwd(), Make::Directory));
    }
    let linux = spec.linux().as_ref();
    for path in linux.and_then(|linux| linux.readonly_paths().as_ref()).into_iter().flatten() {
        make_readonly(&root, Path::new(path))?;
    }
    for path in linux.and_then(|linux| linux.masked_paths().as_ref()).into_iter().flatten() {
        mask(&root, Path::new(path))?;
    }
    if spec.root().as_ref().and_then(oci::Root::readonly) == Some(true) {
        mounts::remount(root.fd.as_fd(), Path::new("/"), MsFlags::MS_RDONLY, MsFlags::empty())?;
    }
    enter(&root.fd)?;
    drop(root);
    match linux.and_then(|linux| linux.rootfs_propagation().as_deref()) {
        Some("shared") => change(Path::new("/"), MsFlags::MS_SHARED)?,
        Some("rshared") => change(Path::new("/"), MsFlags::MS_SHARED | MsFlags::MS_REC)?,
        Some("unbindable") => change(Path::new("/"), MsFlags::MS_UNBINDABLE)?,
        Some("private") => change(Path::new("/"), MsFlags::MS_PRIVATE)?,
        Some("rprivate") => change(Path::new("/"), MsFlags::MS_PRIVATE | MsFlags::MS_REC)?,
        Some("slave" | "rslave" | "runbindable" | "") | None => {}
        Some(word) => return Err(Failure(format!("rootfsPropagation \"{word}\" is not known"))),
    }
    reopen_null()
}

/// pivot_root(2) onto the same directory, which needs no other: the old root lies on top and is taken off.
fn enter(root: &OwnedFd) -> Result<(), Failure> {
    let action = || "pivot_root".to_owned();
    rustix::process::fchdir(root).during(action)?;
    rustix::process::pivot_root(".", ".").during(action)?;
    // Taking it off must not travel to where it came from.
    change(Path::new("."), MsFlags::MS_SLAVE | MsFlags::MS_REC)?;
    umount2(".", MntFlags::MNT_DETACH).during(action)?;
    rustix::process::chdir("/").during(action)
}

fn change(path: &Path, flags: MsFlags) -> Result<(), Failure> {
    nix::mount::mount(None::<&str>, path, None::<&str>, flags, None::<&str>)
        .during(|| format!("change the propagation of {}", path.display()))
}

/// Where the mount that `path` lies on is mounted.
fn mount_point_of(path: &Path) -> Result<std::path::PathBuf, Failure> {
    let table = fs::read_to_string("/proc/self/mountinfo")
        .during(|| "read /proc/self/mountinfo".to_owned())?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
    let nearest =
        points.filter(|point| path.starts_with(point)).max_by_key(|point| point.as_os_str().len());
    Ok(nearest.unwrap_or(Path::new("/")).to_owned())
}

/// The host and domain name of a container with a UTS namespace of its own.
fn set_names(spec: &Spec) -> Result<(), Failure> {
    if !has_new(spec, LinuxNamespaceType::Uts) {
        return Ok(());
    }
    if let Some(name) = spec.hostname() {
        rustix::system::sethostname(name.as_bytes())
            .during(|| format!("set the hostname {name}"))?;
    }
    if let Some(name) = spec.domainname() {
        rustix::system::setdomainname(name.as_bytes())
            .during(|| format!("set the domainname {name}"))?;
    }
    Ok(())
}

/// Sets those of the spec's sysctls that `which` takes, in the namespaces of the process.
pub(super) fn set_sysctls(spec: &Spec, which: impl Fn(&str) -> bool) -> Result<(), Failure> {
    let sysctls = spec.linux().as_ref().and_then(|linux| linux.sysctl().as_ref());
    for (name, value) in sysctls.into_iter().flatten().filter(|(name, _)| which(name)) {
        let path = if name.contains('/') { name.clone() } else { name.replace('.', "/") };
        if path.split('/').any(|part| part == ".." || part.is_empty()) {
            return Err(Failure(format!("sysctl \"{name}\" is no name of one")));
        }
        fs::write(format!("/proc/sys/{path}"), value)
            .during(|| format!("set sysctl {name} to {value}"))?;
    }
    Ok(())
}

fn make_readonly(root: &Root, path: &Path) -> Result<(), Failure> {
    let Ok(target) = paths::find(root.fd.as_fd(), path) else { return Ok(()) };
    let source = paths::of(target.as_fd());
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mounts::call(Some(&source), &target, None, flags, None)?;
    mounts::remount(root.fd.as_fd(), path, MsFlags::MS_RDONLY, MsFlags::empty())
}

fn mask(root: &Root, path: &Path) -> Result<(), Failure> {
    let Ok(target) = paths::find(root.fd.as_fd(), path) else { return Ok(()) };
    let stat = rustix::fs::fstat(&target).during(|| format!("stat {}", path.display()))?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        let flags = MsFlags::MS_RDONLY;
        return mounts::call(Some(Path::new("tmpfs")), &target, Some("tmpfs"), flags, None);
    }
    mounts::call(Some(Path::new("/dev/null")), &target, None, MsFlags::MS_BIND, None)
}

/// Has the standard streams that are the guest's null device be the container's, so that it can open them again by
/// their names below /proc.
fn reopen_null() -> Result<(), Failure> {
    let Ok(null) = fs::OpenOptions::new().read(true).write(true).open("/dev/null") else {
        return Ok(());
    };
    let action = || "reopen /dev/null".to_owned();
    let device = rustix::fs::fstat(&null).during(action)?.st_rdev;
    let is_null = |stat: rustix::fs::Stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == device
    };
    if is_null(rustix::fs::fstat(rustix::stdio::stdin()).during(action)?) {
        rustix::stdio::dup2_stdin(&null).during(action)?;
    }
    if is_null(rustix::fs::fstat(rustix::stdio::stdout()).during(action)?) {
        rustix::stdio::dup2_stdout(&null).during(action)?;
    }
    if is_null(rustix::fs::fstat(rustix::stdio::stderr()).during(action)?) {
        rustix::stdio::dup2_stderr(&null).during(action)?;
    }
    Ok(())
}

fn has_new(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    namespaces.into_iter().flatten().any(|namespace| {
        let path = namespace.path().as_ref();
        namespace.typ() == kind && path.is_none_or(|path| path.as_os_str().is_empty())
    })
}

pub(super) fn has_user_namespace(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    namespaces.into_iter().flatten().any(|one| one.typ() == LinuxNamespaceType::User)
}
