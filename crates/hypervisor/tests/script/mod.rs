//! What every driver is put through.

use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use hypervisor::{Device, Error, Hypervisor, Port, SharedDirectory, Vm, VmExit, VmProcess, VmSpec};
use linux::ledger::Ledger;
use linux::process::ProcessId;
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::time::timeout;

use crate::Outcome;

/// For a guest to boot, on a slow and busy host.
const BOOT: Duration = Duration::from_mins(3);

/// For a machine to end after its end was caused.
const END: Duration = Duration::from_secs(30);

/// Ends the script with a sentence where a fact is not as it should be.
macro_rules! hold {
    ($fact:expr, $($sentence:tt)+) => {
        if !$fact {
            return Err(format!($($sentence)+).into());
        }
    };
}

/// A directory of a machine, with its ledger.
struct Place {
    directory: TempDir,
    ledger: Ledger,
    spec: VmSpec,
}

impl Place {
    fn new(spec: &VmSpec) -> std::io::Result<Self> {
        let directory = tempfile::tempdir()?;
        let share = directory.path().join("share");
        fs::create_dir(&share)?;
        let ledger = Ledger::open(&directory.path().join("ledger"))?;
        let share = Some(SharedDirectory { tag: "kata".into(), path: share });
        Ok(Self { directory, ledger, spec: VmSpec { share, ..spec.clone() } })
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    async fn launch(&mut self, driver: &dyn Hypervisor) -> Result<Box<dyn Vm>, Error> {
        driver.launch(&self.spec, self.directory.path(), &mut self.ledger).await
    }
}

/// A machine from its launch to its end, with everything that its driver claims.
pub(crate) async fn whole_life(driver: &dyn Hypervisor, spec: &VmSpec) -> Outcome {
    let mut place = Place::new(spec)?;
    let mut vm = place.launch(driver).await?;
    let processes = processes(&*vm);
    hold!(processes.iter().all(|process| process.is_alive()), "its processes are not alive");
    let ledger = fs::read_to_string(place.path().join("ledger"))?;
    for process in processes.iter().filter(|process| process.pid != std::process::id()) {
        hold!(ledger.contains(&format!("\"pid\":{}", process.pid)), "the ledger lacks a process");
    }

    let mut ready = vm.listen(Port(protocol::READY_PORT)).await?;
    vm.boot().await?;
    hold!(timeout(BOOT, ready.recv()).await?.is_some(), "the guest opened no stream to its host");
    vm.connect(Port(protocol::CONTROL_PORT)).await?;
    let refused = vm.connect(Port(9)).await;
    hold!(matches!(refused, Err(Error::Connect { .. })), "a port without a listener took a stream");
    hold!(vm.ended().borrow().is_none(), "it ended while it ran");

    vm.pause().await?;
    vm.resume().await?;
    vm.connect(Port(protocol::CONTROL_PORT)).await?;

    let capabilities = driver.capabilities();
    let disk = place.path().join("disk");
    File::create(&disk)?.set_len(1 << 20)?;
    plug(&mut *vm, capabilities.disk_hotplug, "data", || Ok(disk_device(&disk))).await?;
    plug(&mut *vm, capabilities.net_hotplug, "eth0", network_device).await?;
    resize(&mut *vm, capabilities.resize, spec).await?;
    vm.connect(Port(protocol::CONTROL_PORT)).await?;

    let ended = vm.ended();
    vm.kill().await?;
    hold!(ended.borrow().is_some(), "a killed machine has not ended");
    for process in processes.iter().filter(|process| process.pid != std::process::id()) {
        hold!(!process.is_alive(), "a process outlived its machine");
    }
    Ok(())
}

/// Adds a device, twice under one name, and takes it away, twice.
async fn plug(
    vm: &mut dyn Vm,
    claimed: bool,
    id: &str,
    device: impl Fn() -> std::io::Result<Device>,
) -> Outcome {
    let attached = vm.attach(device()?).await;
    if !claimed {
        hold!(matches!(attached, Err(Error::Unsupported { .. })), "it claims not to take {id}");
        return Ok(());
    }
    attached?;
    let again = vm.attach(device()?).await;
    hold!(matches!(again, Err(Error::Refused { .. })), "{id} was taken twice");
    vm.detach(id).await?;
    let again = vm.detach(id).await;
    hold!(matches!(again, Err(Error::Refused { .. })), "{id} went twice");
    vm.attach(device()?).await?;
    Ok(())
}

async fn resize(vm: &mut dyn Vm, claimed: bool, spec: &VmSpec) -> Outcome {
    let (vcpus, memory) = (spec.max_vcpus, spec.max_memory_mib);
    let grown = vm.resize(vcpus, memory).await;
    if !claimed {
        hold!(matches!(grown, Err(Error::Unsupported { .. })), "it claims not to resize");
        return Ok(());
    }
    hold!(grown? == (vcpus, memory), "it did not grow to its full size");
    let more = vm.resize(vcpus + 1, memory + 128).await?;
    hold!(more == (vcpus, memory), "it grew beyond its size to {more:?}");
    let (vcpus, memory) = vm.resize(spec.vcpus, spec.memory_mib).await?;
    hold!(vcpus == spec.vcpus, "it kept {vcpus} vCPUs");
    // How much a guest gives back is the guest's to say.
    hold!(memory <= spec.max_memory_mib, "it grew as it shrank");
    Ok(())
}

/// A machine that is saved, and two that are made of it and live at the same time.
pub(crate) async fn template(driver: &dyn Hypervisor, spec: &VmSpec) -> Outcome {
    let mut place = Place::new(spec)?;
    let mut vm = place.launch(driver).await?;
    let mut ready = vm.listen(Port(protocol::READY_PORT)).await?;
    vm.boot().await?;
    hold!(timeout(BOOT, ready.recv()).await?.is_some(), "the guest opened no stream to its host");
    let template = tempfile::tempdir()?;
    let (ended, processes) = (vm.ended(), processes(&*vm));
    let saved = vm.save(template.path()).await;
    if !driver.capabilities().snapshot {
        hold!(matches!(saved, Err(Error::Unsupported { .. })), "it claims not to save");
        return Ok(());
    }
    saved?;
    hold!(ended.borrow().is_some(), "a saved machine has not ended");
    hold!(processes.iter().all(|process| !process.is_alive()), "a process outlived its machine");

    let mut living = Vec::new();
    for _ in 0..2 {
        let Place { directory, mut ledger, spec } = Place::new(spec)?;
        let restored = driver.restore(template.path(), &spec, directory.path(), &mut ledger);
        let mut vm = restored.await?;
        let mut ready = vm.listen(Port(protocol::READY_PORT)).await?;
        vm.boot().await?;
        hold!(timeout(BOOT, ready.recv()).await?.is_some(), "a restored guest says nothing");
        vm.connect(Port(protocol::CONTROL_PORT)).await?;
        plug(&mut *vm, driver.capabilities().net_hotplug, "eth0", network_device).await?;
        living.push((vm, directory));
    }
    for (vm, _directory) in living {
        vm.kill().await?;
    }

    let larger = VmSpec { max_memory_mib: spec.max_memory_mib + 128, ..spec.clone() };
    let Place { directory, mut ledger, spec } = Place::new(&larger)?;
    let refused = driver.restore(template.path(), &spec, directory.path(), &mut ledger).await;
    hold!(matches!(refused, Err(Error::Refused { .. })), "it restored another machine's template");
    Ok(())
}

/// A hypervisor that somebody kills takes the device process with it.
pub(crate) async fn killed_from_outside(driver: &dyn Hypervisor, spec: &VmSpec) -> Outcome {
    let mut place = Place::new(spec)?;
    let mut vm = place.launch(driver).await?;
    vm.boot().await?;
    let processes = processes(&*vm);
    processes[0].signal(Signal::KILL)?;
    let exit = end(&*vm).await?;
    hold!(exit.process == VmProcess::Hypervisor, "the wrong process is blamed: {exit}");
    hold!(exit.status == Some(128 + 9), "its status is {exit}");
    hold!(processes.iter().all(|process| !process.is_alive()), "a process outlived its machine");
    let late = vm.pause().await;
    hold!(matches!(late, Err(Error::Ended { .. })), "a dead machine was paused");
    Ok(())
}

/// A guest whose kernel panics ends its machine, and the kernel's words come out.
pub(crate) async fn panic(driver: &dyn Hypervisor, spec: &VmSpec) -> Outcome {
    let cmdline = "rdinit=/no/such/init root=/dev/none".to_owned();
    let mut place = Place::new(&VmSpec { cmdline, ..spec.clone() })?;
    let mut vm = place.launch(driver).await?;
    vm.boot().await?;
    let exit = timeout(BOOT, end(&*vm)).await??;
    hold!(exit.words.contains("Kernel panic"), "a panic ended it without words: {exit}");
    Ok(())
}

/// A program that is not there is named, and nothing runs.
pub(crate) async fn missing_program(driver: &dyn Hypervisor, spec: &VmSpec) -> Outcome {
    let program = Some(PathBuf::from("/no/such/hypervisor"));
    let mut place = Place::new(&VmSpec { program, ..spec.clone() })?;
    let Err(error) = place.launch(driver).await else { return Err("it runs".into()) };
    hold!(error.to_string().contains("/no/such/hypervisor"), "the program is not named: {error}");
    hold!(fs::read_to_string(place.path().join("ledger"))?.is_empty(), "something was started");
    Ok(())
}

fn processes(vm: &dyn Vm) -> Vec<ProcessId> {
    let processes = vm.processes();
    let pids = std::iter::once(processes.hypervisor).chain(processes.devices);
    pids.filter_map(ProcessId::of).collect()
}

async fn end(vm: &dyn Vm) -> Result<VmExit, Box<dyn std::error::Error>> {
    let mut ended = vm.ended();
    let exit = timeout(END.max(BOOT), ended.wait_for(Option::is_some)).await??;
    exit.clone().ok_or_else(|| "it ended without a word".into())
}

fn disk_device(path: &Path) -> Device {
    Device::Disk { serial: "data".into(), path: path.to_owned(), read_only: false }
}

/// A tap, in the network namespace of the test; it goes when the machine closes it.
fn network_device() -> std::io::Result<Device> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = format!("kc{}-{count}", std::process::id());
    let tap = match linux::tap::create(&name, false) {
        Ok(tap) => OwnedFd::from(tap),
        // Enough for a driver that only counts.
        Err(_) => OpenOptions::new().read(true).open("/dev/null")?.into(),
    };
    Ok(Device::Network { id: "eth0".into(), mac: [2, 0, 0, 0, 0, 1], mtu: 1400, tap: vec![tap] })
}
