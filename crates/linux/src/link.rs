//! Network links of the calling thread's network namespace, and the traffic control that redirects their frames:
//! rtnetlink(7), tc-mirred(8), tc-u32(8).

use std::io;

use crate::netlink::{self, Message, Socket};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;

const IFLA_MTU: u16 = 4;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;

/// `ffff:`, where the ingress qdisc's filters hang.
const INGRESS_HANDLE: u32 = 0xffff_0000;
/// `TC_H_INGRESS`, where the ingress qdisc itself hangs.
const INGRESS_PARENT: u32 = 0xffff_fff1;

/// The index of the link named `name`; `None` where there is none.
///
/// # Errors
///
/// What the ioctl says.
pub fn index(name: &str) -> io::Result<Option<u32>> {
    let socket = Socket::open()?;
    match rustix::net::netdevice::name_to_index(socket.fd(), name) {
        Ok(index) => Ok(Some(index)),
        Err(rustix::io::Errno::NODEV | rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Deletes the link named `name`. One that is not there is a success.
///
/// # Errors
///
/// What rtnetlink answers.
pub fn delete(name: &str) -> io::Result<()> {
    let Some(index) = index(name)? else { return Ok(()) };
    let outcome = Socket::open()?.request(&Message::new(RTM_DELLINK, 0, &header(index, 0, 0)));
    unless_gone(outcome)
}

/// Gives a link its MTU and brings it up.
///
/// # Errors
///
/// What rtnetlink answers: EINVAL for an MTU that the link cannot have.
pub fn set_up(index: u32, mtu: u32) -> io::Result<()> {
    let mut message = Message::new(RTM_NEWLINK, 0, &header(index, IFF_UP, IFF_UP));
    message.attribute(IFLA_MTU, &mtu.to_ne_bytes());
    Socket::open()?.request(&message)
}

/// Brings a link up, and leaves its MTU.
///
/// # Errors
///
/// What rtnetlink answers.
pub fn bring_up(index: u32) -> io::Result<()> {
    Socket::open()?.request(&Message::new(RTM_NEWLINK, 0, &header(index, IFF_UP, IFF_UP)))
}

const IFF_UP: u32 = 1;

/// Keeps a link from getting an IPv6 address by itself when it comes up. A kernel without IPv6 has nothing to keep.
///
/// # Errors
///
/// What rtnetlink answers, but for a missing IPv6.
pub fn without_own_address(index: u32) -> io::Result<()> {
    const AF_INET6: u16 = 10;
    let mut message = Message::new(RTM_NEWLINK, 0, &header(index, 0, 0));
    message.nested(IFLA_AF_SPEC, |families| {
        families.nested(AF_INET6, |inet6| {
            inet6.attribute(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
        });
    });
    match Socket::open()?.request(&message) {
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) =>
        {
            Ok(())
        }
        outcome => outcome,
    }
}

/// `struct ifinfomsg`.
fn header(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..].copy_from_slice(&change.to_ne_bytes());
    bytes
}

/// `struct tcmsg`.
fn traffic(index: u32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&handle.to_ne_bytes());
    bytes[12..16].copy_from_slice(&parent.to_ne_bytes());
    bytes[16..].copy_from_slice(&info.to_ne_bytes());
    bytes
}

/// Gives a link an ingress qdisc, for [`redirect`].
///
/// # Errors
///
/// What rtnetlink answers: EEXIST where it has one, or a clsact.
pub fn add_ingress(index: u32) -> io::Result<()> {
    let fixed = traffic(index, INGRESS_HANDLE, INGRESS_PARENT, 0);
    let mut message = Message::new(RTM_NEWQDISC, netlink::CREATE, &fixed);
    message.string(TCA_KIND, "ingress");
    Socket::open()?.request(&message)
}

/// Takes a link's ingress qdisc away, with all its filters. A link or a qdisc that is not there is a success.
///
/// # Errors
///
/// What rtnetlink answers.
pub fn delete_ingress(name: &str) -> io::Result<()> {
    let Some(index) = index(name)? else { return Ok(()) };
    let fixed = traffic(index, INGRESS_HANDLE, INGRESS_PARENT, 0);
    unless_gone(Socket::open()?.request(&Message::new(RTM_DELQDISC, 0, &fixed)))
}

/// No such link: ENODEV. No such qdisc: ENOENT, and EINVAL since it can only be the ingress one that is not there.
fn unless_gone(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENODEV | libc::ENOENT | libc::EINVAL | libc::ESRCH)
            ) =>
        {
            Ok(())
        }
        outcome => outcome,
    }
}

/// Sends each frame that comes in by the link `from` out by the link `to`, instead of to this namespace's own stack.
/// `from` has an ingress qdisc.
///
/// As `tc filter add dev FROM parent ffff: protocol all u32 match u8 0 0 action mirred egress redirect dev TO`.
///
/// # Errors
///
/// What rtnetlink answers: ENOENT where the kernel has no `cls_u32` or `act_mirred`.
pub fn redirect(from: u32, to: u32) -> io::Result<()> {
    const TC_ACT_STOLEN: i32 = 4;
    const TCA_EGRESS_REDIR: i32 = 1;
    const ETH_P_ALL: u16 = 3;
    // A key that looks at no bit.
    let all = [Key { offset: 0, mask: 0, value: 0 }];
    let action = mirred(TCA_EGRESS_REDIR, TC_ACT_STOLEN, to);
    filter(from, (LAST, ETH_P_ALL), &all, Some(&action))
}

