//! The device: carries packets between the guest's rings and the host's sockets.

use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::{io, slice};

use rustix::event::{Timespec, epoll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::connection::{Connection, Ports, Turn};
use super::packet::{HOST, Header, Operation, STREAM};
use super::queue::{Fault, LARGEST_READ, Memory, Packet, Receiving, Transmitted, Vring};
use super::table::{Table, Token};

/// Index of the ring with packets to the guest.
const RECEIVE: usize = 0;
/// Index of the ring with packets from the guest.
const TRANSMIT: usize = 1;

/// The epoll token of the listening socket; no stream's, as slots are fewer.
const LISTENER: u64 = u64::MAX;

/// The most refusals that wait for room in the receive ring. Beyond, the guest's packets wait.
const MOST_REFUSALS: usize = 256;

/// Packets from the guest in a row, before the other direction gets its turn.
const BATCH: usize = 128;

/// Events of host sockets that are taken at once.
const EVENTS: usize = 64;

/// A virtio-vsock device.
pub(super) struct Device {
    cid: u64,
    pub(super) memory: Option<Memory>,
    epoll: OwnedFd,
    listener: UnixListener,
    host_streams: OwnedFd,
    pub(super) table: Table,
    refusals: VecDeque<Header>,
    scratch: Box<[u8]>,
    /// As of the last [`Device::run`].
    rings: Vec<Vring>,
}

impl Device {
    /// # Errors
    ///
    /// When the epoll instance cannot be made.
    pub(super) fn new(cid: u64, listener: UnixListener, host_streams: OwnedFd) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        // Edge-triggered, as all of ours: a socket that we must not read now does not wake us for ever.
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &listener, epoll::EventData::new_u64(LISTENER), flags)?;
        Ok(Self {
            cid,
            memory: None,
            epoll,
            listener,
            host_streams,
            table: Table::default(),
            refusals: VecDeque::new(),
            scratch: vec![0; LARGEST_READ].into_boxed_slice(),
            rings: Vec::new(),
        })
    }

    /// Does all there is to do, in both directions. Called whenever a ring or [`Device::as_fd`] wants attention.
    ///
    /// # Errors
    ///
    /// When the guest broke a ring; the device is of no use then.
    pub(super) fn run(&mut self, rings: &[Vring]) -> Result<(), Fault> {
        if self.rings.is_empty() {
            self.rings = rings.to_vec();
        }
        let memory = self.memory.as_ref().map(GuestAddressSpace::memory);
        loop {
            self.serve_host()?;
            let Some(memory) = &memory else { return Ok(()) };
            let more = self.receive(&rings[TRANSMIT], memory)?;
            self.send(&rings[RECEIVE], memory)?;
            if !more {
                return Ok(());
            }
        }
    }

    /// The guest is gone: what it sent goes to the host, then every stream ends.
    pub(super) fn hang_up(&mut self) {
        // Its last words may still be in the ring. A ring that is broken has none.
        let rings = std::mem::take(&mut self.rings);
        if !rings.is_empty() {
            drop(self.run(&rings));
        }
        self.refusals.clear();
        for token in self.table.tokens() {
            if let Some(connection) = self.table.get(token) {
                connection.forget();
            }
            self.table.changed(token);
        }
    }

    fn serve_host(&mut self) -> Result<(), Fault> {
        let mut space = [MaybeUninit::uninit(); EVENTS];
        let timeout = Timespec { tv_sec: 0, tv_nsec: 0 };
        loop {
            let events = match epoll::wait(&self.epoll, &mut space, Some(&timeout)) {
                Ok((events, _)) => events,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(Fault::Wait(error.into())),
            };
            let mut more = events.len() == EVENTS;
            for event in events {
                let data = event.data.u64();
                if data == LISTENER {
                    self.accept();
                    // A client has mostly said what it wants by now.
                    more = true;
                } else {
                    self.serve_stream(Token::from_u64(data), event.flags);
                }
            }
            if !more {
                return Ok(());
            }
        }
    }

    fn accept(&mut self) {
        // Any error ends the round: nothing is left, or we are out of descriptors and the next client wakes us.
        while let Ok((stream, _)) = self.listener.accept() {
            if !self.table.is_full() {
                self.add(Connection::greeting, stream);
            }
        }
    }

    /// Takes in a new stream; `false` where it cannot be watched.
    fn add(&mut self, make: impl FnOnce(UnixStream) -> Connection, stream: UnixStream) -> bool {
        if stream.set_nonblocking(true).is_err() {
            return false;
        }
        let token = self.table.insert(make(stream));
        let flags = epoll::EventFlags::IN
            | epoll::EventFlags::OUT
            | epoll::EventFlags::RDHUP
            | epoll::EventFlags::ET;
        let Some(connection) = self.table.get(token) else { return false };
        let data = epoll::EventData::new_u64(token.to_u64());
        let watched = epoll::add(&self.epoll, &*connection, data, flags).is_ok();
        if !watched {
            connection.forget();
        }
        self.table.changed(token);
        watched
    }

    fn serve_stream(&mut self, token: Token, flags: epoll::EventFlags) {
        let Some(connection) = self.table.get(token) else { return };
        connection.on_event(flags);
        if connection.is_greeting() {
            match connection.read_greeting() {
                Ok(Some(port)) => self.table.request(token, port),
                Ok(None) => {}
                Err(_) => connection.forget(),
            }
        }
        self.table.changed(token);
    }

    /// Takes packets from the guest. `true` where there may be more that could be taken now.
    fn receive(&mut self, ring: &Vring, memory: &GuestMemoryMmap) -> Result<bool, Fault> {
        let Some(mut ring) = Transmitted::open(ring, memory) else { return Ok(false) };
        let mut more = true;
        for _ in 0..BATCH {
            if self.refusals.len() >= MOST_REFUSALS {
                more = false;
                break;
            }
            let Some(packet) = ring.next()? else {
                more = false;
                break;
            };
            self.on_packet(&packet);
            ring.release(&packet)?;
        }
        ring.close()?;
        Ok(more)
    }

    fn on_packet(&mut self, packet: &Packet<'_>) {
        let Some(header) = packet.header else { return };
        // Nobody to answer: neither is a stream between this guest and the host.
        if header.src_cid != self.cid || header.dst_cid != HOST {
            return;
        }
        let operation = header.operation();
        if header.kind != STREAM || operation.is_none() {
            self.refuse(&header);
            return;
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        match (self.table.find(ports), operation) {
            (Some(token), _) => self.on_stream_packet(token, &header, packet),
            (None, Some(Operation::Request)) => {
                if !self.open(ports, &header) {
                    self.refuse(&header);
                }
            }
            (None, Some(Operation::Reset)) => {}
            (None, _) => self.refuse(&header),
        }
    }

    fn on_stream_packet(&mut self, token: Token, header: &Header, packet: &Packet<'_>) {
        let Some(connection) = self.table.get(token) else { return };
        let has_payload = header.operation() == Some(Operation::Data);
        match packet.payload(if has_payload { header.len } else { 0 }) {
            Some(payload) => connection.on_packet(header, &payload),
            // Bytes are lost, so the stream is.
            None => connection.abort(),
        }
        self.table.changed(token);
    }

    /// Opens a stream that the guest asks for.
    fn open(&mut self, ports: Ports, request: &Header) -> bool {
        if self.table.is_full() {
            return false;
        }
        let Ok((ours, theirs)) = UnixStream::pair() else { return false };
        if self.offer(ports.host, theirs.as_fd()).is_err() {
            return false;
        }
        self.add(|stream| Connection::accepted(stream, ports, request), ours)
    }

    /// Passes the host's end of a stream to whoever listens for such.
    fn offer(&self, port: u32, stream: BorrowedFd<'_>) -> rustix::io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(slice::from_ref(&stream)));
        let bytes = port.to_le_bytes();
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        sendmsg(&self.host_streams, &[io::IoSlice::new(&bytes)], &mut control, flags)?;
        Ok(())
    }

    fn refuse(&mut self, header: &Header) {
        let mut answer = Header::of(Operation::Reset).addressed(self.cid);
        (answer.src_port, answer.dst_port, answer.kind) =
            (header.dst_port, header.src_port, header.kind);
        self.refusals.push_back(answer);
    }

    /// Sends the guest what there is for it, until it has no room.
    fn send(&mut self, ring: &Vring, memory: &GuestMemoryMmap) -> Result<(), Fault> {
        let Some(mut ring) = Receiving::open(ring, memory, &mut self.scratch)? else {
            return Ok(());
        };
        while let Some(refusal) = self.refusals.front() {
            if !ring.send(refusal)? {
                return ring.close();
            }
            self.refusals.pop_front();
        }
        while let Some(token) = self.table.next_turn() {
            let Some(connection) = self.table.get(token) else { continue };
            if connection.take_turn(self.cid, &mut ring)? == Turn::NoRoom {
                self.table.return_turn(token);
                break;
            }
            self.table.changed(token);
        }
        ring.close()
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
