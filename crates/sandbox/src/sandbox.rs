//! A running sandbox: a machine, and the containers in it.
//!
//! One thread owns everything here; tasks on it take turns, and no borrow is held across an await. A request that waits
//! (for a process, for the guest) keeps no other one waiting.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use hypervisor::{Device, Vm, VsockAddress};
use linux::cgroup::Cgroup;
use linux::ledger::Ledger;
use protocol::agent as wire;
use protocol::oci::LinuxResources;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{info, warn};

use crate::agent::Agent;
use crate::boot::Booted;
use crate::config::SandboxConfig;
use crate::container::Container;
use crate::control::{NewContainer, Response};
use crate::disks::Disks;
use crate::error::{Chain, Error};
use crate::interfaces::Interfaces;
use crate::loopback::Loopback;
use crate::operations::settle;
use crate::resize::{self, Size};
use crate::resources::joint_limits;
use crate::sockets::Sockets;
use crate::state::{ContainerDir, ContainerId, VmDir};
use crate::status::Status;
use crate::update;
use crate::watch::{Volume, Volumes};

/// How a container exits that was killed: 128 + SIGKILL.
pub(crate) const KILLED: u8 = 137;

/// SIGKILL, which must work on a guest that answers nothing.
pub(crate) const SIGKILL: u32 = 9;

/// How long a killed container may take to end before it is taken for ended.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// A request to whoever owns the machine.
pub(crate) enum VmRequest {
    /// Add a device.
    Attach(Device, oneshot::Sender<Result<(), Error>>),
    /// Take the device with this id away.
    Detach(String, oneshot::Sender<Result<(), Error>>),
    /// Give the machine this size; of what it is to lose it may keep what the guest uses.
    Resize(Size, oneshot::Sender<Result<(), Error>>),
    /// End the machine.
    Kill,
}

/// A sandbox with its containers.
pub(crate) struct Sandbox {
    pub(crate) agent: Agent,
    pub(crate) vsock: VsockAddress,
    pub(crate) config: SandboxConfig,
    sockets: Sockets,
    disks: Disks,
    volumes: Volumes,
    dir: VmDir,
    vm: mpsc::Sender<VmRequest>,
    /// What the machine was last given.
    size: Cell<Size>,
    pub(crate) ledger: RefCell<Ledger>,
    pub(crate) interfaces: Interfaces,
    containers: RefCell<HashMap<String, Rc<Container>>>,
    creating: Cell<usize>,
    /// Whether several containers are, or were when we last looked, in it.
    shared: Cell<bool>,
    changed: watch::Sender<()>,
    /// The machine's processes on the host, this one among them.
    pids: Vec<u32>,
    /// The cgroup that they are in.
    cgroups: RefCell<Vec<PathBuf>>,
    began: Instant,
    phases: RefCell<Vec<(String, u64)>>,
    orphan: RefCell<Option<ContainerDir>>,
}

impl Sandbox {
    /// The sandbox of a machine that has booted; the machine is the caller's, who does what comes by `vm_requests`.
    pub(crate) fn new(booted: Booted, vm_requests: mpsc::Sender<VmRequest>) -> (Self, Box<dyn Vm>) {
        let Booted { launch, ledger, vm, agent, sockets, loopback, began, phases } = booted;
        let processes = vm.processes();
        let mut pids = vec![std::process::id(), processes.hypervisor];
        pids.extend(processes.devices);
        // Until a container was created, the one it was made for is to be removed with it.
        let orphan = ContainerId::new(&launch.id).ok().map(|id| launch.vm.container(&id));
        let size = resize::size(&[launch.resources], &launch.config.sandbox, resize::host());
        let sandbox = Self {
            agent,
            vsock: vm.vsock(),
            config: launch.config.sandbox,
            sockets,
            disks: Disks::default(),
            volumes: Volumes::default(),
            dir: launch.vm,
            vm: vm_requests,
            size: Cell::new(size),
            ledger: RefCell::new(ledger),
            interfaces: Interfaces::new(launch.netns, Loopback::new(loopback, vm.vsock())),
            containers: RefCell::default(),
            creating: Cell::new(0),
            shared: Cell::new(false),
            changed: watch::Sender::default(),
            pids,
            cgroups: RefCell::new(launch.cgroups),
            began,
            phases: RefCell::new(phases),
            orphan: RefCell::new(orphan),
        };
        (sandbox, vm)
    }

    /// Whether no container is in it, nor is about to be.
    pub(crate) fn is_empty(&self) -> bool {
        self.containers.borrow().is_empty() && self.creating.get() == 0
    }

    /// Tells whenever [`Self::is_empty`] may have changed.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// The directory of the last container, where nobody is there to remove it.
    pub(crate) fn orphan(&self) -> Option<ContainerDir> {
        self.orphan.take()
    }

    /// Writes down that every container has ended: its machine has.
    pub(crate) fn all_killed(&self) {
        for container in self.containers.borrow().values() {
            container.ended(KILLED);
        }
    }

