//! Moves the interfaces of a network namespace into a guest.
//!
//! All functions act in the network namespace of the calling *thread*: the sandbox process lives in its container's;
//! others call through [`linux::namespace::inside`]. Nothing here starts a program or is asynchronous.
//!
//! # How
//!
//! ```text
//! the other end ── eth0 ──(ingress: redirect)──> tap ──> guest's NIC, with eth0's MAC and MTU
//!               <───────  (ingress: redirect)──────── <──
//! ```
//!
//! The link keeps its addresses, so that whoever manages the namespace finds it as it was made, but no frame gets to
//! the namespace's own stack any more. Segmentation and checksum offloads pass both ways in the tap's virtio header.

#![forbid(unsafe_code)]

mod attach;
mod difference;
mod scan;
mod wire;

use std::io;

use protocol::agent::{ConfigureNetworkRequest, Interface, Neighbor, Route};

pub use attach::{attach, detach, share_dns};
pub use difference::{Difference, difference};
pub use scan::scan;

/// What a network namespace has that a guest is to get.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Network {
    /// The links to be moved, by index.
    pub links: Vec<Link>,
    /// Routes of the main table, those first that others need.
    pub routes: Vec<Route>,
    /// Static entries of the ARP and neighbour tables.
    pub neighbors: Vec<Neighbor>,
    /// Links, addresses and routes that stay behind, and why.
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

/// Something that stays behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// What: `link sit0`, `route 10.0.0.0/8`.
    pub name: String,
    /// Why, as a half sentence: `it is a tunnel`.
    pub reason: String,
}

/// A failure with a network.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel refused.
    #[error("cannot {action}")]
    Kernel {
        /// A verb phrase: `list the links`.
        action: String,
        /// What it said.
        source: io::Error,
    },
    /// A link went away while it was being moved.
    #[error("network link {name} went away while it was being given to the guest")]
    Gone {
        /// Its name.
        name: String,
    },
    /// The guest could not tell two links apart.
    #[error(
        "network links {first} and {second} have the same MAC address {mac}; a guest finds its links by it. Give one of \
         them another (two ipvlan links of one parent always share it: use macvlan)"
    )]
    SameMac {
        /// One.
        first: String,
        /// The other.
        second: String,
        /// Their address.
        mac: String,
    },
    /// Somebody else on the link has an address of ours.
    #[error("address {address} of network link {name} is another host's already")]
    AddressTaken {
        /// The address.
        address: String,
        /// The link that has it.
        name: String,
    },
    /// No tap can have the link's MTU.
    #[error(
        "the MTU {mtu} of network link {name} is larger than {most}, the largest that a guest's link can have"
    )]
    Mtu {
        /// The link.
        name: String,
        /// Its MTU.
        mtu: u32,
        /// The largest possible.
        most: u32,
    },
    /// Somebody's traffic control is in the way.
    #[error(
        "network link {name} has ingress traffic control already; is another sandbox using this network namespace, or \
         was one not deleted?"
    )]
    Busy {
        /// The link.
        name: String,
    },
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

    /// Its name, in the namespace as in the guest.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.interface.name
    }
}
