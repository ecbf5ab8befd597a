//! Freezing and thawing: cgroup.freeze of v2, freezer.state of v1.

use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::removal::{pause, wait_for};
use super::{Cgroup, Error};

/// How long processes may take to stop.
const DEADLINE: Duration = Duration::from_secs(10);

/// v1 has no event for "all have stopped".
const PAUSE: Duration = Duration::from_millis(2);

pub(super) fn set(cgroup: &Cgroup, frozen: bool) -> Result<(), Error> {
    let v2 = cgroup.unified().filter(|directory| directory.path.join("cgroup.freeze").exists());
    if let Some(directory) = v2 {
        return set_v2(&directory.path, frozen)
            .map_err(Error::host("freeze or thaw cgroup", &directory.path));
    }
    let v1 = cgroup.controller("freezer").ok_or_else(|| Error::Unsupported {
        resource: "freezer",
        problem: "neither cgroup v2 nor the v1 freezer is mounted".to_owned(),
    })?;
    set_v1(&v1.path, frozen).map_err(Error::host("freeze or thaw cgroup", &v1.path))
}

fn set_v2(directory: &Path, frozen: bool) -> io::Result<()> {
    let deadline = Instant::now() + DEADLINE;
    let mut events = File::open(directory.join("cgroup.events"))?;
    fs::write(directory.join("cgroup.freeze"), if frozen { "1" } else { "0" })?;
    let wanted = if frozen { "frozen 1" } else { "frozen 0" };
    loop {
        let mut text = String::new();
        events.rewind()?;
        events.read_to_string(&mut text)?;
        if text.lines().any(|line| line == wanted) {
            return Ok(());
        }
        // The kernel marks a change of the file by POLLPRI until it is read again.
        if !wait_for(&events, PollFlags::PRI, deadline)? {
            return Err(too_slow());
        }
    }
}

fn set_v1(directory: &Path, frozen: bool) -> io::Result<()> {
    let deadline = Instant::now() + DEADLINE;
    let state = directory.join("freezer.state");
    let wanted = if frozen { "FROZEN" } else { "THAWED" };
    loop {
        // Written again each time: a process that was just being made can slip through the first, and then the state
        // stays FREEZING.
        fs::write(&state, wanted)?;
        if fs::read_to_string(&state)?.trim() == wanted {
            return Ok(());
        }
        if Instant::now() >= deadline {
            if frozen {
                fs::write(&state, "THAWED")?;
            }
            return Err(too_slow());
        }
        pause(PAUSE);
    }
}

fn too_slow() -> io::Error {
    io::Error::new(
        io::ErrorKind::TimedOut,
        format!("its processes did not stop within {} s", DEADLINE.as_secs()),
    )
}
