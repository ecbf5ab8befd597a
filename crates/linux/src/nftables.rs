//! The kernel's packet filter, nft(8): the one thing that we ask of it.
//!
//! Messages as in the kernel's `Documentation/netlink/specs/nftables.yaml` and `include/uapi/linux/netfilter/nf_tables.h`.
//! All numbers in them are big-endian but for those that are compared with what the kernel has in its own order.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::netlink::{self, Message, Socket};

const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_NEWRULE: u16 = 6;

const NFPROTO_UNSPEC: u8 = 0;
const NFPROTO_INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;

const CHAIN: &str = "output";

/// New TCP connections to the loopback addresses of the calling thread's network namespace go to another port there,
/// for as long as this lives.
#[derive(Debug)]
pub struct LoopbackRedirect {
    /// The table's owner: the kernel removes the table when this is closed, by whatever hand.
    _socket: Socket,
}

impl LoopbackRedirect {
    /// Sends connections to 127.0.0.0/8 to `port_v4` and those to ::1 to `port_v6`, where there is one; but neither those
    /// to `except`, nor those of sockets with the mark `exempt` (SO_MARK of socket(7)). `table` is the table's name, as
    /// `nft list ruleset` shows it; that it is there already is an error.
    ///
    /// # Errors
    ///
    /// What the kernel answers. One before 5.12 knows no tables that go with their owner: EOPNOTSUPP or EINVAL; one without
    /// nf_tables: EPROTONOSUPPORT or EOPNOTSUPP.
    pub fn new(
        table: &str,
        (port_v4, port_v6): (u16, Option<u16>),
        except: Ipv4Addr,
        exempt: u32,
    ) -> io::Result<Self> {
        let v4 = Rule::tcp(NFPROTO_IPV4, exempt)
            .payload(16, &[127])
            .differs_at(16, &except.octets())
            .redirect(port_v4);
        let mut messages = vec![new_table(table), new_chain(table), v4.message(table)];
        if let Some(port) = port_v6 {
            let v6 = Rule::tcp(NFPROTO_IPV6, exempt)
                .payload(24, &Ipv6Addr::LOCALHOST.octets())
                .redirect(port);
            messages.push(v6.message(table));
        }
        let mut socket = Socket::netfilter()?;
        socket.batch(&batch(NFNL_MSG_BATCH_BEGIN), &messages, &batch(NFNL_MSG_BATCH_END))?;
        Ok(Self { _socket: socket })
    }
}

/// Where a connection that was redirected wanted to go, in a socket that accept(2) answered: SO_ORIGINAL_DST.
///
/// # Errors
///
/// What getsockopt(2) says: ENOENT where it was not redirected.
pub fn original_destination(
    socket: impl std::os::fd::AsFd,
    is_v6: bool,
) -> io::Result<(IpAddr, u16)> {
    use rustix::net::sockopt::{ip_original_dst, ipv6_original_dst};
    Ok(if is_v6 {
        let address = ipv6_original_dst(socket)?;
        ((*address.ip()).into(), address.port())
    } else {
        let address = ip_original_dst(socket)?;
        ((*address.ip()).into(), address.port())
    })
}

