//! The device between a driver that is written down here and real Unix sockets.

use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use proptest::prelude::*;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
    recvmsg, socketpair,
};
use vhost_user_backend::VringT;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use super::credit::WINDOW;
use super::device::Device;
use super::packet::{
    HEADER_SIZE, HOST, Header, Operation, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
};
use super::queue::{Fault, Memory, Vring};
use super::table::MOST_STREAMS;

const CID: u64 = 3;
const SIZE: u16 = 256;
/// Room for one packet of the guest, or one receive buffer.
const SLOT: u64 = 0x1_1000;
const MEMORY: usize = 64 << 20;
/// As Linux offers them: a page and a header.
const RECEIVE_BUFFER: u32 = 4096 + 44;

/// A ring as the driver sees it.
struct Ring {
    base: u64,
    buffers: u64,
    available: u16,
    seen: u16,
}

impl Ring {
    fn descriptor(&self, memory: &GuestMemoryMmap, at: u16, addr: u64, len: u32, flags: u16) {
        let descriptor = RawDescriptor::from(Descriptor::new(addr, len, flags, at + 1));
        memory.write_obj(descriptor, GuestAddress(self.base + u64::from(at) * 16)).unwrap();
    }

    fn offer(&mut self, memory: &GuestMemoryMmap, head: u16) {
        let entry = self.base + 0x4000 + 4 + u64::from(self.available % SIZE) * 2;
        memory.write_obj(head, GuestAddress(entry)).unwrap();
        self.available = self.available.wrapping_add(1);
        memory.write_obj(self.available, GuestAddress(self.base + 0x4002)).unwrap();
    }

    fn used(&mut self, memory: &GuestMemoryMmap) -> Option<(u16, u32)> {
        let used: u16 = memory.read_obj(GuestAddress(self.base + 0x8002)).unwrap();
        if used == self.seen {
            return None;
        }
        let entry = self.base + 0x8000 + 4 + u64::from(self.seen % SIZE) * 8;
        self.seen = self.seen.wrapping_add(1);
        let id: u32 = memory.read_obj(GuestAddress(entry)).unwrap();
        let len = memory.read_obj(GuestAddress(entry + 4)).unwrap();
        Some((u16::try_from(id).unwrap(), len))
    }

    fn buffer(&self, head: u16) -> u64 {
        self.buffers + u64::from(head) * SLOT
    }
}

/// A guest with its device and the host's sockets.
struct Guest {
    memory: Memory,
    vrings: Vec<Vring>,
    receive: Ring,
    transmit: Ring,
    device: Device,
    streams: PathBuf,
    host: OwnedFd,
    _dir: tempfile::TempDir,
}

