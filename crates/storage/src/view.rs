//! A container's tree as host processes see it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use linux::mount::{self, Attributes, Propagation, Tree};
use protocol::paths;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2};

use crate::{Bind, Error, Plan, ReadOnly};

/// Makes the container's tree the root of the calling thread's mount namespace, which must be its own: its root, and on
/// it those of its mounts that are the host's. Where the guest has mounted something of its own, nothing can be written.
///
/// For those who look for a container's files through the pid that stands for it: `podman cp` enters the mount namespace
/// of that process. `scratch` is a directory that nobody else uses.
///
/// # Errors
///
/// [`Error::Host`]. The namespace may then have some of the mounts, but still its old root.
pub fn enter_view(plan: &Plan, scratch: &Path) -> Result<(), Error> {
    let Some(root) = plan.binds.first() else { return Ok(()) };
    let failed = |error: io::Error| Error::host("enter the tree at", &root.source)(error);
    // A mount point is wanted, and one that nobody else hears of.
    mount::bind(&root.source, &root.source, true).map_err(failed)?;
    mount::set_propagation(&root.source, Propagation::Private, true).map_err(failed)?;
    mount::tmpfs(scratch, 0o555, Some(0)).map_err(Error::host("mount on", scratch))?;
    let top = openat(CWD, &root.source, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())
        .map_err(Error::host("open", &root.source))?;
    for mount in &plan.guest_mounts {
        let source = mount.source().as_deref().unwrap_or(Path::new(""));
        let name = source.strip_prefix(paths::SHARE).ok();
        let bind = name.and_then(|name| plan.binds.iter().find(|bind| bind.name == name));
        // A mount point that the guest could not make, or that another mount hides, shows nothing.
        drop(match bind {
            Some(bind) => show(bind, top.as_fd(), mount.destination()),
            None => hide(scratch, top.as_fd(), mount.destination()),
        });
    }
    if root.read_only != ReadOnly::No {
        mount::set_attributes(&root.source, Attributes::READ_ONLY, false).map_err(failed)?;
    }
    mount::pivot(&root.source).map_err(failed)
}

fn show(bind: &Bind, root: BorrowedFd<'_>, destination: &Path) -> io::Result<()> {
    let tree = Tree::open(&bind.source, bind.recursive)?;
    match bind.read_only {
        ReadOnly::No => {}
        ReadOnly::Top => tree.set(Attributes::READ_ONLY, false)?,
        ReadOnly::All => tree.set(Attributes::READ_ONLY, true)?,
    }
    tree.attach(open(root, destination)?)
}

fn hide(empty: &Path, root: BorrowedFd<'_>, destination: &Path) -> io::Result<()> {
    let target = open(root, destination)?;
    if FileType::from_raw_mode(fstat(&target)?.st_mode) != FileType::Directory {
        return Ok(());
    }
    let tree = Tree::open(empty, false)?;
    tree.set(Attributes::READ_ONLY, false)?;
    tree.attach(target)
}

/// Opens a path as the container sees it: its symlinks end in its root.
fn open(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    Ok(openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?)
}

#[cfg(test)]
mod tests {
    use super::enter_view;
    use crate::{Bind, Plan, ReadOnly};
    use linux::mount::Propagation;
    use protocol::{oci, paths};
    use std::fs;
    use std::io::ErrorKind;
    use std::path::Path;

    fn bind(source: &Path, name: &str, read_only: ReadOnly) -> Bind {
        Bind {
            source: source.to_owned(),
            name: name.into(),
            read_only,
            recursive: true,
            is_directory: true,
            propagation: Propagation::Private,
        }
    }

    fn mount(destination: &str, source: &str) -> oci::Mount {
        let mut mount = oci::Mount::default();
        mount.set_destination(destination.into()).set_source(Some(source.into()));
        mount
    }

    #[test]
    fn the_tree_has_the_root_its_volumes_and_nothing_of_the_host() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (root, volume, scratch) =
            (dir.path().join("root"), dir.path().join("volume"), dir.path().join("scratch"));
        for path in [&root.join("vol"), &root.join("proc"), &root.join("own"), &volume, &scratch] {
            fs::create_dir_all(path).unwrap();
        }
        fs::write(volume.join("precious"), "data").unwrap();
        let plan = Plan {
            container_id: "c".into(),
            binds: vec![
                bind(&root, "c/rootfs", ReadOnly::No),
                bind(&volume, "c/mounts/0", ReadOnly::Top),
            ],
            mount_points: Vec::new(),
            guest_root: String::new(),
            guest_mounts: vec![
                mount("/vol", &format!("{}/c/mounts/0", paths::SHARE)),
                mount("/proc", "proc"),
            ],
            sockets: Vec::new(),
            disks: Vec::new(),
            warnings: Vec::new(),
        };
        // A mount namespace is a thread's; this one ends with it.
        let seen = std::thread::spawn(move || {
            linux::namespace::unshare_mounts().unwrap();
            enter_view(&plan, &scratch).unwrap();
            fs::write("/own/new", "").unwrap();
            (
                fs::read_to_string("/vol/precious").unwrap(),
                fs::write("/vol/new", "").unwrap_err().kind(),
                fs::write("/proc/new", "").unwrap_err().kind(),
                fs::read_dir("/").unwrap().count(),
            )
        });
        let (precious, in_volume, in_proc, entries) = seen.join().unwrap();
        assert_eq!((precious.as_str(), entries), ("data", 3));
        assert_eq!(
            (in_volume, in_proc),
            (ErrorKind::ReadOnlyFilesystem, ErrorKind::ReadOnlyFilesystem)
        );
        assert!(root.join("own/new").exists());
    }
}
