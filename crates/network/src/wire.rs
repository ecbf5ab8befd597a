//! What rtnetlink says of links, addresses, routes and neighbours: rtnetlink(7), the kernel's
//! `Documentation/netlink/specs/rt-*.yaml`.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use linux::netlink::{Attributes, Message, Socket};

use crate::Error;

pub(crate) const AF_INET: u8 = 2;
pub(crate) const AF_INET6: u8 = 10;

const RTM_GETLINK: u16 = 18;
const RTM_GETADDR: u16 = 22;
const RTM_GETROUTE: u16 = 26;
const RTM_GETNEIGH: u16 = 30;

/// A link, as far as we look at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RawLink {
    pub index: u32,
    /// `ARPHRD_…`.
    pub hardware: u16,
    /// `IFF_…`.
    pub flags: u32,
    pub name: String,
    pub mac: Vec<u8>,
    pub mtu: u32,
    pub kind: String,
    pub queues: u32,
    /// The bridge, bond or the like that it is a port of.
    pub master: Option<u32>,
}

/// An address of a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RawAddress {
    pub index: u32,
    pub address: Prefix,
    pub scope: u8,
    /// `IFA_F_…`.
    pub flags: u32,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RawRoute {
    pub family: u8,
    pub destination: Option<Prefix>,
    pub gateway: Option<IpAddr>,
    pub source: Option<IpAddr>,
    pub index: Option<u32>,
    pub metric: u32,
    pub table: u32,
    /// `RTPROT_…`.
    pub protocol: u8,
    pub scope: u8,
    /// `RTN_…`.
    pub kind: u8,
    /// `RTNH_F_…` and `RTM_F_…`.
    pub flags: u32,
    pub multipath: bool,
    /// It has parts that we cannot carry over.
    pub odd: bool,
}

/// An entry of the ARP or neighbour table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RawNeighbor {
    pub index: u32,
    pub address: IpAddr,
    pub mac: Vec<u8>,
    /// `NUD_…`.
    pub state: u16,
}

/// An address with the length of its network's part, as CIDR writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Prefix {
    pub address: IpAddr,
    pub length: u8,
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

/// All that there is in the calling thread's network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Raw {
    pub links: Vec<RawLink>,
    pub addresses: Vec<RawAddress>,
    pub routes: Vec<RawRoute>,
    pub neighbors: Vec<RawNeighbor>,
}

impl Raw {
    pub(crate) fn read() -> Result<Self, Error> {
        let socket = Socket::open();
        let mut socket = socket.map_err(kernel("open a netlink socket"))?;
        Ok(Self {
            links: list(&mut socket, "list the links", RTM_GETLINK, &[0; 16], link)?,
            addresses: list(&mut socket, "list the addresses", RTM_GETADDR, &[0; 8], address)?,
            routes: list(&mut socket, "list the routes", RTM_GETROUTE, &[0; 12], route)?,
            neighbors: list(&mut socket, "list the neighbours", RTM_GETNEIGH, &[0; 12], neighbor)?,
        })
    }
}

pub(crate) fn kernel(action: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Kernel { action: action.into(), source }
}

fn list<T>(
    socket: &mut Socket,
    action: &str,
    request: u16,
    fixed: &[u8],
    parse: impl Fn(&[u8]) -> Option<T>,
) -> Result<Vec<T>, Error> {
    // An answer is of type `request - 2`: RTM_NEW… of RTM_GET….
    let found = socket.dump(&Message::new(request, 0, fixed)).map_err(kernel(action))?;
    let answers = found.iter().filter(|(kind, _)| *kind == request - 2);
    Ok(answers.filter_map(|(_, bytes)| parse(bytes)).collect())
}

