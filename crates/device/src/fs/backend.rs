//! The rings of the virtio-fs device: virtio 1.2, section 5.11. Each request is answered by virtiofsd's `Server`.
//!
//! One thread serves them in order. That suits what containers do best: an answer costs less than waking another
//! thread for it, and the library keeps state (working directory, credentials, capabilities) for each thread.

use std::cell::Cell;
use std::io;
use std::sync::mpsc::Sender;
use std::sync::{PoisonError, RwLock};

use capng::CapngState;
use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringState, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::{QueueOwnedT, QueueT};
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::server::Server;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::keep::Kept;
use super::{echo, failed};
use crate::Error;

/// high priority (for requests without an answer), requests.
const QUEUES: usize = 2;
const QUEUE_SIZE: usize = 1024;

// The library knows memory with a log of written pages only; there is none behind it here.
pub(super) type Mapped = GuestMemoryMmap<BitmapMmapRegion>;
type Memory = GuestMemoryAtomic<Mapped>;

/// The guest's driver broke the protocol.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error("a queue of the guest is broken")]
    Ring(#[from] virtio_queue::Error),
    #[error("a request of the guest lies outside of its memory: {0}")]
    Buffer(String),
    #[error("a request of the guest makes no sense: {0}")]
    Request(String),
    #[error("cannot notify the guest")]
    Notify(#[source] io::Error),
}

/// The device as the vhost-user library sees it.
pub(super) struct Backend {
    server: Server<Kept>,
    memory: RwLock<Option<Memory>>,
    report: Sender<Result<(), Error>>,
}

impl Backend {
    pub(super) fn new(server: Server<Kept>, report: Sender<Result<(), Error>>) -> Self {
        Self { server, memory: RwLock::new(None), report }
    }

    /// Answers what there is in a ring.
    fn serve(&self, ring: &mut VringState<Memory>, memory: &Mapped) -> Result<(), Fault> {
        ring.disable_notification()?;
        loop {
            while let Some(chain) = ring.get_queue_mut().iter(memory)?.next() {
                let head = chain.head_index();
                echo::disarm(memory, &chain);
                let outside =
                    |error: virtiofsd::descriptor_utils::Error| Fault::Buffer(error.to_string());
                let request = Reader::new(memory, chain.clone()).map_err(outside)?;
                let answer = Writer::new(memory, chain).map_err(outside)?;
                restore_capabilities();
                let length = self
                    .server
                    .handle_message(request, answer, None::<&mut ()>)
                    .map_err(|error| Fault::Request(error.to_string()))?;
                // An answer has at most the length of the guest's buffer, which is a u32 for each of its parts.
                ring.add_used(head, u32::try_from(length).unwrap_or(u32::MAX))?;
                // Another vCPU can go on with this answer while we work on the next.
                if ring.needs_notification()? {
                    ring.signal_used_queue().map_err(Fault::Notify)?;
                }
            }
            if !ring.enable_notification()? {
                return Ok(());
            }
            ring.disable_notification()?;
        }
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = BitmapMmapRegion;
    type Vring = VringMutex<Memory>;

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
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    // The rings do that themselves.
    fn set_event_idx(&self, _: bool) {}

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        *self.memory.write().unwrap_or_else(PoisonError::into_inner) = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn handle_event(
        &self,
        ring: u16,
        _: EventSet,
        rings: &[Self::Vring],
        _: usize,
    ) -> io::Result<()> {
        let memory = self.memory.read().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(memory) = memory.map(|memory| GuestAddressSpace::memory(&memory)) else {
            return Ok(());
        };
        let mut ring = rings[usize::from(ring)].get_mut();
        if !ring.get_queue().ready() {
            return Ok(());
        }
        self.serve(&mut ring, &memory).map_err(|fault| {
            drop(self.report.send(Err(failed(fault.into()))));
            io::ErrorKind::InvalidData.into()
        })
    }
}

thread_local! {
    /// What libcap-ng should believe of this thread's capabilities.
    static WHOLE: Cell<Option<CapngState>> = const { Cell::new(None) };
}

/// Has libcap-ng believe that this thread's capabilities are whole, as they are between requests.
///
/// It reads them when asked to and believes that from then on. The library asks it to while it acts as some user, when
/// most are not in effect, and takes `CAP_FSETID` for lost afterwards: the host would no longer clear the set-user-id
/// bit of a file that such a user writes to. Reading them anew takes some hundred system calls; this takes none.
fn restore_capabilities() {
    let whole = WHOLE.take().or_else(|| {
        capng::get_caps_process().ok()?;
        capng::save_state()
    });
    if let Some(whole) = whole {
        // Consumes what was saved.
        capng::restore_state(whole);
        WHOLE.set(capng::save_state());
    }
}
