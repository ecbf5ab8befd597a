//! A driver without machines, for tests of what is above this crate.
//!
//! The guest is a [`Guest`] in the calling process. Streams into it go the way that they go in production: through a
//! Unix socket in the machine's directory, as [`VsockAddress::Hybrid`].

use std::fmt;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use linux::ledger::Ledger;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::error::host;
use crate::{
    Capabilities, Device, Error, GuestStream, Hypervisor, Port, Vm, VmExit, VmProcess, VmProcesses,
    VmSpec, VsockAddress,
};

/// The driver's name.
pub const NAME: &str = "fake";

/// What stands in for a guest.
pub trait Guest: Send + Sync + 'static {
    /// The vCPUs run: a guest would now open its streams to the host, here by [`Machine::open`].
    fn boot(&self, machine: &Machine);

    /// Whether it listens on `port`.
    fn listens(&self, port: Port) -> bool;

    /// Takes a stream that was opened to a port it listens on.
    fn serve(&self, port: Port, stream: UnixStream);
}

/// A driver whose machines all have the same guest.
#[derive(Clone)]
pub struct Fake {
    guest: Arc<dyn Guest>,
    machine: Machine,
}

/// What a test sees of the machine, and can do to it.
#[derive(Debug, Clone)]
pub struct Machine {
    state: Arc<Mutex<State>>,
    ended: watch::Sender<Option<VmExit>>,
}

#[derive(Debug, Default)]
struct State {
    done: Vec<String>,
    takers: Vec<(Port, mpsc::Sender<GuestStream>)>,
}

impl Fake {
    /// A driver whose machines have this guest.
    pub fn new(guest: impl Guest) -> Self {
        let machine = Machine { state: Arc::default(), ended: watch::Sender::new(None) };
        Self { guest: Arc::new(guest), machine }
    }

    /// The machine, whether it has been launched or not.
    pub fn machine(&self) -> Machine {
        self.machine.clone()
    }
}

impl fmt::Debug for Fake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fake").field("machine", &self.machine).finish_non_exhaustive()
    }
}

impl Machine {
    /// What was done to it, in order: `boot`, `attach eth0`, `resize 2 512`.
    #[must_use]
    pub fn done(&self) -> Vec<String> {
        self.with(|state| state.done.clone())
    }

    /// Opens a stream from the guest to the host's `port`; none where nobody listens.
    pub async fn open(&self, port: Port) -> Option<UnixStream> {
        let taker = self.with(|state| {
            state.takers.iter().rev().find(|(of, _)| *of == port).map(|(_, taker)| taker.clone())
        })?;
        let (ours, theirs) = UnixStream::pair().ok()?;
        taker.send(Box::new(theirs)).await.ok()?;
        Some(ours)
    }

    /// Ends it, as a hypervisor ends with this status.
    pub fn end(&self, status: i32) {
        self.ended.send_if_modified(|exit| {
            let first = exit.is_none();
            exit.get_or_insert_with(|| VmExit {
                process: VmProcess::Hypervisor,
                status: Some(status),
                words: String::new(),
            });
            first
        });
    }

    fn with<T>(&self, use_it: impl FnOnce(&mut State) -> T) -> T {
        use_it(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn record(&self, what: String) {
        self.with(|state| state.done.push(what));
    }
}

#[async_trait(?Send)]
impl Hypervisor for Fake {
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

    fn fingerprint(&self, spec: &VmSpec) -> Result<String, Error> {
        Ok(format!("{}-{}", spec.vcpus, spec.memory_mib))
    }

    async fn restore(
        &self,
        _template: &Path,
        _spec: &VmSpec,
        _dir: &Path,
        _ledger: &mut Ledger,
    ) -> Result<Box<dyn Vm>, Error> {
        Err(Error::Unsupported { driver: NAME, operation: "make a machine of a template" })
    }

    async fn launch(
        &self,
        spec: &VmSpec,
        dir: &Path,
        _ledger: &mut Ledger,
    ) -> Result<Box<dyn Vm>, Error> {
        let socket = dir.join("vsock.sock");
        let listener = UnixListener::bind(&socket).map_err(host("listen on", &socket))?;
        let guest = Arc::clone(&self.guest);
        let acceptor = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(accept(stream, Arc::clone(&guest)));
            }
        });
        Ok(Box::new(FakeVm {
            machine: self.machine(),
            guest: Arc::clone(&self.guest),
            socket,
            acceptor,
            devices: Vec::new(),
            limits: (spec.max_vcpus, spec.max_memory_mib),
        }))
    }
}

