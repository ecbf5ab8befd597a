//! One container of a running sandbox.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::path::PathBuf;

use linux::cgroup::Cgroup;
use protocol::agent as wire;
use protocol::oci::{Hooks, LinuxResources};
use tokio::sync::OnceCell;
use tracing::error;

use crate::error::{Chain, Error};
use crate::oom;
use crate::state::{ContainerDir, ContainerRecord};
use crate::status::{Operation, Status};

/// A container that was created.
pub(crate) struct Container {
    dir: ContainerDir,
    record: RefCell<ContainerRecord>,
    cgroup: Option<Cgroup>,
    resources: RefCell<Option<LinuxResources>>,
    /// The execs, each with the host process that stands for it.
    execs: RefCell<HashMap<String, u32>>,
    execs_made: Cell<u64>,
    disowned: Cell<bool>,
    /// Set when the host was told that the guest had killed a process of it for lack of memory.
    out_of_memory: OnceCell<()>,
}

impl Container {
    pub(crate) fn new(
        dir: ContainerDir,
        record: ContainerRecord,
        cgroup: Option<Cgroup>,
        resources: Option<LinuxResources>,
    ) -> Self {
        Self {
            dir,
            record: RefCell::new(record),
            cgroup,
            resources: RefCell::new(resources),
            execs: RefCell::default(),
            execs_made: Cell::default(),
            disowned: Cell::default(),
            out_of_memory: OnceCell::new(),
        }
    }

    pub(crate) fn id(&self) -> &str {
        self.dir.id().as_str()
    }

    pub(crate) fn dir(&self) -> &ContainerDir {
        &self.dir
    }

    /// Its cgroup on the host.
    pub(crate) fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    /// The directories of its cgroup.
    pub(crate) fn cgroups(&self) -> Vec<PathBuf> {
        self.record.borrow().cgroups.clone()
    }

    /// Its limits, as the spec or the last update has them.
    pub(crate) fn resources(&self) -> Option<LinuxResources> {
        self.resources.borrow().clone()
    }

    /// Changes those of its limits that `update` has.
    pub(crate) fn update_resources(&self, update: &LinuxResources) {
        let merged = crate::resources::merged(self.resources.borrow().as_ref(), update);
        self.resources.replace(merged);
    }

    pub(crate) fn status(&self) -> Status {
        self.record.borrow().status
    }

    /// The spec's hooks.
    pub(crate) fn hooks(&self) -> Option<Hooks> {
        self.record.borrow().hooks.clone()
    }

    /// Whether `operation` is lawful now.
    pub(crate) fn check(&self, operation: Operation) -> Result<(), Error> {
        let status = self.status();
        if status.allows(operation) {
            return Ok(());
        }
        Err(Error::WrongStatus { id: self.id().to_owned(), operation, status })
    }

    /// Changes the status, on disk too.
    pub(crate) fn set_status(&self, status: Status) -> Result<(), Error> {
        self.record.borrow_mut().status = status;
        self.dir.write(&self.record.borrow())
    }

    /// Writes down how it exited; the first to say so is right.
    pub(crate) fn ended(&self, code: u8) {
        if self.status() == Status::Stopped {
            return;
        }
        self.record.borrow_mut().exit_code = Some(code);
        if let Err(error) = self.set_status(Status::Stopped) {
            error!(error = %Chain(&error), "the exit was not written down");
        }
    }

    /// The guest killed a process of it for lack of memory: once, that is told to those who watch its cgroup.
    pub(crate) async fn tell_out_of_memory(&self) {
        if let Some(cgroup) = &self.cgroup {
            self.out_of_memory.get_or_init(|| oom::tell(cgroup)).await;
        }
    }

    /// Nobody is there who would delete it.
    pub(crate) fn disown(&self) {
        self.disowned.set(true);
    }

    pub(crate) fn is_disowned(&self) -> bool {
        self.disowned.get()
    }

    /// A new exec's name.
    pub(crate) fn name_exec(&self) -> String {
        self.execs_made.set(self.execs_made.get() + 1);
        format!("exec-{}", self.execs_made.get())
    }

    /// An exec runs, and `pid` stands for it.
    pub(crate) fn add_exec(&self, exec: &str, pid: u32) {
        self.execs.borrow_mut().insert(exec.to_owned(), pid);
    }

    /// An exec has ended; whether it was there.
    pub(crate) fn forget_exec(&self, exec: &str) -> bool {
        self.execs.borrow_mut().remove(exec).is_some()
    }

    /// The host processes that stand for its processes.
    pub(crate) fn host_processes(&self) -> Vec<u32> {
        let init = self.record.borrow().process.map(|process| process.pid);
        init.into_iter().chain(self.execs.borrow().values().copied()).collect()
    }

    /// The agent's request to signal one process of it, or all.
    pub(crate) fn signal_request(&self, exec: &str, signal: u32, all: bool) -> wire::SignalRequest {
        wire::SignalRequest {
            container_id: self.id().to_owned(),
            exec_id: exec.to_owned(),
            signal,
            all,
            ..Default::default()
        }
    }
}
