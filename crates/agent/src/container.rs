//! One container: what is known of it, and what is lawful now.

use std::collections::HashMap;
use std::sync::Arc;

use protocol::oci::{LinuxNamespaceType, Spec};

use crate::cgroup::Cgroup;
use crate::error::Error;
use crate::launch::Control;
use crate::process::Process;
use crate::sockets::Sockets;

/// A container whose init is there.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) spec: Arc<Spec>,
    pub(crate) cgroup: Cgroup,
    pub(crate) init: Arc<Process>,
    /// The line to its init, until that is started.
    control: Option<Control>,
    /// Those of the host that it has mounted.
    _sockets: Sockets,
    /// Nothing while an exec is being started.
    execs: HashMap<String, Option<Arc<Process>>>,
    paused: bool,
}

impl Container {
    /// A container that was just created.
    pub(crate) fn new(
        id: &str,
        spec: Arc<Spec>,
        cgroup: Cgroup,
        init: Arc<Process>,
        control: Control,
        sockets: Sockets,
    ) -> Self {
        let id = id.to_owned();
        let control = Some(control);
        let execs = HashMap::new();
        Self { id, spec, cgroup, init, control, _sockets: sockets, execs, paused: false }
    }

    /// The line to its init, for the one who starts it.
    pub(crate) fn take_control(&mut self) -> Result<Control, Error> {
        if self.init.exit().is_some() {
            return Err(Error::WrongState("cannot start a container that has stopped"));
        }
        let running = Error::WrongState("cannot start an already running container");
        self.control.take().ok_or(running)
    }

    /// Whether its user's program was started.
    pub(crate) fn is_started(&self) -> bool {
        self.control.is_none()
    }

    /// Takes note of a new exec, if there may be one.
    pub(crate) fn reserve_exec(&mut self, exec: &str) -> Result<(), Error> {
        if exec.is_empty() {
            return Err(Error::Invalid("an exec needs an id".to_owned()));
        }
        if self.init.exit().is_some() {
            return Err(Error::WrongState("cannot exec in a stopped container"));
        }
        if self.paused {
            return Err(Error::WrongState("cannot exec in a paused container"));
        }
        if self.execs.contains_key(exec) {
            return Err(Error::Exists { what: "process", id: exec.to_owned() });
        }
        self.execs.insert(exec.to_owned(), None);
        Ok(())
    }

    /// Takes note of an exec's process.
    pub(crate) fn add_exec(&mut self, exec: &str, process: Arc<Process>) {
        self.execs.insert(exec.to_owned(), Some(process));
    }

    /// Forgets an exec.
    pub(crate) fn forget_exec(&mut self, exec: &str) {
        self.execs.remove(exec);
    }

    /// The process of that name; the empty one is the init's.
    pub(crate) fn process(&self, exec: &str) -> Result<Arc<Process>, Error> {
        if exec.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        let unknown = || Error::NoProcess { id: self.id.clone(), exec: exec.to_owned() };
        self.execs.get(exec).cloned().flatten().ok_or_else(unknown)
    }

    /// Notes that it shall be paused, or not, if that is lawful.
    pub(crate) fn set_paused(&mut self, paused: bool) -> Result<Cgroup, Error> {
        if self.init.exit().is_some() || !self.is_started() {
            return Err(Error::WrongState("container not running"));
        }
        match (self.paused, paused) {
            (true, true) => return Err(Error::WrongState("container already paused")),
            (false, false) => return Err(Error::WrongState("container not paused")),
            _ => self.paused = paused,
        }
        Ok(self.cgroup.clone())
    }

    /// Whether its processes are in a user namespace other than the guest's.
    pub(crate) fn has_user_namespace(&self) -> bool {
        let namespaces = self.spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
        namespaces.into_iter().flatten().any(|one| one.typ() == LinuxNamespaceType::User)
    }
}
