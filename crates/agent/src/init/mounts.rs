//! The mounts of a container.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use libcontainer::rootfs::utils::{MountOptionConfig, is_bind, parse_mount};
use libcontainer::syscall::linux::{AT_EMPTY_PATH, AT_RECURSIVE, MountAttr};
use libcontainer::syscall::syscall::create_syscall;
use nix::mount::MsFlags;
use protocol::oci::Mount;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

use super::failure::{During, Failure};
use super::paths::{self, Make};

/// What the options of a mount mean.
struct Options {
    /// Of the mount and its file system.
    flags: MsFlags,
    /// For the file system.
    data: String,
    /// How later mounts travel between it and its copies; each its own call, mount_namespaces(7).
    propagation: Vec<MsFlags>,
    /// Of the mount and those below it.
    recursive: Option<MountAttr>,
    /// The words that take a property away: "rw", "exec".
    cleared: MsFlags,
    /// Whether a new tmpfs starts with what it hides.
    copy_up: bool,
}

const PROPAGATION: [(&str, MsFlags); 8] = [
    ("private", MsFlags::MS_PRIVATE),
    ("rprivate", MsFlags::MS_PRIVATE.union(MsFlags::MS_REC)),
    ("slave", MsFlags::MS_SLAVE),
    ("rslave", MsFlags::MS_SLAVE.union(MsFlags::MS_REC)),
    ("shared", MsFlags::MS_SHARED),
    ("rshared", MsFlags::MS_SHARED.union(MsFlags::MS_REC)),
    ("unbindable", MsFlags::MS_UNBINDABLE),
    ("runbindable", MsFlags::MS_UNBINDABLE.union(MsFlags::MS_REC)),
];

const CLEARING: [(&str, MsFlags); 4] = [
    ("rw", MsFlags::MS_RDONLY),
    ("suid", MsFlags::MS_NOSUID),
    ("dev", MsFlags::MS_NODEV),
    ("exec", MsFlags::MS_NOEXEC),
];

/// What a remount keeps. These have the same bits in statvfs(3) as in mount(2).
const KEPT: MsFlags =
    MsFlags::MS_RDONLY.union(MsFlags::MS_NOSUID).union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

fn parse(mount: &Mount) -> Result<Options, Failure> {
    let mut propagation = Vec::new();
    let mut cleared = MsFlags::empty();
    let mut copy_up = false;
    let mut rest = Vec::new();
    for word in mount.options().iter().flatten() {
        let named = |table: &[(&str, MsFlags)]| {
            table.iter().find(|(name, _)| name == word).map(|(_, flags)| *flags)
        };
        cleared |= named(&CLEARING).unwrap_or(MsFlags::empty());
        match named(&PROPAGATION) {
            Some(flags) => propagation.push(flags),
            None if word == "tmpcopyup" => copy_up = true,
            None if word == "idmap" || word == "ridmap" => {
                return Err(Failure(format!("the mount option {word} is not supported")));
            }
            None => rest.push(word.clone()),
        }
    }
    let mut plain = mount.clone();
    plain.set_options(Some(rest));
    let MountOptionConfig { flags, data, rec_attr } =
        parse_mount(&plain).map_err(|error| Failure(format!("mount options: {error}")))?;
    let flags = MsFlags::from_bits_retain(flags.bits());
    Ok(Options { flags, data: data.join(","), propagation, recursive: rec_attr, cleared, copy_up })
}

/// The guest's sysfs, for a container with a user namespace: the network namespace is the guest's, so the container
/// may mount none. To be taken before the user namespace is entered.
pub(super) fn guest_sysfs() -> Result<OwnedFd, Failure> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    rustix::mount::open_tree(rustix::fs::CWD, "/sys", flags).during(|| "copy /sys".to_owned())
}

