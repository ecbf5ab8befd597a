//! One stream between guest and host: its state, its credit, its Unix socket.
//!
//! ```text
//!   host connects:  Greeting ──CONNECT line──► Requested ──guest's RESPONSE──┐
//!   guest connects: ───────────────────────────────────────────────────────► Open
//!                                                                             │ guest's SHUTDOWN of both directions,
//!                                                                             │ or an error: all but the backlog ends
//!   Over ◄──RST sent── Closing ◄──────────────────────────────────────────────┤
//!   Over ◄──backlog written── Forgotten ◄─────────guest's RST─────────────────┘
//! ```
//!
//! What the guest sent before it closed reaches the host in every case, also when the guest loses patience and
//! forgets the stream (Linux does after 8 s): a slow reader loses nothing. Either direction may end first.

use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::event::epoll::EventFlags;
use rustix::net::RecvFlags;
use vm_memory::{VolatileMemoryError, VolatileSlice, WriteVolatile};

use super::backlog::Backlog;
use super::credit::{Incoming, Outgoing, WINDOW};
use super::packet::{Header, Operation, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::queue::{Fault, LARGEST_READ, Receiving};

/// The two ports that tell a guest's streams apart: the host has one context id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Greeting,
    Requested,
    Open,
    Closing,
    Forgotten,
    Over,
}

/// What a turn at the receive ring came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// There may be more to do.
    More,
    /// Nothing to send.
    Idle,
    /// The guest has no room; the turn was not used.
    NoRoom,
}

/// A stream.
#[derive(Debug)]
pub(super) struct Connection {
    ports: Ports,
    stream: UnixStream,
    phase: Phase,
    /// The one packet that must go before all others.
    due: Option<Operation>,
    /// The socket may have bytes, or its end, for the guest: true from an event until a read blocks.
    readable: bool,
    outgoing: Outgoing,
    incoming: Incoming,
    backlog: Backlog,
    /// What the guest has shut down, as `VIRTIO_VSOCK_SHUTDOWN_F_*`.
    guest_shut: u32,
    /// What the host has shut down.
    host_shut: u32,
    /// What the guest was told of `host_shut`.
    told_shut: u32,
    /// The guest asked for our credit.
    asked: bool,
    /// We asked for the guest's credit since it last told.
    asking: bool,
}

/// The longest line that a client can greet us with: `CONNECT 4294967295\n` and some blanks.
const LONGEST_GREETING: usize = 32;

impl Connection {
    fn new(stream: UnixStream, ports: Ports, phase: Phase, due: Option<Operation>) -> Self {
        Self {
            ports,
            stream,
            phase,
            due,
            readable: false,
            outgoing: Outgoing::default(),
            incoming: Incoming::default(),
            backlog: Backlog::default(),
            guest_shut: 0,
            host_shut: 0,
            told_shut: 0,
            asked: false,
            asking: false,
        }
    }

    /// A client of the host that has yet to say where it wants to go. The stream must not block.
    pub(super) fn greeting(stream: UnixStream) -> Self {
        Self::new(stream, Ports { host: 0, guest: 0 }, Phase::Greeting, None)
    }

    /// A stream that the guest asked for with `request`. The stream must not block.
    pub(super) fn accepted(stream: UnixStream, ports: Ports, request: &Header) -> Self {
        let mut this = Self::new(stream, ports, Phase::Open, Some(Operation::Response));
        this.outgoing.update(request.buf_alloc, request.fwd_cnt);
        this
    }

    pub(super) fn ports(&self) -> Ports {
        self.ports
    }

    pub(super) fn is_greeting(&self) -> bool {
        self.phase == Phase::Greeting
    }

    /// Whether the guest no longer knows it, so that its ports are free.
    pub(super) fn is_forgotten(&self) -> bool {
        matches!(self.phase, Phase::Forgotten | Phase::Over)
    }

