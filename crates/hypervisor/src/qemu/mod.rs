//! QEMU: KVM where the host has it, else QEMU's own translator.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{self, Stdio};
use std::time::Duration;

use async_trait::async_trait;
use linux::ledger::{Ledger, Undo};
use linux::process::{Child, Command};
use rustix::process::Signal;

use crate::back_ends::{self, BackEnds, Listeners, Sockets};
use crate::error::host;
use crate::log::escaped;
use crate::processes::{Processes, logs};
use crate::{Capabilities, Error, Hypervisor, Vm, VmSpec};

mod arguments;
mod qmp;
mod resize;
mod slots;
mod vm;

use arguments::Inherited;
use vm::QemuVm;

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
            snapshot: false,
        }
    }

    async fn launch(
        &self,
        spec: &VmSpec,
        dir: &Path,
        ledger: &mut Ledger,
    ) -> Result<Box<dyn Vm>, Error> {
        let sockets = Sockets::of(dir);
        let listeners = Listeners::bind(&sockets, spec.share.is_some())?;
        let (logs, [hypervisor_log, devices_log, console]) =
            logs(dir).map_err(host("write logs in", dir))?;
        let (monitor, their_monitor) = UnixStream::pair().map_err(host("make a socket in", dir))?;

        let program = program(spec.program.as_deref());
        let mut command = Command::new(&program);
        let fds =
            Inherited { qmp: command.pass(their_monitor.into()), console: command.pass(console) };
        command.args(arguments::arguments(spec, &sockets, fds));
        command.stdio(Stdio::null(), Stdio::null(), hypervisor_log.into()).die_with_parent();
        // Neither waits for the other: QEMU's connections are held in the sockets' backlogs.
        let qemu = command.spawn().map_err(|source| missing(&program, source))?;
        let BackEnds { child: devices, lifeline, host_streams } =
            match back_ends::start(spec, listeners, devices_log) {
                Ok(back_ends) => back_ends,
                Err(error) => return Err(abandon(qemu, error)),
            };
        let recorded = record(ledger, &[&qemu, &devices]);
        let processes = Processes::watch(qemu, devices, lifeline, logs);
        let processes = recorded.and(processes).map_err(host("watch", program))?;
        let vm = QemuVm::connect(monitor, processes, host_streams, spec, sockets.streams, START);
        Ok(Box::new(vm.await?))
    }
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
    let exists = |program: &&str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|dir| fs::metadata(dir.join(program)).is_ok())
    };
    let ours = || PROGRAMS.iter().find(|program| exists(program)).unwrap_or(&PROGRAMS[0]).into();
    configured.map_or_else(ours, PathBuf::from)
}

fn record(ledger: &mut Ledger, children: &[&Child]) -> io::Result<()> {
    for child in children {
        ledger.record(Undo::Kill(child.id()?))?;
    }
    Ok(())
}

/// Ends a child that is of no use after `error`.
fn abandon(mut child: Child, error: Error) -> Error {
    // What else could be done about a failure here, the ledger and the parent's death signal do.
    drop(child.signal(Signal::KILL).and_then(|()| child.wait()));
    error
}