impl Guest {
    /// A guest whose driver is not up yet.
    fn booting() -> Self {
        let ranges = [(GuestAddress(0), MEMORY)];
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let streams = dir.path().join("streams");
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, host) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let mut device = Device::new(CID, UnixListener::bind(&streams).unwrap(), ours).unwrap();
        device.memory = Some(memory.clone());
        let vring = |at: u64| {
            let vring = Vring::new(memory.clone(), SIZE).unwrap();
            vring.set_queue_size(SIZE);
            let base = at * 0x1_0000;
            vring.set_queue_info(base, base + 0x4000, base + 0x8000).unwrap();
            vring
        };
        let vrings = (1..=3).map(vring).collect();
        let ring = |at: u64, buffers| Ring { base: at * 0x1_0000, buffers, available: 0, seen: 0 };
        let (receive, transmit) = (ring(1, 0x10_0000), ring(2, 0x200_0000));
        Self { memory, vrings, receive, transmit, device, streams, host, _dir: dir }
    }

    /// A guest whose driver is up.
    fn running() -> Self {
        let mut guest = Self::booting();
        guest.boot();
        guest
    }

    fn boot(&mut self) {
        for vring in &self.vrings {
            vring.set_queue_ready(true);
            vring.set_enabled(true);
        }
        for head in 0..SIZE {
            let buffer = self.receive.buffer(head);
            self.receive.descriptor(&self.memory.memory(), head, buffer, RECEIVE_BUFFER, 2);
            self.receive.offer(&self.memory.memory(), head);
        }
        self.run();
    }

    fn run(&mut self) {
        self.device.run(&self.vrings).unwrap();
    }

    /// What the guest gets, its buffers returned.
    fn receive(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.run();
        let mut packets = Vec::new();
        while let Some((head, len)) = self.receive.used(&self.memory.memory()) {
            let mut bytes = vec![0; usize::try_from(len).unwrap()];
            let buffer = GuestAddress(self.receive.buffer(head));
            self.memory.memory().read_slice(&mut bytes, buffer).unwrap();
            let header = Header::parse(bytes[..HEADER_SIZE].try_into().unwrap());
            assert_eq!((header.src_cid, header.dst_cid), (HOST, CID));
            assert_eq!(header.len as usize, bytes.len() - HEADER_SIZE);
            packets.push((header, bytes.split_off(HEADER_SIZE)));
            self.receive.offer(&self.memory.memory(), head);
        }
        packets
    }

    /// The one packet that the guest gets.
    fn receive_one(&mut self) -> Header {
        let packets = self.receive();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets[0].0
    }

    /// Sends a packet: header and payload in a descriptor each. Returns the driver's descriptor.
    fn send(&mut self, header: &Header, payload: &[u8]) {
        let memory = self.memory.memory();
        let buffer = self.transmit.buffer(0);
        memory.write_slice(&header.bytes(), GuestAddress(buffer)).unwrap();
        memory.write_slice(payload, GuestAddress(buffer + 0x1000)).unwrap();
        let len = u32::try_from(payload.len()).unwrap();
        let size = u32::try_from(HEADER_SIZE).unwrap();
        self.transmit.descriptor(&memory, 0, buffer, size, u16::from(len > 0));
        self.transmit.descriptor(&memory, 1, buffer + 0x1000, len, 0);
        self.transmit.offer(&memory, 0);
        self.run();
        assert_eq!(self.transmit.used(&memory), Some((0, 0)));
    }

    fn packet(operation: Operation, guest: u32, host: u32) -> Header {
        let mut header = Header::of(operation);
        (header.src_cid, header.dst_cid) = (CID, HOST);
        (header.src_port, header.dst_port, header.buf_alloc) = (guest, host, WINDOW);
        header
    }

    fn control(&mut self, operation: Operation, guest: u32, host: u32, flags: u32) {
        let header = Header { flags, ..Self::packet(operation, guest, host) };
        self.send(&header, &[]);
    }

    fn data(&mut self, guest: u32, host: u32, payload: &[u8]) {
        let header = Header {
            len: u32::try_from(payload.len()).unwrap(),
            ..Self::packet(Operation::Data, guest, host)
        };
        self.send(&header, payload);
    }

    /// A client that asked for `port`.
    fn client(&self, port: u32) -> UnixStream {
        let mut client = UnixStream::connect(&self.streams).unwrap();
        client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        client
    }

    /// A stream from a client to the guest's `port`, and our port of it.
    fn connected(&mut self, port: u32) -> (UnixStream, u32) {
        let mut client = self.client(port);
        let request = self.receive_one();
        assert_eq!((request.operation(), request.dst_port), (Some(Operation::Request), port));
        self.control(Operation::Response, port, request.src_port, 0);
        let line = format!("OK {}\n", request.src_port);
        let mut answer = vec![0; line.len()];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer, line.as_bytes());
        (client, request.src_port)
    }

    /// What the host was offered: the port and the stream.
    fn offered(&self) -> Option<(u32, UnixStream)> {
        let mut bytes = [0; 8];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let message = recvmsg(&self.host, &mut slices, &mut control, RecvFlags::empty()).ok()?;
        assert_eq!(message.bytes, 4);
        let Some(RecvAncillaryMessage::ScmRights(mut fds)) = control.drain().next() else {
            return None;
        };
        Some((u32::from_le_bytes(bytes[..4].try_into().unwrap()), fds.next()?.into()))
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..251).cycle().take(len).collect()
}

fn rest(mut stream: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_client_that_comes_before_the_driver_is_answered_when_it_is_up() {
    let mut guest = Guest::booting();
    let _early = guest.client(7);
    let gone = guest.client(8);
    guest.run();
    drop(gone);
    guest.run();
    guest.boot();
    assert_eq!(guest.receive_one().dst_port, 7);
}

#[test]
fn bytes_behind_the_connect_line_are_the_guests() {
    let mut guest = Guest::running();
    let mut client = guest.client(7);
    client.write_all(b"hello").unwrap();
    let request = guest.receive_one();
    guest.control(Operation::Response, 7, request.src_port, 0);
    let packets = guest.receive();
    assert_eq!(packets[0].1, b"hello");
    assert_eq!((packets[0].0.src_port, packets[0].0.dst_port), (request.src_port, 7));
}

#[test]
fn a_port_where_nobody_listens_closes_the_clients_connection() {
    let mut guest = Guest::running();
    let client = guest.client(7);
    let request = guest.receive_one();
    guest.control(Operation::Reset, 7, request.src_port, 0);
    assert_eq!(rest(&client), b"");
    assert!(guest.device.table.is_empty());
}

#[test]
fn another_greeting_closes_the_clients_connection() {
    let mut guest = Guest::running();
    for line in ["CONNECT x\n", "HELLO 7\n", "CONNECT 4294967296\n", &"C".repeat(40)] {
        let mut client = UnixStream::connect(&guest.streams).unwrap();
        client.write_all(line.as_bytes()).unwrap();
        guest.run();
        let mut byte = [0];
        assert!(!client.read(&mut byte).is_ok_and(|count| count > 0));
    }
    assert!(guest.device.table.is_empty());
}

#[test]
fn a_stream_of_the_guest_is_offered_to_the_host() {
    let mut guest = Guest::running();
    guest.control(Operation::Request, 9, 1024, 0);
    let (port, mut stream) = guest.offered().unwrap();
    assert_eq!(port, 1024);
    assert_eq!(guest.receive_one().operation(), Some(Operation::Response));
    guest.data(9, 1024, b"to the host");
    let mut bytes = [0; 11];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"to the host");
    stream.write_all(b"to the guest").unwrap();
    assert_eq!(guest.receive()[0].1, b"to the guest");
}

