//! A running QEMU.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};

use super::NAME;
use super::arguments::{extra_memory, port};
use super::qmp::{Qmp, QmpError};
use super::slots::{Kind, Slots};
use crate::back_ends::HostStreams;
use crate::error::host;
use crate::log::escaped;
use crate::processes::Processes;
use crate::{Device, Error, GuestStream, Port, Vm, VmExit, VmProcesses, VmSpec, VsockAddress};

/// For a command that QEMU answers by itself. Seconds only on a host that is all but dead.
const COMMAND: Duration = Duration::from_secs(30);

/// For a device to be let go by the guest, whose kernel gives whoever pressed a slot's button five seconds to think
/// again.
const UNPLUG: Duration = Duration::from_mins(1);

/// Between two looks at an indicator that blinks.
const BLINK: Duration = Duration::from_millis(100);

/// For the exit status of a QEMU that has closed its monitor.
const EXIT: Duration = Duration::from_secs(10);

/// A machine that QEMU runs.
#[derive(Debug)]
pub(super) struct QemuVm {
    qmp: Qmp,
    processes: Processes,
    host_streams: HostStreams,
    streams: VsockAddress,
    slots: Slots,
    /// Numbers the descriptors that QEMU gets, so that each has a name of its own.
    last_fd: u64,
    /// The ids of the devices that the device process serves.
    pub(super) back_ends: Vec<&'static str>,
    pub(super) memory: File,
    pub(super) fingerprint: String,
    pub(super) shape: Shape,
}

/// A QEMU that has been started and not yet been heard of.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) processes: Processes,
    pub(super) host_streams: HostStreams,
    pub(super) streams: PathBuf,
    pub(super) memory: File,
    pub(super) fingerprint: String,
    pub(super) back_ends: Vec<&'static str>,
    pub(super) shape: Shape,
}

/// How large a machine is, and how large it can become.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) vcpus: u32,
    pub(super) max_vcpus: u32,
    pub(super) base_memory_mib: u32,
    pub(super) extra_memory_mib: u32,
    pub(super) max_extra_memory_mib: u32,
}

impl Shape {
    /// At the start.
    pub(super) fn of(spec: &VmSpec) -> Self {
        Self {
            vcpus: spec.vcpus,
            max_vcpus: spec.max_vcpus.max(spec.vcpus),
            base_memory_mib: spec.memory_mib,
            extra_memory_mib: 0,
            max_extra_memory_mib: extra_memory(spec),
        }
    }
}

impl QemuVm {
    /// Waits for QEMU's first answer.
    pub(super) async fn connect(
        monitor: UnixStream,
        started: Started,
        deadline: Duration,
    ) -> Result<Self, Error> {
        let Started { processes, host_streams, streams, memory, fingerprint, back_ends, shape } =
            started;
        let answer = timeout(deadline, Qmp::connect(monitor)).await;
        let qmp = judge(&processes, "start", deadline, answer).await?;
        let streams = VsockAddress::Hybrid(streams);
        let slots = Slots::default();
        let last_fd = 0;
        Ok(Self {
            qmp,
            processes,
            host_streams,
            streams,
            slots,
            last_fd,
            back_ends,
            memory,
            fingerprint,
            shape,
        })
    }

    /// Runs a command; `operation` is what it is for, in words that fit after "refused to".
    pub(super) async fn command(
        &mut self,
        operation: &'static str,
        command: &str,
        arguments: Value,
    ) -> Result<Value, Error> {
        let answer = timeout(COMMAND, self.qmp.execute(command, arguments)).await;
        judge(&self.processes, operation, COMMAND, answer).await
    }

    /// Waits for an event about which `wanted` says yes, given its name and its data.
    pub(super) async fn event(
        &mut self,
        operation: &'static str,
        deadline: Duration,
        wanted: impl Fn(&str, &Value) -> bool,
    ) -> Result<Value, Error> {
        let waiting = self.qmp.event(|event| wanted(&event.name, &event.data));
        let answer = timeout(deadline, waiting).await;
        Ok(judge(&self.processes, operation, deadline, answer).await?.data)
    }

    /// Forgets what has happened so far, so that [`QemuVm::event`] sees only what happens from now on.
    pub(super) fn forget_events(&mut self) {
        self.qmp.forget_events();
    }

