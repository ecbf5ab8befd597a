//! QEMU: KVM where the host has it, else QEMU's own translator.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{self, Stdio};
use std::time::Duration;

use async_trait::async_trait;
use linux::clock::Reading;
use linux::ledger::{Ledger, Undo};
use linux::process::{Child, Command};
use rustix::process::Signal;

use crate::back_ends::{self, BackEnds, Listeners, Sockets};
use crate::error::host;
use crate::log::escaped;
use crate::processes::{Processes, logs};
use crate::{Acceleration, Capabilities, Error, Hypervisor, Vm, VmSpec, memory};

mod arguments;
mod qmp;
mod resize;
mod slots;
mod template;
mod vm;

use arguments::{Inherited, Loader, Start};
use template::Template;
use vm::{QemuVm, Shape, Started};

/// The driver's name.
pub const NAME: &str = "qemu";

/// Where devices can be added to a running machine: PCIe root ports that are empty at first.
const SLOTS: usize = 8;

/// Where to look for it: Debian's name, then Fedora's.
const PROGRAMS: [&str; 2] = ["qemu-system-x86_64", "/usr/libexec/qemu-kvm"];

/// From QEMU's start to its first answer. It reads the kernel before it answers.
const START: Duration = Duration::from_mins(1);

/// The driver of QEMU, 7.2 and later.
#[derive(Debug)]
pub struct Qemu;

#[async_trait(?Send)]
impl Hypervisor for Qemu {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            disk_hotplug: true,
            net_hotplug: true,
            resize: true,
            virtio_fs: true,
            snapshot: true,
        }
    }

    fn fingerprint(&self, spec: &VmSpec) -> Result<String, Error> {
        template::fingerprint(spec, &located(&program(spec.program.as_deref())))
    }

    async fn launch(
        &self,
        spec: &VmSpec,
        dir: &Path,
        ledger: &mut Ledger,
    ) -> Result<Box<dyn Vm>, Error> {
        let fingerprint = self.fingerprint(spec)?;
        let spec = &with_frequency(spec).await;
        let parts = Parts { spec, dir, fingerprint };
        let memory = memory::create(spec.memory_mib).map_err(host("make memory for", dir))?;
        let (monitor, vm) = start(&parts, memory, Start::Boot, ledger)?;
        Ok(Box::new(QemuVm::connect(monitor, vm, START).await?))
    }

    async fn restore(
        &self,
        template: &Path,
        spec: &VmSpec,
        dir: &Path,
        ledger: &mut Ledger,
    ) -> Result<Box<dyn Vm>, Error> {
        let parts = Parts { spec, dir, fingerprint: self.fingerprint(spec)? };
        let template = Template::open(template, &parts.fingerprint)?;
        let loader = Loader::of(&spec.kernel).map_err(host("read", &spec.kernel))?;
        let memory = memory::create(spec.memory_mib).map_err(host("make memory for", dir))?;
        let clone = |file: &File| file.try_clone().map_err(host("make memory for", dir));
        let (from, to) = (clone(&template.memory)?, clone(&memory)?);
        // While QEMU starts, which takes about as long.
        let filling = tokio::task::spawn_blocking(move || memory::fill(&from, &to));
        let (monitor, vm) = start(&parts, memory, Start::Template(loader), ledger)?;
        let mut vm = QemuVm::connect(monitor, vm, START).await?;
        let filled = filling.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        filled.map_err(host("fill the memory for", dir))?;
        vm.load(&template, spec).await?;
        Ok(Box::new(vm))
    }
}

/// Tells an emulated guest how fast its time stamp counter runs, which is the host's. By itself its kernel compares the
/// counter with an emulated timer; on a busy host it is wrong by any factor then, and so is its clock for good.
async fn with_frequency(spec: &VmSpec) -> VmSpec {
    /// Long against the microsecond that a reading may be off.
    const MEASURED: Duration = Duration::from_millis(20);
    let mut spec = spec.clone();
    if spec.acceleration != Acceleration::Tcg {
        return spec;
    }
    let from = Reading::now();
    tokio::time::sleep(MEASURED).await;
    let khz = from.zip(Reading::now()).and_then(|(from, to)| from.khz_until(&to));
    if let Some(khz) = khz {
        // The user's own words come last, and win.
        spec.cmdline.insert_str(0, &format!("tsc_early_khz={khz} "));
    }
    spec
}

