//! From a prepared sandbox process to a created container: the machine boots, the guest is made its own, the container's
//! files and interfaces go in.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hypervisor::{Acceleration, GuestStream, Port, SharedDirectory, Vm, VmSpec};
use linux::ledger::Ledger;
use linux::process::ProcessId;
use network::Network;
use protocol::agent as wire;
use protocol::oci::LinuxResources;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::agent::Agent;
use crate::config::{AccelerationConfig, Config};
use crate::error::{Error, ErrorKind};
use crate::hooks;
use crate::launch::Caller;
use crate::process::Prepared;
use crate::resources::{self, Size};
use crate::running::Running;
use crate::server::{Sandbox, tty_size};
use crate::spec::Bundle;
use crate::state::ContainerId;
use crate::status::Status;
use crate::stdio::Stdio;
use crate::template::{self, Origin};

/// Fresh randomness for a guest.
const ENTROPY_BYTES: usize = 64;

/// A machine whose agent answers, with the container's files where the guest will find them.
struct Booted {
    vm: Box<dyn Vm>,
    agent: Agent,
    files: storage::Plan,
    origin: Origin,
    /// When the machine ran, the hooks were done and the agent answered, since the process began.
    phases: [Duration; 3],
}

/// Boots the machine and creates the container in it.
pub(crate) async fn create(mut prepared: Prepared, caller: &mut Caller) -> Result<Running, Error> {
    let Booted { mut vm, agent, files, origin, phases } = boot(&mut prepared, caller).await?;
    let Prepared { launch, bundle, dir, stdio, mut ledger, cgroup, netns, began } = prepared;
    let hello = agent.hello().await?;
    agent.resync(resync(&bundle)?).await?;
    let network = attach_network(vm.as_mut(), &netns, &mut ledger, &agent).await?;
    agent.mount(share_mount()).await?;
    run_create_container_hooks(&bundle, dir.id())?;
    let created = agent
        .create(wire::CreateContainerRequest {
            container_id: dir.id().as_str().to_owned(),
            spec_json: bundle
                .for_guest(&files.guest_root, &files.guest_mounts)
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
    let [launched, hooked, booted] = phases;
    let phases = [
        ("launched", launched),
        ("hooks", hooked),
        ("agent", booted),
        ("guest_kernel", Duration::from_millis(hello.kernel_ms)),
        ("guest_agent", Duration::from_millis(hello.ready_ms)),
        ("created", began.elapsed()),
    ];
    let phases: Vec<_> = phases
        .map(|(name, time)| (name.to_owned(), u64::try_from(time.as_millis()).unwrap_or(u64::MAX)))
        .into();
    let kernel = crate::error::from_guest(&hello.kernel_release);
    info!(?origin, kernel, ?phases, "container created");

    let control = UnixListener::bind(dir.vm().control())
        .map_err(Error::host("listen on", dir.vm().control()))?;
    let mut record = dir.read()?.ok_or_else(|| Error::NoSuchContainer { id: launch.id })?;
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
        config: launch.config.sandbox,
        execs: RefCell::new(HashMap::new()),
        execs_made: Cell::new(0),
    });
    sandbox.set_status(Status::Created)?;
    Ok(Running { sandbox, vm, vm_orders, control, relay, phases, tty })
}

/// Boots the machine; meanwhile the container's files are bound below the share, and the caller runs the hooks.
async fn boot(prepared: &mut Prepared, caller: &mut Caller) -> Result<Booted, Error> {
    let Prepared { launch, bundle, dir, ledger, began, .. } = prepared;
    let input = storage::Input {
        container_id: dir.id().as_str(),
        bundle: &bundle.path,
        spec: &bundle.spec,
    };
    let files = storage::plan(&input, storage::probe)?;
    for warning in &files.warnings {
        warn!("{warning}");
    }
    let (share, machine) = (dir.vm().share(), dir.vm().machine());
    for path in [&share, &machine] {
        fs::create_dir_all(path).map_err(Error::host("create", path))?;
    }
    linux::mount::share(&share).map_err(Error::host("share", &share))?;

    let config = &launch.config;
    let device_program = launch.device_program.clone();
    let spec = machine_spec(config, bundle.resources(), share.clone(), device_program)?;
    let driver = hypervisor::driver(&config.hypervisor.driver)?;
    storage::attach(&files, &share, ledger)?;
    let started = async {
        let (mut vm, origin) =
            template::machine(driver.as_ref(), &spec, config, &machine, ledger).await?;
        let ready = vm.listen(Port(protocol::READY_PORT)).await?;
        vm.boot().await?;
        Ok::<_, Error>((vm, ready, origin, began.elapsed()))
    };
    let hooked = async {
        caller.run_hooks().await?;
        Ok(began.elapsed())
    };
    let ((vm, mut ready, origin, launched), hooked) = tokio::try_join!(started, hooked)?;
    let agent = tokio::select! {
        agent = connect(vm.as_ref(), &mut ready, config, &machine) => agent?,
        () = caller.gone() => return Err(Caller::lost()),
    };
    let phases = [launched, hooked, began.elapsed()];
    Ok(Booted { vm, agent, files, origin, phases })
}

/// The machine for a container with these limits.
pub(crate) fn machine_spec(
    config: &Config,
    limits: Option<&LinuxResources>,
    share: PathBuf,
    device_program: (PathBuf, Vec<String>),
) -> Result<VmSpec, Error> {
    let host_cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let host_cpus = u32::try_from(host_cpus).unwrap_or(1);
    let memory = rustix::system::sysinfo();
    let memory_mib = memory.totalram.saturating_mul(memory.mem_unit.into()) >> 20;
    let memory_mib = u32::try_from(memory_mib).unwrap_or(u32::MAX);
    let host = Size { vcpus: host_cpus, memory_mib };
    let size = resources::size(limits, &config.sandbox, host);
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
        device_program,
    })
}

/// Waits for the agent's sign and connects to it.
async fn connect(
    vm: &dyn Vm,
    ready: &mut mpsc::Receiver<GuestStream>,
    config: &Config,
    machine: &Path,
) -> Result<Agent, Error> {
    agent_ready(vm, ready, config, machine).await?;
    let stream = vm.connect(Port(protocol::CONTROL_PORT)).await?;
    let timeout = Duration::from_secs(config.sandbox.agent_timeout);
    Ok(Agent::new(stream, timeout, console(machine)))
}

/// Waits for the agent's sign that it is listening.
pub(crate) async fn agent_ready(
    vm: &dyn Vm,
    ready: &mut mpsc::Receiver<GuestStream>,
    config: &Config,
    machine: &Path,
) -> Result<(), Error> {
    let seconds = config.sandbox.boot_timeout;
    let console = console(machine);
    let mut ended = vm.ended();
    tokio::select! {
        stream = ready.recv() => {
            drop(stream);
            Ok(())
        }
        exit = ended.wait_for(Option::is_some) => {
            let exit = exit.ok().and_then(|exit| exit.clone());
            let how = exit.map_or_else(String::new, |exit| exit.to_string());
            let text = format!(
                "the virtual machine ended {how} before its agent answered; its console is in {}",
                console.display()
            );
            Err(Error::Told { text, kind: ErrorKind::Unavailable })
        }
        () = tokio::time::sleep(Duration::from_secs(seconds)) => {
            Err(Error::GuestTimeout { what: "boot", seconds, console })
        }
    }
}

/// Where the driver keeps what the guest's kernel says.
fn console(machine: &Path) -> PathBuf {
    machine.join("console.log")
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
    netns: &Path,
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
