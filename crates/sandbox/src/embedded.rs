//! A sandbox whose process is the caller's own, for a door that lives as long as its sandbox: the containerd shim.
//!
//! There are no stand-ins: the calling process stands for all containers, and relays their streams itself. Other doors get at
//! them by `control.sock` as ever.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::rc::Rc;

use hypervisor::Port;
use linux::cgroup::{Cgroup, Driver};
use linux::ledger::Ledger;
use linux::process::ProcessId;
use protocol::oci::{Hook, LinuxNamespaceType};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_local;
use tracing::warn;

use crate::boot;
use crate::config::Config;
use crate::control::{NewContainer, Response, Stats};
use crate::create::{network_namespace, plan_files, run_runtime_hooks};
use crate::error::{Chain, Error};
use crate::hooks;
use crate::launch::Launch;
use crate::operations::{give_back, settle};
use crate::outside::Outside;
use crate::pod::Pod;
use crate::process::{Prepared, own_mounts};
use crate::running::{Caller, Running};
use crate::sandbox::Sandbox as Engine;
use crate::spec::{Bundle, SharedNamespace};
use crate::stand_in::new_network;
use crate::state::{ContainerDir, ContainerId, ContainerRecord, Root, VmDir};
use crate::status::Operation;
use crate::stdio::Tokens;

/// A sandbox to be made of the calling process.
#[derive(Debug)]
pub struct Boot<'a> {
    /// Where its state goes.
    pub root: Root,
    /// Its first container's id.
    pub id: &'a ContainerId,
    /// Its first container's bundle.
    pub bundle: &'a Bundle,
    /// The configuration, before the first container's annotations.
    pub config: Config,
}

/// A process's streams in the guest.
#[derive(Debug, Default)]
pub struct Streams {
    /// Written.
    pub stdin: Option<UnixStream>,
    /// Read.
    pub stdout: Option<UnixStream>,
    /// Read.
    pub stderr: Option<UnixStream>,
    /// Both; then there are no others.
    pub tty: Option<UnixStream>,
}

/// A process that was made, with its streams.
#[derive(Debug)]
pub struct ProcessStreams {
    /// What it is called from now on.
    pub exec: String,
    /// Its streams.
    pub streams: Streams,
}

/// How a process ended.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    /// Its exit code; 128 + the signal that ended it.
    pub code: u8,
    /// What it had written to stdout (or its terminal) and stderr.
    pub written: [u64; 2],
}

/// A running sandbox. To be used on the thread that booted it, in a [`tokio::task::LocalSet`]. A copy is another handle of
/// the same sandbox.
#[derive(Clone)]
pub struct Sandbox(Rc<Embedded>);

/// A thread that does nothing: its id stands for a container after the first, where callers tell containers of one pod
/// apart by their pids. As a process's, its id is found in `/proc`, with the namespaces of this process.
struct Marker {
    id: u32,
    _alive: std::sync::mpsc::Sender<()>,
}

impl Marker {
    fn start() -> Result<Self, Error> {
        let (alive, ended) = std::sync::mpsc::channel::<()>();
        let (started, id) = std::sync::mpsc::channel();
        let stay = move || {
            if started.send(rustix::thread::gettid()).is_ok() {
                // Until the other end is dropped.
                while ended.recv().is_ok() {}
            }
        };
        let failed = |source| Error::Host { action: "start", path: "a thread".into(), source };
        std::thread::Builder::new()
            .name("container".into())
            .stack_size(16 << 10)
            .spawn(stay)
            .map_err(failed)?;
        let id = id.recv().map_err(|_| failed(std::io::ErrorKind::BrokenPipe.into()))?;
        Ok(Self { id: id.as_raw_pid().unsigned_abs(), _alive: alive })
    }
}

struct Embedded {
    engine: Rc<Engine>,
    /// Of each container but the first.
    markers: RefCell<HashMap<String, Marker>>,
    outside: Outside,
    root: Root,
    vm: VmDir,
    /// The first container.
    leader: ContainerId,
    /// While it is open, the machine outlives its last container.
    lifeline: RefCell<Option<UnixStream>>,
    ended: watch::Receiver<bool>,
}

