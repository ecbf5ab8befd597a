//! The guest's network, by rtnetlink(7).
//!
//! [`configure`] makes the network exactly what is asked, and may be called again with the same or another wish. It
//! touches only the interfaces that the host has plugged in, known by having no kind: what a container with the
//! right to do so makes for itself (a bridge, a tunnel) is left alone.

mod plan;
mod slot;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use futures::channel::mpsc::UnboundedReceiver;
use futures::{StreamExt, TryStreamExt};
use protocol::agent::ConfigureNetworkRequest;
use rtnetlink::packet_core::NetlinkMessage;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
use rtnetlink::packet_route::link::{LinkAttribute, LinkInfo, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
};
use rtnetlink::sys::SocketAddr;
use rtnetlink::{Handle, LinkUnspec, MulticastGroup, RouteMessageBuilder};
use tokio::task::JoinHandle;

use self::plan::{Interface, Neighbor, Plan, Prefix, Route};
use crate::error::{Doing, Error};
use crate::pci;

/// How long an interface that the host has plugged in may take to appear.
const DEADLINE: Duration = Duration::from_secs(10);

/// Sets the loopback interface up.
pub(crate) async fn bring_up_loopback() -> Result<(), Error> {
    const LOOPBACK: u32 = 1;
    let link = Link::open()?;
    let up = LinkUnspec::new_with_index(LOOPBACK).up().build();
    link.handle.link().set(up).execute().await.trying(|| "set lo up".to_owned())
}

/// Makes the network exactly what is asked.
pub(crate) async fn configure(request: ConfigureNetworkRequest) -> Result<(), Error> {
    let plan = Plan::read(&request)?;
    let mut link = Link::open()?;
    let nics = link.wait_for(&plan.interfaces).await?;
    link.retire_others(&plan).await?;
    link.rename(&plan, &nics).await?;
    for (interface, nic) in plan.interfaces.iter().zip(&nics) {
        link.set_up(interface, nic.index).await?;
    }
    let ours: HashMap<&str, u32> = plan
        .interfaces
        .iter()
        .zip(&nics)
        .map(|(interface, nic)| (interface.name.as_str(), nic.index))
        .collect();
    let index_of = |name: &str| {
        let unknown = || Error::Invalid(format!("interface {name:?} of a route is not asked for"));
        ours.get(name).copied().ok_or_else(unknown)
    };
    let mut wanted = HashSet::new();
    for route in &plan.routes {
        let index = index_of(&route.device)?;
        wanted.insert(link.add_route(route, index).await?);
    }
    link.remove_routes(&ours.values().copied().collect(), &wanted).await?;
    let mut wanted = HashSet::new();
    for neighbor in &plan.neighbors {
        let index = index_of(&neighbor.device)?;
        link.add_neighbor(neighbor, index).await?;
        wanted.insert((index, neighbor.address));
    }
    link.remove_neighbors(&ours.values().copied().collect(), &wanted).await?;
    Ok(())
}

/// A line to the kernel's network, with news of its interfaces.
struct Link {
    handle: Handle,
    news: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
    connection: JoinHandle<()>,
}

/// An interface that the host has plugged in.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Nic {
    index: u32,
    name: String,
    mac: Vec<u8>,
}

