//! Emptying and removing cgroup directories.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;

use crate::process::ProcessId;

/// How long killed processes may take to end.
const DEADLINE: Duration = Duration::from_secs(10);

/// The kernel has no event for "this cgroup can be removed now": we ask again this often.
const PAUSE: Duration = Duration::from_millis(2);

/// Kills what is in the cgroup directory at `path`, and below it, and removes it. One that is not there is a success.
///
/// The calling process, should it be in there, moves to a parent first.
///
/// # Errors
///
/// When processes did not end, or the directory was still busy, after ten seconds.
pub fn remove_directory(path: &Path) -> io::Result<()> {
    let deadline = Instant::now() + DEADLINE;
    loop {
        match remove_tree(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                if Instant::now() >= deadline {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
        step_out(path)?;
        thaw(path);
        kill(path, deadline)?;
        pause(PAUSE);
    }
}

/// Removes the directory and those below it, the deepest first.
fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir(path) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        // cgroupfs says EBUSY for children as for processes.
        Err(error) if error.kind() != io::ErrorKind::ResourceBusy => return Err(error),
        Err(_) => {}
    }
    for child in children(path)? {
        remove_tree(&child)?;
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn children(path: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut children = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            children.push(entry.path());
        }
    }
    Ok(children)
}

/// The processes in a cgroup and below it. None, where it is not there.
pub(super) fn pids_below(path: &Path) -> io::Result<Vec<u32>> {
    let text = match fs::read_to_string(path.join("cgroup.procs")) {
        Ok(text) => text,
        // ENODEV: removed while open. EOPNOTSUPP: a threaded v2 cgroup; its parent lists the processes.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP)
            ) =>
        {
            String::new()
        }
        Err(error) => return Err(error),
    };
    // 0: a process of another pid namespace.
    let mut pids: Vec<u32> =
        text.lines().filter_map(|line| line.parse().ok()).filter(|&pid| pid != 0).collect();
    for child in children(path)? {
        pids.extend(pids_below(&child)?);
    }
    Ok(pids)
}

/// Whether somebody's processes are in it.
pub(super) fn is_populated(path: &Path) -> bool {
    pids_below(path).is_ok_and(|pids| !pids.is_empty())
}

/// Moves the calling process out, to the nearest parent that takes it.
fn step_out(path: &Path) -> io::Result<()> {
    let own = process::id();
    if !pids_below(path)?.contains(&own) {
        return Ok(());
    }
    let mut last = Err(io::ErrorKind::ResourceBusy.into());
    for parent in path.ancestors().skip(1) {
        let procs = parent.join("cgroup.procs");
        if !procs.exists() {
            break;
        }
        // EBUSY: a v2 cgroup whose controllers are its children's takes no processes.
        last = fs::write(procs, own.to_string());
        if last.is_ok() {
            break;
        }
    }
    last
}

/// A process that a v1 freezer holds cannot die.
fn thaw(path: &Path) {
    let state = path.join("freezer.state");
    if state.exists() {
        for child in children(path).unwrap_or_default() {
            thaw(&child);
        }
        drop(fs::write(state, "THAWED"));
    }
}

/// Kills the processes below `path` and waits for their ends.
fn kill(path: &Path, deadline: Instant) -> io::Result<()> {
    let pids = pids_below(path)?;
    let processes: Vec<_> = pids.into_iter().filter_map(ProcessId::of).collect();
    // Linux 5.14, v2: one write, and nothing forked meanwhile escapes.
    let at_once = fs::write(path.join("cgroup.kill"), "1").is_ok();
    let mut ends = Vec::new();
    for process in processes {
        ends.extend(process.open()?.map(File::from));
        if !at_once {
            process.signal(Signal::KILL)?;
        }
    }
    for end in &ends {
        if !wait_for(end, PollFlags::IN, deadline)? {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("killed processes did not end within {} s", DEADLINE.as_secs()),
            ));
        }
    }
    Ok(())
}

/// Waits until `file` is ready; `false` when the deadline has come.
pub(super) fn wait_for(file: &File, flags: PollFlags, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(file, flags)], Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits where the kernel has no event to wait for.
pub(super) fn pause(time: Duration) {
    let time = Timespec { tv_sec: 0, tv_nsec: time.subsec_nanos().into() };
    // Woken early by a signal, we only ask earlier.
    let _woken = poll(&mut [], Some(&time));
}
