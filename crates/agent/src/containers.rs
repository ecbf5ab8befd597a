//! The containers of the guest, and what can be done to them.
//!
//! The table is behind a lock that is held for a look at it, never while anything is awaited. Requests that change
//! something run to their end in tasks of their own, also when the host that asked has gone.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocol::agent::{self, CreateContainerRequest, ExecRequest, ProcessCreated, SignalRequest};
use protocol::{oci, paths};
use tokio::sync::broadcast;

use crate::cgroup::Cgroup;
use crate::container::Container;
use crate::error::{Doing, Error};
use crate::init::request::{Request, Role};
use crate::launch::{Control, Spare, launch};
use crate::process::{Exit, Output, Process};
use crate::reaper::Reaper;
use crate::sockets::Sockets;
use crate::stdio::{self, End, Source, Streams};
use crate::{disks, notify, shm, spec, sys, watch};

/// How long killed processes may take to go, and paused ones to stop.
const DEADLINE: Duration = Duration::from_secs(20);

/// All of them.
#[derive(Debug)]
pub(crate) struct Containers {
    /// Nothing while a container is being created.
    table: Mutex<HashMap<String, Option<Container>>>,
    reaper: Arc<Reaper>,
    streams: Arc<Streams>,
    events: broadcast::Sender<agent::Event>,
    /// Whether the host was, or will be, told that files are watched.
    watched: AtomicBool,
    spare: Arc<Spare>,
}

/// A process that was just started, and what the host needs to know of it.
struct Started {
    process: Arc<Process>,
    control: Control,
    created: ProcessCreated,
}

impl Containers {
    /// None yet.
    pub(crate) fn new(reaper: Arc<Reaper>, streams: Arc<Streams>) -> Self {
        let (events, _) = broadcast::channel(64);
        let watched = AtomicBool::new(false);
        let spare = Arc::default();
        Self { table: Mutex::default(), reaper, streams, events, watched, spare }
    }

    /// Prepares for the first process.
    pub(crate) fn prepare(&self) -> Result<(), Error> {
        self.spare.keep()
    }

    /// Makes a container up to its user's program.
    pub(crate) async fn create(
        self: Arc<Self>,
        request: CreateContainerRequest,
    ) -> Result<ProcessCreated, Error> {
        let id = request.container_id.clone();
        spec::check_id(&id)?;
        let mut spec = spec::container(&request.spec_json)?;
        self.find_shared_namespaces(&mut spec)?;
        disks::place(&mut spec, &request.disks).await?;
        if request.watchable && !self.watched.swap(true, Ordering::Relaxed) {
            notify::tell_of_watchers(self.events.clone());
        }
        if request.watchable {
            notify::look_at_volumes(&id);
        }
        shm::share(&mut spec)?;
        let spec = Arc::new(spec);
        if self.table().contains_key(&id) {
            return Err(Error::Exists { what: "container", id });
        }
        self.table().insert(id.clone(), None);
        let made = self.make(&id, spec, &request).await;
        match made {
            Ok((container, created)) => {
                let watched = watch::oom(id.clone(), container.cgroup.clone(), self.events.clone());
                tokio::spawn(watched);
                self.table().insert(id, Some(container));
                Ok(created)
            }
            Err(error) => {
                self.table().remove(&id);
                Err(error)
            }
        }
    }

    /// Puts in the paths of the namespaces that `spec` shares with containers that are there.
    fn find_shared_namespaces(&self, spec: &mut oci::Spec) -> Result<(), Error> {
        let Some(mut linux) = spec.linux().clone() else { return Ok(()) };
        let mut namespaces = linux.namespaces().clone().unwrap_or_default();
        for namespace in &mut namespaces {
            let path = namespace.path().as_ref().and_then(|path| path.to_str());
            let Some(of) = path.and_then(|path| path.strip_prefix(paths::NAMESPACE_OF)) else {
                continue;
            };
            let pid = self.with(of, |container| container.init.pid)?;
            let file = match namespace.typ() {
                oci::LinuxNamespaceType::Mount => "mnt".to_owned(),
                other => other.to_string(),
            };
            namespace.set_path(Some(format!("/proc/{pid}/ns/{file}").into()));
        }
        linux.set_namespaces(Some(namespaces));
        spec.set_linux(Some(linux));
        Ok(())
    }

    async fn make(
        &self,
        id: &str,
        spec: Arc<oci::Spec>,
        request: &CreateContainerRequest,
    ) -> Result<(Container, ProcessCreated), Error> {
        let linux = spec.linux().as_ref();
        let sockets = Sockets::listen(id, &request.sockets)?;
        let cgroup = Cgroup::create(id, linux.and_then(|linux| linux.resources().as_ref()))?;
        let process = spec.process().clone();
        let process =
            process.ok_or_else(|| Error::Invalid("the spec has no process".to_owned()))?;
        let seccomp = linux.and_then(|linux| linux.seccomp().clone());
        let wanted = Request {
            container: id.to_owned(),
            cgroup: cgroup.path().to_owned(),
            terminal: terminal(&process, request.tty_size.as_ref()),
            process,
            seccomp,
            role: Role::Init(Box::new(oci::Spec::clone(&spec))),
        };
        match self.start_process(&wanted, "", &request.streams, &cgroup).await {
            Ok(started) => {
                let Started { process, control, created } = started;
                Ok((Container::new(id, spec, cgroup, process, control, sockets), created))
            }
            Err(error) => {
                // What was made goes again; why it failed is what the host must hear.
                if empty(&cgroup).await.is_ok() {
                    drop(cgroup.remove());
                }
                Err(error)
            }
        }
    }