#[test]
fn a_stream_of_the_guest_that_nobody_takes_is_refused() {
    let mut guest = Guest::running();
    let (_, other) = UnixStream::pair().unwrap();
    guest.host = other.into();
    guest.control(Operation::Request, 9, 1024, 0);
    let refusal = guest.receive_one();
    assert_eq!((refusal.operation(), refusal.dst_port), (Some(Operation::Reset), 9));
    assert!(guest.device.table.is_empty());
}

#[test]
fn what_the_guest_sent_before_it_closed_reaches_a_slow_host() {
    let mut guest = Guest::running();
    let (client, port) = guest.connected(7);
    let bytes = pattern(WINDOW as usize);
    for chunk in bytes.chunks(0x8000) {
        guest.data(7, port, chunk);
    }
    guest.control(Operation::Shutdown, 7, port, SHUTDOWN_BOTH);
    let early =
        guest.receive().iter().any(|(header, _)| header.operation() == Some(Operation::Reset));
    // The guest does not wait any longer for our answer.
    if !early {
        guest.control(Operation::Reset, 7, port, 0);
    }
    let mut got = vec![0; bytes.len()];
    let reader = std::thread::spawn(move || {
        (&client).read_exact(&mut got).unwrap();
        assert_eq!(rest(&client), b"");
        got
    });
    while !guest.device.table.is_empty() {
        guest.run();
        std::thread::yield_now();
    }
    assert_eq!(reader.join().unwrap(), bytes);
}

#[test]
fn a_guest_that_goes_leaves_its_last_words() {
    let mut guest = Guest::running();
    let (client, port) = guest.connected(7);
    let bytes = pattern(0x8000);
    guest.data(7, port, &bytes);
    guest.device.hang_up();
    assert_eq!(rest(&client), bytes);
    assert!(guest.device.table.is_empty());
}

#[test]
fn either_side_may_stop_sending_and_still_receive() {
    let mut guest = Guest::running();
    let (mut client, port) = guest.connected(7);
    guest.control(Operation::Shutdown, 7, port, SHUTDOWN_SEND);
    assert_eq!(rest(&client), b"");
    client.write_all(b"still here").unwrap();
    assert_eq!(guest.receive()[0].1, b"still here");

    let (client, port) = guest.connected(8);
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let shutdown = guest.receive_one();
    assert_eq!((shutdown.operation(), shutdown.flags), (Some(Operation::Shutdown), SHUTDOWN_SEND));
    guest.data(8, port, b"still here");
    guest.control(Operation::Shutdown, 8, port, SHUTDOWN_BOTH);
    assert_eq!(rest(&client), b"still here");
    assert_eq!(guest.receive_one().operation(), Some(Operation::Reset));
}

