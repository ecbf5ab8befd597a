//! The two rings of a vsock device, as packets: what descriptors are is known here and nowhere else.

use std::io::{self, Read, Write};
use std::sync::MutexGuard;

use vhost_user_backend::{VringMutex, VringState, VringT};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT, Writer};
use vm_memory::{
    Address, GuestAddress, GuestMemory, GuestMemoryAtomic, GuestMemoryMmap, VolatileSlice,
};

use super::packet::{HEADER_SIZE, Header};

pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
pub(super) type Vring = VringMutex<Memory>;
type Chain<'m> = DescriptorChain<&'m GuestMemoryMmap>;

/// The most that is read from a host stream at once, and so the size of the scratch buffer.
pub(super) const LARGEST_READ: usize = 64 * 1024;

/// The driver of the guest broke a ring in a way that cannot be survived.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error("the guest's {ring} queue is broken")]
    Ring { ring: &'static str, source: virtio_queue::Error },
    #[error("the guest offered a receive buffer that cannot hold a packet")]
    Buffer,
    #[error("cannot notify the guest")]
    Notify(#[source] io::Error),
    #[error("cannot wait for host streams")]
    Wait(#[source] io::Error),
}

fn running(vring: &Vring) -> Option<MutexGuard<'_, VringState<Memory>>> {
    let state = vring.get_mut();
    (state.is_enabled() && state.get_queue().ready()).then_some(state)
}

fn notify(state: &mut VringState<Memory>, ring: &'static str) -> Result<(), Fault> {
    if state.needs_notification().map_err(|source| Fault::Ring { ring, source })? {
        state.signal_used_queue().map_err(Fault::Notify)?;
    }
    Ok(())
}

/// Packets from the guest.
pub(super) struct Transmitted<'m> {
    ring: MutexGuard<'m, VringState<Memory>>,
    memory: &'m GuestMemoryMmap,
    used: bool,
}

/// A packet from the guest. [`Transmitted::release`] takes it back.
pub(super) struct Packet<'m> {
    chain: Chain<'m>,
    memory: &'m GuestMemoryMmap,
    /// Nothing where the guest's buffer is too short for one or not in its memory.
    pub(super) header: Option<Header>,
}

impl<'m> Transmitted<'m> {
    /// Opens the ring; nothing where the driver is not up.
    pub(super) fn open(vring: &'m Vring, memory: &'m GuestMemoryMmap) -> Option<Self> {
        Some(Self { ring: running(vring)?, memory, used: false })
    }

    fn fault(source: virtio_queue::Error) -> Fault {
        Fault::Ring { ring: "transmit", source }
    }

    /// Takes the next packet. Where there is none, asks to be notified of one.
    pub(super) fn next(&mut self) -> Result<Option<Packet<'m>>, Fault> {
        loop {
            let chain = self.ring.get_queue_mut().iter(self.memory).map_err(Self::fault)?.next();
            if let Some(chain) = chain {
                let mut bytes = [0; HEADER_SIZE];
                let header = chain
                    .clone()
                    .reader(self.memory)
                    .ok()
                    .and_then(|mut reader| reader.read_exact(&mut bytes).ok())
                    .map(|()| Header::parse(&bytes));
                return Ok(Some(Packet { chain, memory: self.memory, header }));
            }
            if !self.ring.enable_notification().map_err(Self::fault)? {
                return Ok(None);
            }
            self.ring.disable_notification().map_err(Self::fault)?;
        }
    }

    /// Gives a packet's descriptors back to the guest.
    pub(super) fn release(&mut self, packet: &Packet<'m>) -> Result<(), Fault> {
        self.used = true;
        self.ring.add_used(packet.chain.head_index(), 0).map_err(Self::fault)
    }

    /// Tells the guest of what was released.
    pub(super) fn close(mut self) -> Result<(), Fault> {
        if self.used { notify(&mut self.ring, "transmit") } else { Ok(()) }
    }
}

impl<'m> Packet<'m> {
    /// The `len` bytes behind the header; nothing where the guest's buffer is shorter or not in its memory.
    pub(super) fn payload(&self, len: u32) -> Option<Vec<VolatileSlice<'m>>> {
        let (mut skip, mut left) = (HEADER_SIZE, usize::try_from(len).ok()?);
        let mut slices = Vec::new();
        for descriptor in self.chain.clone().readable() {
            if left == 0 {
                break;
            }
            let (start, size) = extent(&descriptor)?;
            let skipped = skip.min(size);
            skip -= skipped;
            let size = (size - skipped).min(left);
            if size == 0 {
                continue;
            }
            let start = start.checked_add(u64::try_from(skipped).ok()?)?;
            slices.push(self.memory.get_slice(start, size).ok()?);
            left -= size;
        }
        (left == 0).then_some(slices)
    }
}

