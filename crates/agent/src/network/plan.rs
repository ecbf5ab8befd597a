//! What the network shall be, read from the request and checked before anything is changed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use protocol::agent::{self, ConfigureNetworkRequest};

use crate::error::Error;

/// A network as it shall be.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) interfaces: Vec<Interface>,
    /// Those to gateways after those that make the gateways reachable.
    pub(super) routes: Vec<Route>,
    pub(super) neighbors: Vec<Neighbor>,
}

/// An address and the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Prefix {
    pub(super) address: IpAddr,
    pub(super) length: u8,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) name: String,
    pub(super) mac: [u8; 6],
    pub(super) mtu: Option<u32>,
    pub(super) addresses: Vec<Prefix>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) destination: Prefix,
    pub(super) gateway: Option<IpAddr>,
    pub(super) source: Option<IpAddr>,
    pub(super) device: String,
    pub(super) scope: u8,
    pub(super) metric: u32,
    pub(super) onlink: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Neighbor {
    pub(super) address: IpAddr,
    pub(super) mac: [u8; 6],
    pub(super) device: String,
}

/// `RTNH_F_ONLINK`.
const ONLINK: u32 = 4;
const AF_INET6: u32 = 10;

impl Plan {
    /// Reads the request.
    pub(super) fn read(request: &ConfigureNetworkRequest) -> Result<Self, Error> {
        let interfaces: Vec<_> =
            request.interfaces.iter().map(interface).collect::<Result<_, _>>()?;
        let mut routes: Vec<_> = request.routes.iter().map(route).collect::<Result<_, _>>()?;
        routes.sort_by_key(|route| route.gateway.is_some());
        let neighbors = request.neighbors.iter().map(neighbor).collect::<Result<_, _>>()?;
        Ok(Self { interfaces, routes, neighbors })
    }
}

fn interface(asked: &agent::Interface) -> Result<Interface, Error> {
    // IFNAMSIZ holds the zero at its end.
    if asked.name.is_empty() || asked.name.len() > 15 || asked.name.contains(['/', ' ']) {
        return Err(Error::Invalid(format!("{:?} is no name of an interface", asked.name)));
    }
    Ok(Interface {
        name: asked.name.clone(),
        mac: mac(&asked.mac)?,
        mtu: Some(asked.mtu).filter(|&mtu| mtu > 0),
        addresses: asked.addresses.iter().map(|text| prefix(text)).collect::<Result<_, _>>()?,
    })
}

fn route(asked: &agent::Route) -> Result<Route, Error> {
    let optional = |text: &str| (!text.is_empty()).then(|| address(text)).transpose();
    let gateway = optional(&asked.gateway)?;
    let destination = if asked.destination.is_empty() {
        let is_v6 = gateway.map_or(asked.family == AF_INET6, |gateway| gateway.is_ipv6());
        let any: IpAddr =
            if is_v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        Prefix { address: any, length: 0 }
    } else {
        prefix(&asked.destination)?
    };
    let scope = u8::try_from(asked.scope)
        .map_err(|_| Error::Invalid(format!("route scope {} is none", asked.scope)))?;
    Ok(Route {
        destination,
        gateway,
        source: optional(&asked.source)?,
        device: asked.device.clone(),
        scope,
        metric: asked.metric,
        onlink: asked.flags & ONLINK != 0,
    })
}

fn neighbor(asked: &agent::Neighbor) -> Result<Neighbor, Error> {
    Ok(Neighbor {
        address: address(&asked.address)?,
        mac: mac(&asked.mac)?,
        device: asked.device.clone(),
    })
}

fn address(text: &str) -> Result<IpAddr, Error> {
    text.parse().map_err(|_| Error::Invalid(format!("{text:?} is no IP address")))
}

fn prefix(text: &str) -> Result<Prefix, Error> {
    let bad = || Error::Invalid(format!("{text:?} is no address with a prefix length"));
    let (host, length) = text.split_once('/').ok_or_else(bad)?;
    let address = address(host)?;
    let length: u8 = length.parse().map_err(|_| bad())?;
    let longest = if address.is_ipv6() { 128 } else { 32 };
    if length > longest { Err(bad()) } else { Ok(Prefix { address, length }) }
}

fn mac(text: &str) -> Result<[u8; 6], Error> {
    let bytes: Option<Vec<u8>> =
        text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
    bytes.ok_or_else(|| Error::Invalid(format!("{text:?} is no MAC address")))
}

#[cfg(test)]
mod tests {
    use super::{Plan, prefix};
    use protocol::agent::{ConfigureNetworkRequest, Route};

    fn to(destination: &str, gateway: &str, family: u32) -> Route {
        Route {
            destination: destination.to_owned(),
            gateway: gateway.to_owned(),
            family,
            ..Route::default()
        }
    }

    #[test]
    fn an_empty_destination_is_the_default_route_of_its_family() {
        let routes = vec![
            to("", "10.0.0.1", 0),
            to("", "fe80::1", 0),
            to("", "", 10),
            to("10.0.0.0/8", "", 2),
        ];
        let request = ConfigureNetworkRequest { routes, ..ConfigureNetworkRequest::default() };
        let plan = Plan::read(&request).unwrap();
        let destinations: Vec<_> = plan
            .routes
            .iter()
            .map(|route| format!("{}/{}", route.destination.address, route.destination.length))
            .collect();
        // Those without a gateway come first.
        assert_eq!(destinations, ["::/0", "10.0.0.0/8", "0.0.0.0/0", "::/0"]);
    }

    #[test]
    fn a_prefix_longer_than_its_address_is_refused() {
        assert!(prefix("10.0.0.1/33").is_err());
        assert!(prefix("10.0.0.1").is_err());
        assert!(prefix("fd00::1/64").is_ok());
    }
}