/// Makes one mount in the container's `root`. Where there is a `sysfs`, that stands for every sysfs.
pub(super) fn mount(
    root: BorrowedFd<'_>,
    mount: &Mount,
    sysfs: Option<BorrowedFd<'_>>,
) -> Result<(), Failure> {
    let source = mount.source().as_deref().unwrap_or(Path::new("none"));
    let name = |failure: Failure| {
        let (from, to) = (source.display(), mount.destination().display());
        Failure(format!("error mounting \"{from}\" to rootfs at \"{to}\": {}", failure.0))
    };
    let options = parse(mount).map_err(name)?;
    if is_bind(mount) {
        bind(root, source, mount.destination(), &options).map_err(name)?;
    } else {
        let kind = match mount.typ().as_deref() {
            Some("cgroup" | "cgroup2") => "cgroup2",
            Some(kind) => kind,
            None => return Err(name(Failure("it has no type".to_owned()))),
        };
        if let (Some(sysfs), "sysfs") = (sysfs, kind) {
            attach(root, sysfs, mount.destination(), &options).map_err(name)?;
        } else {
            fresh(root, kind, source, mount.destination(), &options).map_err(name)?;
        }
    }
    adjust(root, mount.destination(), &options).map_err(name)
}

fn bind(
    root: BorrowedFd<'_>,
    source: &Path,
    destination: &Path,
    options: &Options,
) -> Result<(), Failure> {
    let stat = std::fs::metadata(source).during(|| format!("stat {}", source.display()))?;
    let make = if stat.is_dir() { Make::Directory } else { Make::File };
    let target = target(root, destination, make)?;
    let flags = MsFlags::MS_BIND | (options.flags & MsFlags::MS_REC);
    call(Some(source), &target, None, flags, None)?;
    let wanted = options.flags & !(MsFlags::MS_BIND | MsFlags::MS_REC);
    if wanted.is_empty() && (options.cleared & !MsFlags::MS_RDONLY).is_empty() {
        return Ok(());
    }
    remount(root, destination, wanted, options.cleared)
}

fn attach(
    root: BorrowedFd<'_>,
    tree: BorrowedFd<'_>,
    destination: &Path,
    options: &Options,
) -> Result<(), Failure> {
    let target = target(root, destination, Make::Directory)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(tree, "", &target, "", flags)
        .during(|| "attach the guest's sysfs".to_owned())?;
    // A copy of a shared mount shares what is mounted below it with the guest; not this one.
    let mounted =
        paths::find(root, destination).during(|| format!("open {}", destination.display()))?;
    call(None, &mounted, None, MsFlags::MS_PRIVATE, None)?;
    remount(root, destination, options.flags, options.cleared)
}

/// Gives the mount at `destination` the flags `wanted` beside those that it has, without those `cleared`.
pub(super) fn remount(
    root: BorrowedFd<'_>,
    destination: &Path,
    wanted: MsFlags,
    cleared: MsFlags,
) -> Result<(), Failure> {
    let mounted =
        paths::find(root, destination).during(|| format!("open {}", destination.display()))?;
    let has = rustix::fs::fstatvfs(&mounted)
        .during(|| format!("look at the mount {}", destination.display()))?;
    let has = MsFlags::from_bits_truncate(has.f_flag.bits()) & KEPT & !cleared;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | wanted | has;
    call(None, &mounted, None, flags, None)
}