/// The host's half of hybrid vsock.
async fn accept(mut stream: UnixStream, guest: Arc<dyn Guest>) {
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        match stream.read_u8().await {
            Ok(byte) => line.push(byte),
            Err(_) => return,
        }
    }
    let port = String::from_utf8_lossy(&line);
    let port = port.trim().strip_prefix("CONNECT ").and_then(|port| port.parse().ok()).map(Port);
    if let Some(port) = port.filter(|port| guest.listens(*port))
        && stream.write_all(b"OK 1073741824\n").await.is_ok()
    {
        guest.serve(port, stream);
    }
}

struct FakeVm {
    machine: Machine,
    guest: Arc<dyn Guest>,
    socket: PathBuf,
    acceptor: JoinHandle<()>,
    devices: Vec<String>,
    limits: (u32, u32),
}

impl FakeVm {
    fn refused(operation: &'static str, message: String) -> Error {
        Error::Refused { driver: NAME, operation, message }
    }
}

impl Drop for FakeVm {
    fn drop(&mut self) {
        self.acceptor.abort();
        self.machine.end(128 + 9);
    }
}

#[async_trait(?Send)]
impl Vm for FakeVm {
    async fn boot(&mut self) -> Result<(), Error> {
        self.machine.record("boot".into());
        self.guest.boot(&self.machine);
        Ok(())
    }

    async fn pause(&mut self) -> Result<(), Error> {
        self.machine.record("pause".into());
        Ok(())
    }

    async fn resume(&mut self) -> Result<(), Error> {
        self.machine.record("resume".into());
        Ok(())
    }

    async fn attach(&mut self, device: Device) -> Result<(), Error> {
        let (Device::Disk { serial: id, .. } | Device::Network { id, .. }) = device;
        if self.devices.contains(&id) {
            return Err(Self::refused("add a device", format!("there is a device `{id}` already")));
        }
        self.machine.record(format!("attach {id}"));
        self.devices.push(id);
        Ok(())
    }

    async fn detach(&mut self, id: &str) -> Result<(), Error> {
        let at = self.devices.iter().position(|device| device == id);
        let at = at.ok_or_else(|| {
            Self::refused("remove a device", format!("there is no device `{id}`"))
        })?;
        self.devices.remove(at);
        self.machine.record(format!("detach {id}"));
        Ok(())
    }

    async fn resize(&mut self, vcpus: u32, memory_mib: u32) -> Result<(u32, u32), Error> {
        let size = (vcpus.min(self.limits.0), memory_mib.min(self.limits.1));
        self.machine.record(format!("resize {} {}", size.0, size.1));
        Ok(size)
    }

    async fn listen(&mut self, port: Port) -> Result<mpsc::Receiver<GuestStream>, Error> {
        let (taker, streams) = mpsc::channel(16);
        self.machine.with(|state| state.takers.push((port, taker)));
        Ok(streams)
    }

    async fn connect(&self, port: Port) -> Result<GuestStream, Error> {
        let stream = self.vsock().connect(port).await;
        Ok(Box::new(stream.map_err(|source| Error::Connect { port, source })?))
    }

    fn vsock(&self) -> VsockAddress {
        VsockAddress::Hybrid(self.socket.clone())
    }

    fn processes(&self) -> VmProcesses {
        VmProcesses { hypervisor: process::id(), devices: Vec::new() }
    }

    fn ended(&self) -> watch::Receiver<Option<VmExit>> {
        self.machine.ended.subscribe()
    }

    async fn save(self: Box<Self>, _directory: &Path) -> Result<(), Error> {
        Err(Error::Unsupported { driver: NAME, operation: "save a machine" })
    }

    async fn kill(self: Box<Self>) -> Result<(), Error> {
        self.machine.record("kill".into());
        Ok(())
    }
}
