//! The seam between a sandbox and whatever runs its virtual machine.
//!
//! Two traits, because there are two lives: a [`Hypervisor`] is a program on the host that can make machines, and a
//! [`Vm`] is one machine it made. A `Vm` is owned by the sandbox's driver task and taken by `&mut self`, so that no
//! driver holds a lock of its own.
//!
//! This crate speaks of machines, devices and ports. It knows nothing of containers, OCI, the agent's protocol or
//! the user's configuration file.

#![forbid(unsafe_code)]

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use linux::ledger::Ledger;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};

mod back_ends;
mod detect;
mod error;
#[cfg(feature = "fake")]
pub mod fake;
mod log;
mod memory;
mod processes;
pub mod qemu;
mod vsock;

pub use detect::{Detection, Obstacle, detect};
pub use error::Error;
pub use vsock::VsockAddress;

/// The driver with this name.
///
/// # Errors
///
/// [`Error::NoSuchDriver`].
pub fn driver(name: &str) -> Result<Box<dyn Hypervisor>, Error> {
    match name {
        qemu::NAME => Ok(Box::new(qemu::Qemu)),
        _ => Err(Error::NoSuchDriver { name: name.to_owned() }),
    }
}

/// What a driver can do on this host. Facts, found once; asking costs nothing.
///
/// A call outside these answers [`Error::Unsupported`]. The conformance tests hold every driver to its own claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "a set of independent facts")]
pub struct Capabilities {
    /// Disks can be added to a running machine.
    pub disk_hotplug: bool,
    /// Network interfaces can be added to a running machine.
    pub net_hotplug: bool,
    /// vCPUs and memory can be added to a running machine.
    pub resize: bool,
    /// A host directory can be shared by virtio-fs.
    pub virtio_fs: bool,
    /// A machine can be saved, and started again from what was saved.
    pub snapshot: bool,
}

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Acceleration {
    /// The CPU's own virtualisation, through `/dev/kvm`.
    Kvm,
    /// QEMU's translator: works everywhere, several times slower.
    Tcg,
}

/// A machine to be made, in full. Plain data: building one touches nothing.
#[derive(Debug, Clone)]
pub struct VmSpec {
    /// Who runs its instructions.
    pub acceleration: Acceleration,
    /// vCPUs at boot.
    pub vcpus: u32,
    /// The most vCPUs it can be resized to.
    pub max_vcpus: u32,
    /// Memory at boot, in MiB.
    pub memory_mib: u32,
    /// The most memory it can be resized to, in MiB.
    pub max_memory_mib: u32,
    /// The guest kernel: an ELF image with a PVH entry, or a bzImage.
    pub kernel: PathBuf,
    /// The initial RAM file system.
    pub initrd: PathBuf,
    /// What the kernel's command line has beside what the driver itself puts there.
    pub cmdline: String,
    /// The one directory that the guest sees by virtio-fs.
    pub share: Option<SharedDirectory>,
    /// The hypervisor program; `None`: the driver's own default, looked up in `PATH`.
    pub program: Option<PathBuf>,
    /// The program, with its first arguments, that runs the `device` role (see the `device` crate): virtio-fs and vsock
    /// back ends of one machine.
    pub device_program: (PathBuf, Vec<String>),
}

/// A host directory that a guest can mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedDirectory {
    /// The tag that the guest mounts.
    pub tag: String,
    /// The directory. Mounts made below it later show up in the guest where it is a shared mount (see
    /// mount_namespaces(7)) of the calling process.
    pub path: PathBuf,
}

/// A device to be added to a running machine, in the one vocabulary that storage, network and drivers share.
#[derive(Debug)]
#[non_exhaustive]
pub enum Device {
    /// A virtio-blk disk.
    Disk {
        /// Its serial number, at most 20 bytes, by which the agent finds it in the guest.
        serial: String,
        /// A raw image or block device on the host.
        path: PathBuf,
        /// Whether the guest may not write.
        read_only: bool,
    },
    /// A virtio-net interface.
    Network {
        /// A name for it, unique in this machine: what `detach` takes.
        id: String,
        /// Its MAC address, by which the agent finds it.
        mac: [u8; 6],
        /// Its MTU, told to the guest; 0: the default.
        mtu: u32,
        /// A tap, opened with `IFF_VNET_HDR`, one fd for each queue.
        tap: Vec<OwnedFd>,
    },
}

/// A port between host and guest. The same number means the same thing on every transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Port(pub u32);

/// A byte stream to or from the guest, whatever carries it.
pub type GuestStream = Box<dyn Duplex>;

/// A two-way byte stream.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static> Duplex for T {}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmExit {
    /// Which of its processes ended first, and took the others with it.
    pub process: VmProcess,
    /// That one's exit status, or 128 + the signal that ended it, where we could learn it. 0: the guest switched itself off.
    pub status: Option<i32>,
    /// What it (or the guest's kernel, in a panic) said last, escaped for a terminal.
    pub words: String,
}

