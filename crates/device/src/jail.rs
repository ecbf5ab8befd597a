//! The jail of a device process: what it can still reach after a guest has taken it over.
//!
//! - **Files**: the shared directory is its root, and the mounts below it; nothing else of the host is mounted.
//! - **Network**: an empty network namespace, and System V IPC of its own. It has only sockets that it was given.
//! - **Privileges**: the capabilities by which the guest's files keep their owners, modes and attributes, and no way
//!   to others.
//! - **System calls**: see [`crate::seccomp`].

use std::fs::File;
use std::path::Path;

use nix::sched::CloneFlags;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};
use rustix::process::{Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::Error;

/// What passing a guest's files through takes; each guest user's acts are made as that user.
///
/// Not among them: `CAP_DAC_READ_SEARCH`, which lets open_by_handle_at(2) reach any file of the shared directory's file
/// system, whatever the root directory is; `CAP_SYS_ADMIN`, which the guest would need for `trusted.*` attributes.
const KEPT: [CapabilitySet; 8] = [
    CapabilitySet::CHOWN,
    CapabilitySet::DAC_OVERRIDE,
    CapabilitySet::FOWNER,
    CapabilitySet::FSETID,
    CapabilitySet::SETGID,
    CapabilitySet::SETUID,
    CapabilitySet::MKNOD,
    CapabilitySet::SETFCAP,
];

/// What the virtio-fs back end is given from outside the jail.
pub(crate) struct Opened {
    /// `/proc/self/fd`, for the directory's own files to be opened anew by descriptor. It is the root of a mount of its
    /// own: there is no way from it to the rest of `/proc`.
    pub(crate) proc_self_fd: File,
    /// How many descriptors the process can have.
    pub(crate) descriptors: u64,
}

fn failed(action: &'static str) -> impl FnOnce(rustix::io::Errno) -> Error {
    move |source| Error::Jail { action, source: source.into() }
}

/// Leaves the host but for `directory`; without one, the root directory is empty. System calls are not yet limited.
///
/// Called while the process has one thread: credentials are each thread's own.
pub(crate) fn enter(directory: Option<&Path>) -> Result<Opened, Error> {
    // What the guest says a file's mode is, it is.
    rustix::process::umask(Mode::empty());
    let descriptors = raise_descriptor_limit();
    let namespaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC;
    nix::sched::unshare(namespaces).map_err(|error| Error::Jail {
        action: "make namespaces; this takes root's CAP_SYS_ADMIN",
        source: error.into(),
    })?;
    // Mounts that the caller makes later below a shared mount arrive here; ours do not go back.
    let propagation = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", propagation).map_err(failed("keep mounts to itself"))?;
    let proc_self_fd = rustix::mount::open_tree(
        CWD,
        "/proc/self/fd",
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )
    .map_err(failed("open /proc/self/fd"))?;
    pivot(directory)?;
    drop_capabilities().map_err(failed("drop capabilities"))?;
    Ok(Opened { proc_self_fd: proc_self_fd.into(), descriptors })
}

/// As high as we may: each file that the guest knows is one. Answers what it is then.
fn raise_descriptor_limit() -> u64 {
    // More than the hard limit takes CAP_SYS_RESOURCE, which root may lack in a container. A million serves.
    let wanted = Some(1 << 20);
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let maximum = limit.maximum.map(|maximum| maximum.max(1 << 20));
    let higher = Rlimit { current: wanted, maximum };
    let allowed = Rlimit { current: limit.maximum, maximum: limit.maximum };
    // Where neither is granted, what we have must do.
    rustix::process::setrlimit(Resource::Nofile, higher)
        .or_else(|_| rustix::process::setrlimit(Resource::Nofile, allowed))
        .unwrap_or_default();
    rustix::process::getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Makes `directory` the root, and unmounts all else.
fn pivot(directory: Option<&Path>) -> Result<(), Error> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let old = rustix::fs::open("/", flags, Mode::empty()).map_err(failed("open /"))?;
    let new = if let Some(path) = directory {
        let tree = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE;
        let shared =
            |error: rustix::io::Errno| Error::Share { path: path.into(), source: error.into() };
        let new = rustix::mount::open_tree(CWD, path, tree).map_err(shared)?;
        // pivot_root(2) wants the new root to be a mount that is somewhere.
        let move_flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        rustix::mount::move_mount(&new, "", CWD, path, move_flags).map_err(shared)?;
        new
    } else {
        let flags =
            MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount("none", "/proc", "tmpfs", flags, c"size=4k,mode=0")
            .map_err(failed("mount an empty root"))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open("/proc", flags, Mode::empty()).map_err(failed("open the empty root"))?
    };
    let changed = (|| {
        rustix::process::fchdir(&new)?;
        // The directory itself is the host's, often in memory: a guest must not fill it. What is mounted below it keeps
        // flags of its own.
        let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
        rustix::mount::mount_remount(".", flags, "")?;
        // Both the same: the old root is mounted upon the new one, from where it is unmounted, see pivot_root(2).
        rustix::process::pivot_root(".", ".")?;
        rustix::process::fchdir(&old)?;
        rustix::mount::unmount(".", UnmountFlags::DETACH)?;
        rustix::process::fchdir(&new)?;
        rustix::process::chdir("/")
    })();
    changed.map_err(failed("change the root directory"))
}

fn drop_capabilities() -> rustix::io::Result<()> {
    let kept = KEPT.into_iter().collect::<CapabilitySet>();
    for capability in CapabilitySet::all().iter().filter(|&one| !kept.contains(one)) {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // The kernel is older than the capability.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error),
        }
    }
    rustix::thread::clear_ambient_capability_set()?;
    // What the caller itself lacks cannot be kept.
    let kept = kept & rustix::thread::capabilities(None)?.permitted;
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: none };
    rustix::thread::set_capabilities(None, sets)?;
    rustix::thread::set_no_new_privs(true)
}