/// What tells routes apart.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Key {
    destination: Prefix,
    gateway: Option<IpAddr>,
    index: u32,
    metric: u32,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Link {
    fn open() -> Result<Self, Error> {
        let (connection, handle, news) =
            rtnetlink::new_multicast_connection(&[MulticastGroup::Link])
                .doing(|| "open a netlink socket".to_owned())?;
        Ok(Self { handle, news, connection: tokio::spawn(connection) })
    }

    /// All that the host has plugged in.
    async fn nics(&self) -> Result<Vec<Nic>, Error> {
        let links: Vec<LinkMessage> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .trying(|| "list the network interfaces".to_owned())?;
        Ok(links.iter().filter_map(nic).collect())
    }

    /// Finds the interfaces by their MAC addresses; waits for those that are still on their way.
    async fn wait_for(&mut self, interfaces: &[Interface]) -> Result<Vec<Nic>, Error> {
        let deadline = tokio::time::Instant::now() + DEADLINE;
        let drivers = tokio::time::Instant::now() + pci::DRIVERS_TIME;
        loop {
            let there = self.nics().await?;
            let find = |wanted: &Interface| there.iter().find(|nic| nic.mac == wanted.mac).cloned();
            let found: Vec<_> = interfaces.iter().map(find).collect();
            let missing = found.iter().position(Option::is_none);
            let Some(missing) = missing else { return Ok(found.into_iter().flatten().collect()) };
            let now = tokio::time::Instant::now();
            // Any news of an interface is reason enough to look again.
            if now < drivers {
                pci::look();
                drop(tokio::time::timeout(pci::PATIENCE, self.news.next()).await);
            } else if tokio::time::timeout_at(deadline, self.news.next()).await.is_err() {
                let name = &interfaces[missing].name;
                let mac = interfaces[missing].mac.map(|byte| format!("{byte:02x}")).join(":");
                let seconds = DEADLINE.as_secs();
                return Err(Error::Setup(format!(
                    "no interface with MAC address {mac}, to be {name}, appeared within {seconds} s"
                )));
            }
        }
    }

    /// Takes down what is no longer asked for, and lets the host have it back.
    async fn retire_others(&self, plan: &Plan) -> Result<(), Error> {
        for nic in self.nics().await? {
            if plan.interfaces.iter().any(|wanted| nic.mac == wanted.mac) {
                continue;
            }
            self.change(LinkUnspec::new_with_index(nic.index).down().build(), &nic.name, "down")
                .await?;
            self.keep_addresses(nic.index, &[]).await?;
            slot::power_off(&nic.name).await;
        }
        Ok(())
    }

    /// Gives the interfaces their names, also where they have each other's.
    async fn rename(&self, plan: &Plan, nics: &[Nic]) -> Result<(), Error> {
        let wrong: Vec<_> = plan
            .interfaces
            .iter()
            .zip(nics)
            .filter(|(interface, nic)| interface.name != nic.name)
            .collect();
        for nic in self.nics().await? {
            if wrong.iter().any(|(interface, _)| interface.name == nic.name) {
                let spare = format!("kata{}", nic.index);
                self.name(nic.index, &nic.name, &spare).await?;
            }
        }
        for (interface, nic) in wrong {
            self.name(nic.index, &nic.name, &interface.name).await?;
        }
        Ok(())
    }

    async fn name(&self, index: u32, old: &str, new: &str) -> Result<(), Error> {
        // Only one that is down takes another name.
        self.change(LinkUnspec::new_with_index(index).down().build(), old, "down").await?;
        let renamed = LinkUnspec::new_with_index(index).name(new.to_owned()).build();
        self.change(renamed, old, &format!("to the name {new}")).await
    }

    async fn change(&self, message: LinkMessage, name: &str, what: &str) -> Result<(), Error> {
        let set = self.handle.link().set(message).execute().await;
        set.trying(|| format!("set interface {name} {what}"))
    }

    async fn set_up(&self, interface: &Interface, index: u32) -> Result<(), Error> {
        let name = &interface.name;
        // Addresses and routes come from the host, and only from there. A kernel without IPv6 has no such setting.
        for setting in ["accept_ra", "accept_dad"] {
            drop(fs::write(format!("/proc/sys/net/ipv6/conf/{name}/{setting}"), "0"));
        }
        if let Some(mtu) = interface.mtu {
            let message = LinkUnspec::new_with_index(index).mtu(mtu).build();
            self.change(message, name, &format!("to MTU {mtu}")).await?;
        }
        self.keep_addresses(index, &interface.addresses).await?;
        for &Prefix { address, length } in &interface.addresses {
            let mut add = self.handle.address().add(index, address, length).replace();
            if address.is_ipv6() {
                // The host has made sure that nobody else has it; it is to be used at once.
                let message = add.message_mut();
                message.header.flags |= AddressHeaderFlags::Nodad;
                message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            }
            add.execute()
                .await
                .trying(|| format!("add address {address}/{length} to interface {name}"))?;
        }
        self.change(LinkUnspec::new_with_index(index).up().build(), name, "up").await
    }

    /// Takes all other addresses away; but not those that the kernel gives each interface for IPv6.
    async fn keep_addresses(&self, index: u32, kept: &[Prefix]) -> Result<(), Error> {
        let there: Vec<_> = self
            .handle
            .address()
            .get()
            .set_link_index_filter(index)
            .execute()
            .try_collect()
            .await
            .trying(|| "list the addresses".to_owned())?;
        for message in there {
            let local = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(address) => Some(*address),
                _ => None,
            });
            let any = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            });
            let Some(address) = local.or(any) else { continue };
            let prefix = Prefix { address, length: message.header.prefix_len };
            let of_kernel = matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local());
            if of_kernel || kept.contains(&prefix) {
                continue;
            }
            let removed = self.handle.address().del(message).execute().await;
            removed.trying(|| format!("remove address {address}"))?;
        }
        Ok(())
    }

    async fn add_route(&self, route: &Route, index: u32) -> Result<Key, Error> {
        let message = message(route, index)?;
        let key = key(&message).ok_or_else(|| Error::Invalid("a route has no end".to_owned()))?;
        let Prefix { address, length } = route.destination;
        let added = self.handle.route().add(message).replace().execute().await;
        added.trying(|| format!("add route {address}/{length} to interface {}", route.device))?;
        Ok(key)
    }

    /// Removes the routes of our interfaces that are not `wanted`, but for the kernel's own.
    async fn remove_routes(&self, ours: &HashSet<u32>, wanted: &HashSet<Key>) -> Result<(), Error> {
        let both = [
            RouteMessageBuilder::<Ipv4Addr>::new().build(),
            RouteMessageBuilder::<Ipv6Addr>::new().build(),
        ];
        for family in both {
            let there: Vec<RouteMessage> = self
                .handle
                .route()
                .get(family)
                .execute()
                .try_collect()
                .await
                .trying(|| "list the routes".to_owned())?;
            for message in there {
                let kernels = matches!(
                    message.header.protocol,
                    RouteProtocol::Kernel | RouteProtocol::Ra | RouteProtocol::Unspec
                );
                let main = message.header.table == RouteHeader::RT_TABLE_MAIN;
                let Some(key) = key(&message).filter(|_| main && !kernels) else { continue };
                if !ours.contains(&key.index) || wanted.contains(&key) {
                    continue;
                }
                let Prefix { address, length } = key.destination;
                let removed = self.handle.route().del(message).execute().await;
                removed.trying(|| format!("remove route {address}/{length}"))?;
            }
        }
        Ok(())
    }

    async fn add_neighbor(&self, neighbor: &Neighbor, index: u32) -> Result<(), Error> {
        let add = self.handle.neighbours().add(index, neighbor.address);
        let added = add.link_layer_address(&neighbor.mac).replace().execute().await;
        added.trying(|| {
            format!("add neighbor {} to interface {}", neighbor.address, neighbor.device)
        })
    }

    /// Removes the permanent neighbors of our interfaces that are not `wanted`.
    async fn remove_neighbors(
        &self,
        ours: &HashSet<u32>,
        wanted: &HashSet<(u32, IpAddr)>,
    ) -> Result<(), Error> {
        let there: Vec<_> = self
            .handle
            .neighbours()
            .get()
            .execute()
            .try_collect()
            .await
            .trying(|| "list the neighbors".to_owned())?;
        for message in there {
            let address = message.attributes.iter().find_map(|attribute| match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => Some((*v4).into()),
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => Some((*v6).into()),
                _ => None,
            });
            let index = message.header.ifindex;
            let permanent = message.header.state == NeighbourState::Permanent;
            let Some(address) = address.filter(|_| permanent && ours.contains(&index)) else {
                continue;
            };
            if !wanted.contains(&(index, address)) {
                let removed = self.handle.neighbours().del(message).execute().await;
                removed.trying(|| format!("remove neighbor {address}"))?;
            }
        }
        Ok(())
    }
}