    /// Runs the user's program of a created container.
    pub(crate) async fn start(self: Arc<Self>, id: String) -> Result<(), Error> {
        let control = self.with(&id, Container::take_control)??;
        control.start().await
    }

    /// Runs one more process in a container.
    pub(crate) async fn exec(
        self: Arc<Self>,
        request: ExecRequest,
    ) -> Result<ProcessCreated, Error> {
        let (id, exec) = (request.container_id.as_str(), request.exec_id.as_str());
        let mut process = spec::exec(&request.process_json)?;
        let wanted = self.with(id, |container| {
            container.reserve_exec(exec)?;
            let linux = container.spec.linux().as_ref();
            if process.capabilities().is_none() {
                let of_init = container.spec.process().as_ref();
                process.set_capabilities(of_init.and_then(|init| init.capabilities().clone()));
            }
            Ok(Request {
                container: id.to_owned(),
                cgroup: container.cgroup.path().to_owned(),
                terminal: terminal(&process, request.tty_size.as_ref()),
                process,
                seccomp: linux.and_then(|linux| linux.seccomp().clone()),
                role: Role::Exec {
                    member: container.init.pid,
                    user_namespace: container.has_user_namespace(),
                },
            })
        })??;
        let cgroup = self.with(id, |container| container.cgroup.clone())?;
        let started = self.start_process(&wanted, exec, &request.streams, &cgroup).await;
        self.with(id, |container| match started {
            Ok(Started { process, created, .. }) => {
                container.add_exec(exec, process);
                Ok(created)
            }
            Err(error) => {
                container.forget_exec(exec);
                Err(error)
            }
        })?
    }

    async fn start_process(
        &self,
        request: &Request,
        exec: &str,
        streams: &agent::Streams,
        cgroup: &Cgroup,
    ) -> Result<Started, Error> {
        // From here on no exit is lost, however short the process's life.
        let _starting = self.reaper.starting();
        let mut files = Files::new(request, streams).doing(|| "make pipes".to_owned())?;
        let stdio = files.take_stdio().doing(|| "open /dev/null".to_owned())?;
        let launched = launch(&self.spare, request, stdio).await?;
        if let Some(master) = launched.terminal {
            let terminal = Source::new(master).doing(|| "take over the terminal".to_owned())?;
            files.terminal = Some(Arc::new(terminal));
        }
        let is_init = matches!(request.role, Role::Init(_));
        let process = Process::new(launched.pid, files.output(), is_init, cgroup.clone());
        let mut created = files.offer(&self.streams, &request.container, exec)?;
        created.pid = launched.pid;
        created.marks = launched.marks.to_wire();
        let watched = Arc::clone(&process);
        self.reaper.watch(launched.pid, move |status| watched.ended(status));
        Ok(Started { process, control: launched.control, created })
    }

    /// Sends a signal to a process, or to all of a container's.
    pub(crate) fn signal(&self, request: &SignalRequest) -> Result<(), Error> {
        let (process, cgroup) = self.with(&request.container_id, |container| {
            let process = container.process(&request.exec_id)?;
            Ok::<_, Error>((process, container.cgroup.clone()))
        })??;
        if !request.all {
            return process.signal(request.signal);
        }
        if request.signal == libc::SIGKILL.unsigned_abs() {
            return cgroup.kill();
        }
        for pid in cgroup.processes() {
            match sys::kill(pid, request.signal) {
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                result => result.doing(|| format!("signal process {pid}"))?,
            }
        }
        Ok(())
    }

    /// Waits for a process's end; an exec is forgotten with that.
    pub(crate) async fn wait(&self, id: &str, exec: &str) -> Result<Exit, Error> {
        let process = self.process(id, exec)?;
        let exit = process.wait().await;
        if !exec.is_empty() {
            // The container may have gone, and the exec with it.
            drop(self.with(id, |container| container.forget_exec(exec)));
            self.streams.forget_exec_later(id, exec);
        }
        Ok(exit)
    }

    /// A process of a container.
    pub(crate) fn process(&self, id: &str, exec: &str) -> Result<Arc<Process>, Error> {
        self.with(id, |container| container.process(exec))?
    }

    /// A container's cgroup.
    pub(crate) fn cgroup(&self, id: &str) -> Result<Cgroup, Error> {
        self.with(id, |container| container.cgroup.clone())
    }