impl fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sandbox").field("vm", &self.0.vm).finish_non_exhaustive()
    }
}

impl Sandbox {
    /// Moves the calling thread into the sandbox's namespaces and cgroup, for good, and boots the machine. The calling thread
    /// must be the process's first one.
    ///
    /// # Errors
    ///
    /// What is wrong with the bundle, the host or the guest; nothing is then left on the host, but the process is of no
    /// more use.
    pub async fn boot(request: Boot<'_>) -> Result<Self, Error> {
        let bundle = request.bundle;
        let annotations = bundle.spec.annotations().clone().unwrap_or_default();
        let config = request.config.with_annotations(&annotations)?;
        let outside = Outside::start()?;
        let dir = request.root.claim(request.id)?;
        let pod = Pod::of(&annotations);
        let running = boot_in(&dir, bundle, config, &pod, &outside).await;
        let running = running.inspect_err(|_| settle(&dir))?;
        let engine = running.sandbox();
        let (lifeline, theirs) =
            UnixStream::pair().map_err(Error::host("create", "a socket pair"))?;
        let (ending, ended) = watch::channel(false);
        spawn_local(async move {
            running.until_empty(Caller::new(theirs)).await;
            ending.send_replace(true);
        });
        Ok(Self(Rc::new(Embedded {
            engine,
            markers: RefCell::default(),
            outside,
            root: request.root,
            vm: dir.vm().clone(),
            leader: request.id.clone(),
            lifeline: RefCell::new(Some(lifeline)),
            ended,
        })))
    }

    /// Creates a container up to but not including its user's program. The one that it was booted for is the first.
    ///
    /// # Errors
    ///
    /// As for the OCI command; nothing of the container is then left.
    pub async fn create(
        &self,
        id: &ContainerId,
        bundle: &Bundle,
        wanted: [bool; 3],
    ) -> Result<Streams, Error> {
        let dir = if *id == self.0.leader {
            self.0.vm.container(id)
        } else {
            let dir = self.0.root.claim_in(id, &self.0.vm)?;
            if let Err(error) = dir.write(&record(&dir, bundle)?) {
                settle(&dir);
                return Err(error);
            }
            dir
        };
        let created = self.create_in(&dir, bundle, wanted).await;
        let marked = (created.is_ok() && *id != self.0.leader).then(Marker::start).transpose();
        let created = match marked {
            Ok(marker) => {
                let marker = marker.map(|marker| (id.as_str().to_owned(), marker));
                self.0.markers.borrow_mut().extend(marker);
                created
            }
            Err(error) => {
                drop(self.remove(id).await);
                return Err(error);
            }
        };
        if created.is_err() {
            if *id == self.0.leader {
                self.end().await;
            }
            settle(&dir);
        }
        created
    }

    async fn create_in(
        &self,
        dir: &ContainerDir,
        bundle: &Bundle,
        wanted: [bool; 3],
    ) -> Result<Streams, Error> {
        let inner = &*self.0;
        let files = self.plan(dir.id(), bundle).await?;
        let shared = self.shared_namespaces(bundle);
        let spec = bundle.for_guest(&files.guest_root, &files.guest_mounts, &shared).to_string();
        let size = bundle.process()?.console_size().map(|size| {
            let cut = |number: u64| u16::try_from(number).unwrap_or(u16::MAX);
            (cut(size.height()), cut(size.width()))
        });
        let terminal = bundle.process()?.terminal().unwrap_or_default();
        let new = NewContainer {
            spec,
            files,
            streams: wanted,
            size: size.filter(|_| terminal),
            origin: Some(inner.outside.mounts()),
        };
        let made = inner.engine.create(dir.id().as_str(), new).await?;
        Ok(self.streams(made).await?.streams)
    }

    /// What the guest will see of the host's files, as they are now outside.
    async fn plan(&self, id: &ContainerId, bundle: &Bundle) -> Result<storage::Plan, Error> {
        let (id, bundle) = (id.clone(), bundle.clone());
        self.0.outside.run(move || plan_files(&id, &bundle)).await
    }

