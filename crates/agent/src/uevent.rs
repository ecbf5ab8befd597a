//! The kernel's device events, and the host's notice that the guest can be reached.

use std::io;
use std::os::fd::OwnedFd;

use protocol::READY_PORT;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, netlink};
use tokio::io::AsyncReadExt;
use tokio::io::unix::AsyncFd;
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

use crate::console;
use crate::error::{Doing, Error};
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

/// Tells the host, each time that a vsock device has become usable, that the agent listens.
pub(crate) async fn announce(events: Events) {
    tell_host().await;
    loop {
        match events.next().await {
            Ok(event) if is_vsock_bound(&event) => tell_host().await,
            Ok(_) => {}
            Err(error) => {
                console::err(&format!("kata-agent: cannot hear of devices: {error}"));
                return;
            }
        }
    }
}

/// Whether a driver has just finished setting up a vsock device. Not `add`, which comes before its driver has it.
fn is_vsock_bound(event: &[u8]) -> bool {
    let has = |line: &[u8]| event.split(|&byte| byte == 0).any(|one| one == line);
    has(b"ACTION=bind") && has(b"DRIVER=vmw_vsock_virtio_transport")
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
    use super::is_vsock_bound;

    #[test]
    fn only_a_bound_vsock_driver_is_news() {
        let event = |action: &str, driver: &str| {
            let text = format!(
                "{action}@/devices/x/virtio3\0ACTION={action}\0SUBSYSTEM=virtio\0DRIVER={driver}\0"
            );
            is_vsock_bound(text.as_bytes())
        };
        assert!(event("bind", "vmw_vsock_virtio_transport"));
        assert!(!event("add", "vmw_vsock_virtio_transport"));
        assert!(!event("bind", "virtiofs"));
    }
}
