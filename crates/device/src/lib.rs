//! The vhost-user back ends of one virtual machine, in one jailed process: virtio-vsock and virtio-fs.
//!
//! They read what a guest writes, so they run apart from everything else: the process that calls [`serve`] gives up
//! its file system but for the shared directory, its network, its capabilities but those that keep files' owners, and
//! nearly all system calls; then it serves one machine until that machine's hypervisor hangs up.
//!
//! The caller binds the sockets, starts the process with a [`Config`] as its last argument and may connect at once:
//! there is no ready signal because the sockets' backlogs are one.

use std::fs::File;
use std::io::Read;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;

use serde::{Deserialize, Serialize};

mod descriptors;
mod error;
mod frontend;
mod fs;
mod jail;
mod log_line;
mod seccomp;
mod vsock;

/// Seconds and nanoseconds of a time, in the year 200,000,000,000 or so: a guest that asks to set it as a file's time of
/// change, and nothing else, changes nothing; its kernel then tells the file's watchers that it has changed.
pub const ECHO_TIME: (u64, u32) = (0x6b61_7461_6563_686f, 123_456_789);

use descriptors::Descriptors;
pub use error::Error;

/// What a device process serves. Passed as JSON in its last argument; file descriptors are inherited, by number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// A pipe's or socket's end; the process ends when the other end is closed. (Its parent's death signal is not
    /// enough: the kernel forgets it when a process changes its credentials.)
    pub lifeline: RawFd,
    /// The listening Unix stream socket to which the hypervisor connects its vhost-user-vsock device.
    pub vsock_listener: RawFd,
    /// The guest's context id, at least 3. It may be the same for every machine, as each has its own back end.
    pub guest_cid: u64,
    /// The listening Unix stream socket for streams into the guest. A client writes `CONNECT <port>\n` and gets
    /// `OK <local port>\n` once the guest has accepted, then raw bytes; a guest that refuses closes the connection. A
    /// client that comes before the guest's driver is held until that is up.
    pub streams_listener: RawFd,
    /// One end of a `SOCK_SEQPACKET` pair, for streams that the guest opens to the host (CID 2): a message each, of the
    /// port as 4 bytes little-endian, with a connected Unix stream as its one `SCM_RIGHTS` descriptor. Where nobody
    /// takes the message at once, the guest's stream is refused.
    pub host_streams: RawFd,
    /// The directory that the guest sees by virtio-fs.
    pub fs: Option<Fs>,
}

/// The virtio-fs back end of a device process.
///
/// The tag that the guest mounts is not here: QEMU takes it as an option of its `vhost-user-fs-pci` device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fs {
    /// The listening Unix stream socket to which the hypervisor connects its vhost-user-fs device.
    pub listener: RawFd,
    /// The directory: itself read-only to the guest. Mounts made below it later show up in the guest where it is a shared mount, see
    /// mount_namespaces(7); a mount's flags, read-only among them, hold for the guest.
    pub directory: PathBuf,
}

/// Jails this process and serves the devices of `config` until the hypervisor hangs up or the lifeline ends.
///
/// Called by a process with one thread, as root, that does nothing else: it is not fit for anything afterwards.
///
/// # Errors
///
/// When a file descriptor is not what `config` says, the jail cannot be built, or a device failed; what the guest did
/// wrong to cause it is in the error. Nothing is served any more then.
pub fn serve(config: Config) -> Result<(), Error> {
    let descriptors = Descriptors::inherit(&config)?;
    log_line::start();
    log_line::end_on_panic();
    let directory = config.fs.map(|fs| fs.directory);
    let opened = jail::enter(directory.as_deref())?;
    seccomp::limit(directory.is_some())?;
    let (report, end) = mpsc::channel();
    if let Some(listener) = descriptors.fs_listener {
        fs::start(listener.into(), opened, report.clone())?;
    }
    let (listener, streams) = (descriptors.vsock_listener, descriptors.streams_listener);
    let host_streams = descriptors.host_streams;
    vsock::start(listener.into(), streams.into(), host_streams, config.guest_cid, report.clone())?;
    let lifeline = File::from(descriptors.lifeline);
    let watch = thread::Builder::new().name("lifeline".into()).spawn(move || {
        // Whatever it says, its end is what counts.
        let mut bytes = [0; 64];
        while (&lifeline).read(&mut bytes).is_ok_and(|count| count > 0) {}
        drop(report.send(Ok(())));
    });
    watch.map_err(|source| Error::Jail { action: "start a thread", source })?;
    end.recv().unwrap_or(Ok(()))
}
