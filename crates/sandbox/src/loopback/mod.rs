//! The host's half of the loopback bridge, in the network namespace of the sandbox process, which is the containers'.
//!
//! The guest has a loopback of its own, so what containers and host processes of one network namespace share under runc
//! would be apart: Docker's resolver at 127.0.0.11, a port that a pod's `port-forward` dials. The bridge joins the two:
//!
//! ```text
//! guest: 127.0.0.11:53, 127.0.0.1:8080 ──> stream, port 1027 ──> sandbox process ──> the server in this namespace
//! guest: whatever listens there        <── stream, port 1027 <── sandbox process <── nftables redirect of TCP to loopback
//! ```
//!
//! The guest is told of the servers that there are, and reaches no others. A connection that nobody in the guest wants is
//! closed with a reset after it was made, since only by making it is it seen.

mod servers;
mod to_guest;
mod to_host;

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Duration;

use hypervisor::{GuestStream, VsockAddress};
use network::Network;
use nix::sys::socket::{setsockopt, sockopt};
use protocol::agent::BridgeLoopbackRequest;
use protocol::loopback::{Destination, Transport};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::spawn_local;
use tracing::{info, warn};

use crate::agent::Agent;
use crate::error::{Chain, Error};

pub(crate) use servers::{RESOLVER, find};
use to_guest::Redirect;

/// Connections at a time, in each direction: what is more is refused.
const CONNECTIONS: usize = 256;

/// For a connection to be made.
const DEADLINE: Duration = Duration::from_secs(10);

/// One read of a relay.
const BLOCK: usize = 64 << 10;

/// The mark of the bridge's own sockets, "kata": what they send is not redirected.
const MARK: u32 = 0x6b61_7461;

/// The bridge of one sandbox.
#[derive(Debug)]
pub(crate) struct Loopback {
    vsock: VsockAddress,
    /// The servers in this namespace that the guest may reach.
    servers: Rc<RefCell<HashSet<Destination>>>,
    redirect: RefCell<Option<Redirect>>,
    /// The indices of links behind which the namespace's own sockets get answers.
    sharing: RefCell<HashSet<u32>>,
    warned: Cell<bool>,
}

impl Loopback {
    /// Serves the guest's `streams` from now on, which may go nowhere before [`Self::refresh`].
    pub(crate) fn new(streams: mpsc::Receiver<GuestStream>, vsock: VsockAddress) -> Self {
        let servers = Rc::<RefCell<_>>::default();
        spawn_local(to_host::serve(streams, Rc::clone(&servers)));
        Self {
            vsock,
            servers,
            redirect: RefCell::default(),
            sharing: RefCell::default(),
            warned: Cell::new(false),
        }
    }

    /// Looks what servers there are, and tells the guest of them. What does not work is not worth a container: it is
    /// logged, once.
    pub(crate) async fn refresh(&self, network: &Network, agent: &Agent) {
        if self.redirect.borrow().is_none() {
            match Redirect::start(&self.vsock) {
                Ok(redirect) => drop(self.redirect.replace(Some(redirect))),
                Err(error) => {
                    self.warn(&error, "servers in the guest do not answer on the host's loopback");
                }
            }
        }
        let own = self.redirect.borrow().as_ref().map(Redirect::ports).unwrap_or_default();
        let refreshed = match find(&own) {
            Ok(found) => self.bridge(found, network, agent).await,
            Err(error) => Err(error),
        };
        if let Err(error) = refreshed {
            self.warn(&error, "the guest does not reach the servers on the host's loopback");
        }
    }

    async fn bridge(
        &self,
        found: HashSet<Destination>,
        network: &Network,
        agent: &Agent,
    ) -> Result<(), Error> {
        let resolver = Destination::udp(SocketAddr::V4(RESOLVER));
        if found.contains(&resolver) {
            self.share_dns(network)?;
        }
        if found == *self.servers.borrow() {
            return Ok(());
        }
        info!(servers = ?found, "the guest may reach the host's loopback");
        let tcp = found.iter().filter(|server| {
            server.transport == Transport::Tcp && server.address != SocketAddr::V4(RESOLVER)
        });
        let request = BridgeLoopbackRequest {
            tcp: tcp.map(|server| server.address.to_string()).collect(),
            resolver: if found.contains(&resolver) { RESOLVER.to_string() } else { String::new() },
            ..Default::default()
        };
        self.servers.replace(found);
        agent.bridge_loopback(request).await
    }

    /// The resolver asks its own servers from this namespace.
    fn share_dns(&self, network: &Network) -> Result<(), Error> {
        let mut sharing = self.sharing.borrow_mut();
        sharing.retain(|index| network.links.iter().any(|link| link.index == *index));
        for link in &network.links {
            if sharing.insert(link.index) {
                network::share_dns(link)?;
            }
        }
        Ok(())
    }

    fn warn(&self, error: &Error, what: &str) {
        if !self.warned.replace(true) {
            warn!(error = %Chain(error), "{what}");
        }
    }
}

/// Sets the bridge's mark, before the socket is connected.
fn mark(socket: &impl AsFd) -> std::io::Result<()> {
    Ok(setsockopt(socket, sockopt::Mark, &MARK)?)
}

/// Connects to a server in this namespace.
async fn dial(address: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    mark(&socket)?;
    let stream = socket.connect(address).await?;
    // An answer shall not wait for the next.
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Has a connection closed, when it is dropped, as by a server that does not want it.
fn reset(client: &TcpStream) {
    // Where that fails it is closed as any other.
    drop(client.set_zero_linger());
}

/// Both ways, until both have ended.
async fn relay(mut tcp: TcpStream, mut other: impl AsyncRead + AsyncWrite + Unpin) {
    let relayed =
        tokio::io::copy_bidirectional_with_sizes(&mut tcp, &mut other, BLOCK, BLOCK).await;
    if relayed.is_err() {
        reset(&tcp);
    }
}
