//! The sandbox process: from a [`Launch`] to a created container, and on until the container has ended.
//!
//! ```text
//! launched ─ namespaces, cgroup ─┬─ hooks of the runtime namespace (in `create`) ─┬─ interfaces ─ container ─ ready ─ serving
//!                                ├─ machine boots, agent says hello ──────────────┤
//!                                └─ root and mounts bound below the share ────────┘
//! ```
//!
//! The process is the container's init to the host: it is in the container's cgroup and network namespace and exits with
//! its exit code. Everything it starts dies with it; its mounts are in its own mount namespace. What else it takes from
//! the host is in the ledger.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader as SyncReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream as SyncStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hypervisor::{Acceleration, GuestStream, Port, SharedDirectory, Vm, VmSpec};
use linux::cgroup::{Cgroup, Driver};
use linux::ledger::Ledger;
use linux::process::ProcessId;
use network::Network;
use protocol::agent as wire;
use protocol::oci::{LinuxNamespaceType, LinuxResources};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::{LocalSet, spawn_blocking, spawn_local};
use tracing::{error, info, warn};

use crate::agent::Agent;
use crate::config::{AccelerationConfig, Config};
use crate::error::{Chain, Error, ErrorKind};
use crate::hooks;
use crate::launch::{HooksDone, Launch, Report};
use crate::resources;
use crate::server::{Sandbox, VmRequest, exit_code, tty_size};
use crate::spec::Bundle;
use crate::state::{ContainerDir, ContainerId, SandboxRecord};
use crate::status::Status;
use crate::stdio::{Relay, Stdio};

/// How a container exits whose machine was killed: 128 + SIGKILL.
const KILLED: u8 = 137;

/// Fresh randomness for a guest.
const ENTROPY_BYTES: usize = 64;

/// Runs the sandbox process whose launch comes over `channel`, until its container has ended.
///
/// Answers the exit code for the process: the container's, or 1 where it was not created.
#[must_use]
pub fn serve(channel: OwnedFd) -> u8 {
    let channel = SyncStream::from(channel);
    match Prepared::new(&channel) {
        Ok(prepared) => prepared.run(channel),
        // Nobody is there to be told anything but the other end of the channel.
        Err(error) => {
            report_blocking(&channel, &failure(&error));
            1
        }
    }
}

fn failure(error: &Error) -> Report {
    Report::Failed { text: Chain(error).to_string(), kind: error.kind() }
}

fn report_blocking(mut channel: &SyncStream, report: &Report) {
    if let Ok(mut line) = serde_json::to_vec(report) {
        line.push(b'\n');
        // A reader that has gone needs no report.
        drop(io::Write::write_all(&mut channel, &line));
    }
}

/// What is known and taken before the asynchronous part.
struct Prepared {
    launch: Launch,
    bundle: Bundle,
    dir: ContainerDir,
    stdio: Stdio,
    ledger: Ledger,
    cgroup: Option<Cgroup>,
    netns: PathBuf,
    began: Instant,
}

impl Prepared {
    fn new(channel: &SyncStream) -> Result<Self, Error> {
        let began = Instant::now();
        let mut line = String::new();
        let told = SyncReader::new(channel)
            .read_line(&mut line)
            .and_then(|_| Ok(serde_json::from_str(&line)?));
        let launch: Launch = told.map_err(Error::host("read the launch from", "create"))?;

        let id = ContainerId::new(&launch.id)?;
        let dir = launch.root.find(&id)?;
        let stdio =
            Stdio::own(launch.terminal).map_err(Error::host("keep", "the standard streams"))?;
        if stdio.terminal && linux::pty::make_controlling(&stdio.stdin).is_err() {
            // The caller's own terminal, which its session keeps: it forwards what happens to it.
        }
        redirect_own_streams(&dir)?;

        let own = ProcessId::own().map_err(Error::host("read", "/proc/self/stat"))?;
        dir.vm().write(&SandboxRecord::new(own, Vec::new()))?;
        let mut ledger =
            Ledger::open(&dir.vm().ledger()).map_err(Error::host("open", dir.vm().ledger()))?;
        let bundle = Bundle::new(launch.bundle.clone(), launch.spec.clone())?;
        let cgroup = join_cgroup(&launch, &bundle, own, &dir, &mut ledger)?;
        let netns = join_namespaces(&bundle)?;
        Ok(Self { launch, bundle, dir, stdio, ledger, cgroup, netns, began })
    }