fn extent(descriptor: &Descriptor) -> Option<(GuestAddress, usize)> {
    Some((descriptor.addr(), usize::try_from(descriptor.len()).ok()?))
}

/// Room for packets to the guest.
pub(super) struct Receiving<'m> {
    ring: MutexGuard<'m, VringState<Memory>>,
    memory: &'m GuestMemoryMmap,
    scratch: &'m mut [u8],
    used: bool,
}

/// Where one packet can go.
struct Buffer<'m> {
    head: u16,
    writer: Writer<'m>,
    room: usize,
}

impl<'m> Receiving<'m> {
    /// Opens the ring; nothing where the driver is not up. `scratch` has [`LARGEST_READ`] bytes.
    pub(super) fn open(
        vring: &'m Vring,
        memory: &'m GuestMemoryMmap,
        scratch: &'m mut [u8],
    ) -> Result<Option<Self>, Fault> {
        let Some(mut ring) = running(vring) else { return Ok(None) };
        ring.disable_notification().map_err(Self::fault)?;
        Ok(Some(Self { ring, memory, scratch, used: false }))
    }

    fn fault(source: virtio_queue::Error) -> Fault {
        Fault::Ring { ring: "receive", source }
    }

    /// Takes the next buffer. Where there is none, asks to be notified of one.
    fn take(&mut self) -> Result<Option<Buffer<'m>>, Fault> {
        loop {
            let chain = self.ring.get_queue_mut().iter(self.memory).map_err(Self::fault)?.next();
            if let Some(chain) = chain {
                let head = chain.head_index();
                let writer = chain.writer(self.memory).map_err(Self::fault)?;
                let room =
                    writer.available_bytes().checked_sub(HEADER_SIZE).ok_or(Fault::Buffer)?;
                return Ok(Some(Buffer { head, writer, room }));
            }
            if !self.ring.enable_notification().map_err(Self::fault)? {
                return Ok(None);
            }
            self.ring.disable_notification().map_err(Self::fault)?;
        }
    }

    fn put_back(&mut self, count: usize) {
        for _ in 0..count {
            self.ring.get_queue_mut().go_to_previous_position();
        }
    }

    fn fill(&mut self, mut to: Buffer<'m>, header: &Header, payload: &[u8]) -> Result<(), Fault> {
        // The writer was found to have room for both, in memory that cannot go away.
        let written =
            to.writer.write_all(&header.bytes()).and_then(|()| to.writer.write_all(payload));
        written.map_err(|_| Fault::Buffer)?;
        let len = u32::try_from(to.writer.bytes_written()).map_err(|_| Fault::Buffer)?;
        self.ring.add_used(to.head, len).map_err(Self::fault)?;
        self.used = true;
        Ok(())
    }

    /// Sends a packet without payload; `false` where the guest has no room for it now.
    pub(super) fn send(&mut self, header: &Header) -> Result<bool, Fault> {
        let Some(buffer) = self.take()? else { return Ok(false) };
        self.fill(buffer, header, &[])?;
        Ok(true)
    }

    /// Sends what `read` gives, at most `limit` bytes, in as many packets as it takes, all with `header` but for its
    /// length. Answers what `read` answered; nothing where the guest has no room now, and then does not read.
    pub(super) fn send_data(
        &mut self,
        header: Header,
        limit: usize,
        read: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> Result<Option<io::Result<usize>>, Fault> {
        let limit = limit.min(self.scratch.len());
        let (mut buffers, mut room) = (Vec::new(), 0);
        while room < limit {
            let Some(buffer) = self.take()? else { break };
            // A buffer for a header only would never be filled: the guest would stall, and we spin.
            if buffer.room == 0 {
                return Err(Fault::Buffer);
            }
            room += buffer.room;
            buffers.push(buffer);
        }
        if buffers.is_empty() {
            return Ok(None);
        }
        let scratch = std::mem::take(&mut self.scratch);
        let result = read(&mut scratch[..limit.min(room)]);
        let mut left = &scratch[..*result.as_ref().unwrap_or(&0)];
        let mut buffers = buffers.into_iter();
        let mut sent = Ok(());
        while !left.is_empty() && sent.is_ok() {
            let Some(buffer) = buffers.next() else { break };
            let (payload, rest) = left.split_at(buffer.room.min(left.len()));
            left = rest;
            let len = u32::try_from(payload.len()).map_err(|_| Fault::Buffer)?;
            sent = self.fill(buffer, &Header { len, ..header }, payload);
        }
        self.put_back(buffers.len());
        self.scratch = scratch;
        sent.map(|()| Some(result))
    }

    /// Tells the guest of what was sent.
    pub(super) fn close(mut self) -> Result<(), Fault> {
        if self.used { notify(&mut self.ring, "receive") } else { Ok(()) }
    }
}
