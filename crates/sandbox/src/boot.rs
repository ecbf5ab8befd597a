//! From a prepared sandbox process to a machine that takes containers: it boots, the guest is made its own.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hypervisor::{Acceleration, GuestStream, Hypervisor, Port, SharedDirectory, Vm, VmSpec};
use linux::ledger::Ledger;
use protocol::agent as wire;
use protocol::oci::LinuxResources;
use tokio::sync::mpsc;
use tracing::info;

use crate::agent::Agent;
use crate::config::{AccelerationConfig, Config};
use crate::error::{Error, ErrorKind};
use crate::launch::Launch;
use crate::process::Prepared;
use crate::resize;
use crate::sockets::Sockets;
use crate::template::{self, Origin};

/// Fresh randomness for a guest.
const ENTROPY_BYTES: usize = 64;

/// A machine whose agent answers, and whose guest is its own.
pub(crate) struct Booted {
    pub(crate) launch: Launch,
    pub(crate) ledger: Ledger,
    pub(crate) vm: Box<dyn Vm>,
    pub(crate) agent: Agent,
    /// What the guest opens to the host's loopback.
    pub(crate) loopback: mpsc::Receiver<GuestStream>,
    pub(crate) sockets: Sockets,
    pub(crate) began: Instant,
    /// What took how long until then, in milliseconds since the sandbox process began.
    pub(crate) phases: Vec<(String, u64)>,
}

/// A machine whose agent answers.
pub(crate) struct Machine {
    pub(crate) vm: Box<dyn Vm>,
    pub(crate) agent: Agent,
    pub(crate) origin: Origin,
    loopback: mpsc::Receiver<GuestStream>,
    sockets: Sockets,
    hello: wire::HelloResponse,
    /// How long its vCPUs took to run, and its agent to answer.
    phases: [Duration; 2],
}

impl Machine {
    /// Starts one of a template, or boots one; its guest is its own, and has mounted the share.
    pub(crate) async fn start(
        driver: &dyn Hypervisor,
        spec: &VmSpec,
        config: &Config,
        dir: &Path,
        ledger: &mut Ledger,
        hostname: &str,
    ) -> Result<Self, Error> {
        let began = Instant::now();
        let (mut vm, origin) = template::machine(driver, spec, config, dir, ledger).await?;
        let mut ready = vm.listen(Port(protocol::READY_PORT)).await?;
        let loopback = vm.listen(Port(protocol::LOOPBACK_PORT)).await?;
        let sockets = Sockets::default();
        sockets.serve(vm.listen(Port(protocol::SOCKET_PORT)).await?);
        vm.boot().await?;
        let launched = began.elapsed();
        let connected = connect(vm.as_ref(), &mut ready, config, dir).await;
        if connected.is_err() && origin == Origin::Template {
            // Whatever is wrong with it, the next start is not to meet it again.
            template::forget(driver, spec, config);
        }
        let agent = connected?;
        let phases = [launched, began.elapsed()];
        // All at once: none needs another, and each alone would wait for the guest's answer.
        let (hello, (), ()) = tokio::try_join!(
            agent.hello(),
            agent.resync(resync(hostname)?),
            agent.mount(share_mount())
        )?;
        Ok(Self { vm, agent, origin, loopback, sockets, hello, phases })
    }
}

/// Boots the machine, unless there is one, and makes the guest one of its own.
pub(crate) async fn boot(prepared: Prepared, machine: Option<Machine>) -> Result<Booted, Error> {
    let Prepared { launch, mut ledger, began } = prepared;
    let before = began.elapsed();
    let machine = match machine {
        Some(machine) => {
            machine.agent.resync(resync(&launch.hostname)?).await?;
            machine
        }
        None => Box::pin(start(&launch, &mut ledger)).await?,
    };
    let Machine { vm, agent, origin, loopback, sockets, hello, phases } = machine;
    let [launched, connected] = phases;
    let mut phases = vec![("prepared", before), ("guest", began.elapsed())];
    if origin != Origin::Pool {
        let of_machine = [
            ("launched", before + launched),
            ("agent", before + connected),
            ("guest_kernel", Duration::from_millis(hello.kernel_ms)),
            ("guest_agent", Duration::from_millis(hello.ready_ms)),
        ];
        phases.splice(1..1, of_machine);
    }
    let phases = phases
        .into_iter()
        .map(|(name, time)| (name.to_owned(), u64::try_from(time.as_millis()).unwrap_or(u64::MAX)));
    let phases: Vec<_> = phases.collect();
    let kernel = crate::error::from_guest(&hello.kernel_release);
    info!(?origin, kernel, ?phases, "the machine is ready");
    Ok(Booted { launch, ledger, vm, agent, loopback, sockets, began, phases })
}

async fn start(launch: &Launch, ledger: &mut Ledger) -> Result<Machine, Error> {
    let (share, machine) = (launch.vm.share(), launch.vm.machine());
    for path in [&share, &machine] {
        fs::create_dir_all(path).map_err(Error::host("create", path))?;
    }
    linux::mount::share(&share).map_err(Error::host("share", &share))?;
    let config = &launch.config;
    share_modules(config, &share)?;
    let device_program = launch.device_program.clone();
    let spec = machine_spec(config, launch.resources.as_ref(), share, device_program)?;
    let driver = hypervisor::driver(&config.hypervisor.driver)?;
    Machine::start(driver.as_ref(), &spec, config, &machine, ledger, &launch.hostname).await
}

/// Gives the guest's kernel its modules, where kernel and modules are an image's.
pub(crate) fn share_modules(config: &Config, share: &Path) -> Result<(), Error> {
    if config.image.kernel.is_some() {
        return Ok(());
    }
    let Some(library) = config.image.open()?.library() else { return Ok(()) };
    let name = Path::new(protocol::paths::MODULES).file_name().unwrap_or_default();
    Ok(storage::share_file(&library, Path::new(name), share)?)
}

/// The machine for a container with these limits.
pub(crate) fn machine_spec(
    config: &Config,
    limits: Option<&LinuxResources>,
    share: PathBuf,
    device_program: (PathBuf, Vec<String>),
) -> Result<VmSpec, Error> {
    let host = resize::host();
    let size = resize::size(&[limits.cloned()], &config.sandbox, host);
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
        max_vcpus: host.vcpus.max(size.vcpus),
        memory_mib: size.memory_mib,
        max_memory_mib: host.memory_mib.max(size.memory_mib),
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

fn resync(hostname: &str) -> Result<wire::ResyncRequest, Error> {
    let mut entropy = vec![0; ENTROPY_BYTES];
    rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty())
        .map_err(io::Error::from)
        .map_err(Error::host("read", "/dev/urandom"))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(wire::ResyncRequest {
        unix_ns: u64::try_from(now.as_nanos()).unwrap_or_default(),
        entropy,
        hostname: hostname.to_owned(),
        ..Default::default()
    })
}

fn share_mount() -> wire::MountRequest {
    wire::MountRequest {
        source: protocol::paths::SHARE_TAG.to_owned(),
        target: protocol::paths::SHARE.to_owned(),
        fstype: "virtiofs".to_owned(),
        ..Default::default()
    }
}
