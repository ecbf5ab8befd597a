//! Real network namespaces, links and TCP, as root.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use hypervisor::Device;
use linux::ThisHost;
use linux::ledger::Ledger;
use linux::process::Command;
use linux::{link, namespace, tap};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{attach, detach, share_dns};
use crate::{Error, Link, Network, scan};

const MAC: &str = "02:42:0a:09:00:02";

/// A container's namespace with an eth0, and an outside that it leads to.
struct Fixture {
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return None;
        }
        let fixture = Self { dir: tempfile::tempdir().unwrap() };
        for name in ["container", "outside", "guest"] {
            namespace::create_network(&fixture.netns(name)).unwrap();
        }
        let outside = fixture.netns("outside");
        let outside = outside.to_str().unwrap();
        if !fixture.ip("container", "link add eth0 type veth peer name peer0") {
            println!("SKIPPED: needs ip(8) and veth links");
            return None;
        }
        for command in [
            &format!("link set eth0 address {MAC}"),
            &format!("link set peer0 netns {outside}"),
            "address add 10.9.0.2/24 dev eth0",
            "address add fd09::2/64 dev eth0 nodad",
            "link set eth0 up",
        ] {
            assert!(fixture.ip("container", command), "{command}");
        }
        for command in [
            "address add 10.9.0.1/24 dev peer0",
            "address add fd09::1/64 dev peer0 nodad",
            "link set peer0 up",
        ] {
            assert!(fixture.ip("outside", command), "{command}");
        }
        Some(fixture)
    }

    fn netns(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn inside<T: Send, E: From<io::Error> + Send>(
        &self,
        name: &str,
        action: impl FnOnce() -> Result<T, E> + Send,
    ) -> Result<T, E> {
        namespace::inside(&self.netns(name), action)
    }

    fn ip(&self, name: &str, command: &str) -> bool {
        let run = || {
            let mut ip = Command::new("ip");
            ip.args(command.split(' '));
            ip.spawn()?.wait()
        };
        self.inside(name, run).is_ok_and(|status| status.success())
    }

    fn scan(&self) -> Network {
        self.inside("container", || Ok::<_, Wrapped>(scan()?)).unwrap()
    }

    fn eth0(&self) -> Link {
        self.scan().links.remove(0)
    }

    fn ledger(&self) -> Ledger {
        Ledger::open(&self.dir.path().join("ledger")).unwrap()
    }

    fn attach(&self, link: &Link) -> Result<OwnedFd, Error> {
        let netns = self.netns("container");
        let device = self
            .inside("container", || Ok::<_, Wrapped>(attach(link, &netns, &mut self.ledger())?));
        match device {
            Ok(Device::Network { mut tap, mac, mtu, .. }) => {
                assert_eq!((mac, mtu), (link.mac, link.interface.mtu));
                Ok(tap.remove(0))
            }
            Ok(other) => panic!("{other:?}"),
            Err(Wrapped(error)) => Err(error),
        }
    }

    fn has_ingress(&self, link: &Link) -> bool {
        self.inside("container", || link::has_ingress(link.index)).unwrap()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        for name in ["container", "outside", "guest"] {
            namespace::remove_network(&self.netns(name)).unwrap();
        }
    }
}

/// An error that can also be one of entering a namespace.
#[derive(Debug)]
struct Wrapped(Error);