    /// Whether nothing is left to do for it.
    pub(super) fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    /// Reads the client's `CONNECT <port>` line: the port, or nothing as long as the line is not whole.
    ///
    /// # Errors
    ///
    /// When it is another line, or the client has left.
    pub(super) fn read_greeting(&mut self) -> io::Result<Option<u32>> {
        let mut bytes = [0; LONGEST_GREETING];
        // What follows the line is the guest's: look first, then take the line only.
        let seen = match rustix::net::recv(&self.stream, &mut bytes, RecvFlags::PEEK) {
            Ok((_, seen)) => seen,
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let Some(end) = bytes[..seen].iter().position(|&byte| byte == b'\n') else {
            let hopeless = seen == 0 || seen == LONGEST_GREETING;
            return if hopeless { Err(io::ErrorKind::InvalidData.into()) } else { Ok(None) };
        };
        (&self.stream).read_exact(&mut bytes[..=end])?;
        let line = std::str::from_utf8(&bytes[..end]).map_err(io::Error::other)?;
        let port = line.strip_prefix("CONNECT ").and_then(|port| port.trim().parse().ok());
        port.map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Asks the guest for the stream that the client wants.
    pub(super) fn request(&mut self, ports: Ports) {
        self.ports = ports;
        self.phase = Phase::Requested;
        self.due = Some(Operation::Request);
        self.readable = true;
    }

    /// Takes in that something happened on the socket.
    pub(super) fn on_event(&mut self, flags: EventFlags) {
        let left = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        if left || flags.intersects(EventFlags::IN | EventFlags::RDHUP) {
            self.readable = true;
        }
        match self.phase {
            Phase::Greeting if left => self.phase = Phase::Over,
            // The guest has not heard of it yet and need not.
            Phase::Requested if left && self.due.is_some() => self.phase = Phase::Over,
            Phase::Requested if left => self.abort(),
            Phase::Open | Phase::Closing | Phase::Forgotten => {
                if left {
                    self.host_is_deaf();
                } else if flags.contains(EventFlags::OUT) {
                    self.flush();
                }
            }
            _ => {}
        }
    }

    /// Takes in a packet of this stream. `payload` is what the guest's header says that it is.
    pub(super) fn on_packet(&mut self, header: &Header, payload: &[VolatileSlice<'_>]) {
        self.outgoing.update(header.buf_alloc, header.fwd_cnt);
        self.asking = false;
        match (header.operation(), self.phase) {
            (Some(Operation::Response), Phase::Requested) if self.due.is_none() => self.open(),
            (Some(Operation::Reset), _) => self.forget(),
            (Some(Operation::Data), Phase::Open) => self.on_data(header.len, payload),
            (Some(Operation::Shutdown), Phase::Open) => self.on_shutdown(header.flags),
            (Some(Operation::CreditRequest), Phase::Open) => self.asked = true,
            (Some(Operation::CreditUpdate), _)
            | (_, Phase::Closing | Phase::Forgotten | Phase::Over) => {}
            _ => self.abort(),
        }
    }

    fn open(&mut self) {
        self.phase = Phase::Open;
        let line = format!("OK {}\n", self.ports.host);
        // The first bytes on a fresh socket: they fit, or the client has left.
        let sent = io::Write::write(&mut &self.stream, line.as_bytes());
        if sent.ok() != Some(line.len()) {
            self.host_is_deaf();
        }
    }

    fn on_data(&mut self, len: u32, payload: &[VolatileSlice<'_>]) {
        if self.guest_shut & SHUTDOWN_SEND != 0 || !self.incoming.admit(len) {
            self.abort();
            return;
        }
        for slice in payload {
            let written = if self.backlog.is_empty() { self.write(slice) } else { 0 };
            self.forward(written);
            let left = slice.len() - written;
            if self.host_shut & SHUTDOWN_RECEIVE != 0 {
                self.forward(left);
            } else if let Ok(rest) = slice.offset(written)
                && left > 0
            {
                self.backlog.push(left, |bytes| {
                    rest.copy_to(bytes);
                });
            }
        }
    }

    /// Writes straight from the guest's memory what the socket takes at once.
    fn write(&mut self, bytes: &VolatileSlice<'_>) -> usize {
        let mut written = 0;
        while written < bytes.len() && self.host_shut & SHUTDOWN_RECEIVE == 0 {
            let Ok(rest) = bytes.offset(written) else { break };
            match self.stream.write_volatile(&rest) {
                Ok(count) => written += count,
                Err(VolatileMemoryError::IOError(error)) if would_block(&error) => break,
                Err(_) => self.host_is_deaf(),
            }
        }
        written
    }

    fn forward(&mut self, count: usize) {
        self.incoming.forward(u32::try_from(count).expect("a packet's length is a u32"));
    }

    fn on_shutdown(&mut self, flags: u32) {
        self.guest_shut |= flags & SHUTDOWN_BOTH;
        if self.guest_shut & SHUTDOWN_RECEIVE != 0 {
            self.stop_reading();
        }
        if self.guest_shut == SHUTDOWN_BOTH {
            self.phase = Phase::Closing;
        }
        self.settle();
    }

    /// Has the host's writers get EPIPE from now on.
    fn stop_reading(&mut self) {
        // Fails when the host has left, which its events tell too.
        drop(self.stream.shutdown(Shutdown::Read));
        // A Unix socket closed with unread bytes gives its peer ECONNRESET instead of the end of the stream. The host
        // cannot write any more, so there is an end to these.
        let mut bytes = [0; 4096];
        while self.stream.read(&mut bytes).is_ok_and(|count| count > 0) {}
    }

    /// The guest does not know the stream any more: what it sent before still goes to the host.
    pub(super) fn forget(&mut self) {
        let known = matches!(self.phase, Phase::Open | Phase::Closing);
        self.phase = if known { Phase::Forgotten } else { Phase::Over };
        self.guest_shut = SHUTDOWN_BOTH;
        self.settle();
    }

    /// Breaks the stream off: a packet that should not have come, or a client that left.
    pub(super) fn abort(&mut self) {
        self.phase = Phase::Closing;
        self.discard();
        self.due = Some(Operation::Reset);
    }

    fn discard(&mut self) {
        let count = self.backlog.len();
        self.backlog = Backlog::default();
        self.forward(count);
    }

    fn host_is_deaf(&mut self) {
        self.host_shut |= SHUTDOWN_RECEIVE;
        self.discard();
        self.settle();
    }

    fn flush(&mut self) {
        if self.backlog.is_empty() {
            return;
        }
        let (count, result) = self.backlog.flush(&self.stream);
        self.forward(count);
        match result {
            Err(error) if !would_block(&error) => self.host_is_deaf(),
            _ => self.settle(),
        }
    }

    /// Does what had to wait for the backlog to reach the host.
    fn settle(&mut self) {
        if !self.backlog.is_empty() {
            return;
        }
        if self.guest_shut & SHUTDOWN_SEND != 0 {
            // Fails when the host has left, which its events tell too.
            drop(self.stream.shutdown(Shutdown::Write));
        }
        match self.phase {
            // Linux takes a close as finished when this comes.
            Phase::Closing => self.due = Some(Operation::Reset),
            Phase::Forgotten => self.phase = Phase::Over,
            _ => {}
        }
    }

    fn header(&self, operation: Operation) -> Header {
        let mut header = Header::of(operation);
        (header.src_port, header.dst_port) = (self.ports.host, self.ports.guest);
        (header.buf_alloc, header.fwd_cnt) = (WINDOW, self.incoming.fwd_cnt());
        header
    }

    fn can_read(&self) -> bool {
        self.readable
            && self.guest_shut & SHUTDOWN_RECEIVE == 0
            && self.host_shut & SHUTDOWN_SEND == 0
    }

    /// The packet without payload that should go next.
    fn control(&self) -> Option<Operation> {
        if self.due.is_some() || self.phase != Phase::Open {
            return self.due;
        }
        if self.host_shut != self.told_shut {
            return Some(Operation::Shutdown);
        }
        if self.asked || self.incoming.is_due() {
            return Some(Operation::CreditUpdate);
        }
        let starved = self.can_read() && self.outgoing.free() == 0 && !self.asking;
        starved.then_some(Operation::CreditRequest)
    }

    fn has_data(&self) -> bool {
        let open = self.phase == Phase::Open && self.due.is_none();
        open && self.can_read() && self.outgoing.free() > 0
    }

    /// Whether it has something for the guest.
    pub(super) fn wants_turn(&self) -> bool {
        self.has_data() || self.control().is_some()
    }

    /// Sends one thing to the guest: a packet without payload, or what one read of the socket gives.
    pub(super) fn take_turn(&mut self, cid: u64, to: &mut Receiving<'_>) -> Result<Turn, Fault> {
        if let Some(operation) = self.control() {
            let mut header = self.header(operation).addressed(cid);
            if operation == Operation::Shutdown {
                header.flags = self.host_shut;
            }
            if !to.send(&header)? {
                return Ok(Turn::NoRoom);
            }
            self.on_sent(operation);
            return Ok(Turn::More);
        }
        if !self.has_data() {
            return Ok(Turn::Idle);
        }
        let limit =
            usize::try_from(self.outgoing.free()).map_or(LARGEST_READ, |n| n.min(LARGEST_READ));
        let header = self.header(Operation::Data).addressed(cid);
        let mut stream = &self.stream;
        match to.send_data(header, limit, |bytes| stream.read(bytes))? {
            None => return Ok(Turn::NoRoom),
            Some(Ok(0)) => self.host_shut |= SHUTDOWN_SEND,
            Some(Ok(count)) => {
                self.outgoing.send(u32::try_from(count).expect("at most LARGEST_READ"));
                self.on_sent(Operation::Data);
            }
            Some(Err(error)) if would_block(&error) => self.readable = false,
            Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Some(Err(_)) => {
                self.host_shut |= SHUTDOWN_SEND;
                self.host_is_deaf();
            }
        }
        Ok(Turn::More)
    }

    fn on_sent(&mut self, operation: Operation) {
        self.incoming.tell();
        self.asked = false;
        if self.due == Some(operation) {
            self.due = None;
        }
        match operation {
            Operation::Shutdown => self.told_shut = self.host_shut,
            Operation::CreditRequest => self.asking = true,
            Operation::Reset => self.phase = Phase::Over,
            _ => {}
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn would_block(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}
