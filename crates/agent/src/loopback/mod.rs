//! The guest's half of the loopback bridge: servers on the loopback of the host's network namespace answer on the guest's,
//! and the guest's answer to connections that the host brings.
//!
//! ```text
//! container ──127.0.0.1:8080──> agent ──stream, port 1027──> sandbox process ──> server in the host's namespace
//! container <──127.0.0.1:80──── agent <──stream, port 1027── sandbox process <── dialler in the host's namespace
//! ```

mod program;
mod resolver;

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::LOOPBACK_PORT;
use protocol::agent::BridgeLoopbackRequest;
use protocol::loopback::{CONNECTED, Destination, LENGTH, REFUSED, Transport};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

use crate::console;
use crate::error::{Doing, Error, words};

/// Connections at a time, in each direction: what is more is refused.
const CONNECTIONS: usize = 256;

/// For a connection to be made, or a stream to say where it goes.
const DEADLINE: Duration = Duration::from_secs(10);

/// One read of a relay: each costs an interrupt.
const BLOCK: usize = 64 * 1024;

/// What the guest's loopback answers for.
#[derive(Debug, Default)]
pub(crate) struct Loopback {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    servers: HashMap<SocketAddr, Server>,
    /// The DNS server, once there was one: it stays, and the host refuses what it does not want.
    resolver: Option<SocketAddrV4>,
}

/// A listening socket; closed when dropped.
#[derive(Debug)]
struct Server(JoinHandle<()>);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Loopback {
    /// Answers for exactly these from now on. Connections that were made stay.
    ///
    /// # Errors
    ///
    /// When an address is not one of a loopback, or the resolver's cannot be taken over. A TCP port that a container has
    /// taken is left to it.
    pub(crate) fn bridge(&self, request: &BridgeLoopbackRequest) -> Result<(), Error> {
        let wanted =
            request.tcp.iter().map(|text| loopback(text)).collect::<Result<Vec<_>, _>>()?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.servers.retain(|address, server| wanted.contains(address) && !server.0.is_finished());
        for address in wanted {
            if state.servers.contains_key(&address) {
                continue;
            }
            match listen(address) {
                Ok(listener) => {
                    let accepting = accept(listener, Destination::tcp(address));
                    state.servers.insert(address, Server(tokio::spawn(accepting)));
                }
                Err(error) => console::err(&format!(
                    "kata-agent: the host's server at {address} cannot be reached: {}",
                    words(&error)
                )),
            }
        }
        if request.resolver.is_empty() || state.resolver.is_some() {
            return Ok(());
        }
        let SocketAddr::V4(address) = loopback(&request.resolver)? else {
            return Err(Error::Invalid(format!("resolver {} is not IPv4", request.resolver)));
        };
        resolver::start(address)?;
        state.resolver = Some(address);
        Ok(())
    }
}

fn loopback(text: &str) -> Result<SocketAddr, Error> {
    let address = text.parse().ok().filter(|address: &SocketAddr| address.ip().is_loopback());
    address.ok_or_else(|| Error::Invalid(format!("{text:?} is no loopback address with a port")))
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// Brings connections to the host, until dropped or the listener is of no use any more.
async fn accept(listener: TcpListener, destination: Destination) {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            // The client changed its mind.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => {
                let address = destination.address;
                let why = words(&error);
                console::err(&format!("kata-agent: no more connections to {address}: {why}"));
                return;
            }
        };
        let Ok(permit) = Arc::clone(&room).try_acquire_owned() else {
            reset(&client);
            continue;
        };
        tokio::spawn(async move {
            match timeout(DEADLINE, to_host(destination)).await {
                Ok(Ok(stream)) => relay(client, stream).await,
                _ => reset(&client),
            }
            drop(permit);
        });
    }
}

/// A stream to a server on the host's side.
async fn to_host(destination: Destination) -> io::Result<VsockStream> {
    let mut stream = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, LOOPBACK_PORT)).await?;
    stream.write_all(&destination.encode()).await?;
    match stream.read_u8().await? {
        CONNECTED => Ok(stream),
        _ => Err(io::ErrorKind::ConnectionRefused.into()),
    }
}

/// Has a connection closed, when it is dropped, as by a server that does not want it.
fn reset(client: &TcpStream) {
    // Where that fails it is closed as any other.
    drop(client.set_zero_linger());
}

/// Both ways, until both have ended.
async fn relay(mut client: TcpStream, mut stream: VsockStream) {
    // An answer shall not wait for the next: latency is all that most of these protocols have to lose.
    drop(client.set_nodelay(true));
    let relayed =
        tokio::io::copy_bidirectional_with_sizes(&mut client, &mut stream, BLOCK, BLOCK).await;
    if relayed.is_err() {
        reset(&client);
    }
}

/// Takes the host's streams to the guest's loopback; the task ends only with an error.
pub(crate) fn serve() -> Result<JoinHandle<io::Error>, Error> {
    let address = VsockAddr::new(VMADDR_CID_ANY, LOOPBACK_PORT);
    let listener =
        VsockListener::bind(address).doing(|| format!("listen on vsock port {LOOPBACK_PORT}"))?;
    Ok(tokio::spawn(async move {
        let room = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let (stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => return error,
            };
            // A dropped stream is refused.
            if peer.cid() != VMADDR_CID_HOST {
                continue;
            }
            let Ok(permit) = Arc::clone(&room).try_acquire_owned() else { continue };
            tokio::spawn(async move {
                if let Ok(Some((server, stream))) = timeout(DEADLINE, from_host(stream)).await {
                    relay(server, stream).await;
                }
                drop(permit);
            });
        }
    }))
}

/// Dials where a stream of the host's wants to go, and tells it.
async fn from_host(mut stream: VsockStream) -> Option<(TcpStream, VsockStream)> {
    let mut bytes = [0; LENGTH];
    stream.read_exact(&mut bytes).await.ok()?;
    let wanted = Destination::decode(&bytes).filter(|wanted| wanted.transport == Transport::Tcp)?;
    let server = dial(wanted.address).await;
    let answer = if server.is_ok() { CONNECTED } else { REFUSED };
    stream.write_u8(answer).await.ok()?;
    Some((server.ok()?, stream))
}

/// `localhost` is either family: a server may listen on the other one only.
async fn dial(wanted: SocketAddr) -> io::Result<TcpStream> {
    let other: IpAddr =
        if wanted.is_ipv4() { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
    match TcpStream::connect(wanted).await {
        Err(_) => TcpStream::connect(SocketAddr::new(other, wanted.port())).await,
        connected => connected,
    }
}
