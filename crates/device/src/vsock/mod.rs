//! virtio-vsock: streams between a guest and Unix sockets of the host, virtio 1.2 section 5.10.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{io, iter, thread};

use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::Error;
use crate::frontend::serve_until_hang_up;

mod backlog;
mod connection;
mod credit;
mod device;
mod packet;
mod queue;
mod table;

use device::Device;
use queue::{Memory, Vring};

/// receive, transmit, event.
const QUEUES: usize = 3;
const QUEUE_SIZE: usize = 1024;
/// The token of the device's own epoll instance. One behind the rings is the exit event's.
const HOST_SOCKETS: u64 = 1 + QUEUES as u64;

/// How long what a guest sent before it went may take to reach slow readers on the host.
const FAREWELL: Duration = Duration::from_secs(10);

/// Starts to serve a vsock device. `report` hears of its end: the hypervisor hung up, or a fault.
///
/// # Errors
///
/// When no thread or epoll instance can be made.
pub(crate) fn start(
    listener: UnixListener,
    streams: UnixListener,
    host_streams: OwnedFd,
    cid: u64,
    report: Sender<Result<(), Error>>,
) -> Result<(), Error> {
    let device = Device::new(cid, streams, host_streams).map_err(|error| failed(error.into()))?;
    let sockets = device.as_fd().as_raw_fd();
    let backend = Arc::new(Backend {
        cid,
        device: Mutex::new(device),
        emptied: Condvar::new(),
        report: report.clone(),
    });
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("vsock".into(), Arc::clone(&backend), memory)
        .map_err(|error| failed(error.to_string().into()))?;
    let handlers = daemon.get_epoll_handlers();
    let watched = handlers[0].register_listener(sockets, EventSet::IN, HOST_SOCKETS);
    watched.map_err(|error| failed(error.into()))?;
    let serve = move || {
        let result = serve_until_hang_up(&mut daemon, listener);
        backend.say_farewell();
        // Nobody hears it any more where another device failed first.
        drop(report.send(result.map_err(failed)));
    };
    let thread = thread::Builder::new().name("vsock-control".into()).spawn(serve);
    thread.map(drop).map_err(|error| failed(error.into()))
}

fn failed(source: Box<dyn std::error::Error + Send + Sync>) -> Error {
    Error::Device { device: "vsock", source }
}

/// The device as the vhost-user library sees it.
struct Backend {
    cid: u64,
    device: Mutex<Device>,
    /// Told when the last stream has ended.
    emptied: Condvar,
    report: Sender<Result<(), Error>>,
}

impl Backend {
    fn device(&self) -> MutexGuard<'_, Device> {
        self.device.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets what the guest sent reach the host.
    fn say_farewell(&self) {
        let mut device = self.device();
        device.hang_up();
        let busy = |device: &mut Device| !device.table.is_empty();
        drop(self.emptied.wait_timeout_while(device, FAREWELL, busy));
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        (1 << VIRTIO_F_VERSION_1)
            | (1 << VIRTIO_RING_F_INDIRECT_DESC)
            | (1 << VIRTIO_RING_F_EVENT_IDX)
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    // The rings do that themselves.
    fn set_event_idx(&self, _: bool) {}

    /// `struct virtio_vsock_config`: the guest's context id.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.cid.to_le_bytes().into_iter().chain(iter::repeat(0));
        let (Ok(offset), Ok(size)) = (usize::try_from(offset), usize::try_from(size)) else {
            return Vec::new();
        };
        // The library has bounded both by the size of a message.
        config.skip(offset).take(size).collect()
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        self.device().memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn handle_event(&self, _: u16, _: EventSet, rings: &[Vring], _: usize) -> io::Result<()> {
        let mut device = self.device();
        let result = device.run(rings);
        if device.table.is_empty() {
            self.emptied.notify_all();
        }
        drop(device);
        result.map_err(|fault| {
            drop(self.report.send(Err(failed(fault.into()))));
            io::ErrorKind::InvalidData.into()
        })
    }
}

#[cfg(test)]
mod tests;
