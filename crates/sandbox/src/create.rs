//! Creating a container: in a sandbox of its own, or in the one that has its network namespace.
//!
//! `create` is short-lived and synchronous, and may die at any point: what it has started then gives up by itself.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio as ChildStdio;

use linux::cgroup::{Cgroup, Driver};
use linux::ledger::Ledger;
use linux::process::{Child, Command};
use protocol::oci::{LinuxNamespaceType, Spec};
use rustix::process::Signal;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::config::Config;
use crate::console::{self, Console};
use crate::error::{Chain, Error, ErrorKind};
use crate::hooks;
use crate::launch::{Channel, Go, Init, Launch, Order, Process, Report};
use crate::operations::{hook_state, settle};
use crate::pool;
use crate::resources;
use crate::spec::{Bundle, SharedNamespace};
use crate::state::{ContainerDir, ContainerId, ContainerRecord, Root};
use crate::status::Status;

/// A container to be created.
#[derive(Debug)]
pub struct Create<'a> {
    /// Where its state goes.
    pub root: &'a Root,
    /// Its id.
    pub id: &'a ContainerId,
    /// What to run.
    pub bundle: &'a Bundle,
    /// The configuration, before the container's annotations.
    pub config: Config,
    /// Whether `linux.cgroupsPath` is systemd's.
    pub systemd_cgroup: bool,
    /// Its standard streams.
    pub console: Console,
    /// Whether the container shall end when [`Created`] is dropped, or the caller ends.
    pub foreground: bool,
    /// The program that has the roles `sandbox`, `stand-in` and `device`: the `kata` binary.
    pub program: &'a Path,
}

/// A container that was created.
#[derive(Debug)]
pub struct Created {
    /// Its stand-in: a child of the caller, which exits with the container's exit code.
    pub process: Child,
    /// Closed: the caller has no more interest.
    _lifeline: Option<Channel>,
}

/// Creates a container up to but not including its user's program: in the sandbox whose network namespace the spec gives,
/// if there is one, else in a VM of its own.
///
/// # Errors
///
/// What is wrong with the bundle, the host or the guest; nothing is then left on the host.
pub fn create(request: &Create<'_>) -> Result<Created, Error> {
    let annotations = request.bundle.spec.annotations().clone().unwrap_or_default();
    let config = request.config.clone().with_annotations(&annotations)?;
    let files = plan_files(request.id, request.bundle)?;
    let netns = network_namespace(&request.bundle.spec);
    let joined = netns.as_ref().and_then(|path| {
        let metadata = fs::metadata(path).ok()?;
        request.root.sandbox_in((metadata.dev(), metadata.ino()))
    });
    let dir = match &joined {
        Some(vm) => request.root.claim_in(request.id, vm)?,
        None => request.root.claim(request.id)?,
    };
    let created = linux::file::lock(&dir.vm().lock())
        .map_err(Error::host("lock", dir.vm().lock()))
        .and_then(|_lock| {
            let bundle = request.bundle;
            let now = OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default();
            let mut record =
                ContainerRecord::new(dir.id(), bundle.path.clone(), bundle.rootfs()?, now);
            record.annotations = annotations;
            record.hooks.clone_from(bundle.spec.hooks());
            dir.write(&record)?;
            let shared = shared_namespaces(&bundle.spec, &dir)?;
            let spec =
                bundle.for_guest(&files.guest_root, &files.guest_mounts, &shared).to_string();
            let init = Init {
                netns,
                spec,
                files,
                hooks: container_hooks(bundle),
                state: String::new(),
                foreground: request.foreground,
            };
            let start = Start { request, config: &config, dir: &dir, joins: joined.is_some() };
            start.run(init, record)
        });
    if created.is_err() {
        settle(&dir);
    }
    // With what the usual container gets, not with what this one's annotations ask for.
    if joined.is_none()
        && request.config.pool.size > 0
        && let Err(error) = pool::refill(&request.config, request.program)
    {
        tracing::warn!(error = %Chain(&error), "the pool is not filled");
    }
    created
}

/// What the guest will see of the files of the caller's mount namespace.
pub(crate) fn plan_files(id: &ContainerId, bundle: &Bundle) -> Result<storage::Plan, Error> {
    let input =
        storage::Input { container_id: id.as_str(), bundle: &bundle.path, spec: &bundle.spec };
    let mut files = storage::plan(&input, storage::probe)?;
    if !bundle.gives_all_devices() {
        files.disks = storage::disks(&bundle.spec)?;
    }
    for warning in &files.warnings {
        tracing::warn!("{warning}");
    }
    Ok(files)
}

/// The path of the network namespace to be in; `None`: a new one.
pub(crate) fn network_namespace(spec: &Spec) -> Option<PathBuf> {
    let namespaces = spec.linux().iter().flat_map(|linux| linux.namespaces().iter().flatten());
    namespaces
        .filter(|namespace| namespace.typ() == LinuxNamespaceType::Network)
        .find_map(|namespace| namespace.path().clone())
        .filter(|path| !path.as_os_str().is_empty())
}

