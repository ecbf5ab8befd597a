//! The device nodes and links of a container's `/dev`.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use nix::mount::MsFlags;
use protocol::oci::{LinuxDevice, LinuxDeviceType, Spec};
use rustix::fs::{AtFlags, FileType, Gid, Mode, Uid};
use rustix::io::Errno;

use super::failure::{During, Failure};
use super::mounts;
use super::paths::{self, Make};

/// What every container has, config-linux.md of the OCI runtime spec, "Default Devices".
const DEFAULTS: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("/proc/kcore", "core"),
];

/// A node to be made.
struct Node<'a> {
    path: &'a Path,
    kind: FileType,
    major: u32,
    minor: u32,
    mode: u32,
    owner: (u32, u32),
}

/// Makes the default devices, those of the spec, and the links.
pub(super) fn make(root: BorrowedFd<'_>, spec: &Spec, user: bool) -> Result<(), Failure> {
    let given = spec.linux().as_ref().and_then(|linux| linux.devices().as_deref());
    let given = given.unwrap_or_default();
    for (path, major, minor) in DEFAULTS {
        let path = Path::new(path);
        if given.iter().any(|device| device.path() == path) {
            continue;
        }
        let kind = FileType::CharacterDevice;
        make_node(root, &Node { path, kind, major, minor, mode: 0o666, owner: (0, 0) }, user)?;
    }
    for device in given {
        make_node(root, &node(device)?, user)?;
    }
    if !user && allows_all(spec) {
        make_guests_own(root)?;
    }
    make_links(root)
}

/// Whether the spec lets the container use every device, as privileged ones may.
fn allows_all(spec: &Spec) -> bool {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    let any = |number: Option<i64>| number.is_none_or(|number| number == -1);
    rules.iter().any(|rule| {
        let kind = rule.typ().unwrap_or(LinuxDeviceType::A);
        rule.allow() && kind == LinuxDeviceType::A && any(rule.major()) && any(rule.minor())
    })
}

/// Devices whose first use brings their module along: until then the guest's kernel shows no node of them.
const LOADED: [(&str, FileType, u32, u32); 6] = [
    ("/dev/fuse", FileType::CharacterDevice, 10, 229),
    ("/dev/net/tun", FileType::CharacterDevice, 10, 200),
    ("/dev/loop-control", FileType::CharacterDevice, 10, 237),
    ("/dev/mapper/control", FileType::CharacterDevice, 10, 236),
    ("/dev/loop0", FileType::BlockDevice, 7, 0),
    ("/dev/loop1", FileType::BlockDevice, 7, 1),
];

/// Makes the devices that the guest has, as a privileged container has its host's.
fn make_guests_own(root: BorrowedFd<'_>) -> Result<(), Failure> {
    for (path, kind, major, minor) in LOADED {
        let mode = if path.ends_with("tun") { 0o666 } else { 0o600 };
        let path = Path::new(path);
        make_node(root, &Node { path, kind, major, minor, mode, owner: (0, 0) }, false)?;
    }
    let list = || "list /dev".to_owned();
    for entry in fs::read_dir("/dev").during(list)? {
        let path = entry.during(list)?.path();
        let Ok(stat) = rustix::fs::lstat(&path) else { continue };
        let kind = FileType::from_raw_mode(stat.st_mode);
        let is_device = matches!(kind, FileType::CharacterDevice | FileType::BlockDevice);
        // The container's console is a terminal of its own.
        if !is_device || path.ends_with("console") || path.ends_with("ptmx") {
            continue;
        }
        let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        let owner = (stat.st_uid, stat.st_gid);
        let node = Node { path: &path, kind, major, minor, mode: stat.st_mode & 0o777, owner };
        make_node(root, &node, false)?;
    }
    Ok(())
}

fn node(device: &LinuxDevice) -> Result<Node<'_>, Failure> {
    let path = device.path();
    let kind = match device.typ() {
        LinuxDeviceType::B => FileType::BlockDevice,
        LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
        LinuxDeviceType::P => FileType::Fifo,
        LinuxDeviceType::A => {
            return Err(Failure(format!("device {} has no type", path.display())));
        }
    };
    let number = |value: i64| {
        u32::try_from(value)
            .map_err(|_| Failure(format!("device {} has no number", path.display())))
    };
    Ok(Node {
        path,
        kind,
        major: if kind == FileType::Fifo { 0 } else { number(device.major())? },
        minor: if kind == FileType::Fifo { 0 } else { number(device.minor())? },
        mode: device.file_mode().unwrap_or(0o666),
        owner: (device.uid().unwrap_or_default(), device.gid().unwrap_or_default()),
    })
}

fn make_node(root: BorrowedFd<'_>, node: &Node<'_>, user: bool) -> Result<(), Failure> {
    let action = || format!("create device node {}", node.path.display());
    let (Some(parent), Some(name)) = (node.path.parent(), node.path.file_name()) else {
        return Err(Failure(format!("device path {} is no path", node.path.display())));
    };
    if user {
        // A user namespace may make no devices; the guest's serve.
        let target = paths::ensure(root, node.path, Make::File).during(action)?;
        return mounts::call(Some(node.path), &target, None, MsFlags::MS_BIND, None);
    }
    let parent = paths::ensure(root, parent, Make::Directory).during(action)?;
    let device = rustix::fs::makedev(node.major, node.minor);
    let mode = Mode::from_raw_mode(node.mode & 0o7777);
    match rustix::fs::mknodat(&parent, name, node.kind, mode, device) {
        Ok(()) => {}
        // The image, or a mount, has it.
        Err(Errno::EXIST) => return Ok(()),
        Err(error) => return Err(error).during(action),
    }
    // The process's umask has taken its part of the mode.
    rustix::fs::chmodat(&parent, name, mode, AtFlags::empty()).during(action)?;
    let (uid, gid) = (Uid::from_raw(node.owner.0), Gid::from_raw(node.owner.1));
    rustix::fs::chownat(&parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
        .during(action)
}

fn make_links(root: BorrowedFd<'_>) -> Result<(), Failure> {
    let dev = paths::ensure(root, Path::new("/dev"), Make::Directory)
        .during(|| "create /dev".to_owned())?;
    for (target, name) in LINKS {
        if name == "core" && !Path::new(target).exists() {
            continue;
        }
        match rustix::fs::symlinkat(target, &dev, name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error).during(|| format!("create link /dev/{name}")),
        }
    }
    // The container's terminals, not those that the image may name.
    let ptmx = paths::of(dev.as_fd()).join("ptmx");
    match fs::remove_file(&ptmx) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).during(|| "remove /dev/ptmx".to_owned());
        }
        _ => {}
    }
    rustix::fs::symlinkat("pts/ptmx", &dev, "ptmx").during(|| "create link /dev/ptmx".to_owned())
}
