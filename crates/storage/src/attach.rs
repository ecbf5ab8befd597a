//! Makes a plan's binds below the share, and takes them away.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path};

use linux::ledger::{Ledger, Undo};
use linux::mount::{self, Attributes, Propagation, Tree};
use linux::namespace::inside_mounts;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, openat, openat2};
use rustix::io::Errno;

use crate::{Bind, Error, Plan, ReadOnly};

/// Makes the binds of `plan` below `share`, in the calling thread's mount namespace. What is made on disk goes into
/// `ledger` before.
///
/// The sources are found in the mount namespace `origin` (`/proc/<pid>/ns/mnt`): the one of whoever asks, who may have
/// mounted them since the caller left that namespace.
///
/// # Errors
///
/// [`Error::Host`]; what was bound before is undone.
pub fn attach(plan: &Plan, share: &Path, origin: &Path, ledger: &mut Ledger) -> Result<(), Error> {
    let directory = share.join(&plan.container_id);
    let mut entries = vec![Undo::RemoveTree { path: directory.clone() }];
    entries.extend(plan.binds.iter().map(|bind| Undo::Unmount { path: share.join(&bind.name) }));
    for entry in entries {
        ledger.record(entry).map_err(Error::host("record", &directory))?;
    }
    let taken = inside_mounts(origin, || {
        let trees = make_mount_points(plan).and_then(|()| {
            plan.binds.iter().map(|bind| take(bind, share)).collect::<Result<_, _>>()
        });
        Ok::<Result<Vec<Tree>, Error>, io::Error>(trees)
    });
    let trees = taken.map_err(Error::host("enter mount namespace", origin))??;
    let outcome =
        plan.binds.iter().zip(trees).try_for_each(|(bind, tree)| place(bind, tree, share));
    if outcome.is_err() {
        // The first error is the one to tell; the ledger still has what would not go.
        drop(detach(&plan.container_id, share));
    }
    outcome
}

/// Shows the guest one file of the host's, read-only, under `name`, in the calling thread's mount namespace. It stays as
/// long as that and `share` do.
///
/// # Errors
///
/// [`Error::Host`].
pub fn share_file(source: &Path, name: &Path, share: &Path) -> Result<(), Error> {
    let source = source.canonicalize().map_err(Error::host("resolve", source))?;
    let bind = Bind {
        source,
        name: name.into(),
        read_only: ReadOnly::Top,
        recursive: false,
        is_directory: false,
        propagation: Propagation::Private,
    };
    place(&bind, take(&bind, share)?, share)
}

/// Undoes what [`attach`] made for a container, in the calling thread's mount namespace. What is not there is a success.
///
/// # Errors
///
/// [`Error::Host`].
pub fn detach(container_id: &str, share: &Path) -> Result<(), Error> {
    let directory = share.join(container_id);
    let mounts = directory.join("mounts");
    let mut targets = vec![directory.join("rootfs")];
    match fs::read_dir(&mounts) {
        Ok(entries) => {
            for entry in entries {
                targets.push(entry.map_err(Error::host("list", &mounts))?.path());
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::host("list", &mounts)(error)),
    }
    for target in targets {
        mount::unmount_all(&target).map_err(Error::host("unmount", &target))?;
    }
    linux::remove_tree(&directory).map_err(Error::host("remove", &directory))
}

/// A copy of the source's mount, with the bind's attributes, not yet attached anywhere.
fn take(bind: &Bind, share: &Path) -> Result<Tree, Error> {
    let source = open_source(bind)?;
    let failed = |error: io::Error| Error::host("bind", &bind.source)(error);
    let tree = Tree::of(&source, bind.recursive).map_err(failed)?;
    // A source that the share is in would be told of its own bind, and that one of it, without end.
    let hears = bind.propagation == Propagation::Slave && !share.starts_with(&bind.source);
    let propagation = if hears { Propagation::Slave } else { Propagation::Private };
    tree.set_propagation(propagation).map_err(failed)?;
    let read_only = match bind.read_only {
        ReadOnly::No => None,
        ReadOnly::Top => Some(false),
        ReadOnly::All => Some(true),
    };
    // The guest may make device files and set-user-id programs there, as root of its container; to the host they are
    // plain files.
    let inert = Attributes { no_suid: true, no_dev: true, ..Attributes::default() };
    tree.set(inert, true).map_err(failed)?;
    if let Some(recursive) = read_only {
        tree.set(Attributes::READ_ONLY, recursive).map_err(failed)?;
    }
    Ok(tree)
}

fn place(bind: &Bind, tree: Tree, share: &Path) -> Result<(), Error> {
    let target = make_target(bind, share).map_err(Error::host("make", &share.join(&bind.name)))?;
    tree.attach(&target).map_err(Error::host("bind", &bind.source))
}

/// Opens a planned source: its path had no symlinks then, and must have none now.
fn open_source(bind: &Bind) -> Result<OwnedFd, Error> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let source = openat2(CWD, &bind.source, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)
        .map_err(Error::host("open", &bind.source))?;
    let stat = fstat(&source).map_err(Error::host("open", &bind.source))?;
    let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    if is_directory == bind.is_directory {
        Ok(source)
    } else {
        Err(Error::host("open", &bind.source)(io::Error::other("it was replaced meanwhile")))
    }
}

