//! From this namespace's loopback to the guest's.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as SyncListener};
use std::os::fd::AsFd;
use std::rc::Rc;

use hypervisor::{Port, VsockAddress};
use linux::nftables::{LoopbackRedirect, original_destination};
use protocol::LOOPBACK_PORT;
use protocol::loopback::{CONNECTED, Destination};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::timeout;
use tracing::{debug, warn};

use super::{CONNECTIONS, DEADLINE, RESOLVER, dial, mark, relay, reset};
use crate::error::Error;

/// The table's name, as `nft list ruleset` shows it.
const TABLE: &str = "kata-loopback";

/// Connections to this namespace's loopback, redirected to us; until dropped.
#[derive(Debug)]
pub(super) struct Redirect {
    ports: Vec<u16>,
    accepting: Vec<JoinHandle<()>>,
    _rules: LoopbackRedirect,
}

impl Drop for Redirect {
    fn drop(&mut self) {
        for task in &self.accepting {
            task.abort();
        }
    }
}

impl Redirect {
    /// Redirects from now on.
    ///
    /// # Errors
    ///
    /// When the loopback interface is down, or the kernel has no nftables with tables that go with their owner (5.12).
    pub(super) fn start(vsock: &VsockAddress) -> Result<Self, Error> {
        let listen = |ip: IpAddr| {
            let told = Error::host("listen on", ip.to_string());
            listener(SocketAddr::new(ip, 0)).map_err(told)
        };
        let v4 = listen(Ipv4Addr::LOCALHOST.into())?;
        // A namespace may have no IPv6.
        let v6 = listen(Ipv6Addr::LOCALHOST.into()).ok();
        let (v4, port_v4) = v4;
        let (v6, port_v6) = v6.unzip();
        let ports = (port_v4, port_v6);
        let rules = LoopbackRedirect::new(TABLE, ports, *RESOLVER.ip(), super::MARK)
            .map_err(Error::host("redirect connections by nftables table", TABLE))?;
        let room = Rc::new(Semaphore::new(CONNECTIONS));
        let own: Vec<u16> = [Some(port_v4), port_v6].into_iter().flatten().collect();
        let listeners = [Some(v4), v6].into_iter().flatten();
        let accepting = listeners
            .map(|listener| {
                spawn_local(accept(listener, vsock.clone(), own.clone(), Rc::clone(&room)))
            })
            .collect();
        Ok(Self { ports: own, accepting, _rules: rules })
    }

    /// The ports that we listen on ourselves.
    pub(super) fn ports(&self) -> Vec<u16> {
        self.ports.clone()
    }
}

fn listener(address: SocketAddr) -> io::Result<(TcpListener, u16)> {
    let listener = SyncListener::bind(address)?;
    // What it accepts inherits the mark: answers too are to be left alone.
    mark(&listener)?;
    listener.set_nonblocking(true)?;
    let port = listener.local_addr()?.port();
    Ok((TcpListener::from_std(listener)?, port))
}

async fn accept(listener: TcpListener, vsock: VsockAddress, own: Vec<u16>, room: Rc<Semaphore>) {
    let vsock = Rc::new(vsock);
    loop {
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) => {
                warn!(%error, "no more connections from the host's loopback are taken");
                return;
            }
        };
        let wanted = match original_destination(client.as_fd(), is_v6(&client)) {
            Ok((ip, port)) if !own.contains(&port) => SocketAddr::new(ip, port),
            _ => {
                reset(&client);
                continue;
            }
        };
        let (room, vsock) = (Rc::clone(&room), Rc::clone(&vsock));
        spawn_local(async move {
            let Ok(_permit) = room.try_acquire() else { return reset(&client) };
            connect(client, wanted, &vsock).await;
        });
    }
}

fn is_v6(client: &TcpStream) -> bool {
    client.local_addr().is_ok_and(|address| address.is_ipv6())
}

/// Joins `client` with who listens: in this namespace, else in the guest.
async fn connect(client: TcpStream, wanted: SocketAddr, vsock: &VsockAddress) {
    drop(client.set_nodelay(true));
    if let Ok(Ok(server)) = timeout(DEADLINE, dial(wanted)).await {
        return relay(client, server).await;
    }
    match timeout(DEADLINE, into_guest(wanted, vsock)).await {
        Ok(Ok(stream)) => relay(client, stream).await,
        refused => {
            debug!(%wanted, ?refused, "refused");
            reset(&client);
        }
    }
}

async fn into_guest(wanted: SocketAddr, vsock: &VsockAddress) -> io::Result<UnixStream> {
    let mut stream = vsock.connect(Port(LOOPBACK_PORT)).await?;
    stream.write_all(&Destination::tcp(wanted).encode()).await?;
    match stream.read_u8().await? {
        CONNECTED => Ok(stream),
        _ => Err(io::ErrorKind::ConnectionRefused.into()),
    }
}