/// Which namespaces the spec shares with other containers of the VM. Callers name them by `/proc/<pid>/ns/<type>` of the
/// process that stands for the other container.
fn shared_namespaces(spec: &Spec, dir: &ContainerDir) -> Result<Vec<SharedNamespace>, Error> {
    let siblings: Vec<_> = dir
        .vm()
        .containers()
        .iter()
        .filter_map(|sibling| sibling.read().ok().flatten())
        .filter_map(|record| Some((record.process?.pid, record.id)))
        .collect();
    let namespaces = spec.linux().iter().flat_map(|linux| linux.namespaces().iter().flatten());
    let sibling = |path: &Path| {
        let path = path.strip_prefix("/proc").ok()?;
        let pid: u32 = path.iter().next()?.to_str()?.parse().ok()?;
        siblings.iter().find(|(known, _)| *known == pid).map(|(_, container)| container.clone())
    };
    let mut shared = Vec::new();
    for namespace in namespaces {
        let kind = namespace.typ();
        let path = namespace.path().as_deref().filter(|path| !path.as_os_str().is_empty());
        let Some(path) = path.filter(|_| kind != LinuxNamespaceType::Network) else { continue };
        let container = sibling(path).ok_or_else(|| Error::Unsupported {
            what: format!(
                "the {kind} namespace {} is not one of the container's own VM and cannot be joined; without a path \
                 the container gets a new one, and without the namespace the VM's",
                path.display()
            ),
        })?;
        shared.push(SharedNamespace { kind, container });
    }
    Ok(shared)
}

/// What the guest is called: as the host, where the container has no name of its own (`docker run --uts host`).
fn hostname(spec: &Spec) -> String {
    let name = spec.hostname().clone().filter(|name| !name.is_empty());
    name.unwrap_or_else(|| rustix::system::uname().nodename().to_string_lossy().into_owned())
}

fn container_hooks(bundle: &Bundle) -> Vec<protocol::oci::Hook> {
    let hooks = bundle.spec.hooks().as_ref().and_then(|hooks| hooks.create_container().clone());
    hooks.unwrap_or_default()
}

/// The start of a container's processes.
struct Start<'a> {
    request: &'a Create<'a>,
    config: &'a Config,
    dir: &'a ContainerDir,
    /// Whether its sandbox is there.
    joins: bool,
}

/// A process of ours that was started, and the way to talk to it.
struct Started {
    child: Killed,
    channel: Channel,
}

/// A child that is killed when dropped, until it is taken out.
struct Killed(Option<Child>);