fn fresh(
    root: BorrowedFd<'_>,
    kind: &str,
    source: &Path,
    destination: &Path,
    options: &Options,
) -> Result<(), Failure> {
    let target = target(root, destination, Make::Directory)?;
    let data = Some(options.data.as_str()).filter(|data| !data.is_empty());
    // Read-only comes after the copy, if at all.
    let late = if options.copy_up { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    call(Some(source), &target, Some(kind), options.flags & !late, data)?;
    if options.copy_up && kind == "tmpfs" {
        let mounted =
            paths::find(root, destination).during(|| format!("open {}", destination.display()))?;
        // The fd of before the mount still shows what the mount hides.
        copy_up::tree(&paths::of(target.as_fd()), &paths::of(mounted.as_fd()))
            .during(|| "copy what it hides into it".to_owned())?;
        if options.flags.contains(MsFlags::MS_RDONLY) {
            remount(root, destination, options.flags, options.cleared)?;
        }
    }
    Ok(())
}

/// What is done to a mount once it is there.
fn adjust(root: BorrowedFd<'_>, destination: &Path, options: &Options) -> Result<(), Failure> {
    if options.propagation.is_empty() && options.recursive.is_none() {
        return Ok(());
    }
    let mounted =
        paths::find(root, destination).during(|| format!("open {}", destination.display()))?;
    if let Some(attributes) = &options.recursive {
        let flags = AT_EMPTY_PATH | AT_RECURSIVE;
        create_syscall()
            .mount_setattr(
                mounted.as_fd(),
                Path::new(""),
                flags,
                attributes,
                size_of::<MountAttr>(),
            )
            .map_err(|error| Failure(format!("set recursive mount options: {error}")))?;
    }
    for &flags in &options.propagation {
        call(None, &mounted, None, flags, None)?;
    }
    Ok(())
}

fn target(root: BorrowedFd<'_>, destination: &Path, make: Make) -> Result<OwnedFd, Failure> {
    paths::ensure(root, destination, make)
        .during(|| format!("create mount point {}", destination.display()))
}

pub(super) fn call(
    source: Option<&Path>,
    target: &OwnedFd,
    kind: Option<&str>,
    flags: MsFlags,
    data: Option<&str>,
) -> Result<(), Failure> {
    nix::mount::mount(source, &paths::of(target.as_fd()), kind, flags, data).during(|| {
        let source = source.unwrap_or(Path::new(""));
        format!("mount {} (type {}, flags {:#x})", source.display(), kind.unwrap_or("-"), flags)
    })
}

/// The option `tmpcopyup` of a tmpfs.
mod copy_up {
    use std::fs;
    use std::io;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
    use std::path::Path;

    /// Copies what is in directory `from` into `to`: files, directories and links, with owners and modes.
    pub(super) fn tree(from: &Path, to: &Path) -> io::Result<()> {
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            let (source, target) = (entry.path(), to.join(entry.file_name()));
            let stat = entry.metadata()?;
            let kind = stat.file_type();
            if kind.is_symlink() {
                symlink(fs::read_link(&source)?, &target)?;
                lchown(&target, Some(stat.uid()), Some(stat.gid()))?;
                continue;
            }
            if kind.is_dir() {
                fs::create_dir(&target)?;
                tree(&source, &target)?;
            } else if kind.is_file() {
                fs::copy(&source, &target)?;
            } else {
                continue;
            }
            chown(&target, Some(stat.uid()), Some(stat.gid()))?;
            fs::set_permissions(&target, fs::Permissions::from_mode(stat.mode() & 0o7777))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::parse;
    use nix::mount::MsFlags;
    use protocol::oci::{Mount, MountBuilder};

    fn mount(options: &[&str]) -> Mount {
        let options: Vec<_> = options.iter().map(ToString::to_string).collect();
        MountBuilder::default().destination("/x").source("/y").options(options).build().unwrap()
    }

    #[test]
    fn recursive_propagation_makes_no_recursive_bind() {
        let options = parse(&mount(&["bind", "rprivate", "ro"])).unwrap();
        assert_eq!(options.flags, MsFlags::MS_BIND | MsFlags::MS_RDONLY);
        assert_eq!(options.propagation, [MsFlags::MS_PRIVATE | MsFlags::MS_REC]);
    }

    #[test]
    fn what_is_no_flag_is_for_the_file_system() {
        let options = parse(&mount(&["nosuid", "mode=755", "size=65536k", "tmpcopyup"])).unwrap();
        assert_eq!(options.flags, MsFlags::MS_NOSUID);
        assert_eq!(options.data, "mode=755,size=65536k");
        assert!(options.copy_up);
    }
}
