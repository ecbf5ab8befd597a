//! Events of files that the host has changed: the guest's kernel knows nothing of them, so watchers, inotify(7), would wait
//! in vain.
//!
//! The host watches its side once the agent says that somebody in the guest watches files, and tells what has changed.
//! For that the agent asks to set a time that the host's device does not set, see the `device` crate: nothing changes, and
//! the guest's kernel tells its watchers.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use protocol::{ECHO_TIME, agent, paths};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT};
use tokio::sync::broadcast;

use crate::console;
use crate::error::{Doing, Error};

/// Where the kernel's tracing is, for the agent alone.
const TRACING: &str = "/run/kata/tracing";

/// `FUSE_SUPER_MAGIC` of the kernel's include/uapi/linux/magic.h.
const FUSE: rustix::fs::FsWord = 0x6573_5546;

/// Says once, when a process other than the agent begins to watch a file. Costs nothing until then, and nothing after.
pub(crate) fn tell_of_watchers(events: broadcast::Sender<agent::Event>) {
    let wait = move || {
        if let Err(error) = wait_for_watcher() {
            // A kernel without tracing: then the host's changes are not told.
            console::err(&format!("kata-agent: {}", error.chain()));
            return;
        }
        let mut event = agent::Event::new();
        event.set_watching(agent::Empty::default());
        // A host that does not listen does not want to know.
        drop(events.send(event));
    };
    // A thread, as it spends its life in one read; without one, nothing is told.
    drop(std::thread::Builder::new().name("watchers".into()).stack_size(64 << 10).spawn(wait));
}

fn wait_for_watcher() -> Result<(), Error> {
    let action = || "trace the system call inotify_add_watch".to_owned();
    fs::create_dir_all(TRACING).doing(action)?;
    let flags = rustix::mount::MountFlags::NOSUID | rustix::mount::MountFlags::NOEXEC;
    rustix::mount::mount("tracefs", TRACING, "tracefs", flags, c"mode=700").doing(action)?;
    let at = |name: &str| Path::new(TRACING).join(name);
    let waited = || -> std::io::Result<()> {
        fs::write(at("kprobe_events"), "p:kata/watch __x64_sys_inotify_add_watch")?;
        fs::create_dir(at("instances/kata"))?;
        fs::write(at("instances/kata/buffer_size_kb"), "4")?;
        let probe = at("instances/kata/events/kata/watch");
        // The agent's own are those of cgroups.
        fs::write(probe.join("filter"), "common_pid != 1")?;
        fs::write(probe.join("enable"), "1")?;
        let mut pipe = fs::File::open(at("instances/kata/trace_pipe"))?;
        let read = pipe.read(&mut [0; 256]);
        // A probe that stays is one more instruction.
        drop(fs::write(probe.join("enable"), "0"));
        read.map(drop)
    };
    let outcome = waited().doing(action);
    drop(fs::remove_dir(at("instances/kata")));
    // Opened to be written anew it loses all that is in it.
    drop(fs::File::create(at("kprobe_events")));
    rustix::mount::unmount(TRACING, rustix::mount::UnmountFlags::DETACH).doing(action)?;
    outcome
}

/// Has the volumes of a container that is about to be made be mounted here first. Each is mounted by the kernel where it is
/// first looked at; so the container's are copies of ours, and its watchers those of the same files.
pub(crate) fn look_at_volumes(container: &str) {
    let Ok(volumes) = fs::read_dir(Path::new(paths::SHARE).join(container).join("mounts")) else {
        return;
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    for volume in volumes.filter_map(Result::ok) {
        // One that cannot be looked at has no watchers.
        drop(rustix::fs::open(volume.path(), flags, Mode::empty()));
    }
}

/// Tells the watchers of these. What has gone meanwhile is left out.
pub(crate) fn tell_watchers(changes: &[agent::Change]) -> Result<(), Error> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let share = rustix::fs::open(paths::SHARE, flags, Mode::empty())
        .doing(|| format!("open {}", paths::SHARE))?;
    for change in changes {
        let path = Path::new(OsStr::from_bytes(&change.path));
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let Ok(file) = rustix::fs::openat2(&share, path, flags, Mode::empty(), resolve) else {
            continue;
        };
        if rustix::fs::fstatfs(&file).is_ok_and(|about| about.f_type == FUSE) {
            // A file that has gone since has no watchers either.
            echo(file.as_fd(), change.lost).unwrap_or_default();
        }
    }
    Ok(())
}

/// The time of the last change alone is a change of contents to watchers, both times one of attributes.
fn echo(file: std::os::fd::BorrowedFd<'_>, both: bool) -> rustix::io::Result<()> {
    let (tv_sec, tv_nsec) = ECHO_TIME;
    let echo = Timespec { tv_sec, tv_nsec };
    let other = if both { echo } else { Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT } };
    let times = Timestamps { last_access: other, last_modification: echo };
    rustix::fs::utimensat(file, "", &times, AtFlags::EMPTY_PATH)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_time_is_the_one_that_the_device_knows() {
        let (seconds, nanoseconds) = protocol::ECHO_TIME;
        assert_eq!(u64::try_from(seconds).unwrap(), device::ECHO_TIME.0);
        assert_eq!(u32::try_from(nanoseconds).unwrap(), device::ECHO_TIME.1);
    }
}