/// Makes the directory or the empty file to bind on, and holds it. A symlink anywhere below the share is an error: the
/// guest would have made it.
fn make_target(bind: &Bind, share: &Path) -> io::Result<OwnedFd> {
    let mut parent =
        openat(CWD, share, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let names: Vec<_> = bind.name.iter().collect();
    let (last, parents) = names.split_last().ok_or(io::ErrorKind::InvalidInput)?;
    for name in parents {
        parent = make_directory(parent.as_fd(), Path::new(name))?;
    }
    if bind.is_directory {
        make_directory(parent.as_fd(), Path::new(last))
    } else {
        make_file(parent.as_fd(), Path::new(last))
    }
}

fn make_directory(parent: BorrowedFd<'_>, name: &Path) -> io::Result<OwnedFd> {
    // Container processes in a user namespace must get through, but have nothing to look for here.
    match mkdirat(parent, name, Mode::from_raw_mode(0o711)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(parent, name, flags, Mode::empty())?)
}

fn make_file(parent: BorrowedFd<'_>, name: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(parent, name, flags, Mode::from_raw_mode(0o600)) {
        Ok(_) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(parent, name, flags, Mode::empty())?;
    match FileType::from_raw_mode(fstat(&file)?.st_mode) {
        FileType::RegularFile => Ok(file),
        _ => Err(io::Error::other("it is not a regular file")),
    }
}

/// Makes what is missing of the plan's mount points, in the root and nowhere else. What cannot be made is left to the
/// guest, whose error then names the mount.
fn make_mount_points(plan: &Plan) -> Result<(), Error> {
    if plan.mount_points.is_empty() {
        return Ok(());
    }
    let root = open_source(&plan.binds[0])?;
    for (path, is_directory) in &plan.mount_points {
        drop(make_mount_point(root.as_fd(), path, *is_directory));
    }
    Ok(())
}

fn make_mount_point(root: BorrowedFd<'_>, path: &Path, is_directory: bool) -> io::Result<()> {
    // An image's symlinks are followed as the container would see them: they end in the root.
    let open = |path: &Path| {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        openat2(root, path, flags, Mode::empty(), resolve)
    };
    let names: Vec<_> = path
        .components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect();
    let mut parent =
        openat(root, ".", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut so_far = Path::new("/").to_owned();
    for (index, name) in names.iter().enumerate() {
        so_far.push(name);
        parent = match open(&so_far) {
            Err(Errno::NOENT) if index + 1 == names.len() && !is_directory => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                openat(&parent, *name, flags, Mode::from_raw_mode(0o644))?
            }
            Err(Errno::NOENT) => {
                mkdirat(&parent, *name, Mode::from_raw_mode(0o755))?;
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                openat(&parent, *name, flags, Mode::empty())?
            }
            found => found?,
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests;