/// A kind of process that a machine needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmProcess {
    /// The hypervisor.
    Hypervisor,
    /// The process with the device back ends.
    Devices,
}

impl fmt::Display for VmExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.process == VmProcess::Devices {
            f.write_str("as its device process ended ")?;
        }
        match self.status {
            Some(status) => write!(f, "with status {status}")?,
            None => f.write_str("with a status that nobody saw")?,
        }
        if self.words.is_empty() { Ok(()) } else { write!(f, "; its last words: {}", self.words) }
    }
}

/// The host processes of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmProcesses {
    /// The hypervisor's pid.
    pub hypervisor: u32,
    /// The pids of device back ends.
    pub devices: Vec<u32>,
}

/// A program on the host that can make virtual machines.
#[async_trait(?Send)]
pub trait Hypervisor {
    /// The name used in configuration, messages and state: `qemu`.
    fn name(&self) -> &'static str;

    /// What it can do on this host.
    fn capabilities(&self) -> Capabilities;

    /// A hash of all that a machine has in common with those that can be made of it: a name for its template.
    ///
    /// # Errors
    ///
    /// When a file of the machine cannot be found.
    fn fingerprint(&self, spec: &VmSpec) -> Result<String, Error>;

    /// Starts a hypervisor process with a machine as `spec` says, its vCPUs not yet running, and its device back ends.
    ///
    /// `dir` is the machine's own directory: sockets and logs go there and nowhere else. Every process started is in
    /// `ledger`, and dies with the calling thread.
    ///
    /// # Errors
    ///
    /// When a program is missing or refuses; nothing then runs any more.
    async fn launch(
        &self,
        spec: &VmSpec,
        dir: &Path,
        ledger: &mut Ledger,
    ) -> Result<Box<dyn Vm>, Error>;

    /// Makes a machine of the template in the directory `template`, which [`Vm::save`] wrote. After [`Vm::boot`] it goes on
    /// where the saved one was stopped, and must be told that it is another one: time, names, random numbers.
    ///
    /// All else is as for [`Hypervisor::launch`]; its memory is a copy of its own.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] where the template is one of another machine, in QEMU's or `spec`'s eyes. The caller can still
    /// launch.
    async fn restore(
        &self,
        template: &Path,
        spec: &VmSpec,
        dir: &Path,
        ledger: &mut Ledger,
    ) -> Result<Box<dyn Vm>, Error>;
}

/// One virtual machine. Dropping it kills it.
#[async_trait(?Send)]
pub trait Vm {
    /// Lets the vCPUs run.
    async fn boot(&mut self) -> Result<(), Error>;

    /// Stops the vCPUs.
    async fn pause(&mut self) -> Result<(), Error>;

    /// Lets the vCPUs run again.
    async fn resume(&mut self) -> Result<(), Error>;

    /// Adds a device to the running machine; the guest sees it some milliseconds later.
    async fn attach(&mut self, device: Device) -> Result<(), Error>;

    /// Takes away the device that was attached under this id or serial, and waits until the guest has let it go.
    async fn detach(&mut self, id: &str) -> Result<(), Error>;

    /// Gives the machine this many vCPUs and this much memory, up to its spec's maxima. Answers what it has then.
    async fn resize(&mut self, vcpus: u32, memory_mib: u32) -> Result<(u32, u32), Error>;

    /// Hears the guest: streams that the guest opens to `port` on the host, as they come.
    ///
    /// Called before [`Vm::boot`], so that the agent's "I am here" cannot be missed.
    async fn listen(&mut self, port: Port) -> Result<mpsc::Receiver<GuestStream>, Error>;

    /// Opens a byte stream to `port` in the guest. One try: a guest that is not listening is an error.
    async fn connect(&self, port: Port) -> Result<GuestStream, Error>;

    /// How another process of ours opens streams into this guest, for as long as the machine lives.
    fn vsock(&self) -> VsockAddress;

    /// Its host processes.
    fn processes(&self) -> VmProcesses;

    /// Becomes `Some` when the machine has ended, by whatever hand: hypervisor or any back end.
    fn ended(&self) -> watch::Receiver<Option<VmExit>>;

    /// Saves the machine as a template in `directory`, which exists and is empty, and ends it. The guest must be idle, and
    /// have nothing mounted that the host shares; it loses its streams to the host.
    ///
    /// # Errors
    ///
    /// When it could not be saved; it has then ended all the same, and the directory holds no template.
    async fn save(self: Box<Self>, directory: &Path) -> Result<(), Error>;

    /// Ends the machine now. The guest gets no say; ask the agent first if it should.
    async fn kill(self: Box<Self>) -> Result<(), Error>;
}