    /// Asks the guest to let a device go, and waits until it has. One that it has let go by itself, by switching off the
    /// power of its slot, is gone already.
    pub(super) async fn unplug(
        &mut self,
        operation: &'static str,
        device: &str,
    ) -> Result<(), Error> {
        let deadline = Instant::now() + UNPLUG;
        loop {
            match self.command(operation, "device_del", json!({ "id": device })).await {
                // The slot of a device that was just added: its indicator blinks until the guest has powered it on,
                // and QEMU tells nobody when that is.
                Err(Error::Refused { message, .. })
                    if message.contains("guest is busy") && Instant::now() < deadline =>
                {
                    sleep(BLINK).await;
                }
                Err(Error::Refused { message, .. }) if message.ends_with("not found") => {
                    return Ok(());
                }
                outcome => break drop(outcome?),
            }
        }
        let gone = |name: &str, data: &Value| {
            name == "DEVICE_DELETED" && data.get("device").is_some_and(|id| id == device)
        };
        self.event(operation, UNPLUG, gone).await.map(drop)
    }

    async fn attach_disk(
        &mut self,
        slot: usize,
        serial: &str,
        path: &Path,
        read_only: bool,
    ) -> Result<(), Error> {
        const OPERATION: &str = "add a disk";
        let kind = fs::metadata(path).map_err(host("read", path))?.file_type();
        let driver = if kind.is_block_device() { "host_device" } else { "file" };
        let (node, device) = (format!("disk{slot}"), format!("device{slot}"));
        let node_options = json!({
            "node-name": node,
            "driver": "raw",
            "read-only": read_only,
            "discard": "unmap",
            "file": { "driver": driver, "filename": path, "read-only": read_only },
        });
        self.command(OPERATION, "blockdev-add", node_options).await?;
        let device_options = json!({
            "driver": "virtio-blk-pci",
            "id": device,
            "bus": port(slot),
            "drive": node,
            "serial": serial,
            "disable-legacy": "on",
        });
        let added = self.command(OPERATION, "device_add", device_options).await;
        if added.is_err() {
            // The first error is the one to tell.
            drop(self.command(OPERATION, "blockdev-del", json!({ "node-name": node })).await);
        }
        added.map(drop)
    }

    async fn attach_network(
        &mut self,
        slot: usize,
        mac: [u8; 6],
        mtu: u32,
        tap: Vec<OwnedFd>,
    ) -> Result<(), Error> {
        const OPERATION: &str = "add a network interface";
        let queues = tap.len();
        // The kernel moves the packets where it can; each queue needs a descriptor.
        let vhost: Vec<OwnedFd> = tap
            .iter()
            .map_while(|_| OpenOptions::new().read(true).write(true).open("/dev/vhost-net").ok())
            .map(OwnedFd::from)
            .collect();
        let netdev = format!("net{slot}");
        let mut options =
            json!({ "type": "tap", "id": netdev, "fds": self.give_all(OPERATION, tap).await? });
        if vhost.len() == queues {
            options["vhost"] = true.into();
            options["vhostfds"] = self.give_all(OPERATION, vhost).await?.into();
        }
        self.command(OPERATION, "netdev_add", options).await?;
        let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
        let mut options = json!({
            "driver": "virtio-net-pci",
            "id": format!("device{slot}"),
            "bus": port(slot),
            "netdev": netdev,
            "mac": mac,
            "romfile": "",
            "disable-legacy": "on",
        });
        if mtu != 0 {
            options["host_mtu"] = mtu.into();
        }
        if queues > 1 {
            options["mq"] = true.into();
            // One for each direction of each queue, one for changes of the configuration, one for control.
            options["vectors"] = (2 * queues + 2).into();
        }
        let added = self.command(OPERATION, "device_add", options).await;
        if added.is_err() {
            // The first error is the one to tell.
            drop(self.command(OPERATION, "netdev_del", json!({ "id": netdev })).await);
        }
        added.map(drop)
    }

    /// Gives QEMU descriptors and answers their names, as `netdev_add` takes them.
    async fn give_all(
        &mut self,
        operation: &'static str,
        fds: Vec<OwnedFd>,
    ) -> Result<String, Error> {
        let mut names = Vec::new();
        for fd in fds {
            self.last_fd += 1;
            let name = format!("fd{}", self.last_fd);
            self.give(operation, &name, fd.as_fd()).await?;
            names.push(name);
        }
        Ok(names.join(":"))
    }