    fn run(self, channel: SyncStream) -> u8 {
        let dir = self.dir.clone();
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(source) => {
                let error = Error::Host { action: "start", path: "the event loop".into(), source };
                report_blocking(&channel, &failure(&error));
                return 1;
            }
        };
        let code = LocalSet::new().block_on(&runtime, async move {
            let mut caller = match Caller::new(channel) {
                Ok(caller) => caller,
                Err(source) => {
                    error!(%source, "no way to report");
                    return 1;
                }
            };
            match self.create(&mut caller).await {
                Ok(running) => {
                    if let Err(error) = caller.report(&Report::Ready).await {
                        warn!(%error, "`create` is gone; its container is kept");
                    }
                    drop(caller);
                    running.until_ended().await
                }
                Err(error) => {
                    error!(error = %Chain(&error), "not created");
                    if caller.report(&failure(&error)).await.is_err() {
                        // `create` would have cleaned up; it is gone, so we do.
                        crate::operations::settle(&dir);
                    }
                    1
                }
            }
        });
        // A relay may still block in a read of the caller's stdin.
        runtime.shutdown_background();
        code
    }

    /// Boots the machine and creates the container in it.
    async fn create(self, caller: &mut Caller) -> Result<Running, Error> {
        let Self { launch, bundle, dir, stdio, mut ledger, cgroup, netns, began } = self;
        let config = &launch.config;
        let plan = storage::plan(
            &storage::Input {
                container_id: dir.id().as_str(),
                bundle: &bundle.path,
                spec: &bundle.spec,
            },
            storage::probe,
        )?;
        for warning in &plan.warnings {
            warn!("{warning}");
        }
        let share = dir.vm().share();
        let machine = dir.vm().machine();
        for path in [&share, &machine] {
            fs::create_dir_all(path).map_err(Error::host("create", path))?;
        }
        linux::mount::share(&share).map_err(Error::host("share", &share))?;

        let spec = machine_spec(&launch, &bundle, share.clone())?;
        let driver = hypervisor::driver(&config.hypervisor.driver)?;
        let mut vm = driver.launch(&spec, &machine, &mut ledger).await?;
        let mut ready = vm.listen(Port(protocol::READY_PORT)).await?;
        vm.boot().await?;
        let launched = began.elapsed();

        storage::attach(&plan, &share, &mut ledger)?;
        caller.run_hooks().await?;
        let hooked = began.elapsed();
        let agent = agent_ready(vm.as_ref(), &mut ready, config, &machine).await?;
        let booted = began.elapsed();

        let hello = agent.hello().await?;
        agent.resync(resync(&bundle)?).await?;
        let network = attach_network(vm.as_mut(), &netns, &mut ledger, &agent).await?;
        agent.mount(share_mount()).await?;
        run_create_container_hooks(&bundle, dir.id())?;
        let created = agent
            .create(wire::CreateContainerRequest {
                container_id: dir.id().as_str().to_owned(),
                spec_json: bundle
                    .for_guest(&plan.guest_root, &plan.guest_mounts)
                    .to_string()
                    .into_bytes(),
                streams: Some(streams(&stdio)).into(),
                tty_size: stdio.size().map(tty_size).into(),
                ..Default::default()
            })
            .await?;
        let vsock = vm.vsock();
        let tty = stdio.terminal.then(|| stdio.stdin.try_clone()).transpose();
        let tty = tty.map_err(Error::host("keep", "the terminal"))?;
        let relay = stdio
            .relay(&vsock, &created.into())
            .map_err(Error::host("open a stream into", "the guest"))?;
        info!(
            kernel = hello.kernel_release,
            launched_ms = launched.as_millis(),
            hooks_ms = hooked.as_millis(),
            agent_ms = booted.as_millis(),
            guest_kernel_ms = hello.kernel_ms,
            guest_agent_ms = hello.ready_ms,
            created_ms = began.elapsed().as_millis(),
            "container created"
        );

        let control = UnixListener::bind(dir.vm().control())
            .map_err(Error::host("listen on", dir.vm().control()))?;
        let mut record =
            dir.read()?.ok_or_else(|| Error::NoSuchContainer { id: launch.id.clone() })?;
        record.process = Some(ProcessId::own().map_err(Error::host("read", "/proc/self/stat"))?);
        let (vm_requests, vm_orders) = mpsc::channel(4);
        let sandbox = Rc::new(Sandbox {
            agent,
            record: RefCell::new(record),
            dir,
            ledger: RefCell::new(ledger),
            network: RefCell::new(network),
            netns,
            vsock,
            vm: vm_requests,
            cgroup,
            config: config.sandbox.clone(),
            execs: RefCell::new(HashMap::new()),
            execs_made: Cell::new(0),
        });
        sandbox.set_status(Status::Created)?;
        Ok(Running { sandbox, vm, vm_orders, control, relay, tty })
    }
}

