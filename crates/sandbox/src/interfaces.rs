//! The guest's interfaces: those of the network namespace, at all times.
//!
//! The namespace is filled before a container is created, by hooks while it is, or between create and start; and `docker
//! network connect` fills it while the container runs, with no word to the runtime. So it is looked at on create and on
//! start, and whenever the kernel tells of a change.

use std::cell::RefCell;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use linux::netlink::News;
use network::{Link, Network};
use protocol::agent::ConfigureNetworkRequest;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};
use tracing::{info, warn};

use crate::error::{Chain, Error};
use crate::loopback::Loopback;
use crate::sandbox::{Sandbox, VmRequest};

/// A change is one of several mostly: a link is moved, named, given its addresses, set up. No news for so long, and they
/// are taken for done.
const QUIET: Duration = Duration::from_millis(100);

/// A namespace that is never quiet is looked at so often.
const LATEST: Duration = Duration::from_secs(2);

/// What the guest has of its network namespace.
#[derive(Debug)]
pub(crate) struct Interfaces {
    /// A path to the namespace, for the ledger.
    netns: PathBuf,
    /// What is attached.
    network: RefCell<Network>,
    /// What the agent was told last.
    configured: RefCell<ConfigureNetworkRequest>,
    loopback: Loopback,
    /// One at a time looks at the interfaces and changes the guest's.
    scanning: Semaphore,
}

impl Interfaces {
    pub(crate) fn new(netns: PathBuf, loopback: Loopback) -> Self {
        Self {
            netns,
            network: RefCell::default(),
            configured: RefCell::default(),
            loopback,
            scanning: Semaphore::new(1),
        }
    }
}

impl Sandbox {
    /// Makes the guest's interfaces those that the network namespace has now.
    pub(crate) async fn rescan_network(&self) -> Result<(), Error> {
        let Interfaces { network, loopback, scanning, .. } = &self.interfaces;
        let _one = scanning.acquire().await;
        let now = network::scan()?;
        let difference = network::difference(&network.borrow(), &now);
        if !difference.removed.is_empty() {
            self.take_links(&difference.removed).await?;
        }
        if !difference.added.is_empty() {
            for skipped in &now.skipped {
                info!(link = skipped.name, reason = skipped.reason, "link stays on the host");
            }
        }
        for link in difference.added {
            self.give_link(link).await?;
        }
        self.configure_network(now.request()).await?;
        network.replace(now.clone());
        loopback.refresh(&now, &self.agent).await;
        Ok(())
    }

    async fn configure_network(&self, request: ConfigureNetworkRequest) -> Result<(), Error> {
        let configured = &self.interfaces.configured;
        if *configured.borrow() != request {
            self.agent.configure_network(request.clone()).await?;
            configured.replace(request);
        }
        Ok(())
    }

    /// Takes links from the guest. The agent goes first, and lets them go by itself; a guest that does not loses them all
    /// the same, later.
    async fn take_links(&self, links: &[Link]) -> Result<(), Error> {
        let network = &self.interfaces.network;
        let left = network.borrow().without(links);
        if let Err(error) = self.configure_network(left.request()).await {
            warn!(error = %Chain(&error), "the guest does not let its interfaces go");
        }
        for link in links {
            info!(link = link.name(), "link taken from the guest");
            let detached = self.ask_vm(|answer| VmRequest::Detach(link.device_id(), answer)).await;
            network::detach(link)?;
            detached?;
        }
        network.replace(left);
        Ok(())
    }

    async fn give_link(&self, link: Link) -> Result<(), Error> {
        let Interfaces { netns, network, .. } = &self.interfaces;
        info!(link = link.name(), "link given to the guest");
        let device = network::attach(&link, netns, &mut self.ledger.borrow_mut())?;
        let attached = self.ask_vm(|answer| VmRequest::Attach(device, answer)).await;
        if attached.is_err() {
            // The first error is the one to tell.
            drop(network::detach(&link));
            return attached;
        }
        network.borrow_mut().links.push(link);
        Ok(())
    }
}

/// Keeps the guest's interfaces those of the namespace, from the first container on.
pub(crate) async fn follow(sandbox: Rc<Sandbox>) {
    let mut changes = sandbox.changes();
    while sandbox.is_empty() {
        if changes.changed().await.is_err() {
            return;
        }
    }
    let followed = async {
        let news = watched(News::open()?)?;
        loop {
            news.async_io(Interest::READABLE, News::take).await?;
            let latest = Instant::now() + LATEST;
            while Instant::now() < latest {
                let quiet = latest.min(Instant::now() + QUIET);
                let more = news.async_io(Interest::READABLE, News::take);
                match timeout_at(quiet, more).await {
                    Ok(taken) => taken?,
                    Err(_) => break,
                }
            }
            if let Err(error) = sandbox.rescan_network().await {
                warn!(error = %Chain(&error), "the guest's network stays as it was");
            }
        }
    };
    let Err::<(), io::Error>(error) = followed.await else { return };
    warn!(%error, "changes of the network are not followed");
}

#[expect(
    deprecated,
    reason = "unsound only for a type that may change its descriptor; its successor is unsafe"
)]
fn watched(news: News) -> io::Result<AsyncFd<News>> {
    AsyncFd::with_interest(news, Interest::READABLE)
}
