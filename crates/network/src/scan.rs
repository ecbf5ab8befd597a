//! From what the kernel has to what a guest is to get. All but the reading is pure.

use std::collections::BTreeMap;
use std::fmt::Write;

use protocol::agent::{Interface, Neighbor, Route};

use crate::attach::TAP_PREFIX;
use crate::wire::{AF_INET, AF_INET6, Raw, RawAddress, RawLink, RawRoute};
use crate::{Error, Link, Network, Skipped};

const IFF_UP: u32 = 0x1;
const IFF_LOOPBACK: u32 = 0x8;
const ARPHRD_ETHER: u16 = 1;
const IFA_F_DADFAILED: u32 = 0x08;
const RT_SCOPE_LINK: u8 = 253;
const RT_SCOPE_HOST: u8 = 254;
const NUD_PERMANENT: u16 = 0x80;

/// The network of the calling thread's namespace, as it is now.
///
/// # Errors
///
/// [`Error::Kernel`], and the clashes that no guest could sort out.
pub fn scan() -> Result<Network, Error> {
    network(&Raw::read()?)
}

fn network(raw: &Raw) -> Result<Network, Error> {
    let mut network = Network::default();
    for link in &raw.links {
        if link.flags & IFF_LOOPBACK != 0 || link.name.starts_with(TAP_PREFIX) {
            continue;
        }
        let addresses: Vec<_> =
            raw.addresses.iter().filter(|address| address.index == link.index).collect();
        match obstacle(link, !addresses.is_empty()) {
            Some(reason) => network.skip(format!("link {}", link.name), reason),
            None => network.links.push(moved(link, &addresses)?),
        }
    }
    network.links.sort_by_key(|link| link.index);
    refuse_same_macs(&network.links)?;
    let names: BTreeMap<u32, &str> =
        raw.links.iter().map(|link| (link.index, link.name.as_str())).collect();
    for route in &raw.routes {
        network.add_route(route, &names);
    }
    // The agent adds them one by one, and the kernel takes a gateway only where it can be reached by then.
    network.routes.sort_by_key(|route| {
        (!route.gateway.is_empty(), route.destination.is_empty(), route.metric)
    });
    for neighbor in &raw.neighbors {
        let device = network.links.iter().find(|link| link.index == neighbor.index);
        if let (Some(device), true) = (device, neighbor.state & NUD_PERMANENT != 0) {
            // The kernel keeps permanent entries for multicast groups of its own accord.
            if neighbor.address.is_multicast() || neighbor.mac.len() != 6 {
                continue;
            }
            network.neighbors.push(Neighbor {
                address: neighbor.address.to_string(),
                mac: colons(&neighbor.mac),
                device: device.name().to_owned(),
                ..Neighbor::default()
            });
        }
    }
    Ok(network)
}

/// Why a link cannot be moved, if so.
fn obstacle(link: &RawLink, has_addresses: bool) -> Option<&'static str> {
    if let Some(reason) = match link.kind.as_str() {
        "dummy" => Some("it is a dummy, which leads nowhere"),
        "bridge" => Some("it is a bridge; its frames belong to its ports"),
        "ifb" => Some("it is for traffic control only"),
        "sit" | "gre" | "gretap" | "erspan" | "ip6tnl" | "ipip" | "ip6gre" | "ip6gretap"
        | "vti" | "vti6" | "xfrm" | "wireguard" | "vxlan" | "geneve" | "ip6erspan" => {
            Some("it is a tunnel, whose other side is in the namespace")
        }
        _ => None,
    } {
        return Some(reason);
    }
    if link.master.is_some() {
        return Some("it is a port of another link");
    }
    if link.hardware != ARPHRD_ETHER
        || link.mac.len() != 6
        || link.mac.iter().all(|&byte| byte == 0)
    {
        return Some("it carries no Ethernet frames");
    }
    (link.flags & IFF_UP == 0 && !has_addresses).then_some("it is down and has no address")
}

fn moved(link: &RawLink, addresses: &[&RawAddress]) -> Result<Link, Error> {
    let mut own = Vec::new();
    for address in addresses {
        if address.flags & IFA_F_DADFAILED != 0 {
            return Err(Error::AddressTaken {
                address: address.address.to_string(),
                name: link.name.clone(),
            });
        }
        // The guest's kernel makes its own link-local address, the same one: it has the same MAC.
        let made_by_kernel = address.address.address.is_ipv6() && address.scope == RT_SCOPE_LINK;
        if !made_by_kernel && address.scope != RT_SCOPE_HOST {
            own.push(address.address.to_string());
        }
    }
    let mac = <[u8; 6]>::try_from(&*link.mac).unwrap_or_default();
    Ok(Link {
        index: link.index,
        kind: link.kind.clone(),
        mac,
        queues: link.queues,
        interface: Interface {
            name: link.name.clone(),
            mac: colons(&mac),
            mtu: link.mtu,
            addresses: own,
            ..Interface::default()
        },
    })
}

