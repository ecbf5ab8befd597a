//! A guest that killed a process for lack of memory, told to those who watch the container's cgroup on the host.
//!
//! containerd's runc shim and conmon learn of it from the host's kernel alone: from the events of the cgroup that the
//! container's pid is in. The guest's kernel has no part in those. So a process dies there in the place of the guest's:
//! one of ours, which the kernel prefers to all others, takes memory in a cgroup that has been left none.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::Duration;

use linux::cgroup::Cgroup;
use linux::process::Command;
use rustix::process::Signal;
use tokio::task::spawn_blocking;
use tracing::{info, warn};

use crate::error::{Chain, Error};
use crate::launch::Channel;

/// What is left to the others in the cgroup meanwhile, in bytes.
const ROOM: u64 = 16 << 20;

/// How long the process may take to die.
const DEADLINE: Duration = Duration::from_secs(10);

/// The most that the process takes, in bytes: it must be more than [`ROOM`] and the files that the kernel can drop.
const MOST: usize = 2 << 30;

/// Has the host's kernel kill a process of ours in `cgroup` for lack of memory.
pub(crate) async fn tell(cgroup: &Cgroup) {
    match die_in(cgroup).await {
        Ok(true) => info!("the guest's lack of memory was told to the host"),
        Ok(false) => {
            warn!("the host was not told of the guest's lack of memory: nothing was killed");
        }
        Err(error) => {
            warn!(error = %Chain(&error), "the host was not told of the guest's lack of memory");
        }
    }
}

async fn die_in(cgroup: &Cgroup) -> Result<bool, Error> {
    const PROGRAM: &str = "/proc/self/exe";
    const WHO: &str = "the process that dies for lack of memory";
    let (mut channel, theirs) = Channel::pair().map_err(Error::host("create", "a socket pair"))?;
    let mut command = Command::new(PROGRAM);
    let number = command.pass(theirs);
    command.name("kata").args(["out-of-memory".to_owned(), number.to_string()]);
    command.stdio(Stdio::null(), Stdio::null(), Stdio::null()).die_with_parent();
    let mut child = command.spawn().map_err(Error::host("start", PROGRAM))?;
    let heard = spawn_blocking(move || channel.hear().map(|()| channel)).await;
    let heard = heard.map_err(std::io::Error::other).and_then(|heard| heard);
    let mut channel = heard.map_err(Error::host("hear", WHO))?;
    cgroup.add(child.pid())?;
    let tight = cgroup.tighten(ROOM)?;
    if tight.is_some() {
        channel.tell(&()).map_err(Error::host("tell", WHO))?;
    }
    drop(channel);
    let id = child.id().map_err(Error::host("watch", PROGRAM))?;
    let mut ended = spawn_blocking(move || child.wait());
    let in_time = tokio::time::timeout(DEADLINE, &mut ended).await;
    // Before anything else: the others need room again.
    drop(tight);
    let (status, in_time) = if let Ok(status) = in_time {
        (status, true)
    } else {
        drop(id.signal(Signal::KILL));
        (ended.await, false)
    };
    let status = status.map_err(std::io::Error::other).and_then(|status| status);
    let status = status.map_err(Error::host("wait for", PROGRAM))?;
    Ok(in_time && status.signal() == Some(9))
}

/// Runs the process that dies: once it hears a word over `channel` it takes memory, and ends by itself only where nothing
/// keeps it from that.
#[must_use]
pub fn out_of_memory(channel: OwnedFd) -> u8 {
    let mut channel = std::os::unix::net::UnixStream::from(channel);
    // The kernel's choice, before any other process of the cgroup: proc(5).
    if std::fs::write("/proc/self/oom_score_adj", "1000").is_err() {
        return 1;
    }
    let mut word = [0];
    let told = channel.write_all(b"null\n").and_then(|()| channel.read_exact(&mut word));
    if told.is_err() {
        return 1;
    }
    let mut taken = Vec::new();
    while taken.len() < MOST {
        taken.resize(taken.len() + (1 << 20), 1_u8);
    }
    std::hint::black_box(&taken);
    0
}
