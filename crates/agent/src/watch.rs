//! Waiting for what the kernel says in the event files of a cgroup, with inotify(7).

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::time::Duration;

use protocol::agent;
use rustix::fs::inotify::{self, ReadFlags, WatchFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::broadcast;

use crate::cgroup::Cgroup;
use crate::error::{Doing, Error};
use crate::sys;

/// Changes of one file.
struct Changes(AsyncFd<OwnedFd>);

impl Changes {
    fn of(cgroup: &Cgroup, file: &str) -> Result<Self, Error> {
        let action = || format!("watch {file} of the container's cgroup");
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let fd = inotify::init(flags).doing(action)?;
        inotify::add_watch(&fd, cgroup.path().join(file), WatchFlags::MODIFY).doing(action)?;
        Ok(Self(sys::watched(fd).doing(action)?))
    }

    /// Waits for the next one; `false` when the file has gone. Cancel safe.
    async fn next(&self) -> Result<bool, Error> {
        let there = self.0.async_io(Interest::READABLE, |fd| {
            let mut space = [MaybeUninit::uninit(); 4096];
            let mut events = inotify::Reader::new(fd, &mut space);
            let mut there = !events.next()?.events().contains(ReadFlags::IGNORED);
            while !events.is_buffer_empty() {
                there &= !events.next()?.events().contains(ReadFlags::IGNORED);
            }
            Ok(there)
        });
        there.await.doing(|| "hear of the container's cgroup".to_owned())
    }
}

/// Waits until `reached`, which depends on the cgroup's `cgroup.events`.
///
/// # Errors
///
/// When that takes longer than `deadline`; `what` says what does.
pub(crate) async fn until(
    cgroup: &Cgroup,
    deadline: Duration,
    what: &'static str,
    reached: impl Fn(&Cgroup) -> bool,
) -> Result<(), Error> {
    // A cgroup that has gone has no processes, and none that could stop.
    if !cgroup.path().exists() {
        return Ok(());
    }
    let changes = Changes::of(cgroup, "cgroup.events")?;
    let wait = async {
        while !reached(cgroup) && changes.next().await? {}
        Ok(())
    };
    let seconds = deadline.as_secs();
    tokio::time::timeout(deadline, wait).await.unwrap_or(Err(Error::Deadline { what, seconds }))
}

/// Tells of each time that the kernel kills in a cgroup for lack of memory, until the cgroup has gone.
pub(crate) async fn oom(id: String, cgroup: Cgroup, events: broadcast::Sender<agent::Event>) {
    let Ok(changes) = Changes::of(&cgroup, "memory.events") else { return };
    let mut known = 0;
    loop {
        let kills = cgroup.oom_kills();
        if kills > known {
            let mut event = agent::Event { container_id: id.clone(), ..agent::Event::default() };
            event.set_oom(agent::Empty::default());
            // An error is that nobody listens.
            drop(events.send(event));
        }
        known = kills;
        if !matches!(changes.next().await, Ok(true)) {
            return;
        }
    }
}
