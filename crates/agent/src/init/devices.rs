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
    make_links(root)
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