#[test]
fn a_guest_that_stops_receiving_breaks_the_hosts_pipe() {
    let mut guest = Guest::running();
    let (mut client, port) = guest.connected(7);
    client.write_all(b"unread").unwrap();
    guest.control(Operation::Shutdown, 7, port, SHUTDOWN_RECEIVE);
    assert_eq!(client.write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    guest.data(7, port, b"last");
    guest.control(Operation::Shutdown, 7, port, SHUTDOWN_SEND);
    assert_eq!(rest(&client), b"last", "unread bytes must not turn the end into ECONNRESET");
}

#[test]
fn a_client_that_is_killed_ends_the_guests_stream() {
    let mut guest = Guest::running();
    let (client, port) = guest.connected(7);
    drop(client);
    let packets = guest.receive();
    let (shutdown, _) = packets.last().unwrap();
    assert_eq!((shutdown.operation(), shutdown.flags), (Some(Operation::Shutdown), SHUTDOWN_BOTH));
    guest.data(7, port, b"into the void");
    guest.control(Operation::Reset, 7, port, 0);
    assert!(guest.device.table.is_empty());
}

#[test]
fn a_guest_gets_no_more_than_it_has_room_for() {
    let mut guest = Guest::running();
    let (mut client, port) = guest.connected(7);
    let narrow = |fwd_cnt| Header {
        buf_alloc: 1000,
        fwd_cnt,
        ..Guest::packet(Operation::CreditUpdate, 7, port)
    };
    guest.send(&narrow(0), &[]);
    client.write_all(&pattern(2500)).unwrap();
    let mut got = Vec::new();
    for taken in [1000, 2000, 3000] {
        for (_, bytes) in guest.receive() {
            got.extend(bytes);
        }
        assert_eq!(got.len(), taken.min(2500));
        guest.send(&narrow(u32::try_from(taken).unwrap()), &[]);
    }
    assert_eq!(got, pattern(2500));
}

#[test]
fn a_guest_that_sends_without_credit_loses_the_stream() {
    let mut guest = Guest::running();
    let (_client, port) = guest.connected(7);
    let mut sent = 0;
    while !guest.receive().iter().any(|(header, _)| header.operation() == Some(Operation::Reset)) {
        guest.data(7, port, &pattern(0x8000));
        sent += 0x8000;
        // The socket buffers some, the window is the rest.
        assert!(sent < 8 << 20);
    }
    assert!(guest.device.table.is_empty());
}

#[test]
fn streams_are_bounded() {
    let mut guest = Guest::running();
    let mut kept = Vec::new();
    for port in 0..u32::try_from(MOST_STREAMS).unwrap() {
        guest.control(Operation::Request, port, 1, 0);
        kept.push(guest.offered().unwrap());
        assert_eq!(guest.receive_one().operation(), Some(Operation::Response));
    }
    guest.control(Operation::Request, 5000, 1, 0);
    assert_eq!(guest.receive_one().operation(), Some(Operation::Reset));
    guest.control(Operation::Reset, 0, 1, 0);
    guest.control(Operation::Request, 5000, 1, 0);
    assert_eq!(guest.receive_one().operation(), Some(Operation::Response));
}

#[test]
fn a_packet_that_is_not_in_memory_is_dropped_and_one_that_is_cut_short_ends_its_stream() {
    let mut guest = Guest::running();
    let (client, port) = guest.connected(7);
    let memory = guest.memory.memory();
    guest.transmit.descriptor(&memory, 0, MEMORY as u64 - 4, 44, 0);
    guest.transmit.offer(&memory, 0);
    assert_eq!(guest.receive().len(), 0);
    assert_eq!(guest.transmit.used(&memory), Some((0, 0)));

    let header = Header { len: 100, ..Guest::packet(Operation::Data, 7, port) };
    guest.send(&header, b"short");
    assert_eq!(guest.receive_one().operation(), Some(Operation::Reset));
    assert_eq!(rest(&client), b"");
}

#[test]
fn a_broken_ring_is_a_fault_and_not_a_panic() {
    let mut guest = Guest::running();
    let index = GuestAddress(guest.transmit.base + 0x4002);
    guest.memory.memory().write_obj(SIZE + 1, index).unwrap();
    let fault = guest.device.run(&guest.vrings).unwrap_err();
    assert!(matches!(fault, Fault::Ring { ring: "transmit", .. }), "{fault}");

    let mut guest = Guest::running();
    guest.receive.descriptor(&guest.memory.memory(), 0, 0x10_0000, 20, 2);
    let _client = guest.client(7);
    assert!(matches!(guest.device.run(&guest.vrings).unwrap_err(), Fault::Buffer));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_sequence_of_packets_breaks_the_device(
        steps in proptest::collection::vec(
            (0..9u16, 0..3u32, 0..3u32, 0..3000u32, any::<u32>(), 0..3000usize, 0..4u8), 1..150),
    ) {
        let mut guest = Guest::running();
        let mut streams = Vec::new();
        for (op, from, to, len, number, payload, host) in steps {
            let mut header = Guest::packet(Operation::Data, from, to);
            header.op = op;
            header.len = if number % 4 == 0 { len } else { u32::try_from(payload).unwrap() };
            header.flags = number;
            if number % 7 == 0 {
                (header.buf_alloc, header.fwd_cnt) = (number, len);
            }
            if number % 31 == 0 {
                header.kind = 2;
            }
            guest.send(&header, &pattern(payload));
            streams.extend(guest.offered());
            match host {
                0 => drop(streams.pop()),
                1 => streams.iter_mut().for_each(|(_, stream)| {
                    stream.set_nonblocking(true).unwrap();
                    drop(stream.write(&pattern(payload)));
                    drop(stream.read(&mut [0; 2000]));
                }),
                _ => {}
            }
            guest.receive();
        }
        guest.device.hang_up();
        drop(streams);
        guest.run();
        prop_assert!(guest.device.table.is_empty());
    }
}