fn refuse_same_macs(links: &[Link]) -> Result<(), Error> {
    for (index, link) in links.iter().enumerate() {
        if let Some(other) = links[..index].iter().find(|other| other.mac == link.mac) {
            return Err(Error::SameMac {
                first: other.name().to_owned(),
                second: link.name().to_owned(),
                mac: colons(&link.mac),
            });
        }
    }
    Ok(())
}

impl Network {
    fn skip(&mut self, name: String, reason: &str) {
        self.skipped.push(Skipped { name, reason: reason.to_owned() });
    }

    fn add_route(&mut self, route: &RawRoute, names: &BTreeMap<u32, &str>) {
        const RT_TABLE_MAIN: u32 = 254;
        const RTN_UNICAST: u8 = 1;
        const RTPROT_KERNEL: u8 = 2;
        const RTM_F_CLONED: u32 = 0x200;
        let wanted = matches!(route.family, AF_INET | AF_INET6)
            && route.table == RT_TABLE_MAIN
            && route.kind == RTN_UNICAST
            // The guest's kernel makes these itself, from the addresses.
            && route.protocol != RTPROT_KERNEL
            && route.flags & RTM_F_CLONED == 0;
        if !wanted {
            return;
        }
        let destination = route.destination.map(|destination| destination.to_string());
        let name = format!("route {}", destination.as_deref().unwrap_or("default"));
        if route.multipath || route.odd {
            return self.skip(name, "it has several next hops, or more than a gateway and a link");
        }
        let device = route.index.and_then(|index| names.get(&index)).copied().unwrap_or_default();
        if !self.links.iter().any(|link| link.name() == device) {
            return self.skip(name, "its link stays behind");
        }
        self.routes.push(Route {
            destination: destination.unwrap_or_default(),
            gateway: text(route.gateway),
            source: text(route.source),
            device: device.to_owned(),
            scope: route.scope.into(),
            metric: route.metric,
            flags: route.flags & RTNH_F_ONLINK,
            family: route.family.into(),
            ..Route::default()
        });
    }
}

/// Of a next hop's flags the others are states, not wishes.
const RTNH_F_ONLINK: u32 = 4;

