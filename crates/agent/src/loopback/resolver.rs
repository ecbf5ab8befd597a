//! A DNS server on the host's side, asked on the guest's loopback.
//!
//! The agent listens on a port of the kernel's choice, and a program in the kernel has those who ask the server's port find
//! it there: so a container can have a DNS server of its own on all addresses, as it can where packets are rewritten.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use protocol::loopback::Destination;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{DEADLINE, accept, listen, program, to_host};
use crate::console;
use crate::error::{Doing, Error, words};

/// Clients at a time. One that asks several questions from one socket is one client.
const FLOWS: usize = 256;

/// Questions of one client that wait; what is more is lost, as UDP allows.
const QUESTIONS: usize = 16;

/// How long a client may be silent.
const IDLE: Duration = Duration::from_secs(30);

/// No datagram is longer.
const LONGEST: usize = 65_535;

/// Answers on `address` from now on.
pub(super) fn start(address: SocketAddrV4) -> Result<(), Error> {
    let action = || format!("listen for the resolver at {address}");
    let (udp, tcp) = sockets(address).doing(action)?;
    let port = udp.local_addr().doing(action)?.port();
    program::redirect(address, port)
        .doing(|| format!("send what is for {address} to the agent"))?;
    let server = SocketAddr::V4(address);
    tokio::spawn(accept(tcp, Destination::tcp(server)));
    tokio::spawn(answer(udp, Destination::udp(server)));
    Ok(())
}

/// A port that is free for both.
fn sockets(address: SocketAddrV4) -> io::Result<(UdpSocket, tokio::net::TcpListener)> {
    const TRIES: usize = 16;
    let mut last = None;
    for _ in 0..TRIES {
        let udp = std::net::UdpSocket::bind((*address.ip(), 0))?;
        match listen(udp.local_addr()?) {
            Ok(tcp) => {
                udp.set_nonblocking(true)?;
                return Ok((UdpSocket::from_std(udp)?, tcp));
            }
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| io::ErrorKind::AddrInUse.into()))
}

/// Carries each client's datagrams by a stream of its own, for as long as the socket is of use.
async fn answer(socket: UdpSocket, destination: Destination) {
    let socket = Arc::new(socket);
    let mut flows: HashMap<SocketAddr, mpsc::Sender<Vec<u8>>> = HashMap::new();
    let mut buffer = vec![0; LONGEST];
    loop {
        let (length, client) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // Of an answer that nobody wanted any more.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
            Err(error) => {
                let why = words(&error);
                console::err(&format!("kata-agent: no more questions to the resolver: {why}"));
                return;
            }
        };
        let question = buffer[..length].to_vec();
        let question = match flows.get(&client).map(|flow| flow.try_send(question)) {
            Some(Ok(()) | Err(mpsc::error::TrySendError::Full(_))) => continue,
            Some(Err(mpsc::error::TrySendError::Closed(question))) => question,
            None => buffer[..length].to_vec(),
        };
        flows.retain(|_, flow| !flow.is_closed());
        if flows.len() >= FLOWS {
            continue;
        }
        let (sender, questions) = mpsc::channel(QUESTIONS);
        // There is room for one.
        drop(sender.try_send(question));
        flows.insert(client, sender);
        let socket = Arc::clone(&socket);
        tokio::spawn(async move {
            // A client whose server cannot be reached asks again, or another one.
            drop(flow(&socket, client, questions, destination).await);
        });
    }
}

async fn flow(
    socket: &UdpSocket,
    client: SocketAddr,
    mut questions: mpsc::Receiver<Vec<u8>>,
    destination: Destination,
) -> io::Result<()> {
    let stream = timeout(DEADLINE, to_host(destination)).await??;
    let (mut from_host, mut to_host) = tokio::io::split(stream);
    let asking = async {
        while let Ok(Some(question)) = timeout(IDLE, questions.recv()).await {
            let length = u16::try_from(question.len()).map_err(io::Error::other)?;
            let mut frame = Vec::with_capacity(question.len() + 2);
            frame.extend(length.to_be_bytes());
            frame.extend(question);
            to_host.write_all(&frame).await?;
        }
        Ok(())
    };
    let answering = async {
        let mut datagram = vec![0; LONGEST];
        loop {
            let length = usize::from(from_host.read_u16().await?);
            from_host.read_exact(&mut datagram[..length]).await?;
            socket.send_to(&datagram[..length], client).await?;
        }
    };
    tokio::select! {
        ended = asking => ended,
        ended = answering => ended,
    }
}
