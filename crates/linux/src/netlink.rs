//! Requests to the kernel's rtnetlink and nfnetlink, netlink(7) and rtnetlink(7): one socket, one request at a time.
//!
//! Only the frame is here: messages and attributes as bytes. What is in them is for those who know it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send,
    socket_with,
};

/// The flag of a request that makes something: fail where it is there, make it where it is not.
pub const CREATE: u16 = FLAG_CREATE | FLAG_EXCL;

const FLAG_REQUEST: u16 = 0x1;
const FLAG_ACK: u16 = 0x4;
const FLAG_DUMP_INTERRUPTED: u16 = 0x10;
const FLAG_EXCL: u16 = 0x200;
const FLAG_DUMP: u16 = 0x300;
const FLAG_CREATE: u16 = 0x400;

const TYPE_ERROR: u16 = 2;
const TYPE_DONE: u16 = 3;

/// The length of `struct nlmsghdr`.
const HEADER: usize = 16;

/// The kernel answers at once; this only guards against waiting for ever.
const DEADLINE: Duration = Duration::from_secs(10);

/// The kernel sends no longer datagrams in a dump.
const LONGEST: usize = 64 * 1024;

/// A message to the kernel: a fixed part of its type, then attributes.
#[derive(Debug, Clone)]
pub struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Message {
    /// A message of type `kind` (`RTM_…`) with that fixed part; `flags` are those of its kind: 0 or [`CREATE`] mostly.
    #[must_use]
    pub fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        Self { kind, flags, body: fixed.to_vec() }
    }

    /// Adds an attribute.
    pub fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        put(&mut self.body, kind, |body| body.extend_from_slice(value));
        self
    }

    /// Adds an attribute that is a string, with the NUL that the kernel wants.
    pub fn string(&mut self, kind: u16, value: &str) -> &mut Self {
        put(&mut self.body, kind, |body| {
            body.extend_from_slice(value.as_bytes());
            body.push(0);
        });
        self
    }

    /// Adds an attribute made of the attributes that `fill` adds.
    pub fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let mut inside = Self::new(0, 0, &[]);
        fill(&mut inside);
        self.attribute(kind, &inside.body)
    }

    /// All but the header.
    pub(crate) fn body(&self) -> &[u8] {
        &self.body
    }

    fn bytes(&self, flags: u16, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(HEADER + self.body.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(HEADER + self.body.len());
        bytes.extend_from_slice(&length.to_ne_bytes());
        bytes.extend_from_slice(&self.kind.to_ne_bytes());
        bytes.extend_from_slice(&(self.flags | flags).to_ne_bytes());
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        // Port 0: the kernel fills in ours.
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// Appends one attribute, padded to four bytes.
fn put(body: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = body.len();
    body.extend_from_slice(&[0; 4]);
    fill(body);
    let length = u16::try_from(body.len() - start).unwrap_or(u16::MAX);
    body[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    body[start + 2..start + 4].copy_from_slice(&kind.to_ne_bytes());
    body.resize(body.len().next_multiple_of(4), 0);
}

/// The attributes in a piece of a message: pairs of a type and a value. Ends at the first that is not whole.
#[derive(Debug, Clone)]
pub struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    /// Those in `bytes`.
    #[must_use]
    pub fn of(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Those behind the fixed part of a message, which is `fixed` bytes long.
    #[must_use]
    pub fn behind(message: &'a [u8], fixed: usize) -> Self {
        Self(message.get(fixed..).unwrap_or_default())
    }

    /// The value of the first attribute of a type.
    #[must_use]
    pub fn find(&self, kind: u16) -> Option<&'a [u8]> {
        self.clone().find_map(|(found, value)| (found == kind).then_some(value))
    }

    /// The number in the first attribute of a type.
    #[must_use]
    pub fn number(&self, kind: u16) -> Option<u32> {
        Some(u32::from_ne_bytes(self.find(kind)?.try_into().ok()?))
    }

    /// The text in the first attribute of a type.
    #[must_use]
    pub fn text(&self, kind: u16) -> Option<String> {
        let bytes = self.find(kind)?;
        let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
        Some(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        /// The two upper bits are flags: nested, network byte order.
        const TYPE: u16 = 0x3fff;
        let length = usize::from(u16::from_ne_bytes(self.0.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(self.0.get(2..4)?.try_into().ok()?) & TYPE;
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

/// A socket to the kernel, in the network namespace that the thread was in when it was opened.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// Opens one.
    ///
    /// # Errors
    ///
    /// What socket(2) says.
    pub fn open() -> io::Result<Self> {
        // The protocol NETLINK_ROUTE is 0, which `None` stands for.
        Self::of_protocol(None)
    }

    /// Opens one to the packet filter: `Documentation/netlink/specs/nftables.yaml`.
    ///
    /// # Errors
    ///
    /// What socket(2) says: EPROTONOSUPPORT where the kernel has no nfnetlink.
    pub(crate) fn netfilter() -> io::Result<Self> {
        Self::of_protocol(Some(rustix::net::netlink::NETFILTER))
    }

    fn of_protocol(protocol: Option<Protocol>) -> io::Result<Self> {
        let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
        let fd = socket_with(family, kind, SocketFlags::CLOEXEC, protocol)?;
        bind(&fd, &SocketAddrNetlink::new(0, 0))?;
        set_socket_timeout(&fd, Timeout::Recv, Some(DEADLINE))?;
        Ok(Self { fd, sequence: 0 })
    }

    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Sends a request and waits for its acknowledgement.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub fn request(&mut self, message: &Message) -> io::Result<()> {
        self.send(message, FLAG_ACK)?;
        self.receive(&mut |_, _| {}).map(drop)
    }

    /// Asks for all objects that `message` is about; each answer's type and bytes, without the header. A list that
    /// changed while it was made is asked for again.
    ///
    /// # Errors
    ///
    /// What the kernel answers; EAGAIN when the list would not keep still.
    pub fn dump(&mut self, message: &Message) -> io::Result<Vec<(u16, Vec<u8>)>> {
        const TRIES: u32 = 10;
        for _ in 0..TRIES {
            let mut found = Vec::new();
            self.send(message, FLAG_DUMP)?;
            if self.receive(&mut |kind, bytes| found.push((kind, bytes.to_vec())))? {
                return Ok(found);
            }
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Sends messages that are done together or not at all, and waits for the acknowledgement of the last. `begin` and
    /// `end` are what the kernel wants around them, and does not acknowledge.
    ///
    /// # Errors
    ///
    /// What the kernel answers to the first that it refuses.
    pub(crate) fn batch(
        &mut self,
        begin: &Message,
        messages: &[Message],
        end: &Message,
    ) -> io::Result<()> {
        let mut bytes = Vec::new();
        let mut put = |message: &Message, flags: u16| {
            self.sequence += 1;
            bytes.extend(message.bytes(FLAG_REQUEST | flags, self.sequence));
            self.sequence
        };
        let first = put(begin, 0);
        let mut last = first;
        for message in messages {
            last = put(message, FLAG_ACK);
        }
        put(end, 0);
        send(&self.fd, &bytes, SendFlags::empty())?;
        let mut buffer = vec![0; LONGEST];
        loop {
            let (length, _) = recv(&self.fd, &mut buffer[..], RecvFlags::empty())?;
            let mut rest = &buffer[..length];
            while let Some(answer) = Answer::parse(&mut rest) {
                if answer.kind != TYPE_ERROR || !(first..=last).contains(&answer.sequence) {
                    continue;
                }
                answer.outcome()?;
                if answer.sequence == last {
                    return Ok(());
                }
            }
        }
    }

    fn send(&mut self, message: &Message, flags: u16) -> io::Result<()> {
        self.sequence += 1;
        let bytes = message.bytes(FLAG_REQUEST | flags, self.sequence);
        send(&self.fd, &bytes, SendFlags::empty())?;
        Ok(())
    }

    /// Receives up to the end of the answer; `false` where it is not consistent.
    fn receive(&mut self, take: &mut dyn FnMut(u16, &[u8])) -> io::Result<bool> {
        let mut buffer = vec![0; LONGEST];
        let mut consistent = true;
        loop {
            let (length, _) = recv(&self.fd, &mut buffer[..], RecvFlags::empty())?;
            let mut rest = &buffer[..length];
            while let Some(answer) = Answer::parse(&mut rest) {
                if answer.sequence != self.sequence {
                    continue;
                }
                consistent &= answer.flags & FLAG_DUMP_INTERRUPTED == 0;
                match answer.kind {
                    TYPE_ERROR | TYPE_DONE => return answer.outcome().map(|()| consistent),
                    kind => take(kind, answer.body),
                }
            }
        }
    }
}

/// A socket on which the kernel tells of changes to the network of the namespace that the thread was in when it was
/// opened: links, addresses, routes, neighbours.
#[derive(Debug)]
pub struct News(OwnedFd);

impl News {
    /// Opens one. It tells of what happens from now on, and never blocks.
    ///
    /// # Errors
    ///
    /// What socket(2) says.
    pub fn open() -> io::Result<Self> {
        // RTMGRP_LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE
        const GROUPS: u32 = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        bind(&fd, &SocketAddrNetlink::new(0, GROUPS))?;
        Ok(Self(fd))
    }

    /// Takes one piece of news; what it says is for another request to find out.
    ///
    /// # Errors
    ///
    /// EAGAIN where there is none.
    pub fn take(&self) -> io::Result<()> {
        let mut start = [0; HEADER];
        match recv(&self.0, &mut start[..], RecvFlags::TRUNC) {
            // There was more than the socket holds: news all the same.
            Ok(_) | Err(rustix::io::Errno::NOBUFS) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsRawFd for News {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// One message of the kernel's.
struct Answer<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: &'a [u8],
}

impl<'a> Answer<'a> {
    fn parse(rest: &mut &'a [u8]) -> Option<Self> {
        let header = rest.get(..HEADER)?;
        let word = |at: usize| Some(u32::from_ne_bytes(header.get(at..at + 4)?.try_into().ok()?));
        let half = |at: usize| Some(u16::from_ne_bytes(header.get(at..at + 2)?.try_into().ok()?));
        let length = usize::try_from(word(0)?).ok()?;
        let body = rest.get(HEADER..length)?;
        let answer = Self { kind: half(4)?, flags: half(6)?, sequence: word(8)?, body };
        *rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(answer)
    }

    /// Both an error and the end of a dump begin with a negative errno, or 0.
    fn outcome(&self) -> io::Result<()> {
        let code = self.body.get(..4).and_then(|bytes| bytes.try_into().ok());
        match code.map_or(0, i32::from_ne_bytes) {
            0 => Ok(()),
            code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Attributes, Message, News};

    #[test]
    fn attributes_are_read_as_they_were_written() {
        let mut message = Message::new(16, 0, &[7; 4]);
        message.string(3, "eth0").nested(18, |inside| {
            inside.attribute(1, &[1, 2, 3, 4]);
        });
        let found: Vec<_> = Attributes::behind(&message.body, 4).collect();
        assert_eq!(found[0], (3, &b"eth0\0"[..]));
        assert_eq!(Attributes::behind(&message.body, 4).text(3).unwrap(), "eth0");
        let inside = Attributes::of(found[1].1);
        assert_eq!(inside.number(1), Some(u32::from_ne_bytes([1, 2, 3, 4])));
        assert_eq!(message.body.len() % 4, 0);
    }

    #[test]
    fn a_change_is_news_until_it_was_taken() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("netns");
        let namespace = crate::namespace::create_network(&path).unwrap();
        let outcome = namespace.inside(|| {
            let news = News::open()?;
            let none = news.take().unwrap_err().kind();
            crate::link::bring_up(1)?;
            news.take()?;
            Ok::<_, std::io::Error>(none)
        });
        crate::namespace::remove_network(&path).unwrap();
        assert_eq!(outcome.unwrap(), std::io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_cut_or_lying_attribute_ends_the_list() {
        assert_eq!(Attributes::of(&[]).count(), 0);
        assert_eq!(Attributes::of(&[8, 0, 1]).count(), 0);
        assert_eq!(Attributes::of(&[200, 0, 1, 0, 9, 9, 9, 9]).count(), 0);
        // A length of 0 would never end.
        assert_eq!(Attributes::of(&[0, 0, 1, 0, 0, 0, 1, 0]).count(), 0);
    }
}