/// A created container and its machine.
struct Running {
    sandbox: Rc<Sandbox>,
    vm: Box<dyn Vm>,
    vm_orders: mpsc::Receiver<VmRequest>,
    control: UnixListener,
    relay: Relay,
    tty: Option<OwnedFd>,
}

impl Running {
    async fn until_ended(mut self) -> u8 {
        let (ended, end) = watch::channel(None);
        spawn_local(accept(self.control, Rc::clone(&self.sandbox)));
        spawn_local(watch_init(Rc::clone(&self.sandbox), self.relay, ended));
        spawn_local(watch_oom(Rc::clone(&self.sandbox)));
        if let Err(error) = forward_signals(&self.sandbox, self.tty) {
            warn!(%error, "signals are not forwarded");
        }
        let code = own_machine(&mut self.vm, &mut self.vm_orders, end).await;

        self.sandbox.record.borrow_mut().exit_code = Some(code);
        if let Err(error) = self.sandbox.set_status(Status::Stopped) {
            error!(error = %Chain(&error), "the exit was not written down");
        }
        if let Err(error) = self.vm.kill().await {
            warn!(error = %Chain(&error), "the machine was not killed");
        }
        info!(code, "container ended");
        code
    }
}

/// Does what is asked of the machine until the container or the machine has ended; answers the container's exit code.
async fn own_machine(
    vm: &mut Box<dyn Vm>,
    orders: &mut mpsc::Receiver<VmRequest>,
    mut end: watch::Receiver<Option<u8>>,
) -> u8 {
    let mut machine_ended = vm.ended();
    loop {
        tokio::select! {
            // In this order: a container that has exited has exited, however its machine ends.
            biased;
            code = end.wait_for(Option::is_some) => {
                return code.ok().and_then(|code| *code).unwrap_or(KILLED);
            }
            exit = machine_ended.wait_for(Option::is_some) => {
                let exit = exit.ok().and_then(|exit| exit.clone());
                error!(?exit, "the machine ended under its container");
                return KILLED;
            }
            order = orders.recv() => match order {
                Some(VmRequest::Attach(device, answer)) => {
                    drop(answer.send(vm.attach(device).await.map_err(Error::from)));
                }
                Some(VmRequest::Detach(id, answer)) => {
                    drop(answer.send(vm.detach(&id).await.map_err(Error::from)));
                }
                Some(VmRequest::Kill) | None => return KILLED,
            },
        }
    }
}

async fn accept(control: UnixListener, sandbox: Rc<Sandbox>) {
    loop {
        match control.accept().await {
            Ok((stream, _)) => {
                spawn_local(Rc::clone(&sandbox).serve(stream));
            }
            Err(error) => {
                error!(%error, "no more requests are taken");
                return;
            }
        }
    }
}