    /// A process of the guest watches files: it is to hear of the host's changes too.
    pub(crate) fn watch_volumes(&self) {
        self.volumes.watch(&self.agent);
    }

    /// What the machine was last given.
    pub(crate) fn size(&self) -> Size {
        self.size.get()
    }

    /// The machine was given this.
    pub(crate) fn set_size(&self, size: Size) {
        self.size.set(size);
    }

    /// The limits of all containers but one.
    pub(crate) fn limits_of_others(&self, id: &str) -> Vec<Option<LinuxResources>> {
        let containers = self.containers.borrow();
        containers.values().filter(|one| one.id() != id).map(|one| one.resources()).collect()
    }

    /// The container with this id.
    pub(crate) fn container(&self, id: &str) -> Result<Rc<Container>, Error> {
        let container = self.containers.borrow().get(id).cloned();
        container.ok_or_else(|| Error::NoSuchContainer { id: id.to_owned() })
    }

    /// Creates a container whose directory and record are there.
    pub(crate) async fn create(&self, id: &str, new: NewContainer) -> Result<Response, Error> {
        if self.containers.borrow().contains_key(id) {
            return Err(Error::IdTaken { id: id.to_owned() });
        }
        self.creating.set(self.creating.get() + 1);
        let created = self.create_counted(id, new).await;
        self.creating.set(self.creating.get() - 1);
        self.changed.send_replace(());
        created
    }

    async fn create_counted(&self, id: &str, new: NewContainer) -> Result<Response, Error> {
        let dir = self.dir.container(&ContainerId::new(id)?);
        let record = dir.read()?.ok_or_else(|| Error::NoSuchContainer { id: id.to_owned() })?;
        let gone = || Error::SandboxGone { id: id.to_owned() };
        let stand_in = record.process.ok_or_else(gone)?;
        let origin = new.origin.clone();
        let origin =
            origin.unwrap_or_else(|| PathBuf::from(format!("/proc/{}/ns/mnt", stand_in.pid)));
        let share = self.dir.share();
        storage::attach(&new.files, &share, &origin, &mut self.ledger.borrow_mut())?;
        let resources = resources_of(&new.spec);
        let volumes = Volume::of(&new.files, &share);
        self.make_room(id, resources.as_ref()).await?;
        let made = self.create_in_guest(id, new).await;
        if made.is_err() {
            // The first error is the one to tell.
            drop(storage::detach(id, &share));
            drop(self.unplug_disks(id).await);
            self.sockets.forget(id);
        }
        let tokens = made?.into();
        let cgroup = (!record.cgroups.is_empty()).then(|| Cgroup::of_process(stand_in.pid));
        let cgroup = cgroup.transpose()?;
        let container = Rc::new(Container::new(dir, record, cgroup, resources));
        container.set_status(Status::Created)?;
        self.containers.borrow_mut().insert(id.to_owned(), container);
        self.orphan.take();
        self.volumes.add(&self.agent, id, volumes);
        self.limit_host();
        let mut phases = self.phases.take();
        if !phases.is_empty() {
            let created = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
            phases.push(("created".to_owned(), created));
        }
        info!(container = id, ?phases, "container created");
        Ok(Response::Process { exec: String::new(), tokens, vsock: self.vsock.clone(), phases })
    }

    async fn create_in_guest(
        &self,
        id: &str,
        new: NewContainer,
    ) -> Result<wire::ProcessCreated, Error> {
        self.rescan_network().await?;
        let request = wire::CreateContainerRequest {
            container_id: id.to_owned(),
            spec_json: new.spec.into_bytes(),
            streams: Some(streams(new.streams)).into(),
            tty_size: new.size.map(tty_size).into(),
            sockets: self.sockets.add(id, &new.files.sockets)?,
            disks: self.plug_disks(id, &new.files.disks).await?,
            watchable: !Volume::of(&new.files, &self.dir.share()).is_empty(),
            ..Default::default()
        };
        let created = self.agent.create(request).await?;
        let marks: Vec<_> = created
            .marks
            .iter()
            .map(|mark| format!("{}={}", crate::error::from_guest(&mark.name), mark.boot_us))
            .collect();
        info!(container = id, marks = marks.join(" "), "the guest's microseconds since its boot");
        Ok(created)
    }

    async fn plug_disks(
        &self,
        id: &str,
        wanted: &[storage::Disk],
    ) -> Result<Vec<wire::Disk>, Error> {
        let mut told = Vec::new();
        for disk in wanted {
            let serial = self.disks.name(id);
            let (path, read_only) = (disk.source.clone(), disk.read_only);
            let device = Device::Disk { serial: serial.clone(), path, read_only };
            self.ask_vm(|answer| VmRequest::Attach(device, answer)).await?;
            let path = disk.path.to_string_lossy().into_owned();
            told.push(wire::Disk { serial, path, ..Default::default() });
        }
        Ok(told)
    }

