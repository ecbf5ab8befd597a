//! The one place that waits for processes.
//!
//! PID 1 inherits every orphan of the guest, so it must take the status of any process, and a process's exit may
//! come before whoever started it has learnt its pid. So one task owns waitpid(2), hands a status to the one who
//! [watches](Reaper::watch) that pid, and keeps those of unknown pids for as long as somebody is
//! [starting](Reaper::starting) a process.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::{WaitOptions, WaitStatus};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;

use crate::error::{Doing, Error};

type Watcher = Box<dyn FnOnce(Status) + Send>;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    /// By exit(2), with this code.
    Exited(u32),
    /// By this signal.
    Killed(u32),
}

impl Status {
    /// As a shell says it.
    pub(crate) fn code(self) -> u32 {
        match self {
            Self::Exited(code) => code,
            Self::Killed(signal) => 128 + signal,
        }
    }
}

/// Hands the statuses of ended processes to who watches them.
#[derive(Default)]
pub(crate) struct Reaper(Mutex<State>);

#[derive(Default)]
struct State {
    watchers: HashMap<u32, Watcher>,
    /// How many are starting a process now.
    starting: usize,
    /// The statuses that came while somebody was.
    early: HashMap<u32, Status>,
}

/// While it lives, no exit is lost.
#[derive(Debug)]
pub(crate) struct Starting(Arc<Reaper>);

impl Reaper {
    /// Starts reaping; the task ends only with an error.
    pub(crate) fn start(self: &Arc<Self>) -> Result<JoinHandle<io::Error>, Error> {
        let ended = signal(SignalKind::child()).doing(|| "listen to SIGCHLD".to_owned())?;
        Ok(tokio::spawn(Arc::clone(self).run(ended)))
    }

    /// Says that a process is about to be started.
    pub(crate) fn starting(self: &Arc<Self>) -> Starting {
        self.state().starting += 1;
        Starting(Arc::clone(self))
    }

    /// Has `watcher` called with the status of `pid`, at once where it has ended already. The caller holds the
    /// [`Starting`] that it took before the process was made.
    pub(crate) fn watch(&self, pid: u32, watcher: impl FnOnce(Status) + Send + 'static) {
        let mut state = self.state();
        let Some(status) = state.early.remove(&pid) else {
            state.watchers.insert(pid, Box::new(watcher));
            return;
        };
        drop(state);
        watcher(status);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(self: Arc<Self>, mut ended: Signal) -> io::Error {
        loop {
            // One signal may stand for many processes, and some may have ended before the first.
            match self.reap() {
                Ok(()) | Err(rustix::io::Errno::CHILD) => {}
                Err(error) => return error.into(),
            }
            if ended.recv().await.is_none() {
                return io::Error::other("no more signals come");
            }
        }
    }

    /// Takes the statuses of all that have ended.
    fn reap(&self) -> rustix::io::Result<()> {
        while let Some((pid, status)) = rustix::process::wait(WaitOptions::NOHANG)? {
            if let Some(status) = final_status(status) {
                self.deliver(pid.as_raw_nonzero().get().cast_unsigned(), status);
            }
        }
        Ok(())
    }

    fn deliver(&self, pid: u32, status: Status) {
        let mut state = self.state();
        let watcher = state.watchers.remove(&pid);
        if watcher.is_none() && state.starting > 0 {
            state.early.insert(pid, status);
        }
        drop(state);
        if let Some(watcher) = watcher {
            watcher(status);
        }
    }
}

impl fmt::Debug for Reaper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reaper").finish_non_exhaustive()
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.starting -= 1;
        if state.starting == 0 {
            state.early.clear();
        }
    }
}

fn final_status(status: WaitStatus) -> Option<Status> {
    let number = |value: i32| u32::try_from(value).unwrap_or_default();
    let exited = status.exit_status().map(|code| Status::Exited(number(code)));
    exited.or_else(|| status.terminating_signal().map(|signal| Status::Killed(number(signal))))
}

#[cfg(test)]
mod tests {
    use super::{Reaper, Status};
    use std::sync::{Arc, mpsc};

    #[test]
    fn an_exit_before_its_watch_is_not_lost() {
        let reaper = Arc::new(Reaper::default());
        let starting = reaper.starting();
        reaper.deliver(7, Status::Exited(3));
        let (sender, receiver) = mpsc::channel();
        reaper.watch(7, move |status| sender.send(status).unwrap());
        drop(starting);
        assert_eq!(receiver.recv().unwrap(), Status::Exited(3));
    }

    #[test]
    fn exits_of_strangers_are_forgotten() {
        let reaper = Arc::new(Reaper::default());
        let starting = reaper.starting();
        reaper.deliver(7, Status::Killed(9));
        drop(starting);
        assert!(reaper.state().early.is_empty());
        reaper.deliver(8, Status::Killed(9));
        assert!(reaper.state().early.is_empty());
    }

    #[test]
    fn a_signal_is_said_as_a_shell_does() {
        assert_eq!(Status::Killed(9).code(), 137);
        assert_eq!(Status::Exited(2).code(), 2);
    }
}