/// `struct nfgenmsg`.
fn header(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

fn batch(kind: u16) -> Message {
    Message::new(kind, 0, &header(NFPROTO_UNSPEC, NFNL_SUBSYS_NFTABLES))
}

fn message(kind: u16, flags: u16) -> Message {
    Message::new(NFNL_SUBSYS_NFTABLES << 8 | kind, flags, &header(NFPROTO_INET, 0))
}

fn new_table(name: &str) -> Message {
    const NFTA_TABLE_NAME: u16 = 1;
    const NFTA_TABLE_FLAGS: u16 = 2;
    const NFT_TABLE_F_OWNER: u32 = 2;
    let mut table = message(NFT_MSG_NEWTABLE, netlink::CREATE);
    table.string(NFTA_TABLE_NAME, name);
    table.attribute(NFTA_TABLE_FLAGS, &NFT_TABLE_F_OWNER.to_be_bytes());
    table
}

/// `chain output { type nat hook output priority dstnat; }`: where Docker's resolver has its rules too.
fn new_chain(table: &str) -> Message {
    const NFTA_CHAIN_TABLE: u16 = 1;
    const NFTA_CHAIN_NAME: u16 = 3;
    const NFTA_CHAIN_HOOK: u16 = 4;
    const NFTA_CHAIN_TYPE: u16 = 7;
    const NFTA_HOOK_HOOKNUM: u16 = 1;
    const NFTA_HOOK_PRIORITY: u16 = 2;
    const NF_INET_LOCAL_OUT: u32 = 3;
    const NF_IP_PRI_NAT_DST: i32 = -100;
    let mut chain = message(NFT_MSG_NEWCHAIN, netlink::CREATE);
    chain.string(NFTA_CHAIN_TABLE, table).string(NFTA_CHAIN_NAME, CHAIN);
    chain.nested(NFTA_CHAIN_HOOK, |hook| {
        hook.attribute(NFTA_HOOK_HOOKNUM, &NF_INET_LOCAL_OUT.to_be_bytes());
        hook.attribute(NFTA_HOOK_PRIORITY, &NF_IP_PRI_NAT_DST.to_be_bytes());
    });
    chain.string(NFTA_CHAIN_TYPE, "nat");
    chain
}

/// A rule: what is compared, in order, and in the end what is done.
struct Rule {
    expressions: Message,
}

/// The one register that we use.
const NFT_REG_1: u32 = 1;
const NFT_CMP_EQ: u32 = 0;
const NFT_CMP_NEQ: u32 = 1;

impl Rule {
    /// For TCP of this family, from sockets without the mark.
    fn tcp(family: u8, exempt: u32) -> Self {
        const NFT_META_MARK: u32 = 3;
        const NFT_META_NFPROTO: u32 = 15;
        const NFT_META_L4PROTO: u32 = 16;
        const IPPROTO_TCP: u8 = 6;
        let expressions = Message::new(0, 0, &[]);
        Self { expressions }
            .meta(NFT_META_NFPROTO)
            .compare(NFT_CMP_EQ, &[family])
            .meta(NFT_META_L4PROTO)
            .compare(NFT_CMP_EQ, &[IPPROTO_TCP])
            .meta(NFT_META_MARK)
            .compare(NFT_CMP_NEQ, &exempt.to_ne_bytes())
    }

    fn expression(mut self, name: &str, fill: impl FnOnce(&mut Message)) -> Self {
        const NFTA_LIST_ELEM: u16 = 1;
        const NFTA_EXPR_NAME: u16 = 1;
        const NFTA_EXPR_DATA: u16 = 2;
        self.expressions.nested(NFTA_LIST_ELEM, |expression| {
            expression.string(NFTA_EXPR_NAME, name).nested(NFTA_EXPR_DATA, fill);
        });
        self
    }

    fn meta(self, key: u32) -> Self {
        const NFTA_META_DREG: u16 = 1;
        const NFTA_META_KEY: u16 = 2;
        self.expression("meta", |data| {
            data.attribute(NFTA_META_DREG, &NFT_REG_1.to_be_bytes());
            data.attribute(NFTA_META_KEY, &key.to_be_bytes());
        })
    }

    fn compare(self, operation: u32, value: &[u8]) -> Self {
        const NFTA_CMP_SREG: u16 = 1;
        const NFTA_CMP_OP: u16 = 2;
        const NFTA_CMP_DATA: u16 = 3;
        self.expression("cmp", |data| {
            data.attribute(NFTA_CMP_SREG, &NFT_REG_1.to_be_bytes());
            data.attribute(NFTA_CMP_OP, &operation.to_be_bytes());
            data.nested(NFTA_CMP_DATA, |inside| {
                inside.attribute(NFTA_DATA_VALUE, value);
            });
        })
    }

    fn load(self, offset: u32, length: usize) -> Self {
        const NFTA_PAYLOAD_DREG: u16 = 1;
        const NFTA_PAYLOAD_BASE: u16 = 2;
        const NFTA_PAYLOAD_OFFSET: u16 = 3;
        const NFTA_PAYLOAD_LEN: u16 = 4;
        const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        self.expression("payload", |data| {
            data.attribute(NFTA_PAYLOAD_DREG, &NFT_REG_1.to_be_bytes());
            data.attribute(NFTA_PAYLOAD_BASE, &NFT_PAYLOAD_NETWORK_HEADER.to_be_bytes());
            data.attribute(NFTA_PAYLOAD_OFFSET, &offset.to_be_bytes());
            data.attribute(NFTA_PAYLOAD_LEN, &length.to_be_bytes());
        })
    }

    /// The network header has these bytes at `offset`.
    fn payload(self, offset: u32, value: &[u8]) -> Self {
        self.load(offset, value.len()).compare(NFT_CMP_EQ, value)
    }

    /// The network header has other bytes at `offset`.
    fn differs_at(self, offset: u32, value: &[u8]) -> Self {
        self.load(offset, value.len()).compare(NFT_CMP_NEQ, value)
    }

    fn redirect(self, port: u16) -> Self {
        const NFTA_IMMEDIATE_DREG: u16 = 1;
        const NFTA_IMMEDIATE_DATA: u16 = 2;
        const NFTA_REDIR_REG_PROTO_MIN: u16 = 1;
        self.expression("immediate", |data| {
            data.attribute(NFTA_IMMEDIATE_DREG, &NFT_REG_1.to_be_bytes());
            data.nested(NFTA_IMMEDIATE_DATA, |inside| {
                inside.attribute(NFTA_DATA_VALUE, &port.to_be_bytes());
            });
        })
        .expression("redir", |data| {
            data.attribute(NFTA_REDIR_REG_PROTO_MIN, &NFT_REG_1.to_be_bytes());
        })
    }

    fn message(&self, table: &str) -> Message {
        const NFTA_RULE_TABLE: u16 = 1;
        const NFTA_RULE_CHAIN: u16 = 2;
        const NFTA_RULE_EXPRESSIONS: u16 = 4;
        const NLM_F_APPEND: u16 = 0x800;
        const NLM_F_CREATE: u16 = 0x400;
        let mut rule = message(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND);
        rule.string(NFTA_RULE_TABLE, table).string(NFTA_RULE_CHAIN, CHAIN);
        rule.attribute(NFTA_RULE_EXPRESSIONS, self.expressions.body());
        rule
    }
}

const NFTA_DATA_VALUE: u16 = 1;

#[cfg(test)]
mod tests {
    use super::{LoopbackRedirect, original_destination};
    use crate::namespace::{create_network, remove_network};
    use std::io;
    use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};

    /// In a network namespace of its own, with `lo` up; `None` without the right to make one.
    fn inside<T: Send>(action: impl FnOnce() -> io::Result<T> + Send) -> Option<T> {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("netns");
        let namespace = create_network(&path).unwrap();
        let outcome = namespace.inside(|| {
            crate::link::bring_up(1)?;
            action()
        });
        remove_network(&path).unwrap();
        Some(outcome.unwrap())
    }

    #[test]
    fn connections_to_the_loopback_are_redirected_until_the_redirect_goes() {
        let resolver = Ipv4Addr::new(127, 0, 0, 11);
        inside(|| {
            let (v4, v6) = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("[::1]:0")?);
            let ports = (v4.local_addr()?.port(), Some(v6.local_addr()?.port()));
            let redirect = LoopbackRedirect::new("kata-test", ports, resolver, 7)?;
            let again = LoopbackRedirect::new("kata-test", ports, resolver, 7).unwrap_err();
            // Owned by another socket, or there already.
            assert!(matches!(again.raw_os_error(), Some(libc::EPERM | libc::EEXIST)), "{again}");

            let _dialled = TcpStream::connect("127.0.0.9:4321")?;
            let (accepted, _) = v4.accept()?;
            let wanted = original_destination(&accepted, false)?;
            assert_eq!(wanted, (IpAddr::from([127, 0, 0, 9]), 4321));
            let _dialled = TcpStream::connect("[::1]:4322")?;
            let (accepted, _) = v6.accept()?;
            let wanted = original_destination(&accepted, true)?;
            assert_eq!(wanted, ("::1".parse().unwrap(), 4322));

            let refused = TcpStream::connect((resolver, 4321)).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
            drop(redirect);
            let refused = TcpStream::connect("127.0.0.1:4321").unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
            Ok(())
        });
    }
}