/// Tells `ended` when the container's init has exited and all it had written has been delivered.
async fn watch_init(sandbox: Rc<Sandbox>, relay: Relay, ended: watch::Sender<Option<u8>>) {
    match sandbox.agent.wait(sandbox.dir.id().as_str(), "").await {
        Ok(exit) => {
            let written = [exit.stdout_bytes, exit.stderr_bytes];
            if spawn_blocking(move || relay.finish(written)).await.is_err() {
                error!("the last output may be lost");
            }
            if exit.oom_killed {
                warn!("the guest's kernel killed a process: out of memory");
            }
            ended.send_replace(Some(exit_code(exit.exit_code)));
        }
        Err(error) => {
            // The machine's end, which is watched too, explains it; if the machine lives, the agent is broken.
            error!(error = %Chain(&error), "the container's init is lost");
            ended.send_replace(Some(KILLED));
        }
    }
}

async fn watch_oom(sandbox: Rc<Sandbox>) {
    let Ok(mut events) = sandbox.agent.events().await else { return };
    while let Ok(Some(event)) = events.recv().await {
        if event.has_oom() {
            warn!(
                container = crate::error::from_guest(&event.container_id),
                "out of memory in the guest"
            );
        }
    }
}

/// Forwards the signals that this process is sent to the container's init, and its terminal's size.
fn forward_signals(sandbox: &Rc<Sandbox>, tty: Option<OwnedFd>) -> io::Result<()> {
    let kinds = [
        SignalKind::hangup(),
        SignalKind::interrupt(),
        SignalKind::quit(),
        SignalKind::terminate(),
        SignalKind::user_defined1(),
        SignalKind::user_defined2(),
    ];
    for kind in kinds {
        let mut signals = signal(kind)?;
        let sandbox = Rc::clone(sandbox);
        spawn_local(async move {
            while signals.recv().await.is_some() {
                let number = kind.as_raw_value().unsigned_abs();
                if let Err(error) = sandbox.signal(number, false).await {
                    warn!(number, error = %Chain(&error), "signal not forwarded");
                }
            }
        });
    }
    if let Some(tty) = tty {
        let mut changes = signal(SignalKind::window_change())?;
        let sandbox = Rc::clone(sandbox);
        spawn_local(async move {
            while changes.recv().await.is_some() {
                let Ok(size) = linux::pty::window_size(&tty) else { continue };
                if let Err(error) = sandbox.resize("", size.rows, size.columns).await {
                    warn!(error = %Chain(&error), "terminal not resized");
                }
            }
        });
    }
    Ok(())
}

/// The other end of the launch channel.
struct Caller {
    read: BufReader<tokio::net::unix::OwnedReadHalf>,
    write: tokio::net::unix::OwnedWriteHalf,
}

impl Caller {
    fn new(channel: SyncStream) -> io::Result<Self> {
        channel.set_nonblocking(true)?;
        let (read, write) = UnixStream::from_std(channel)?.into_split();
        Ok(Self { read: BufReader::new(read), write })
    }

    async fn report(&mut self, report: &Report) -> io::Result<()> {
        let mut line = serde_json::to_vec(report)?;
        line.push(b'\n');
        self.write.write_all(&line).await
    }

    /// Has `create` run the hooks of the runtime namespace.
    async fn run_hooks(&mut self) -> Result<(), Error> {
        let gone = || Error::Told {
            text: "`create` ended, or a hook failed, before the container was created".into(),
            kind: ErrorKind::Unavailable,
        };
        self.report(&Report::Hooks).await.map_err(|_| gone())?;
        let mut line = String::new();
        self.read.read_line(&mut line).await.map_err(|_| gone())?;
        let HooksDone = serde_json::from_str(&line).map_err(|_| gone())?;
        Ok(())
    }
}