    /// The pid that stands for a container.
    #[must_use]
    pub fn pid(&self, id: &ContainerId) -> u32 {
        self.0.markers.borrow().get(id.as_str()).map_or_else(std::process::id, |marker| marker.id)
    }

    /// The namespaces of other containers: those that are named by the pids that stand for them.
    fn shared_namespaces(&self, bundle: &Bundle) -> Vec<SharedNamespace> {
        let mut known = vec![(std::process::id(), self.0.leader.as_str().to_owned())];
        let markers = self.0.markers.borrow();
        known.extend(markers.iter().map(|(container, marker)| (marker.id, container.clone())));
        let linux = bundle.spec.linux().iter();
        linux
            .flat_map(|linux| linux.namespaces().iter().flatten())
            .filter(|namespace| namespace.typ() != LinuxNamespaceType::Network)
            .filter_map(|namespace| {
                let path = namespace.path().as_ref()?;
                let named = |pid: u32| path.starts_with(format!("/proc/{pid}/ns"));
                let (_, container) = known.iter().find(|(pid, _)| named(*pid))?;
                Some(SharedNamespace { kind: namespace.typ(), container: container.clone() })
            })
            .collect()
    }

    /// Runs the user's program of a created container, and its poststart hooks.
    ///
    /// # Errors
    ///
    /// When it is not created, or the guest cannot run the program.
    pub async fn start(&self, id: &ContainerId) -> Result<(), Error> {
        let container = self.0.engine.container(id.as_str())?;
        self.0.engine.start(&container).await?;
        let hooks = container.hooks();
        self.late_hooks("poststart", hooks.and_then(|hooks| hooks.poststart().clone()), id).await;
        Ok(())
    }

    /// Runs hooks whose failure is only worth a warning.
    async fn late_hooks(&self, when: &'static str, hooks: Option<Vec<Hook>>, id: &ContainerId) {
        let hooks = hooks.unwrap_or_default();
        if hooks.is_empty() {
            return;
        }
        let state = crate::operations::state(&self.0.root, id).ok();
        let state = state.and_then(|state| serde_json::to_vec(&state).ok()).unwrap_or_default();
        for hook in hooks {
            let state = state.clone();
            let run = self.0.outside.run(move || hooks::run(when, &[hook], &state)).await;
            if let Err(error) = run {
                warn!(error = %Chain(&error), "a hook failed");
            }
        }
    }

    /// Runs one more process: `process` is the OCI spec's, as JSON; `size` its terminal's rows and columns.
    ///
    /// # Errors
    ///
    /// When the container does not run, or the program cannot be run.
    pub async fn exec(
        &self,
        id: &ContainerId,
        process: &str,
        wanted: [bool; 3],
        size: Option<(u16, u16)>,
    ) -> Result<ProcessStreams, Error> {
        let container = self.0.engine.container(id.as_str())?;
        let parsed: protocol::oci::Process = serde_json::from_str(process)
            .map_err(|error| Error::invalid(format!("process: {error}")))?;
        crate::spec::check_process(&parsed, "process")?;
        let pid = std::process::id();
        let made = self.0.engine.exec(&container, process.to_owned(), wanted, size, pid).await?;
        self.streams(made).await
    }

    async fn streams(&self, made: Response) -> Result<ProcessStreams, Error> {
        let Response::Process { exec, tokens, vsock, .. } = made else {
            return Err(Error::SandboxGone { id: self.0.leader.as_str().to_owned() });
        };
        let Tokens { stdin, stdout, stderr, tty } = tokens;
        let opened = async |token: Vec<u8>| {
            if token.is_empty() {
                return Ok(None);
            }
            let mut stream = vsock.connect(Port(protocol::STREAM_PORT)).await?;
            stream.write_all(&token).await?;
            Ok::<_, std::io::Error>(Some(stream))
        };
        let failed = || Error::host("open a stream into", "the guest");
        let streams = Streams {
            stdin: opened(stdin).await.map_err(failed())?,
            stdout: opened(stdout).await.map_err(failed())?,
            stderr: opened(stderr).await.map_err(failed())?,
            tty: opened(tty).await.map_err(failed())?,
        };
        Ok(ProcessStreams { exec, streams })
    }

