//! A process of a container, as long as somebody may ask about it.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;

use crate::cgroup::Cgroup;
use crate::error::{Doing, Error};
use crate::reaper::Status;
use crate::stdio::Meter;
use crate::sys;

/// How and when a process ended, and what it had written by then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    pub(crate) status: Status,
    pub(crate) at_ns: u64,
    pub(crate) stdout_bytes: u64,
    pub(crate) stderr_bytes: u64,
    pub(crate) oom_killed: bool,
}

/// How much a process has written where.
#[derive(Debug, Clone, Default)]
pub(crate) enum Output {
    /// Into pipes; none where the host wants none.
    #[default]
    None,
    Pipes {
        stdout: Option<Meter>,
        stderr: Option<Meter>,
    },
    Terminal(Meter),
}

impl Output {
    fn bytes(&self) -> (u64, u64) {
        let pipe = |meter: &Option<Meter>| meter.as_ref().map_or(0, Meter::pipe);
        match self {
            Self::None => (0, 0),
            Self::Pipes { stdout, stderr } => (pipe(stdout), pipe(stderr)),
            Self::Terminal(meter) => (meter.terminal(), 0),
        }
    }
}

/// A container's init, or one of its execs.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    output: Output,
    exit: watch::Sender<Option<Exit>>,
    is_init: bool,
    cgroup: Cgroup,
}

impl Process {
    /// A process that has just been made.
    pub(crate) fn new(pid: u32, output: Output, is_init: bool, cgroup: Cgroup) -> Arc<Self> {
        let exit = watch::Sender::new(None);
        Arc::new(Self { pid, output, exit, is_init, cgroup })
    }

    /// Notes its end. To be called as soon as it has ended: what it had written is measured now.
    pub(crate) fn ended(&self, status: Status) {
        let (stdout_bytes, stderr_bytes) = self.output.bytes();
        // An exec was killed for lack of memory if it was killed and there was such a lack; of an init one asks
        // whether there ever was, as its own end may only follow from a child's.
        let killed = matches!(status, Status::Killed(9));
        let oom_killed = (self.is_init || killed) && self.cgroup.oom_kills() > 0;
        let at_ns = now_ns();
        let exit = Exit { status, at_ns, stdout_bytes, stderr_bytes, oom_killed };
        self.exit.send_replace(Some(exit));
    }

    /// How it ended, if it has.
    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its end. Cancel safe.
    pub(crate) async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await.map(|exit| *exit);
        ended.ok().flatten().expect("the sender is in self, and it was waited for an exit")
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: u32) -> Result<(), Error> {
        // A process that has ended but was not yet reaped keeps its pid, so this cannot hit a stranger.
        if self.exit().is_some() {
            return Err(Error::Finished);
        }
        match sys::kill(self.pid, signal) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(Error::Finished),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                Err(Error::Invalid(format!("there is no signal {signal}")))
            }
            result => result.doing(|| format!("signal process {}", self.pid)),
        }
    }

    /// Sets the size of its terminal.
    pub(crate) fn resize(&self, rows: u32, columns: u32) -> Result<(), Error> {
        let Output::Terminal(meter) = &self.output else {
            return Err(Error::WrongState("the process has no terminal"));
        };
        let size = |cells: u32| u16::try_from(cells).unwrap_or(u16::MAX);
        let Some(terminal) = meter.source() else { return Err(Error::Finished) };
        terminal.resize(size(rows), size(columns)).doing(|| "resize the terminal".to_owned())
    }
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