/// Lets nothing that this process prints reach the container's streams.
fn redirect_own_streams(dir: &ContainerDir) -> Result<(), Error> {
    let path = dir.vm().log();
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
    let log = log.map_err(Error::host("open", &path))?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
    let null = null.map_err(Error::host("open", "/dev/null"))?;
    let moved = rustix::stdio::dup2_stdin(null.as_fd())
        .and_then(|()| rustix::stdio::dup2_stdout(log.as_fd()))
        .and_then(|()| rustix::stdio::dup2_stderr(log.as_fd()));
    moved.map_err(io::Error::from).map_err(Error::host("redirect streams to", &path))?;
    let filter = tracing_subscriber::EnvFilter::try_from_env("KATA_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    // Already set where the library's caller logs itself.
    drop(
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_ansi(false)
            .with_writer(io::stderr)
            .try_init(),
    );
    Ok(())
}

fn join_cgroup(
    launch: &Launch,
    bundle: &Bundle,
    own: ProcessId,
    dir: &ContainerDir,
    ledger: &mut Ledger,
) -> Result<Option<Cgroup>, Error> {
    let linux_section = bundle.spec.linux().as_ref();
    let Some(path) = linux_section.and_then(|linux| linux.cgroups_path().as_ref()) else {
        return Ok(None);
    };
    let told = |error: linux::cgroup::Error| Error::Told {
        text: Chain(&error).to_string(),
        kind: ErrorKind::InvalidArgument,
    };
    let driver = if launch.systemd_cgroup { Driver::Systemd } else { Driver::Cgroupfs };
    let cgroup = Cgroup::create(&path.to_string_lossy(), driver, own.pid, ledger).map_err(told)?;
    let limits = resources::host_limits(host_resources(bundle), &launch.config.sandbox);
    cgroup.apply(&limits).map_err(told)?;
    let directories = cgroup.directories().iter().map(|directory| directory.path.clone()).collect();
    dir.vm().write(&SandboxRecord::new(own, directories))?;
    Ok(Some(cgroup))
}

fn host_resources(bundle: &Bundle) -> Option<&LinuxResources> {
    bundle.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref())
}

/// Enters the namespaces of the sandbox's host processes; answers a path to the network's.
fn join_namespaces(bundle: &Bundle) -> Result<PathBuf, Error> {
    let network = bundle
        .spec
        .linux()
        .iter()
        .flat_map(|linux| linux.namespaces().iter().flatten())
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Network)
        .and_then(|namespace| namespace.path().clone())
        .filter(|path| !path.as_os_str().is_empty());
    let netns = match network {
        Some(path) => {
            linux::namespace::enter(&path)
                .map_err(Error::host("enter network namespace", &path))?;
            path
        }
        None => {
            linux::namespace::unshare_network()
                .map_err(Error::host("create", "a network namespace"))?;
            PathBuf::from(format!("/proc/{}/ns/net", std::process::id()))
        }
    };
    linux::namespace::unshare_mounts().map_err(Error::host("create", "a mount namespace"))?;
    Ok(netns)
}

fn machine_spec(launch: &Launch, bundle: &Bundle, share: PathBuf) -> Result<VmSpec, Error> {
    let config: &Config = &launch.config;
    let host_cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let host_cpus = u32::try_from(host_cpus).unwrap_or(1);
    let size = resources::size(host_resources(bundle), &config.sandbox, host_cpus);
    let acceleration = match config.hypervisor.qemu.acceleration {
        AccelerationConfig::Kvm => Acceleration::Kvm,
        AccelerationConfig::Tcg => Acceleration::Tcg,
        AccelerationConfig::Auto => hypervisor::detect().acceleration,
    };
    let (kernel, initrd) = match (&config.image.kernel, &config.image.initrd) {
        (Some(kernel), Some(initrd)) => (kernel.clone(), initrd.clone()),
        (kernel, initrd) => {
            let image = config.image.open()?;
            (
                kernel.clone().unwrap_or_else(|| image.kernel()),
                initrd.clone().unwrap_or_else(|| image.initrd()),
            )
        }
    };
    for path in [&kernel, &initrd] {
        fs::metadata(path).map_err(Error::host("open guest image part", path))?;
    }
    Ok(VmSpec {
        acceleration,
        vcpus: size.vcpus,
        max_vcpus: host_cpus.max(size.vcpus),
        memory_mib: size.memory_mib,
        max_memory_mib: size.memory_mib,
        kernel,
        initrd,
        cmdline: config.image.cmdline.clone(),
        share: Some(SharedDirectory { tag: protocol::paths::SHARE_TAG.to_owned(), path: share }),
        program: config.hypervisor.qemu.path.clone(),
        device_program: launch.device_program.clone(),
    })
}