fn text(value: Option<impl ToString>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

fn colons(mac: &[u8]) -> String {
    let mut text = String::with_capacity(mac.len() * 3);
    for byte in mac {
        if !text.is_empty() {
            text.push(':');
        }
        write!(text, "{byte:02x}").expect("a String takes all that is written");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{IFF_UP, NUD_PERMANENT, RT_SCOPE_LINK, network};
    use crate::Error;
    use crate::wire::{AF_INET, AF_INET6, Prefix, Raw, RawAddress, RawLink, RawNeighbor, RawRoute};

    fn link(index: u32, name: &str, kind: &str) -> RawLink {
        RawLink {
            index,
            hardware: 1,
            flags: IFF_UP,
            name: name.to_owned(),
            mac: vec![2, 0x42, 0xac, 0x11, 0, u8::try_from(index).unwrap()],
            mtu: 1500,
            kind: kind.to_owned(),
            queues: 1,
            master: None,
        }
    }

    fn address(index: u32, text: &str, scope: u8) -> RawAddress {
        RawAddress { index, address: prefix(text), scope, flags: 0x80 }
    }

    fn prefix(text: &str) -> Prefix {
        let (address, length) = text.split_once('/').unwrap();
        Prefix { address: address.parse().unwrap(), length: length.parse().unwrap() }
    }

    fn route(destination: &str, gateway: &str, index: u32) -> RawRoute {
        RawRoute {
            family: if (destination.to_owned() + gateway).contains(':') {
                AF_INET6
            } else {
                AF_INET
            },
            destination: (!destination.is_empty()).then(|| prefix(destination)),
            gateway: gateway.parse().ok(),
            source: None,
            index: Some(index),
            metric: 0,
            table: 254,
            protocol: 3,
            scope: 0,
            kind: 1,
            flags: 0,
            multipath: false,
            odd: false,
        }
    }

    #[test]
    fn a_docker_network_becomes_an_interface_and_a_default_route() {
        let mut kernels = route("172.17.0.0/16", "", 5);
        kernels.protocol = 2;
        let raw = Raw {
            links: vec![
                RawLink { flags: 0x9, ..link(1, "lo", "") },
                link(5, "eth0", "veth"),
                link(6, "kata-tap5", "tun"),
            ],
            addresses: vec![
                address(1, "127.0.0.1/8", 254),
                address(5, "172.17.0.2/16", 0),
                address(5, "fe80::42:acff:fe11:2/64", RT_SCOPE_LINK),
                address(5, "2001:db8::2/64", 0),
            ],
            routes: vec![
                route("", "172.17.0.1", 5),
                kernels,
                route("", "2001:db8::1", 5),
                route("10.1.0.0/16", "", 5),
                RawRoute { table: 255, ..route("172.17.0.2/32", "", 5) },
            ],
            neighbors: vec![
                RawNeighbor {
                    index: 5,
                    address: "172.17.0.9".parse().unwrap(),
                    mac: vec![2, 0, 0, 0, 0, 9],
                    state: NUD_PERMANENT,
                },
                RawNeighbor {
                    index: 5,
                    address: "172.17.0.1".parse().unwrap(),
                    mac: vec![2, 0, 0, 0, 0, 1],
                    state: 2,
                },
            ],
        };
        let network = network(&raw).unwrap();
        let request = network.request();
        assert_eq!(request.interfaces.len(), 1);
        let eth0 = &request.interfaces[0];
        assert_eq!((eth0.name.as_str(), eth0.mac.as_str()), ("eth0", "02:42:ac:11:00:05"));
        assert_eq!(eth0.addresses, ["172.17.0.2/16", "2001:db8::2/64"]);
        let routes: Vec<_> = request
            .routes
            .iter()
            .map(|route| (route.destination.as_str(), route.gateway.as_str(), route.family))
            .collect();
        assert_eq!(
            routes,
            [("10.1.0.0/16", "", 2), ("", "172.17.0.1", 2), ("", "2001:db8::1", 10)]
        );
        assert_eq!(request.neighbors.len(), 1);
        assert_eq!(request.neighbors[0].mac, "02:00:00:00:00:09");
        assert!(network.skipped.is_empty(), "{:?}", network.skipped);
    }

    #[test]
    fn what_cannot_be_moved_stays_with_a_reason_and_its_routes_with_it() {
        let raw = Raw {
            links: vec![
                link(2, "dummy0", "dummy"),
                RawLink { hardware: 776, mac: vec![0; 4], ..link(3, "sit0", "sit") },
                RawLink { master: Some(9), ..link(4, "port", "veth") },
                RawLink { flags: 0, ..link(5, "down", "veth") },
                RawLink { hardware: 65534, mac: vec![], ..link(6, "tun0", "tun") },
                link(7, "net1", "macvlan"),
            ],
            routes: vec![
                route("10.0.0.0/8", "", 2),
                RawRoute { multipath: true, index: None, ..route("", "", 0) },
            ],
            ..Raw::default()
        };
        let network = network(&raw).unwrap();
        assert_eq!(network.links.len(), 1);
        assert_eq!(network.links[0].name(), "net1");
        let skipped: Vec<_> = network.skipped.iter().map(|skipped| skipped.name.as_str()).collect();
        assert_eq!(
            skipped,
            [
                "link dummy0",
                "link sit0",
                "link port",
                "link down",
                "link tun0",
                "route 10.0.0.0/8",
                "route default"
            ]
        );
    }

    #[test]
    fn two_links_with_one_mac_are_refused_by_name() {
        let mac = link(5, "", "").mac;
        let raw = Raw {
            links: vec![link(5, "eth0", "ipvlan"), RawLink { mac, ..link(6, "eth1", "ipvlan") }],
            ..Raw::default()
        };
        let error = network(&raw).unwrap_err().to_string();
        assert!(error.starts_with(
            "network links eth0 and eth1 have the same MAC address 02:42:ac:11:00:05"
        ));
    }

    #[test]
    fn an_address_that_another_host_has_is_refused() {
        let mut taken = address(5, "2001:db8::2/64", 0);
        taken.flags |= 0x08;
        let raw =
            Raw { links: vec![link(5, "eth0", "veth")], addresses: vec![taken], ..Raw::default() };
        assert!(matches!(network(&raw), Err(Error::AddressTaken { .. })));
    }
}