impl Start<'_> {
    fn run(&self, init: Init, record: ContainerRecord) -> Result<Created, Error> {
        // Before the stand-in, so that both come up at once.
        let mut sandbox = (!self.joins).then(|| self.spawn_sandbox()).transpose()?;
        let mut stand_in = self.spawn_stand_in()?;
        let talked = self
            .prepare(&stand_in, record)
            .and_then(|cgroups| self.converse(&mut stand_in, sandbox.as_mut(), init, cgroups));
        match talked {
            Ok(()) => {
                if let Some(mut sandbox) = sandbox {
                    drop(sandbox.child.0.take());
                }
                let Started { mut child, channel } = stand_in;
                let process = child
                    .0
                    .take()
                    .ok_or_else(|| Error::SandboxGone { id: self.dir.id().as_str().to_owned() })?;
                let lifeline = self.request.foreground.then_some(channel);
                Ok(Created { process, _lifeline: lifeline })
            }
            Err(Error::SandboxGone { .. }) => {
                drop(sandbox);
                Err(Error::Told {
                    text: format!("the sandbox process ended early: {}", last_words(self.dir)),
                    kind: ErrorKind::Unavailable,
                })
            }
            Err(error) => Err(error),
        }
    }

    fn spawn_sandbox(&self) -> Result<Started, Error> {
        let resources = self.request.bundle.resources();
        if let Some(channel) = pool::claim(self.config, resources, self.request.program) {
            return Ok(Started { child: Killed(None), channel });
        }
        let mut command = Command::new(self.request.program);
        command.stdio(ChildStdio::null(), ChildStdio::null(), ChildStdio::null());
        self.spawn(command, "sandbox")
    }

    fn spawn_stand_in(&self) -> Result<Started, Error> {
        let process = self.request.bundle.process()?;
        let terminal = process.terminal().unwrap_or_default();
        let mut command = Command::new(self.request.program);
        console::attach(&mut command, terminal, &self.request.console, process)?;
        self.spawn(command, "stand-in")
    }

    fn spawn(&self, mut command: Command, role: &str) -> Result<Started, Error> {
        let (channel, theirs) = Channel::pair().map_err(Error::host("create", "a socket pair"))?;
        let number = command.pass(theirs);
        command.name("kata").args([role.to_owned(), number.to_string()]).new_session();
        let child = command.spawn().map_err(Error::host("start", self.request.program))?;
        Ok(Started { child: Killed(Some(child)), channel })
    }

    /// Puts the stand-in in the container's cgroup, and writes both down. Answers the cgroup's directories.
    fn prepare(
        &self,
        stand_in: &Started,
        mut record: ContainerRecord,
    ) -> Result<Vec<PathBuf>, Error> {
        let Some(child) = &stand_in.child.0 else { return Ok(Vec::new()) };
        record.process =
            Some(child.id().map_err(Error::host("find process", child.pid().to_string()))?);
        self.dir.write(&record)?;
        let spec = &self.request.bundle.spec;
        let Some(path) = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_ref())
        else {
            return Ok(Vec::new());
        };
        let mut ledger =
            Ledger::open(&self.dir.ledger()).map_err(Error::host("open", self.dir.ledger()))?;
        let driver = if self.request.systemd_cgroup { Driver::Systemd } else { Driver::Cgroupfs };
        let cgroup = Cgroup::create(&path.to_string_lossy(), driver, child.pid(), &mut ledger)?;
        let limits = resources::host_limits(self.request.bundle.resources(), &self.config.sandbox);
        cgroup.apply(&limits)?;
        record.cgroups =
            cgroup.directories().iter().map(|directory| directory.path.clone()).collect();
        self.dir.write(&record)?;
        Ok(record.cgroups)
    }

    /// Tells both processes what to do and hears them out; see [`crate::launch`] for the order.
    fn converse(
        &self,
        stand_in: &mut Started,
        mut sandbox: Option<&mut Started>,
        mut init: Init,
        cgroups: Vec<PathBuf>,
    ) -> Result<(), Error> {
        let bundle = self.request.bundle;
        let pid = stand_in.child.0.as_ref().map_or(0, Child::pid);
        let gone = || gone(self.dir);
        let own = PathBuf::from(format!("/proc/{pid}/ns/net"));
        let netns = init.netns.clone().unwrap_or(own);
        let state = hook_state(bundle, self.request.id, Status::Creating, pid);
        init.state = String::from_utf8(state).unwrap_or_default();
        let order = Order {
            vm: self.dir.vm().clone(),
            id: self.request.id.as_str().to_owned(),
            terminal: bundle.process()?.terminal().unwrap_or_default(),
            what: Process::Init(Box::new(init)),
        };
        stand_in.channel.tell(&order).map_err(gone())?;
        report(stand_in.channel.hear().map_err(gone())?)?;
        if let Some(sandbox) = &mut sandbox {
            let launch = Launch {
                vm: self.dir.vm().clone(),
                id: self.request.id.as_str().to_owned(),
                hostname: hostname(&bundle.spec),
                resources: bundle.resources().cloned(),
                cgroups,
                netns,
                config: self.config.clone(),
                device_program: (self.request.program.to_owned(), vec!["device".to_owned()]),
            };
            sandbox.channel.tell(&launch).map_err(gone())?;
        }
        run_runtime_hooks(bundle, self.request.id, pid)?;
        if let Some(sandbox) = &mut sandbox {
            report(sandbox.channel.hear().map_err(gone())?)?;
        }
        stand_in.channel.tell(&Go).map_err(gone())?;
        let phases = report(stand_in.channel.hear().map_err(gone())?)?;
        let phases = phases.iter().map(|(name, ms)| format!(" {name}_ms={ms}"));
        tracing::debug!("container created{}", phases.collect::<String>());
        Ok(())
    }
}

fn gone(dir: &ContainerDir) -> impl FnOnce(io::Error) -> Error + use<> {
    let id = dir.id().as_str().to_owned();
    move |_| Error::SandboxGone { id }
}

/// A report that is no failure; the phases of the last.
fn report(report: Report) -> Result<Vec<(String, u64)>, Error> {
    match report {
        Report::Joined | Report::Claimed | Report::Listening => Ok(Vec::new()),
        Report::Ready { phases } => Ok(phases),
        Report::Failed { text, kind } => Err(Error::Told { text, kind }),
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            // It has nothing more to do, or did not notice that it has not.
            drop(child.signal(Signal::KILL));
            drop(child.wait());
        }
    }
}

pub(crate) fn run_runtime_hooks(bundle: &Bundle, id: &ContainerId, pid: u32) -> Result<(), Error> {
    let Some(all) = bundle.spec.hooks() else { return Ok(()) };
    let state = hook_state(bundle, id, Status::Creating, pid);
    // Deprecated in the spec; Docker before 28 sets up its networks in it.
    let prestart = all.prestart().as_deref().unwrap_or_default();
    hooks::run("prestart", prestart, &state)?;
    hooks::run("createRuntime", all.create_runtime().as_deref().unwrap_or_default(), &state)
}

fn last_words(dir: &ContainerDir) -> String {
    let log = fs::read_to_string(dir.vm().log()).unwrap_or_default();
    log.lines().last().unwrap_or("it said nothing").to_owned()
}