/// Waits for the agent's sign and connects to it.
async fn agent_ready(
    vm: &dyn Vm,
    ready: &mut mpsc::Receiver<GuestStream>,
    config: &Config,
    machine: &std::path::Path,
) -> Result<Agent, Error> {
    let seconds = config.sandbox.boot_timeout;
    let console = machine.join("console.log");
    let mut ended = vm.ended();
    tokio::select! {
        stream = ready.recv() => drop(stream),
        exit = ended.wait_for(Option::is_some) => {
            let exit = exit.ok().and_then(|exit| exit.clone());
            let how = exit.map_or_else(String::new, |exit| exit.to_string());
            let text = format!(
                "the virtual machine ended {how} before its agent answered; its console is in {}",
                console.display()
            );
            return Err(Error::Told { text, kind: ErrorKind::Unavailable });
        }
        () = tokio::time::sleep(Duration::from_secs(seconds)) => {
            return Err(Error::GuestTimeout { what: "boot", seconds, console });
        }
    }
    let stream = vm.connect(Port(protocol::CONTROL_PORT)).await?;
    Ok(Agent::new(stream, Duration::from_secs(config.sandbox.agent_timeout), console))
}

fn resync(bundle: &Bundle) -> Result<wire::ResyncRequest, Error> {
    let mut entropy = vec![0; ENTROPY_BYTES];
    rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty())
        .map_err(io::Error::from)
        .map_err(Error::host("read", "/dev/urandom"))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(wire::ResyncRequest {
        unix_ns: u64::try_from(now.as_nanos()).unwrap_or_default(),
        entropy,
        hostname: bundle.spec.hostname().clone().unwrap_or_default(),
        ..Default::default()
    })
}

async fn attach_network(
    vm: &mut dyn Vm,
    netns: &std::path::Path,
    ledger: &mut Ledger,
    agent: &Agent,
) -> Result<Network, Error> {
    let network = network::scan()?;
    for skipped in &network.skipped {
        info!(link = skipped.name, reason = skipped.reason, "link stays on the host");
    }
    for link in &network.links {
        let device = network::attach(link, netns, ledger)?;
        vm.attach(device).await?;
    }
    if !network.links.is_empty() {
        agent.configure_network(network.request()).await?;
    }
    Ok(network)
}

fn share_mount() -> wire::MountRequest {
    wire::MountRequest {
        source: protocol::paths::SHARE_TAG.to_owned(),
        target: protocol::paths::SHARE.to_owned(),
        fstype: "virtiofs".to_owned(),
        ..Default::default()
    }
}

/// The spec has these run in the container's namespaces, with paths of the runtime's. The sandbox process is the one
/// that is in both, as far as the host goes.
fn run_create_container_hooks(bundle: &Bundle, id: &ContainerId) -> Result<(), Error> {
    let hooks = bundle.spec.hooks().as_ref().and_then(|hooks| hooks.create_container().as_ref());
    let Some(hooks) = hooks else { return Ok(()) };
    let state = crate::operations::hook_state(bundle, id, Status::Creating, std::process::id());
    hooks::run("createContainer", hooks, &state)
}

fn streams(stdio: &Stdio) -> wire::Streams {
    let [stdin, stdout, stderr] = stdio.wanted();
    wire::Streams { stdin, stdout, stderr, ..Default::default() }
}