/// What a machine is made of.
struct Parts<'a> {
    spec: &'a VmSpec,
    dir: &'a Path,
    fingerprint: String,
}

/// Starts QEMU and the device process; neither waits for the other, as QEMU's connections are held in the sockets'
/// backlogs. Answers our end of QEMU's monitor.
fn start(
    parts: &Parts<'_>,
    memory: File,
    from: Start,
    ledger: &mut Ledger,
) -> Result<(UnixStream, Started), Error> {
    let Parts { spec, dir, ref fingerprint } = *parts;
    let sockets = Sockets::of(dir);
    let listeners = Listeners::bind(&sockets, spec.share.is_some())?;
    let (logs, [hypervisor_log, devices_log, console]) =
        logs(dir).map_err(host("write logs in", dir))?;
    let (monitor, their_monitor) = UnixStream::pair().map_err(host("make a socket in", dir))?;
    let their_memory = memory.try_clone().map_err(host("make memory for", dir))?;

    let program = program(spec.program.as_deref());
    let mut command = Command::new(&program);
    let fds = Inherited {
        qmp: command.pass(their_monitor.into()),
        console: command.pass(console),
        memory: command.pass(their_memory.into()),
    };
    command.args(arguments::arguments(spec, &sockets, fds, from));
    command.stdio(Stdio::null(), Stdio::null(), hypervisor_log.into()).die_with_parent();
    let qemu = command.spawn().map_err(|source| missing(&program, source))?;
    let recorded = record(ledger, &qemu);
    let back_ends = match recorded.map_err(host("keep track of", &program)).and_then(|()| {
        let back_ends = back_ends::start(spec, listeners, devices_log)?;
        let recorded = record(ledger, &back_ends.child);
        recorded.map_err(host("keep track of", &spec.device_program.0))?;
        Ok(back_ends)
    }) {
        Ok(back_ends) => back_ends,
        Err(error) => return Err(abandon(qemu, error)),
    };
    let BackEnds { child: devices, lifeline, host_streams } = back_ends;
    let processes =
        Processes::watch(qemu, devices, lifeline, logs).map_err(host("watch", program))?;
    let started = Started {
        processes,
        host_streams,
        streams: sockets.streams,
        memory,
        fingerprint: fingerprint.clone(),
        back_ends: arguments::back_end_devices(spec).into_iter().map(|(id, _)| id).collect(),
        shape: Shape::of(spec),
    };
    Ok((monitor, started))
}

/// The file of a program that is looked up in `PATH`.
fn located(program: &Path) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::env::split_paths(&path).map(|dir| dir.join(program)).find(|path| path.exists());
    found.unwrap_or_else(|| program.to_owned())
}

/// What the program says its version is: `QEMU emulator version 7.2.22 (…)`.
///
/// # Errors
///
/// [`Error::Program`] where it cannot be started.
pub fn version(path: Option<&Path>) -> Result<String, Error> {
    let program = program(path);
    let said = process::Command::new(&program).arg("--version").stdin(Stdio::null()).output();
    let said = said.map_err(|source| missing(&program, source))?;
    let said = String::from_utf8_lossy(&said.stdout);
    Ok(escaped(said.lines().next().unwrap_or_default()))
}

fn missing(program: &Path, source: io::Error) -> Error {
    Error::Program { program: program.to_owned(), package: "qemu-system-x86", source }
}

/// The program that was configured, or the first of ours that exists; where none does, the first, for the error to name.
fn program(configured: Option<&Path>) -> PathBuf {
    let ours = || PROGRAMS.map(Path::new).into_iter().find(|program| located(program).exists());
    configured.or_else(ours).unwrap_or(Path::new(PROGRAMS[0])).to_owned()
}

fn record(ledger: &mut Ledger, child: &Child) -> io::Result<()> {
    ledger.record(Undo::Kill(child.id()?))
}

/// Ends a child that is of no use after `error`.
fn abandon(mut child: Child, error: Error) -> Error {
    // What else could be done about a failure here, the ledger and the parent's death signal do.
    drop(child.signal(Signal::KILL).and_then(|()| child.wait()));
    error
}
