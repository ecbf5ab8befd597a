//! A process as containerd sees it: a container's init, or an exec.

use std::cell::{Cell, RefCell};

use containerd_shim_protos::api::Status;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::watch;

use crate::error::Error;
use crate::stdio::{Relay, Stdio};

/// 128 + SIGKILL: how a process ends whose machine has gone.
pub(crate) const KILLED: u32 = 137;

/// How a process ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Exit {
    pub(crate) code: u32,
    pub(crate) at: Timestamp,
    /// What it had written to stdout (or its terminal) and stderr.
    pub(crate) written: [u64; 2],
}

impl Exit {
    /// An end that nobody could see.
    pub(crate) fn killed() -> Self {
        Self { code: KILLED, at: Timestamp::now(), written: [0, 0] }
    }
}

/// A process.
#[derive(Debug)]
pub(crate) struct Process {
    /// Empty for a container's init.
    pub(crate) exec_id: String,
    /// What messages call it.
    pub(crate) name: String,
    pub(crate) stdio: Stdio,
    /// The OCI spec's `process` of an exec, as JSON.
    pub(crate) spec: String,
    /// The engine's id of it.
    pub(crate) engine_id: RefCell<String>,
    pub(crate) status: Cell<Status>,
    pub(crate) relay: RefCell<Option<Relay>>,
    /// The terminal's width and height, told before it was there.
    pub(crate) size: Cell<Option<(u16, u16)>>,
    /// Whether its input shall end, told before it was there.
    input_ended: Cell<bool>,
    exit: watch::Sender<Option<Exit>>,
    /// Whether `start` is at work.
    starting: watch::Sender<bool>,
}

/// While it is there, a process is being started.
#[derive(Debug)]
pub(crate) struct Starting<'a>(&'a Process);

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        self.0.starting.send_replace(false);
    }
}

impl Process {
    /// The init of `container`, or one of its execs.
    pub(crate) fn new(container: &str, exec_id: &str, stdio: Stdio, spec: String) -> Self {
        let name = if exec_id.is_empty() {
            format!("container {container}")
        } else {
            format!("exec {exec_id} of container {container}")
        };
        Self {
            exec_id: exec_id.to_owned(),
            name,
            stdio,
            spec,
            engine_id: RefCell::default(),
            status: Cell::new(Status::CREATED),
            relay: RefCell::default(),
            size: Cell::default(),
            input_ended: Cell::default(),
            exit: watch::Sender::default(),
            starting: watch::Sender::default(),
        }
    }

    /// Holds back the news of its end until the returned value is dropped.
    pub(crate) fn hold(&self) -> Starting<'_> {
        self.starting.send_replace(true);
        Starting(self)
    }

    /// Waits while it is being started.
    pub(crate) async fn started(&self) {
        let mut starting = self.starting.subscribe();
        // The sender is ours and cannot have gone.
        drop(starting.wait_for(|starting| !starting).await);
    }

    /// Its streams are being relayed.
    pub(crate) fn attach(&self, relay: Relay) {
        if self.input_ended.get() {
            relay.close_input();
        }
        self.relay.replace(Some(relay));
    }

    /// Lets its input end, now or when there is one.
    pub(crate) fn close_input(&self) {
        self.input_ended.set(true);
        if let Some(relay) = self.relay.borrow().as_ref() {
            relay.close_input();
        }
    }

    /// Notes its end; the first word counts. Answers whether this was it.
    pub(crate) fn end(&self, exit: Exit) -> bool {
        self.status.set(Status::STOPPED);
        self.exit.send_if_modified(|known| {
            let first = known.is_none();
            known.get_or_insert(exit);
            first
        })
    }

    /// How it ended, if it has.
    pub(crate) fn exit(&self) -> Option<Exit> {
        self.exit.borrow().clone()
    }

    /// Waits for its end.
    pub(crate) async fn ended(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        let known = exit.wait_for(Option::is_some).await;
        // The sender is ours and cannot have gone.
        known.ok().and_then(|exit| exit.clone()).unwrap_or_else(Exit::killed)
    }

    /// That it has not ended.
    pub(crate) fn check_alive(&self) -> Result<(), Error> {
        match self.status.get() {
            Status::STOPPED => Err(Error::Finished { what: self.name.clone() }),
            _ => Ok(()),
        }
    }

    /// That it is in this status.
    pub(crate) fn check(&self, status: Status, operation: &'static str) -> Result<(), Error> {
        let state = self.status.get();
        if state == status {
            return Ok(());
        }
        Err(Error::WrongState { operation, what: self.name.clone(), state: word(state) })
    }
}

fn word(status: Status) -> &'static str {
    match status {
        Status::CREATED => "created",
        Status::RUNNING => "running",
        Status::STOPPED => "stopped",
        Status::PAUSED => "paused",
        Status::PAUSING => "pausing",
        Status::UNKNOWN => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::{Exit, Process};
    use crate::stdio::Stdio;
    use containerd_shim_protos::api::Status;

    #[test]
    fn the_first_word_about_an_end_counts() {
        let process = Process::new("c", "e", Stdio::default(), String::new());
        assert!(process.check(Status::CREATED, "start").is_ok());
        assert!(process.end(Exit { code: 3, ..Exit::killed() }));
        assert!(!process.end(Exit::killed()));
        assert_eq!(process.exit().unwrap().code, 3);
        let error = process.check(Status::CREATED, "start").unwrap_err();
        assert_eq!(error.to_string(), "cannot start exec e of container c: it is stopped");
    }
}