/// The interface of a message, if the host has plugged it in: those that the kernel makes of itself have a kind.
fn nic(link: &LinkMessage) -> Option<Nic> {
    if link.header.link_layer_type != LinkLayerType::Ether {
        return None;
    }
    let mut nic = Nic { index: link.header.index, name: String::new(), mac: Vec::new() };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => nic.name.clone_from(name),
            LinkAttribute::Address(mac) => nic.mac.clone_from(mac),
            LinkAttribute::LinkInfo(infos)
                if infos.iter().any(|info| matches!(info, LinkInfo::Kind(_))) =>
            {
                return None;
            }
            _ => {}
        }
    }
    Some(nic)
}

fn message(route: &Route, index: u32) -> Result<RouteMessage, Error> {
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .output_interface(index)
        .scope(RouteScope::from(route.scope));
    let Prefix { address, length } = route.destination;
    let mixed = || Error::Invalid(format!("the route to {address}/{length} mixes IPv4 and IPv6"));
    builder = builder.destination_prefix(address, length).map_err(|_| mixed())?;
    if let Some(gateway) = route.gateway {
        builder = builder.gateway(gateway).map_err(|_| mixed())?;
    }
    if let Some(source) = route.source {
        builder = builder.pref_source(source).map_err(|_| mixed())?;
    }
    if route.metric > 0 {
        builder = builder.priority(route.metric);
    }
    if route.onlink {
        builder = builder.onlink();
    }
    Ok(builder.build())
}

fn key(route: &RouteMessage) -> Option<Key> {
    use rtnetlink::packet_route::AddressFamily;
    let is_v6 = route.header.address_family == AddressFamily::Inet6;
    let address = |address: &RouteAddress| match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    };
    let unspecified: IpAddr =
        if is_v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let mut destination =
        Prefix { address: unspecified, length: route.header.destination_prefix_length };
    // What the kernel makes of no metric, ipv6_route's IP6_RT_PRIO_USER.
    let mut metric = if is_v6 { 1024 } else { 0 };
    let (mut gateway, mut index) = (None, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(to) => destination.address = address(to)?,
            RouteAttribute::Gateway(to) => gateway = address(to),
            RouteAttribute::Oif(number) => index = Some(*number),
            RouteAttribute::Priority(number) => metric = *number,
            _ => {}
        }
    }
    Some(Key { destination, gateway, index: index?, metric })
}

/// Adds what was being done to a failure of the kernel's network.
trait Trying<T> {
    fn trying(self, action: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T> Trying<T> for Result<T, rtnetlink::Error> {
    fn trying(self, action: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::Network { action: action(), source: Box::new(source) })
    }
}