    async fn unplug_disks(&self, id: &str) -> Result<(), Error> {
        for serial in self.disks.take(id) {
            self.ask_vm(|answer| VmRequest::Detach(serial, answer)).await?;
        }
        Ok(())
    }

    /// Asks the machine's owner, and waits until it is done.
    pub(crate) async fn ask_vm(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<(), Error>>) -> VmRequest,
    ) -> Result<(), Error> {
        let gone = || Error::SandboxGone { id: "this container".to_owned() };
        let (answer, answered) = oneshot::channel();
        self.vm.send(request(answer)).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }

    /// Ends the machine.
    pub(crate) async fn end(&self) {
        // A receiver that is gone has ended the machine already.
        drop(self.vm.send(VmRequest::Kill).await);
    }

    /// The host process that stands for a container has gone: so goes the container, with all it has here.
    pub(crate) async fn let_go(&self, container: &Container) {
        if container.status() != Status::Stopped {
            info!(container = container.id(), "its stand-in is gone: killed");
            self.kill(container).await;
        }
        self.sockets.forget(container.id());
        self.volumes.forget(container.id());
        let others: Vec<_> = {
            let all = self.containers.borrow();
            all.values().filter(|other| other.id() != container.id()).cloned().collect()
        };
        if let Some(other) = others.first() {
            self.clear(container, other).await;
            if container.is_disowned() {
                settle(container.dir());
            }
        } else if container.is_disowned() {
            self.orphan.replace(Some(container.dir().clone()));
        }
        self.containers.borrow_mut().remove(container.id());
        self.limit_host();
        self.changed.send_replace(());
        if !others.is_empty() {
            self.give_room_back().await;
        }
    }

    /// Limits the machine's processes to what its containers may have together. With one container they are in its own
    /// cgroup, which has its limits already.
    pub(crate) fn limit_host(&self) {
        let containers = self.containers.borrow();
        let holder = containers.values().find(|one| one.cgroups() == *self.cgroups.borrow());
        let Some(cgroup) = holder.and_then(|holder| holder.cgroup()) else { return };
        let all: Vec<_> = containers.values().map(|one| one.resources()).collect();
        let shared = self.shared.replace(all.len() > 1) || all.len() > 1;
        if !shared {
            return;
        }
        match update::raise(cgroup, joint_limits(&all, &self.config)) {
            Ok(lowering) => {
                if let Some(lowering) = lowering {
                    lowering.begin();
                }
            }
            Err(error) => {
                warn!(error = %Chain(&error), "the machine's limits are not those of its containers");
            }
        }
    }

    async fn kill(&self, container: &Container) {
        let killed = async {
            self.agent.signal(container.signal_request("", SIGKILL, true)).await?;
            self.agent.wait(container.id(), "").await
        };
        match tokio::time::timeout(END_TIMEOUT, killed).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => warn!(error = %Chain(&error), "the guest did not kill a container"),
            Err(_) => warn!("the guest did not kill a container in time"),
        }
        container.ended(KILLED);
    }

    /// Takes from the guest and the share what a container that has ended had there, while others go on.
    async fn clear(&self, container: &Container, other: &Container) {
        let mut cleared = self.agent.remove(container.id()).await;
        if cleared.is_ok() {
            cleared = self.unplug_disks(container.id()).await;
        }
        let cleared = cleared
            .and_then(|()| Ok(storage::detach(container.id(), &self.dir.share())?))
            .and_then(|()| self.move_to(container, other));
        if let Err(error) = cleared {
            warn!(error = %Chain(&error), container = container.id(), "not all of it is cleared");
        }
    }

    /// Moves the machine's processes out of a cgroup that will be removed.
    fn move_to(&self, from: &Container, to: &Container) -> Result<(), Error> {
        let Some(cgroup) = to.cgroup().filter(|_| from.cgroups() == *self.cgroups.borrow()) else {
            return Ok(());
        };
        for &pid in &self.pids {
            cgroup.add(pid)?;
        }
        self.cgroups.replace(to.cgroups());
        Ok(())
    }

    /// Waits until a container is no longer here.
    pub(crate) async fn released(&self, id: &str) {
        let mut changes = self.changes();
        while self.containers.borrow().contains_key(id) {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }
}

/// The limits in a guest's spec.
fn resources_of(spec: &str) -> Option<LinuxResources> {
    let spec: serde_json::Value = serde_json::from_str(spec).ok()?;
    serde_json::from_value(spec.pointer("/linux/resources")?.clone()).ok()
}

/// Which streams there are, as the agent is told.
pub(crate) fn streams([stdin, stdout, stderr]: [bool; 3]) -> wire::Streams {
    wire::Streams { stdin, stdout, stderr, ..Default::default() }
}

/// A terminal's rows and columns, as the agent is told.
pub(crate) fn tty_size((rows, columns): (u16, u16)) -> wire::TtySize {
    wire::TtySize { rows: rows.into(), columns: columns.into(), ..Default::default() }
}