    /// Waits for a process's end, for as long as it takes. An empty `exec`: the container's init.
    ///
    /// # Errors
    ///
    /// When the machine ends first.
    pub async fn wait(&self, id: &ContainerId, exec: &str) -> Result<Ended, Error> {
        let gone = || Error::SandboxGone { id: id.as_str().to_owned() };
        let mut machine = self.0.ended.clone();
        let waited = tokio::select! {
            // In this order: a process that has exited has exited, however its machine ends.
            biased;
            waited = self.0.engine.wait(id.as_str(), exec) => waited?,
            _ = machine.wait_for(|ended| *ended) => return Err(gone()),
        };
        match waited {
            Response::Ended { code, written } => Ok(Ended { code, written }),
            _ => Err(gone()),
        }
    }

    /// Sends a signal to a process, or with `all` to every process of the container. SIGKILL of its init ends it even where
    /// the guest does not answer. An empty `exec`: the container's init.
    ///
    /// # Errors
    ///
    /// When it does not run.
    pub async fn signal(
        &self,
        id: &ContainerId,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        let container = self.0.engine.container(id.as_str())?;
        self.0.engine.signal(&container, exec, signal, all).await
    }

    /// Tells a process's terminal its size. An empty `exec`: the container's init.
    ///
    /// # Errors
    ///
    /// When it has no terminal, or does not run.
    pub async fn resize(
        &self,
        id: &ContainerId,
        exec: &str,
        rows: u16,
        columns: u16,
    ) -> Result<(), Error> {
        let container = self.0.engine.container(id.as_str())?;
        self.0.engine.resize(&container, exec.to_owned(), (rows, columns)).await
    }

    /// Freezes a container.
    ///
    /// # Errors
    ///
    /// When it does not run.
    pub async fn pause(&self, id: &ContainerId) -> Result<(), Error> {
        let container = self.0.engine.container(id.as_str())?;
        self.0.engine.pause(&container).await
    }

    /// Thaws a container.
    ///
    /// # Errors
    ///
    /// When it is not paused.
    pub async fn resume(&self, id: &ContainerId) -> Result<(), Error> {
        let container = self.0.engine.container(id.as_str())?;
        self.0.engine.resume(&container).await
    }

    /// Changes a container's limits to those that `resources`, the OCI spec's `linux.resources` as JSON, has.
    ///
    /// # Errors
    ///
    /// When it does not run, or a limit is refused.
    pub async fn update(&self, id: &ContainerId, resources: String) -> Result<(), Error> {
        let container = self.0.engine.container(id.as_str())?;
        self.0.engine.update(&container, resources).await
    }

    /// A container's figures, as its guest has them.
    ///
    /// # Errors
    ///
    /// When it does not run.
    pub async fn stats(&self, id: &ContainerId) -> Result<Stats, Error> {
        let container = self.0.engine.container(id.as_str())?;
        container.check(Operation::Events)?;
        Ok(self.0.engine.agent.stats(id.as_str()).await?.into())
    }

    /// Kills a container, if it still runs, and takes all of it from guest and host. With the last one, the machine ends.
    ///
    /// # Errors
    ///
    /// When something would not go; it stays written down, for another try.
    pub async fn remove(&self, id: &ContainerId) -> Result<(), Error> {
        let container = self.0.engine.container(id.as_str())?;
        let dir = container.dir().clone();
        self.0.engine.let_go(&container).await;
        self.0.markers.borrow_mut().remove(id.as_str());
        if self.0.engine.is_empty() {
            self.end().await;
        }
        let poststop = container.hooks().and_then(|hooks| hooks.poststop().clone());
        self.late_hooks("poststop", poststop, id).await;
        give_back(&dir)
    }

    /// Ends the machine, and with it whatever runs in it.
    pub async fn end(&self) {
        self.0.lifeline.take();
        self.0.engine.end().await;
        let mut ended = self.0.ended.clone();
        // A sender that has gone has ended the machine.
        drop(ended.wait_for(|ended| *ended).await);
    }

