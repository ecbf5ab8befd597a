//! The guest's interfaces: those of the network namespace, at all times.

use std::cell::RefCell;
use std::path::PathBuf;

use network::Network;
use tokio::sync::Semaphore;
use tracing::info;

use crate::error::Error;
use crate::loopback::Loopback;
use crate::sandbox::{Sandbox, VmRequest};

/// What the guest has of its network namespace.
#[derive(Debug)]
pub(crate) struct Interfaces {
    /// A path to the namespace, for the ledger.
    netns: PathBuf,
    network: RefCell<Network>,
    loopback: Loopback,
    /// One at a time looks at the interfaces and changes the guest's.
    scanning: Semaphore,
}

impl Interfaces {
    pub(crate) fn new(netns: PathBuf, loopback: Loopback) -> Self {
        Self { netns, network: RefCell::default(), loopback, scanning: Semaphore::new(1) }
    }
}

impl Sandbox {
    /// Makes the guest's interfaces those that the network namespace has now.
    pub(crate) async fn rescan_network(&self) -> Result<(), Error> {
        let Interfaces { netns, network, loopback, scanning } = &self.interfaces;
        let one = scanning.acquire().await;
        let now = network::scan()?;
        let difference = network::difference(&network.borrow(), &now);
        for skipped in &now.skipped {
            info!(link = skipped.name, reason = skipped.reason, "link stays on the host");
        }
        for link in &difference.removed {
            self.ask_vm(|answer| VmRequest::Detach(link.device_id(), answer)).await?;
            network::detach(link)?;
        }
        for link in &difference.added {
            let device = network::attach(link, netns, &mut self.ledger.borrow_mut())?;
            self.ask_vm(|answer| VmRequest::Attach(device, answer)).await?;
        }
        if difference.configuration {
            self.agent.configure_network(now.request()).await?;
            network.replace(now.clone());
        }
        loopback.refresh(&now, &self.agent).await;
        drop(one);
        Ok(())
    }
}