/// `struct ifinfomsg` and its attributes.
fn link(bytes: &[u8]) -> Option<RawLink> {
    const IFLA_ADDRESS: u16 = 1;
    const IFLA_IFNAME: u16 = 3;
    const IFLA_MTU: u16 = 4;
    const IFLA_MASTER: u16 = 10;
    const IFLA_LINKINFO: u16 = 18;
    const IFLA_NUM_TX_QUEUES: u16 = 31;
    const IFLA_INFO_KIND: u16 = 1;
    let attributes = Attributes::behind(bytes, 16);
    let info = Attributes::of(attributes.find(IFLA_LINKINFO).unwrap_or_default());
    Some(RawLink {
        index: word(bytes, 4)?,
        hardware: half(bytes, 2)?,
        flags: word(bytes, 8)?,
        name: attributes.text(IFLA_IFNAME)?,
        mac: attributes.find(IFLA_ADDRESS).unwrap_or_default().to_vec(),
        mtu: attributes.number(IFLA_MTU).unwrap_or(0),
        kind: info.text(IFLA_INFO_KIND).unwrap_or_default(),
        queues: attributes.number(IFLA_NUM_TX_QUEUES).unwrap_or(1),
        master: attributes.number(IFLA_MASTER),
    })
}

/// `struct ifaddrmsg` and its attributes.
fn address(bytes: &[u8]) -> Option<RawAddress> {
    const IFA_ADDRESS: u16 = 1;
    const IFA_LOCAL: u16 = 2;
    const IFA_FLAGS: u16 = 8;
    let attributes = Attributes::behind(bytes, 8);
    // On a point-to-point link IFA_ADDRESS is the other end's.
    let own = attributes.find(IFA_LOCAL).or_else(|| attributes.find(IFA_ADDRESS))?;
    Some(RawAddress {
        index: word(bytes, 4)?,
        address: Prefix { address: ip(own)?, length: *bytes.get(1)? },
        scope: *bytes.get(3)?,
        flags: attributes.number(IFA_FLAGS).unwrap_or(u32::from(*bytes.get(2)?)),
    })
}

/// `struct rtmsg` and its attributes.
fn route(bytes: &[u8]) -> Option<RawRoute> {
    const RTA_DST: u16 = 1;
    const RTA_SRC: u16 = 2;
    const RTA_OIF: u16 = 4;
    const RTA_GATEWAY: u16 = 5;
    const RTA_PRIORITY: u16 = 6;
    const RTA_PREFSRC: u16 = 7;
    const RTA_MULTIPATH: u16 = 9;
    const RTA_TABLE: u16 = 15;
    const RTA_VIA: u16 = 18;
    const RTA_ENCAP: u16 = 22;
    let attributes = Attributes::behind(bytes, 12);
    let length = *bytes.get(1)?;
    let find_ip = |kind| attributes.find(kind).and_then(ip);
    let odd = [RTA_SRC, RTA_VIA, RTA_ENCAP];
    Some(RawRoute {
        family: *bytes.first()?,
        destination: find_ip(RTA_DST).map(|address| Prefix { address, length }),
        gateway: find_ip(RTA_GATEWAY),
        source: find_ip(RTA_PREFSRC),
        index: attributes.number(RTA_OIF),
        metric: attributes.number(RTA_PRIORITY).unwrap_or(0),
        table: attributes.number(RTA_TABLE).unwrap_or(u32::from(*bytes.get(4)?)),
        protocol: *bytes.get(5)?,
        scope: *bytes.get(6)?,
        kind: *bytes.get(7)?,
        flags: word(bytes, 8)?,
        multipath: attributes.find(RTA_MULTIPATH).is_some(),
        odd: odd.iter().any(|&kind| attributes.find(kind).is_some()),
    })
}

/// `struct ndmsg` and its attributes.
fn neighbor(bytes: &[u8]) -> Option<RawNeighbor> {
    const NDA_DST: u16 = 1;
    const NDA_LLADDR: u16 = 2;
    let attributes = Attributes::behind(bytes, 12);
    Some(RawNeighbor {
        index: word(bytes, 4)?,
        address: ip(attributes.find(NDA_DST)?)?,
        mac: attributes.find(NDA_LLADDR)?.to_vec(),
        state: half(bytes, 8)?,
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()),
        _ => None,
    }
}