    /// Stops all processes of a container, or lets them go on.
    pub(crate) async fn pause(self: Arc<Self>, id: String, paused: bool) -> Result<(), Error> {
        let cgroup = self.with(&id, |container| container.set_paused(paused))??;
        cgroup.freeze(paused)?;
        let stopped = |cgroup: &Cgroup| cgroup.is_frozen() == paused;
        if let Err(error) = watch::until(&cgroup, DEADLINE, "pausing the container", stopped).await
        {
            // As it was; the first error is the one to tell.
            drop(cgroup.freeze(!paused));
            drop(self.with(&id, |container| container.set_paused(!paused)));
            return Err(error);
        }
        Ok(())
    }

    /// Kills what is left of a container and forgets it.
    pub(crate) async fn remove(self: Arc<Self>, id: String) -> Result<(), Error> {
        let cgroup = self.cgroup(&id)?;
        empty(&cgroup).await?;
        cgroup.remove()?;
        self.table().remove(&id);
        self.streams.forget_container(&id);
        let directory = Path::new(paths::CONTAINERS).join(&id);
        match std::fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::guest(format!("remove {}", directory.display()), error))
            }
            _ => Ok(()),
        }
    }

    /// Kills every process of every container.
    pub(crate) fn kill_all(&self) {
        for container in self.table().values().flatten() {
            // The guest goes down next, and every process with it.
            drop(container.cgroup.kill());
        }
    }

    /// What happens from now on.
    pub(crate) fn events(&self) -> broadcast::Receiver<agent::Event> {
        self.events.subscribe()
    }

    fn with<T>(&self, id: &str, look: impl FnOnce(&mut Container) -> T) -> Result<T, Error> {
        let mut table = self.table();
        match table.get_mut(id) {
            Some(Some(container)) => Ok(look(container)),
            Some(None) => Err(Error::WrongState("the container is still being created")),
            None => Err(Error::NoContainer { id: id.to_owned() }),
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Option<Container>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Kills all in a cgroup, and waits until it is empty.
async fn empty(cgroup: &Cgroup) -> Result<(), Error> {
    cgroup.kill()?;
    let gone = |cgroup: &Cgroup| !cgroup.is_populated();
    watch::until(cgroup, DEADLINE, "killing the container's processes", gone).await
}

fn terminal(process: &oci::Process, asked: Option<&agent::TtySize>) -> Option<(u16, u16)> {
    if process.terminal() != Some(true) {
        return None;
    }
    let cells = |count: u64| u16::try_from(count).unwrap_or(u16::MAX);
    let size = match (asked, process.console_size()) {
        (Some(size), _) if size.rows > 0 => (size.rows.into(), size.columns.into()),
        (_, Some(size)) => (size.height(), size.width()),
        _ => (0, 0),
    };
    Some((cells(size.0), cells(size.1)))
}

/// A process's standard streams: its ends until it has them, and ours.
#[derive(Default)]
struct Files {
    stdio: [Option<OwnedFd>; 3],
    stdin: Option<End>,
    stdout: Option<Arc<Source>>,
    stderr: Option<Arc<Source>>,
    terminal: Option<Arc<Source>>,
}

impl Files {
    fn new(request: &Request, streams: &agent::Streams) -> std::io::Result<Self> {
        let mut files = Self::default();
        if request.terminal.is_none() {
            if streams.stdin {
                let (theirs, ours) = stdio::input()?;
                files.stdio[0] = Some(theirs);
                files.stdin = Some(ours);
            }
            if streams.stdout {
                let (theirs, ours) = stdio::output()?;
                files.stdio[1] = Some(theirs);
                files.stdout = Some(ours);
            }
            if streams.stderr {
                let (theirs, ours) = stdio::output()?;
                files.stdio[2] = Some(theirs);
                files.stderr = Some(ours);
            }
        }
        Ok(files)
    }

    /// The process's ends; the null device where there is no stream.
    fn take_stdio(&mut self) -> std::io::Result<[OwnedFd; 3]> {
        let null = || File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from);
        let [stdin, stdout, stderr] =
            self.stdio.each_mut().map(|end| end.take().map_or_else(null, Ok));
        Ok([stdin?, stdout?, stderr?])
    }

    fn output(&self) -> Output {
        if let Some(terminal) = &self.terminal {
            return Output::Terminal(terminal.meter());
        }
        let meter = |source: &Option<Arc<Source>>| source.as_ref().map(Source::meter);
        Output::Pipes { stdout: meter(&self.stdout), stderr: meter(&self.stderr) }
    }

    /// Lets the host open our ends.
    fn offer(self, streams: &Streams, id: &str, exec: &str) -> Result<ProcessCreated, Error> {
        let mut created = ProcessCreated::default();
        let offer = |end: Option<End>| -> Result<Vec<u8>, Error> {
            end.map_or(Ok(Vec::new()), |end| Ok(streams.offer(id, exec, end)?.to_vec()))
        };
        created.stdin = offer(self.stdin)?;
        created.stdout = offer(self.stdout.map(End::Output))?;
        created.stderr = offer(self.stderr.map(End::Output))?;
        created.tty = offer(self.terminal.map(End::Terminal))?;
        Ok(created)
    }
}
