//! What the shim's one thread owns: the sandbox, its containers, and what containerd knows of their processes.
//!
//! Events leave in the order of the protocol: a process's end is told after its start, and its deletion after that.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use containerd_shim_protos::api::{CreateTaskRequest, CreateTaskResponse};
use containerd_shim_protos::events::task as event;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::topics;
use sandbox::{Boot, Bundle, Chain, ContainerId, Sandbox};
use tokio::sync::Notify;
use tokio::task::spawn_local;
use tracing::info;

use crate::args::Args;
use crate::error::Error;
use crate::events::Publisher;
use crate::options;
use crate::process::Process;
use crate::rootfs;
use crate::stats::Version;
use crate::stdio::{Relay, Stdio};

/// A container of the sandbox.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: ContainerId,
    pub(crate) bundle: PathBuf,
    /// The pid that stands for it.
    pub(crate) pid: u32,
    pub(crate) init: Rc<Process>,
    pub(crate) execs: RefCell<BTreeMap<String, Rc<Process>>>,
}

/// The shim.
#[derive(Debug)]
pub(crate) struct Shim {
    pub(crate) args: Args,
    pub(crate) events: Publisher,
    pub(crate) metrics: Version,
    pub(crate) sandbox: RefCell<Option<Sandbox>>,
    pub(crate) containers: RefCell<BTreeMap<String, Rc<Container>>>,
    /// Containers that are being created: the shim does not end under them.
    pub(crate) creating: Cell<u32>,
    /// Told when containerd has no more use for us.
    pub(crate) done: Notify,
}

impl Shim {
    /// A shim without a sandbox yet.
    pub(crate) fn new(args: Args, events: Publisher) -> Self {
        Self {
            args,
            events,
            metrics: Version::of_host(),
            sandbox: RefCell::default(),
            containers: RefCell::default(),
            creating: Cell::default(),
            done: Notify::new(),
        }
    }

    pub(crate) fn container(&self, id: &str) -> Result<Rc<Container>, Error> {
        let containers = self.containers.borrow();
        let found = containers.get(id).cloned();
        found.ok_or_else(|| Error::NotFound { what: format!("container {id}") })
    }

    /// A process; an empty `exec` is the container's init.
    pub(crate) fn process(
        &self,
        id: &str,
        exec: &str,
    ) -> Result<(Rc<Container>, Rc<Process>), Error> {
        let container = self.container(id)?;
        let process = if exec.is_empty() {
            Some(Rc::clone(&container.init))
        } else {
            container.execs.borrow().get(exec).cloned()
        };
        let missing = || Error::NotFound { what: format!("exec {exec} of container {id}") };
        Ok((container, process.ok_or_else(missing)?))
    }

    pub(crate) fn sandbox(&self) -> Result<Sandbox, Error> {
        let sandbox = self.sandbox.borrow().clone();
        sandbox.ok_or_else(|| Error::NoSandbox { sandbox: self.args.id.clone() })
    }

    /// Creates a container: the first one boots the machine, all others join it.
    pub(crate) async fn create(
        self: Rc<Self>,
        request: CreateTaskRequest,
    ) -> Result<CreateTaskResponse, Error> {
        if self.containers.borrow().contains_key(&request.id) {
            return Err(Error::AlreadyExists { what: format!("container {}", request.id) });
        }
        if !request.checkpoint.is_empty() {
            let what = "restore of a container in a VM is not supported".to_owned();
            return Err(Error::Unsupported { what });
        }
        self.creating.set(self.creating.get() + 1);
        let created = self.create_inside(&request).await;
        self.creating.set(self.creating.get() - 1);
        if let Err(error) = &created {
            info!(id = request.id, error = %Chain(error), "container not created");
            let sandbox = self.sandbox.borrow().clone();
            rootfs::unmount(Path::new(&request.bundle), sandbox.as_ref()).await;
        }
        let container = created?;
        let pid = container.pid;
        let io = event::TaskIO {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
            ..Default::default()
        };
        let told = event::TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: MessageField::some(io),
            pid,
            ..Default::default()
        };
        self.events.publish(topics::TASK_CREATE_EVENT_TOPIC, &told);
        let init = Rc::clone(&container.init);
        spawn_local(Rc::clone(&self).watch_end(container, init));
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn create_inside(
        self: &Rc<Self>,
        request: &CreateTaskRequest,
    ) -> Result<Rc<Container>, Error> {
        let id = ContainerId::new(&request.id)?;
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let opened = stdio.open()?;
        let path = PathBuf::from(&request.bundle);
        let known = self.sandbox.borrow().clone();
        rootfs::mount(&request.rootfs, &path, known.as_ref()).await?;
        let (sandbox, bundle) = if let Some(sandbox) = known {
            // What it names is looked for where its author is, not where this process has moved.
            let path = path.clone();
            let bundle = sandbox.outside(move || Bundle::load(&path)).await??;
            (sandbox, bundle)
        } else {
            let bundle = Bundle::load(&path)?;
            (self.boot(request, &id, &bundle).await?, bundle)
        };
        let streams = sandbox.create(&id, &bundle, stdio.wanted()).await?;
        let init = Rc::new(Process::new(&request.id, "", stdio, String::new()));
        init.attach(Relay::start(opened, streams));
        let container = Rc::new(Container {
            pid: sandbox.pid(&id),
            id,
            bundle: path,
            init,
            execs: RefCell::default(),
        });
        self.containers.borrow_mut().insert(request.id.clone(), Rc::clone(&container));
        Ok(container)
    }

    /// Makes this process the sandbox process, and boots the machine.
    async fn boot(
        self: &Rc<Self>,
        request: &CreateTaskRequest,
        id: &ContainerId,
        bundle: &Bundle,
    ) -> Result<Sandbox, Error> {
        if self.creating.get() > 1 {
            return Err(Error::NoSandbox { sandbox: self.args.id.clone() });
        }
        let config = options::config(request.options.as_ref())?;
        let root = crate::root(&self.args.namespace)?;
        let boot = Boot { root, id, bundle, config };
        let sandbox = Sandbox::boot(boot).await?;
        self.sandbox.replace(Some(sandbox.clone()));
        spawn_local(Rc::clone(self).watch_oom(sandbox.clone()));
        Ok(sandbox)
    }

    /// Tells containerd of each container whose memory ran out.
    async fn watch_oom(self: Rc<Self>, sandbox: Sandbox) {
        let mut containers = sandbox.out_of_memory();
        while let Some(container_id) = containers.recv().await {
            let told = event::TaskOOM { container_id, ..Default::default() };
            self.events.publish(topics::TASK_OOM_EVENT_TOPIC, &told);
        }
    }
}