    /// Gives QEMU a descriptor, for a later command to take by its name.
    pub(super) async fn give(
        &mut self,
        operation: &'static str,
        name: &str,
        fd: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        let answer = timeout(COMMAND, self.qmp.send_fd(name, fd)).await;
        judge(&self.processes, operation, COMMAND, answer).await
    }
}

/// Turns what came of a wait for QEMU into our words.
async fn judge<T, E>(
    processes: &Processes,
    operation: &'static str,
    deadline: Duration,
    answer: Result<Result<T, QmpError>, E>,
) -> Result<T, Error> {
    let driver = NAME;
    let seconds = deadline.as_secs();
    let timed_out = Error::Timeout { driver, operation, seconds };
    match answer {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(QmpError::Refused(message))) => Err(Error::Refused { driver, operation, message }),
        Ok(Err(QmpError::Broken(error))) => {
            let mut ended = processes.ended();
            let exit = timeout(EXIT, ended.wait_for(Option::is_some)).await;
            Err(match exit.ok().and_then(Result::ok).and_then(|exit| exit.clone()) {
                Some(exit) => Error::Ended { driver, exit },
                // It lives, but its monitor speaks no sense.
                None => Error::Refused { driver, operation, message: error.to_string() },
            })
        }
        Err(_) => Err(timed_out),
    }
}

#[async_trait(?Send)]
impl Vm for QemuVm {
    async fn boot(&mut self) -> Result<(), Error> {
        self.command("boot", "cont", json!({})).await.map(drop)
    }

    async fn pause(&mut self) -> Result<(), Error> {
        self.command("pause", "stop", json!({})).await.map(drop)
    }

    async fn resume(&mut self) -> Result<(), Error> {
        self.command("resume", "cont", json!({})).await.map(drop)
    }

    async fn attach(&mut self, device: Device) -> Result<(), Error> {
        match device {
            Device::Disk { serial, path, read_only } => {
                let slot = self.slots.free(&serial)?;
                self.attach_disk(slot, &serial, &path, read_only).await?;
                self.slots.put(slot, serial, Kind::Disk);
            }
            Device::Network { id, mac, mtu, tap } => {
                let slot = self.slots.free(&id)?;
                self.attach_network(slot, mac, mtu, tap).await?;
                self.slots.put(slot, id, Kind::Network);
            }
        }
        Ok(())
    }

    async fn detach(&mut self, id: &str) -> Result<(), Error> {
        const OPERATION: &str = "remove a device";
        let (slot, kind) = self.slots.find(id).ok_or_else(|| Error::Refused {
            driver: NAME,
            operation: OPERATION,
            message: format!("there is no device `{}`", escaped(id)),
        })?;
        self.unplug(OPERATION, &format!("device{slot}")).await?;
        let (command, arguments) = match kind {
            Kind::Disk => ("blockdev-del", json!({ "node-name": format!("disk{slot}") })),
            Kind::Network => ("netdev_del", json!({ "id": format!("net{slot}") })),
        };
        self.command(OPERATION, command, arguments).await?;
        self.slots.clear(slot);
        Ok(())
    }

    async fn resize(&mut self, vcpus: u32, memory_mib: u32) -> Result<(u32, u32), Error> {
        self.resize_vcpus(vcpus).await?;
        self.resize_memory(memory_mib).await?;
        Ok((self.shape.vcpus, self.shape.base_memory_mib + self.shape.extra_memory_mib))
    }

    async fn listen(&mut self, port: Port) -> Result<mpsc::Receiver<GuestStream>, Error> {
        Ok(self.host_streams.listen(port))
    }

    async fn connect(&self, port: Port) -> Result<GuestStream, Error> {
        let stream = self.streams.connect(port).await;
        Ok(Box::new(stream.map_err(|source| Error::Connect { port, source })?))
    }

    fn vsock(&self) -> VsockAddress {
        self.streams.clone()
    }

    fn processes(&self) -> VmProcesses {
        self.processes.ids()
    }

    fn ended(&self) -> watch::Receiver<Option<VmExit>> {
        self.processes.ended()
    }

    async fn save(mut self: Box<Self>, directory: &Path) -> Result<(), Error> {
        let saved = self.save_in(directory).await;
        let killed = self.kill().await;
        saved.and(killed)
    }

    async fn kill(mut self: Box<Self>) -> Result<(), Error> {
        self.processes.kill().await.map_err(host("kill", "qemu"))
    }
}
