//! What a stream to [`LOOPBACK_PORT`](crate::LOOPBACK_PORT) begins with.
//!
//! Who opens it sends a [`Destination`]; the other side dials it on its own loopback and answers one byte,
//! [`CONNECTED`] or [`REFUSED`]. From then on the stream is that connection. For UDP it is one client's datagrams in both
//! directions, each behind its length in two bytes, high one first.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// The length of a [`Destination`] on the wire.
pub const LENGTH: usize = 20;

/// The answer of who has connected.
pub const CONNECTED: u8 = 1;

/// The answer of who could not connect; the stream ends.
pub const REFUSED: u8 = 0;

/// What carries the bytes; IANA's protocol numbers on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A server on a loopback address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Destination {
    /// How it is reached.
    pub transport: Transport,
    /// Where.
    pub address: SocketAddr,
}

const TCP: u8 = 6;
const UDP: u8 = 17;

impl Destination {
    /// The TCP server at `address`.
    #[must_use]
    pub fn tcp(address: SocketAddr) -> Self {
        Self { transport: Transport::Tcp, address }
    }

    /// The UDP server at `address`.
    #[must_use]
    pub fn udp(address: SocketAddr) -> Self {
        Self { transport: Transport::Udp, address }
    }

    /// On the wire: the protocol's number, a zero, the address as IPv6 has it, the port.
    #[must_use]
    pub fn encode(&self) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        bytes[0] = match self.transport {
            Transport::Tcp => TCP,
            Transport::Udp => UDP,
        };
        let address = match self.address.ip() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        bytes[2..18].copy_from_slice(&address.octets());
        bytes[18..].copy_from_slice(&self.address.port().to_be_bytes());
        bytes
    }

    /// From the wire; `None` for what is no loopback address, or no protocol of ours.
    #[must_use]
    pub fn decode(bytes: &[u8; LENGTH]) -> Option<Self> {
        let transport = match bytes[..2] {
            [TCP, 0] => Transport::Tcp,
            [UDP, 0] => Transport::Udp,
            _ => return None,
        };
        let address: [u8; 16] = bytes[2..18].try_into().ok()?;
        let port = u16::from_be_bytes(bytes[18..].try_into().ok()?);
        let ip = Ipv6Addr::from(address).to_canonical();
        (ip.is_loopback() && port != 0)
            .then(|| Self { transport, address: SocketAddr::new(ip, port) })
    }
}

#[cfg(test)]
mod tests {
    use super::{Destination, LENGTH};

    #[test]
    fn a_destination_is_read_as_it_was_written() {
        for address in ["127.0.0.1:80", "127.0.0.11:53", "[::1]:65535"] {
            for destination in [
                Destination::tcp(address.parse().unwrap()),
                Destination::udp(address.parse().unwrap()),
            ] {
                assert_eq!(Destination::decode(&destination.encode()), Some(destination));
            }
        }
    }

    #[test]
    fn what_leads_off_the_loopback_is_none() {
        for address in ["10.0.0.1:80", "[2001:db8::1]:80", "0.0.0.0:80", "127.0.0.1:0"] {
            let bytes = Destination::tcp(address.parse().unwrap()).encode();
            assert_eq!(Destination::decode(&bytes), None, "{address}");
        }
        assert_eq!(Destination::decode(&[0; LENGTH]), None);
        let mut icmp = Destination::tcp("127.0.0.1:80".parse().unwrap()).encode();
        icmp[0] = 1;
        assert_eq!(Destination::decode(&icmp), None);
    }
}
