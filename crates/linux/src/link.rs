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
    const TCA_U32_SEL: u16 = 5;
    const TCA_U32_ACT: u16 = 7;
    const FIRST_ACTION: u16 = 1;
    const TCA_ACT_KIND: u16 = 1;
    const TCA_ACT_OPTIONS: u16 = 2;
    const TCA_MIRRED_PARMS: u16 = 2;
    const PRIORITY: u32 = 1;
    const ETH_P_ALL: u16 = 3;

    let info = PRIORITY << 16 | u32::from(ETH_P_ALL.to_be());
    let fixed = traffic(from, 0, INGRESS_HANDLE, info);
    let mut message = Message::new(RTM_NEWTFILTER, netlink::CREATE, &fixed);
    message.string(TCA_KIND, "u32").nested(TCA_OPTIONS, |options| {
        options.attribute(TCA_U32_SEL, &match_all()).nested(TCA_U32_ACT, |actions| {
            actions.nested(FIRST_ACTION, |action| {
                action.string(TCA_ACT_KIND, "mirred").nested(TCA_ACT_OPTIONS, |options| {
                    options.attribute(TCA_MIRRED_PARMS, &redirect_to(to));
                });
            });
        });
    });
    Socket::open()?.request(&message)
}

/// `struct tc_u32_sel` with one key that matches whatever is at offset 0.
fn match_all() -> [u8; 32] {
    const TC_U32_TERMINAL: u8 = 1;
    let mut selector = [0; 32];
    selector[0] = TC_U32_TERMINAL;
    // The number of keys. The key itself is 16 bytes of zeros: no bit is looked at.
    selector[2] = 1;
    selector
}

/// `struct tc_mirred`.
fn redirect_to(to: u32) -> [u8; 28] {
    const TC_ACT_STOLEN: i32 = 4;
    const TCA_EGRESS_REDIR: i32 = 1;
    let mut parameters = [0; 28];
    parameters[8..12].copy_from_slice(&TC_ACT_STOLEN.to_ne_bytes());
    parameters[20..24].copy_from_slice(&TCA_EGRESS_REDIR.to_ne_bytes());
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