/// Lets this namespace's own stack have, of what comes in by the link `from` that [`redirect`] sends to `to`, the answers
/// of DNS servers (IPv4, port 53) to its own ports from `first_port` on, and a copy of each ARP answer.
///
/// `first_port` is a power of two less than 65536 subtracted from 65536, so that a mask can tell its range.
///
/// # Errors
///
/// As for [`redirect`].
pub fn keep_dns_answers(from: u32, to: u32, first_port: u16) -> io::Result<()> {
    const TC_ACT_OK: i32 = 0;
    const TCA_EGRESS_MIRROR: i32 = 2;
    const ETH_P_ARP: u16 = 0x0806;
    const ETH_P_IP: u16 = 0x0800;
    const ARP_REPLY: u32 = 2;
    const DNS: u32 = 53;
    const PROTOCOLS: [u32; 2] = [6, 17];
    let reply = [Key { offset: 4, mask: 0xffff, value: ARP_REPLY }];
    let copy = mirred(TCA_EGRESS_MIRROR, TC_ACT_OK, to);
    filter(from, (1, ETH_P_ARP), &reply, Some(&copy))?;
    for protocol in PROTOCOLS {
        let answer = [
            // Version 4, a header of five words: the ports are behind it.
            Key { offset: 0, mask: 0xff00_0000, value: 0x4500_0000 },
            // No later fragment, which has no ports.
            Key { offset: 4, mask: 0x1fff, value: 0 },
            Key { offset: 8, mask: 0x00ff_0000, value: protocol << 16 },
            Key {
                offset: 20,
                mask: 0xffff_0000 | u32::from(first_port),
                value: DNS << 16 | u32::from(first_port),
            },
        ];
        // Without an action a filter that matches lets the frame through.
        filter(from, (2, ETH_P_IP), &answer, None)?;
    }
    Ok(())
}

/// The priority of the filter that takes what no other does.
const LAST: u32 = 10;

/// What a 32-bit word of the network header must be, in the bits of the mask.
struct Key {
    offset: i32,
    mask: u32,
    value: u32,
}

/// Adds a filter to a link's ingress qdisc.
fn filter(
    index: u32,
    (priority, protocol): (u32, u16),
    keys: &[Key],
    mirred: Option<&[u8; 28]>,
) -> io::Result<()> {
    const TCA_U32_SEL: u16 = 5;
    const TCA_U32_ACT: u16 = 7;
    const FIRST_ACTION: u16 = 1;
    const TCA_ACT_KIND: u16 = 1;
    const TCA_ACT_OPTIONS: u16 = 2;
    const TCA_MIRRED_PARMS: u16 = 2;

    let info = priority << 16 | u32::from(protocol.to_be());
    let fixed = traffic(index, 0, INGRESS_HANDLE, info);
    let mut message = Message::new(RTM_NEWTFILTER, netlink::CREATE, &fixed);
    message.string(TCA_KIND, "u32").nested(TCA_OPTIONS, |options| {
        options.attribute(TCA_U32_SEL, &selector(keys));
        let Some(parameters) = mirred else { return };
        options.nested(TCA_U32_ACT, |actions| {
            actions.nested(FIRST_ACTION, |action| {
                action.string(TCA_ACT_KIND, "mirred").nested(TCA_ACT_OPTIONS, |options| {
                    options.attribute(TCA_MIRRED_PARMS, parameters);
                });
            });
        });
    });
    Socket::open()?.request(&message)
}

/// `struct tc_u32_sel`.
fn selector(keys: &[Key]) -> Vec<u8> {
    const TC_U32_TERMINAL: u8 = 1;
    let mut selector = vec![0; 16];
    selector[0] = TC_U32_TERMINAL;
    selector[2] = u8::try_from(keys.len()).unwrap_or(u8::MAX);
    for key in keys {
        selector.extend(key.mask.to_be_bytes());
        selector.extend(key.value.to_be_bytes());
        selector.extend(key.offset.to_ne_bytes());
        // No further offset that the frame itself would tell.
        selector.extend([0; 4]);
    }
    selector
}

/// `struct tc_mirred`.
fn mirred(how: i32, then: i32, to: u32) -> [u8; 28] {
    let mut parameters = [0; 28];
    parameters[8..12].copy_from_slice(&then.to_ne_bytes());
    parameters[20..24].copy_from_slice(&how.to_ne_bytes());
    parameters[24..].copy_from_slice(&to.to_ne_bytes());
    parameters
}

/// Whether a link has an ingress qdisc, or a clsact, which takes its place.
///
/// # Errors
///
/// What rtnetlink answers.
pub fn has_ingress(index: u32) -> io::Result<bool> {
    const RTM_GETQDISC: u16 = 38;
    const TCM_IFINDEX: usize = 4;
    const TCM_PARENT: usize = 12;
    let word = |bytes: &[u8], at: usize| {
        bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes)
    };
    let all = Socket::open()?.dump(&Message::new(RTM_GETQDISC, 0, &traffic(index, 0, 0, 0)))?;
    Ok(all.iter().any(|(_, bytes)| {
        word(bytes, TCM_IFINDEX) == Some(index) && word(bytes, TCM_PARENT) == Some(INGRESS_PARENT)
    }))
}