    /// The ids of the containers whose memory runs out, from now on.
    pub fn out_of_memory(&self) -> mpsc::Receiver<String> {
        let (told, ids) = mpsc::channel(16);
        let engine = Rc::clone(&self.0.engine);
        spawn_local(async move {
            let Ok(mut events) = engine.agent.events().await else { return };
            while let Ok(Some(event)) = events.recv().await {
                // What the guest says is believed only of containers that there are.
                let known = engine.container(&event.container_id).is_ok();
                if event.has_oom() && known && told.send(event.container_id).await.is_err() {
                    return;
                }
            }
        });
        ids
    }

    /// Does something in the namespaces in which the process began.
    ///
    /// # Errors
    ///
    /// When the thread for it has gone.
    pub async fn outside<T: Send + 'static>(
        &self,
        action: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        self.0.outside.run(move || Ok(action())).await
    }
}

/// Boots the machine of the first container, in this process.
async fn boot_in(
    dir: &ContainerDir,
    bundle: &Bundle,
    config: Config,
    pod: &Pod,
    outside: &Outside,
) -> Result<Running, Error> {
    let mut record = record(dir, bundle)?;
    dir.write(&record)?;
    record.cgroups = join_cgroup(dir, bundle, &config, pod)?;
    dir.write(&record)?;
    let own = std::process::id();
    let netns = if let Some(path) = network_namespace(&bundle.spec) {
        path
    } else {
        new_network()?;
        PathBuf::from(format!("/proc/{own}/ns/net"))
    };
    let launch = Launch {
        vm: dir.vm().clone(),
        id: dir.id().as_str().to_owned(),
        hostname: bundle.spec.hostname().clone().unwrap_or_default(),
        resources: pod.resources(bundle),
        cgroups: record.cgroups,
        netns,
        config,
        device_program: ("/proc/self/exe".into(), vec!["device".to_owned()]),
    };
    own_mounts()?;
    let prepared = Prepared::new(launch)?;
    let control = dir.vm().control();
    let control = UnixListener::bind(&control).map_err(Error::host("listen on", &control))?;
    let (id, bundle) = (dir.id().clone(), bundle.clone());
    let hooks = outside.run(move || run_runtime_hooks(&bundle, &id, own));
    let (booted, ()) = tokio::try_join!(boot::boot(prepared, None), hooks)?;
    Ok(Running::new(booted, control))
}

/// Puts this process in the first container's cgroup; answers the cgroup's directories.
fn join_cgroup(
    dir: &ContainerDir,
    bundle: &Bundle,
    config: &Config,
    pod: &Pod,
) -> Result<Vec<PathBuf>, Error> {
    let linux = bundle.spec.linux().as_ref();
    let Some(path) = linux.and_then(|linux| linux.cgroups_path().as_ref()) else {
        return Ok(Vec::new());
    };
    let path = path.to_string_lossy();
    // "slice:prefix:name" is systemd's form, and no path.
    let systemd = !path.starts_with('/') && path.split(':').count() == 3;
    let driver = if systemd { Driver::Systemd } else { Driver::Cgroupfs };
    let mut ledger = Ledger::open(&dir.ledger()).map_err(Error::host("open", dir.ledger()))?;
    let cgroup = Cgroup::create(&path, driver, std::process::id(), &mut ledger)?;
    cgroup.apply(&pod.host_limits(bundle, &config.sandbox))?;
    Ok(cgroup.directories().iter().map(|directory| directory.path.clone()).collect())
}

fn record(dir: &ContainerDir, bundle: &Bundle) -> Result<ContainerRecord, Error> {
    let now = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
    let mut record = ContainerRecord::new(dir.id(), bundle.path.clone(), bundle.rootfs()?, now);
    record.annotations = bundle.spec.annotations().clone().unwrap_or_default();
    record.hooks.clone_from(bundle.spec.hooks());
    record.process = Some(ProcessId::own().map_err(Error::host("read", "/proc/self/stat"))?);
    Ok(record)
}
