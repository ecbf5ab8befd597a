//! From the guest to servers on this namespace's loopback.

use std::cell::RefCell;
use std::collections::HashSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use hypervisor::GuestStream;
use protocol::loopback::{CONNECTED, Destination, LENGTH, REFUSED, Transport};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::spawn_local;
use tokio::time::timeout;
use tracing::debug;

use super::{CONNECTIONS, DEADLINE, dial, mark, relay};

/// How long a guest's UDP client may be silent.
const IDLE: Duration = Duration::from_mins(2);

/// No datagram is longer.
const LONGEST: usize = 65_535;

/// Serves the guest's streams for as long as there is a machine.
pub(super) async fn serve(
    mut streams: mpsc::Receiver<GuestStream>,
    servers: Rc<RefCell<HashSet<Destination>>>,
) {
    let room = Rc::new(Semaphore::new(CONNECTIONS));
    while let Some(stream) = streams.recv().await {
        let (room, servers) = (Rc::clone(&room), Rc::clone(&servers));
        spawn_local(async move {
            // A stream that is dropped is refused.
            let Ok(_permit) = room.try_acquire() else { return };
            if let Err(error) = join(stream, &servers).await {
                debug!(%error, "the guest's connection to the host's loopback ended");
            }
        });
    }
}

async fn join(mut stream: GuestStream, servers: &RefCell<HashSet<Destination>>) -> io::Result<()> {
    let mut bytes = [0; LENGTH];
    timeout(DEADLINE, stream.read_exact(&mut bytes)).await??;
    // The guest has said it, so it may be anything: only what it was told of is reached.
    let wanted = Destination::decode(&bytes).filter(|wanted| servers.borrow().contains(wanted));
    let Some(wanted) = wanted else {
        stream.write_u8(REFUSED).await?;
        return Err(io::ErrorKind::PermissionDenied.into());
    };
    match wanted.transport {
        Transport::Tcp => {
            let server = timeout(DEADLINE, dial(wanted.address))
                .await
                .unwrap_or_else(|late| Err(late.into()));
            stream.write_u8(if server.is_ok() { CONNECTED } else { REFUSED }).await?;
            relay(server?, stream).await;
            Ok(())
        }
        Transport::Udp => {
            let socket = connected(wanted.address).await;
            stream.write_u8(if socket.is_ok() { CONNECTED } else { REFUSED }).await?;
            relay_datagrams(stream, &socket?).await
        }
    }
}

async fn connected(server: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    mark(&socket)?;
    socket.connect(server).await?;
    Ok(socket)
}

async fn relay_datagrams(stream: GuestStream, socket: &UdpSocket) -> io::Result<()> {
    let (mut from_guest, mut to_guest) = tokio::io::split(stream);
    let asking = async {
        let mut datagram = vec![0; LONGEST];
        loop {
            let length = usize::from(timeout(IDLE, from_guest.read_u16()).await??);
            from_guest.read_exact(&mut datagram[..length]).await?;
            // A server that is gone for now is as one that does not answer.
            drop(socket.send(&datagram[..length]).await);
        }
    };
    let answering = async {
        let mut frame = vec![0; 2 + LONGEST];
        loop {
            let length = match socket.recv(&mut frame[2..]).await {
                Ok(length) => length,
                // Told of what was asked before.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
                Err(error) => return Err(error),
            };
            let size = u16::try_from(length).map_err(io::Error::other)?;
            frame[..2].copy_from_slice(&size.to_be_bytes());
            to_guest.write_all(&frame[..2 + length]).await?;
        }
    };
    tokio::select! {
        ended = asking => ended,
        ended = answering => ended,
    }
}