impl From<Error> for Wrapped {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl From<io::Error> for Wrapped {
    fn from(source: io::Error) -> Self {
        Self(Error::Kernel { action: "enter a test's namespace".to_owned(), source })
    }
}

#[test]
fn a_real_namespace_is_scanned() {
    let Some(fixture) = Fixture::new() else { return };
    assert!(fixture.ip("container", "route add default via 10.9.0.1"));
    assert!(
        fixture.ip("container", "route add 10.77.0.0/16 via 10.99.0.1 dev eth0 onlink metric 7")
    );
    assert!(fixture.ip("container", "-6 route add default via fd09::1"));
    assert!(fixture.ip("container", "neigh add 10.9.0.7 lladdr 02:00:00:00:00:07 dev eth0"));
    let network = fixture.scan();
    let request = network.request();
    assert_eq!(network.links.len(), 1);
    assert_eq!((network.links[0].kind.as_str(), network.links[0].name()), ("veth", "eth0"));
    assert_eq!(request.interfaces[0].mac, MAC);
    assert_eq!(request.interfaces[0].mtu, 1500);
    assert_eq!(request.interfaces[0].addresses, ["10.9.0.2/24", "fd09::2/64"]);
    let routes: Vec<_> = request
        .routes
        .iter()
        .map(|route| {
            (route.destination.as_str(), route.gateway.as_str(), route.metric, route.flags)
        })
        .collect();
    assert_eq!(
        routes,
        [("10.77.0.0/16", "10.99.0.1", 7, 4), ("", "10.9.0.1", 0, 0), ("", "fd09::1", 1024, 0)]
    );
    assert_eq!(request.neighbors[0].address, "10.9.0.7");
}

#[test]
fn what_was_attached_is_redirected_until_it_is_detached_or_settled() {
    let Some(fixture) = Fixture::new() else { return };
    let eth0 = fixture.eth0();
    let tap = fixture.attach(&eth0).unwrap();
    assert!(fixture.has_ingress(&eth0));
    // Our own tap is not one of the container's links.
    assert_eq!(fixture.scan().links, std::slice::from_ref(&eth0));
    // And nobody else can take the link.
    assert!(matches!(fixture.attach(&eth0), Err(Error::Busy { .. } | Error::Kernel { .. })));
    assert!(fixture.has_ingress(&eth0));

    fixture.inside("container", || Ok::<_, Wrapped>(detach(&eth0)?)).unwrap();
    fixture.inside("container", || Ok::<_, Wrapped>(detach(&eth0)?)).unwrap();
    drop(tap);
    assert!(!fixture.has_ingress(&eth0));

    // As after a crash: the fd is gone, and only the ledger tells of the rest.
    drop(fixture.attach(&eth0).unwrap());
    assert!(fixture.has_ingress(&eth0));
    fixture.ledger().settle(&ThisHost).unwrap();
    assert!(!fixture.has_ingress(&eth0));
    fixture.ledger().settle(&ThisHost).unwrap();
    drop(fixture.attach(&eth0).unwrap());
}

#[test]
fn a_link_that_vanished_meanwhile_is_named() {
    let Some(fixture) = Fixture::new() else { return };
    let eth0 = fixture.eth0();
    assert!(fixture.ip("container", "link delete eth0"));
    let error = fixture.attach(&eth0).unwrap_err();
    assert_eq!(
        error.to_string(),
        "network link eth0 went away while it was being given to the guest"
    );
    fixture.inside("container", || Ok::<_, Wrapped>(detach(&eth0)?)).unwrap();
}

#[test]
fn an_mtu_that_no_tap_can_have_is_refused() {
    let Some(fixture) = Fixture::new() else { return };
    assert!(fixture.ip("container", "link set eth0 mtu 65535"));
    let error = fixture.attach(&fixture.eth0()).unwrap_err();
    assert!(matches!(error, Error::Mtu { mtu: 65_535, .. }), "{error}");
    assert!(!fixture.has_ingress(&fixture.eth0()));
}

#[test]
fn tcp_of_any_size_passes_between_a_guest_and_the_outside_with_offloads() {
    let Some(fixture) = Fixture::new() else { return };
    let hosts_end = File::from(fixture.attach(&fixture.eth0()).unwrap());
    // The guest is a namespace whose NIC is another tap: a virtual machine without the machine.
    let guests_end = fixture.inside("guest", || tap::create("eth0", false)).unwrap();
    for end in [&hosts_end, &guests_end] {
        tap::accept_offloads(end).unwrap();
    }
    for command in [
        &format!("link set eth0 address {MAC}"),
        "address add 10.9.0.2/24 dev eth0",
        "address add fd09::2/64 dev eth0 nodad",
        "link set eth0 up",
    ] {
        assert!(fixture.ip("guest", command), "{command}");
    }
    let (stop, stopped) = io::pipe().unwrap();
    let largest = thread::scope(|scope| {
        let wire = scope.spawn(|| forward(&hosts_end, &guests_end, &stop));
        for address in ["10.9.0.1", "fd09::1"] {
            exchange(&fixture, address.parse().unwrap());
        }
        drop(stopped);
        wire.join().unwrap()
    });
    // The offloads were used: no frame of an MTU of 1500 is as large.
    assert!(largest > 10_000, "{largest}");
}

/// Sends 4 MiB from the guest to a server outside, which sends it back.
fn exchange(fixture: &Fixture, address: IpAddr) {
    const DEADLINE: Option<Duration> = Some(Duration::from_secs(20));
    let bytes: Vec<u8> = (0..1_u32 << 20).flat_map(u32::to_le_bytes).collect();
    let listener =
        fixture.inside("outside", || TcpListener::bind(SocketAddr::new(address, 0))).unwrap();
    let server = listener.local_addr().unwrap();
    let client =
        fixture.inside("guest", || TcpStream::connect_timeout(&server, DEADLINE.unwrap())).unwrap();
    let (mut outside, peer) = listener.accept().unwrap();
    assert_eq!(peer.ip(), fixture_address(address));
    for stream in [&client, &outside] {
        stream.set_read_timeout(DEADLINE).unwrap();
        stream.set_write_timeout(DEADLINE).unwrap();
    }
    thread::scope(|scope| {
        scope.spawn(|| io::copy(&mut outside.try_clone().unwrap(), &mut outside).unwrap());
        scope.spawn(|| {
            (&client).write_all(&bytes).unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut back = vec![0; bytes.len()];
        (&client).read_exact(&mut back).unwrap();
        assert!(back == bytes);
        // The server's copy ends when ours does.
    });
}

fn fixture_address(server: IpAddr) -> IpAddr {
    if server.is_ipv4() { "10.9.0.2".parse().unwrap() } else { "fd09::2".parse().unwrap() }
}

/// Carries frames between two taps, headers and all, until `stop` closes; answers the length of the longest.
fn forward(one: &File, other: &File, stop: &impl std::os::fd::AsFd) -> usize {
    let mut frame = vec![0; 80_000];
    let mut longest = 0;
    loop {
        let mut fds = [
            PollFd::new(one, PollFlags::IN),
            PollFd::new(other, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        let deadline = Timespec { tv_sec: 60, tv_nsec: 0 };
        assert!(poll(&mut fds, Some(&deadline)).unwrap() > 0, "nothing came for a minute");
        if !fds[2].revents().is_empty() {
            return longest;
        }
        for (mut from, mut to) in [(one, other), (other, one)] {
            while let Ok(length) = from.read(&mut frame) {
                longest = longest.max(length);
                // A tap that is full drops the frame, as a wire would.
                drop(to.write(&frame[..length]));
            }
        }
    }
}

#[test]
fn the_namespaces_own_sockets_hear_dns_servers_and_nobody_else_behind_an_attached_link() {
    const DEADLINE: Duration = Duration::from_secs(20);
    let Some(fixture) = Fixture::new() else { return };
    let eth0 = fixture.eth0();
    let _tap = fixture.attach(&eth0).unwrap();
    fixture.inside("container", || Ok::<_, Wrapped>(share_dns(&eth0)?)).unwrap();

    let server = fixture.inside("outside", || UdpSocket::bind("10.9.0.1:53")).unwrap();
    server.set_read_timeout(Some(DEADLINE)).unwrap();
    let client = fixture.inside("container", || UdpSocket::bind("10.9.0.2:0")).unwrap();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    client.send_to(b"question", "10.9.0.1:53").unwrap();
    let mut text = [0; 16];
    let (_, asker) = server.recv_from(&mut text).unwrap();
    // What comes from another port is the guest's, as is what goes to a port of the guest's.
    let other = fixture.inside("outside", || UdpSocket::bind("10.9.0.1:54")).unwrap();
    other.send_to(b"intruder", asker).unwrap();
    server.send_to(b"answer", asker).unwrap();
    let (length, _) = client.recv_from(&mut text).unwrap();
    assert_eq!(&text[..length], b"answer");

    let listener = fixture.inside("outside", || TcpListener::bind("10.9.0.1:53")).unwrap();
    let server = listener.local_addr().unwrap();
    fixture.inside("container", || TcpStream::connect_timeout(&server, DEADLINE)).unwrap();
}

#[test]
fn a_namespace_that_is_no_file_is_no_matter_for_the_ledger() {
    let dir = tempfile::tempdir().unwrap();
    let mut ledger = Ledger::open(&dir.path().join("ledger")).unwrap();
    let entry = linux::ledger::Undo::DeleteIngress {
        netns: Path::new("/no/such/netns").to_owned(),
        inode: 7,
        name: "eth0".to_owned(),
    };
    ledger.record(entry).unwrap();
    ledger.settle(&ThisHost).unwrap();
}
