//! The kernel's device events, and the host's notice that the guest can be reached.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use protocol::READY_PORT;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, netlink};
use tokio::io::AsyncReadExt;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

use crate::console;
use crate::error::{Doing, Error};
use crate::pci::Slots;
use crate::sys;

/// The multicast group of what the kernel itself says.
const KERNEL: u32 = 1;

/// The kernel's uevents: netlink(7), `NETLINK_KOBJECT_UEVENT`.
#[derive(Debug)]
pub(crate) struct Events(AsyncFd<OwnedFd>);

impl Events {
    /// Listens from now on.
    pub(crate) fn open() -> Result<Self, Error> {
        let action = || "listen to the kernel's device events".to_owned();
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            Some(netlink::KOBJECT_UEVENT),
        )
        .doing(action)?;
        let address = netlink::SocketAddrNetlink::new(0, KERNEL);
        rustix::net::bind(&socket, &address).doing(action)?;
        Ok(Self(sys::watched(socket).doing(action)?))
    }

    /// The next event: lines `KEY=value` after a heading, each ended by a zero byte.
    pub(crate) async fn next(&self) -> io::Result<Vec<u8>> {
        let mut event = vec![0; 8192];
        let size = self
            .0
            .async_io(tokio::io::Interest::READABLE, |socket| {
                let (size, _) = rustix::net::recv(socket, &mut event[..], RecvFlags::empty())?;
                Ok(size)
            })
            .await;
        match size {
            Ok(size) => {
                event.truncate(size);
                Ok(event)
            }
            // The kernel had more to say than the socket holds: anything may have happened, so an event that may
            // be any event.
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(LOST.to_vec()),
            Err(error) => Err(error),
        }
    }
}

const LOST: &[u8] = b"lost\0ACTION=bind\0SUBSYSTEM=virtio\0DRIVER=vmw_vsock_virtio_transport\0";

/// Acts on what the kernel says: tells the host, each time that a vsock device has become usable, that the agent
/// listens, and takes CPUs and memory into use that the host has plugged in.
pub(crate) async fn follow(events: Events) {
    tell_host().await;
    let slots = Slots::in_use();
    let mut refill: Option<JoinHandle<()>> = None;
    loop {
        match events.next().await {
            Ok(event) => {
                if is_vsock(&event, b"ACTION=unbind")
                    && let Some(last) = refill.replace(tokio::spawn(slots.clone().refill()))
                {
                    last.abort();
                }
                if is_vsock(&event, b"ACTION=bind") {
                    tell_host().await;
                }
                if let Some(device) = added_processor_or_memory(&event) {
                    take_into_use(device);
                }
            }
            Err(error) => {
                console::err(&format!("kata-agent: cannot hear of devices: {error}"));
                return;
            }
        }
    }
}

/// Whether a driver has just finished setting up, or let go, a vsock device. Not `add`, which comes before its driver has
/// it.
fn is_vsock(event: &[u8], action: &[u8]) -> bool {
    let has = |line: &[u8]| event.split(|&byte| byte == 0).any(|one| one == line);
    has(action) && has(b"DRIVER=vmw_vsock_virtio_transport")
}

/// The path below /sys of a CPU or a block of memory that has just been plugged in.
fn added_processor_or_memory(event: &[u8]) -> Option<&str> {
    let mut lines = event.split(|&byte| byte == 0).filter_map(|line| str::from_utf8(line).ok());
    let fields: HashMap<_, _> = lines.by_ref().filter_map(|line| line.split_once('=')).collect();
    let is_added = fields.get("ACTION") == Some(&"add");
    let is_ours = matches!(fields.get("SUBSYSTEM"), Some(&"cpu" | &"memory"));
    fields.get("DEVPATH").copied().filter(|_| is_added && is_ours)
}

fn take_into_use(device: &str) {
    let path = format!("/sys{device}/online");
    // The kernel may have done it by itself; and the boot CPU has no such file.
    let is_used = fs::read_to_string(&path).is_ok_and(|text| text.trim() == "1");
    if !is_used && let Err(error) = fs::write(&path, "1") {
        console::err(&format!("kata-agent: cannot write {path}: {error}"));
    }
}

/// Takes all CPUs into use that have been plugged in, for whoever cannot wait until [`follow`] hears of them.
pub(crate) fn use_all_cpus() {
    let devices = fs::read_dir("/sys/devices/system/cpu").into_iter().flatten().flatten();
    for device in devices.filter_map(|device| device.file_name().into_string().ok()) {
        let number = device.strip_prefix("cpu").and_then(|number| number.parse::<u32>().ok());
        // The boot CPU cannot be out of use.
        if number.is_some_and(|number| number > 0) {
            take_into_use(&format!("/devices/system/cpu/{device}"));
        }
    }
}

/// Opens a stream to the host and closes it. That fails where there is no device yet (ENODEV: an event will
/// come), or nobody listens there (then nobody wants to know).
async fn tell_host() {
    let address = VsockAddr::new(VMADDR_CID_HOST, READY_PORT);
    if let Ok(mut stream) = VsockStream::connect(address).await {
        // Until the host has taken note and closed it; nothing depends on how it ends.
        let closed = stream.read_u8();
        drop(tokio::time::timeout(std::time::Duration::from_secs(5), closed).await);
    }
}

#[cfg(test)]
mod tests {
    use super::{added_processor_or_memory, is_vsock};

    #[test]
    fn a_plugged_in_cpu_is_found() {
        let event = |action: &str, subsystem: &str| {
            format!(
                "{action}@/d\0ACTION={action}\0DEVPATH=/devices/system/cpu/cpu1\0SUBSYSTEM={subsystem}\0"
            )
        };
        let found = event("add", "cpu");
        let path = added_processor_or_memory(found.as_bytes());
        assert_eq!(path, Some("/devices/system/cpu/cpu1"));
        assert_eq!(added_processor_or_memory(event("add", "net").as_bytes()), None);
        assert_eq!(added_processor_or_memory(event("online", "cpu").as_bytes()), None);
    }

    #[test]
    fn only_a_bound_vsock_driver_is_news() {
        let event = |action: &str, driver: &str| {
            let text = format!(
                "{action}@/devices/x/virtio3\0ACTION={action}\0SUBSYSTEM=virtio\0DRIVER={driver}\0"
            );
            is_vsock(text.as_bytes(), b"ACTION=bind")
        };
        assert!(event("bind", "vmw_vsock_virtio_transport"));
        assert!(!event("add", "vmw_vsock_virtio_transport"));
        assert!(!event("bind", "virtiofs"));
    }
}
