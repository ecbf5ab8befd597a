//! Which servers listen on the loopback of this network namespace: proc_pid_net(5).

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};

use protocol::loopback::Destination;

use crate::error::Error;

/// Where Docker's resolver answers on user-defined networks: it has packets to this address go to a port of its own.
pub(crate) const RESOLVER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 11), 53);

/// More are not worth a socket each in the guest.
const MOST: usize = 64;

/// `TCP_LISTEN` of the kernel's `tcp_states.h`.
const LISTEN: &str = "0A";

/// The servers there are, but for those on our `own` ports.
///
/// # Errors
///
/// When `/proc` cannot be read.
pub(crate) fn find(own: &[u16]) -> Result<HashSet<Destination>, Error> {
    let read = |name: &str| {
        let path = format!("/proc/thread-self/net/{name}");
        match fs::read_to_string(&path) {
            Ok(text) => Ok(text),
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            Err(source) => Err(Error::Host { action: "read", path: path.into(), source }),
        }
    };
    let tcp = read("tcp")? + &read("tcp6")?;
    Ok(servers(&tcp, &read("udp")?, own))
}

/// Pure.
fn servers(tcp: &str, udp: &str, own: &[u16]) -> HashSet<Destination> {
    let mut found = HashSet::new();
    let listening = tcp.lines().filter_map(socket).filter(|(_, state)| *state == LISTEN);
    for (address, _) in listening {
        let port = address.port();
        if own.contains(&port) {
            continue;
        }
        let reached: &[IpAddr] = match address.ip() {
            IpAddr::V4(ip) if ip == *RESOLVER.ip() => continue,
            IpAddr::V4(Ipv4Addr::UNSPECIFIED) => &[IpAddr::V4(Ipv4Addr::LOCALHOST)],
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) => {
                &[IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)]
            }
            ip if ip.is_loopback() => &[ip],
            _ => continue,
        };
        found.extend(reached.iter().map(|ip| Destination::tcp(SocketAddr::new(*ip, port))));
        if found.len() >= MOST {
            break;
        }
    }
    if udp.lines().filter_map(socket).any(|(address, _)| address.ip() == *RESOLVER.ip()) {
        let resolver = SocketAddr::V4(RESOLVER);
        found.extend([Destination::udp(resolver), Destination::tcp(resolver)]);
    }
    found
}

/// The address and the state in a line of `/proc/net/tcp` and the like.
fn socket(line: &str) -> Option<(SocketAddr, &str)> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let (ip, port) = words.next()?.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    // Words of 32 bits as the kernel has them in memory, which is network byte order, printed as numbers of this machine.
    let word = |at: usize| {
        let digits = ip.get(at * 8..at * 8 + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    let ip = match ip.len() {
        8 => IpAddr::from(word(0)?),
        32 => {
            let mut bytes = [0; 16];
            for (at, chunk) in bytes.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(at)?);
            }
            Ipv6Addr::from(bytes).to_canonical()
        }
        _ => return None,
    };
    Some((SocketAddr::new(ip, port), words.nth(1)?))
}

#[cfg(test)]
mod tests {
    use super::servers;
    use protocol::loopback::Destination;

    const TCP: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1
   2: 0100007F:1F91 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 3 1
   3: 020011AC:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4 1
   4: 0B00007F:8123 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 5 1
   5: 0100007F:7777 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 6 1
   0: 00000000000000000000000001000000:1F92 00000000000000000000000000000000:0000 0A 00000000:00000000
   1: 00000000000000000000000000000000:0017 00000000000000000000000000000000:0000 0A 00000000:00000000
nonsense
";

    fn tcp(address: &str) -> Destination {
        Destination::tcp(address.parse().unwrap())
    }

    #[test]
    fn servers_that_the_loopback_reaches_are_found_and_our_own_are_not() {
        let found = servers(TCP, "", &[0x7777]);
        let expected = ["127.0.0.1:8080", "127.0.0.1:22", "[::1]:8082", "127.0.0.1:23", "[::1]:23"];
        assert_eq!(found, expected.map(tcp).into());
    }

    #[test]
    fn dockers_resolver_is_known_by_its_address_and_asked_at_port_53() {
        let udp = "  12: 0B00007F:B1C2 00000000:0000 07 00000000:00000000\n";
        let found = servers("", udp, &[]);
        let resolver = tcp("127.0.0.11:53");
        assert_eq!(found, [resolver, Destination::udp(resolver.address)].into());
        assert!(servers("", "  1: 0100007F:0035 00000000:0000 07\n", &[]).is_empty());
    }
}
