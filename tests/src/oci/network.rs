//! Network namespaces as they come: made by the runtime, given, filled at any moment.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use testkit::{Run, eventually};

use super::Oci;
use crate::case::{Case, case, has, same, skip};

pub(super) const CASES: &[Case<Oci>] = &[
    case("createRuntime hooks fill the network namespace of the pid that they are told", hooks),
    case(
        "a network namespace filled between create and start is the container's at start",
        between,
    ),
    case("a network filled and emptied while the container runs is the container's", while_running),
    case(
        "interfaces have their addresses, MTU, routes and neighbours of both families",
        interfaces,
    ),
    case("interfaces that a guest could not tell apart are refused by name", same_mac),
    case("an interface that cannot be moved is refused by name", cannot_be_moved),
    case("a network namespace that vanishes after create is no obstacle", vanishes),
    case("the host's own network is refused before anything is started", hosts_own),
    case("localhost in the network namespace reaches the container by IPv4 and IPv6", localhost),
    case(
        "a server on the loopback of a given network namespace is reached from the container",
        server,
    ),
];

/// A network namespace of `ip netns`, deleted when dropped.
struct Netns(String);

impl Netns {
    fn new(oci: &Oci) -> Result<Self> {
        let name = oci.work.id();
        Run::new("ip").args(["netns", "add", &name]).text()?;
        let netns = Self(name);
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    fn path(&self) -> String {
        format!("/run/netns/{}", self.0)
    }

    /// `ip` with these words, in the namespace.
    fn ip(&self, words: &str) -> Result<String> {
        Run::new("ip").args(["-n", &self.0]).args(words.split(' ').collect::<Vec<_>>()).text()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        drop(Run::new("ip").args(["netns", "delete", &self.0]).output());
    }
}

/// An outside world: a network namespace, from which links lead into others.
struct Outside(Netns);

impl Outside {
    fn new(oci: &Oci) -> Result<Self> {
        Netns::new(oci).map(Self)
    }

    /// The line of `sh` that makes a link from here into the namespace at `netns`, with its other end here, and sets it
    /// up: `10.7.N.1/24` and `fd07:N::1/64` here, `.2` and `::2` there.
    fn link(&self, number: u8, netns: &str) -> String {
        let outside = &self.0.0;
        let (peer, link) = (format!("peer{number}"), format!("eth{number}"));
        let there = format!("nsenter --net={netns} ip");
        format!(
            "set -e; ip -n {outside} link add {peer} type veth peer name {link}-{outside}; \
             ip -n {outside} address add 10.7.{number}.1/24 dev {peer}; \
             ip -n {outside} address add fd07:{number}::1/64 dev {peer} nodad; \
             ip -n {outside} link set {peer} up; \
             exec 3<{netns}; ip -n {outside} link set {link}-{outside} netns /proc/self/fd/3 name {link}; \
             {there} address add 10.7.{number}.2/24 dev {link}; \
             {there} address add fd07:{number}::2/64 dev {link} nodad; {there} link set {link} up"
        )
    }
}

/// What a container says that has the link 0 of an outside world.
const REACHES: &str = "ping -c 1 -W 30 10.7.0.1 >/dev/null && ping -6 -c 1 -W 30 fd07:0::1 >/dev/null && echo reached";

impl Oci {
    /// A bundle that runs a shell line which may ping.
    fn pinging(&self, line: &str) -> Result<testkit::Bundle> {
        self.bundle(line)?.with(|config| {
            for set in ["bounding", "effective", "permitted"] {
                if let Some(set) = config["process"]["capabilities"][set].as_array_mut() {
                    set.push(json!("CAP_NET_RAW"));
                }
            }
        })
    }

    /// A bundle that runs a shell line in a given network namespace.
    fn bundle_in(&self, netns: &str, line: &str) -> Result<testkit::Bundle> {
        self.pinging(line)?.with(|config| {
            if let Some(namespaces) = config["linux"]["namespaces"].as_array_mut() {
                namespaces.retain(|namespace| namespace["type"] != "network");
                namespaces.push(json!({"type": "network", "path": netns}));
            }
        })
    }
}

fn localhost(oci: &Oci) -> Result<()> {
    let line = "httpd -p 127.0.0.1:80 -h /etc; httpd -p [::1]:81 -h /etc; exec sleep 1000";
    let container = oci.runtime.start(&oci.bundle(line)?)?;
    let dial = |host: &str| {
        let url = format!("http://{host}/passwd");
        Run::new("nsenter").arg(format!("--net=/proc/{}/ns/net", container.pid)).args([
            "curl",
            "-gsS",
            "--max-time",
            "30",
            &url,
        ])
    };
    for host in ["127.0.0.1:80", "[::1]:81"] {
        let text = eventually(Duration::from_mins(1), &format!("{host} answers"), || {
            let output = dial(host).output()?;
            Ok((output.code == 0).then(|| output.text()))
        })?;
        has(&text, "tester").context(host)?;
    }
    for host in ["127.0.0.1:82", "[::1]:82"] {
        let output = dial(host).output()?;
        ensure!(output.code != 0 && output.text().is_empty(), "{host} answers: {output}");
    }
    Ok(())
}

fn server(oci: &Oci) -> Result<()> {
    let netns = Netns::new(oci)?;
    let bind = || TcpListener::bind("127.0.0.1:0");
    let listener = linux::namespace::inside(netns.path().as_ref(), bind)?;
    let port = listener.local_addr()?.port();
    let answering = thread::spawn(move || -> Result<String> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(Duration::from_mins(1)))?;
        let mut word = [0; 4];
        stream.read_exact(&mut word)?;
        stream.write_all(b"pong\n")?;
        Ok(String::from_utf8_lossy(&word).into_owned())
    });
    let bundle = oci.bundle_in(&netns.path(), &format!("echo ping | nc 127.0.0.1 {port}"))?;
    let output = oci.runtime.run_bundle(&bundle)?.ended(0)?;
    same("answer", output.text().as_str(), "pong")?;
    let asked = answering.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
    same("question", asked.as_str(), "ping")
}

fn hooks(oci: &Oci) -> Result<()> {
    let outside = Outside::new(oci)?;
    let fill = outside.link(0, "/proc/$pid/ns/net");
    let hook = format!("pid=$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/'); {fill}");
    let path = std::env::var("PATH").unwrap_or_default();
    let bundle = oci.pinging(REACHES)?.with(|config| {
        config["hooks"]["createRuntime"] = json!([
            {"path": "/bin/sh", "args": ["sh", "-c", hook], "env": [format!("PATH={path}")]},
        ]);
    })?;
    let text = oci.runtime.run_bundle(&bundle)?.ended(0)?.text();
    same("output", text.as_str(), "reached")
}

fn between(oci: &Oci) -> Result<()> {
    let outside = Outside::new(oci)?;
    let mut container = oci.runtime.create(&oci.pinging(REACHES)?)?;
    let fill = outside.link(0, &format!("/proc/{}/ns/net", container.pid));
    Run::shell(&fill).text()?;
    container.command(&["start"]).text()?;
    same("exit code", container.wait()?, 0)?;
    same("output", container.stdout()?.trim(), "reached")
}

fn while_running(oci: &Oci) -> Result<()> {
    let outside = Outside::new(oci)?;
    let container = oci.runtime.start(&oci.pinging("exec sleep 1000")?)?;
    for _ in 0..2 {
        Run::shell(&outside.link(0, &format!("/proc/{}/ns/net", container.pid))).text()?;
        eventually(Duration::from_mins(1), "the link is there", || {
            let output = container.exec(&["sh", "-c", REACHES]).output()?;
            Ok((output.code == 0).then_some(()))
        })?;
        outside.0.ip("link delete peer0")?;
        eventually(Duration::from_mins(1), "the link is gone", || {
            let output = container.exec(&["ls", "/sys/class/net/eth0"]).output()?;
            Ok((output.code != 0).then_some(()))
        })?;
    }
    Ok(())
}

fn interfaces(oci: &Oci) -> Result<()> {
    let (netns, outside) = (Netns::new(oci)?, Outside::new(oci)?);
    for number in [0, 1] {
        Run::shell(&outside.link(number, &netns.path())).text()?;
    }
    for words in [
        "link set eth1 mtu 1400",
        "route add default via 10.7.0.1",
        "route add 10.99.0.0/16 via 10.7.1.1 metric 7",
        "-6 route add default via fd07:1::1",
        "neigh add 10.7.1.77 lladdr 02:00:00:00:00:77 dev eth1",
        "-6 neigh add fd07:1::77 lladdr 02:00:00:00:00:78 dev eth1",
    ] {
        netns.ip(words)?;
    }
    let line = "ip -o addr; ip route; ip -6 route; ip neigh; \
                for link in eth0 eth1; do cat /sys/class/net/$link/address; done; \
                echo mtu $(cat /sys/class/net/eth0/mtu) $(cat /sys/class/net/eth1/mtu); \
                ping -c 1 -W 30 10.7.0.1 && ping -c 1 -W 30 10.7.1.1 && ping -6 -c 1 -W 30 fd07:1::1";
    let text = oci.runtime.run_bundle(&oci.bundle_in(&netns.path(), line)?)?.ended(0)?.text();
    let macs = netns.ip("-br link")?;
    let macs = macs.lines().filter(|line| line.starts_with("eth"));
    for mac in macs.filter_map(|line| line.split_whitespace().nth(2)) {
        has(&text, mac)?;
    }
    for part in [
        "inet 10.7.0.2/24",
        "inet 10.7.1.2/24",
        "inet6 fd07:0:",
        "inet6 fd07:1::2/64",
        "default via 10.7.0.1 dev eth0",
        "10.99.0.0/16 via 10.7.1.1 dev eth1",
        "default via fd07:1::1 dev eth1",
        "02:00:00:00:00:77",
        "02:00:00:00:00:78",
        "mtu 1500 1400",
    ] {
        has(&text.replace("inet6 fd07::2", "inet6 fd07:0:"), part)?;
    }
    same("pings", text.matches(" 0% packet loss").count(), 3)
}

/// That `create` is refused with these words, and the namespace's links are as they were.
fn refused(oci: &Oci, netns: &Netns, words: &[&str]) -> Result<()> {
    if !oci.runtime.is_kata() {
        return Err(skip("a runtime that moves traffic"));
    }
    let bundle = oci.bundle_in(&netns.path(), "true")?;
    let before = netns.ip("-o link")?;
    let output = oci.runtime.run_bundle(&bundle)?;
    ensure!(output.code != 0, "not refused: {output}");
    for word in words {
        has(&output.stderr, word)?;
    }
    // A warning of running without KVM is none.
    let errors = output.stderr.lines().filter(|line| !line.contains("level=warning"));
    same("lines of the error", errors.count(), 1)?;
    same("links", netns.ip("-o link")?, before)
}

fn same_mac(oci: &Oci) -> Result<()> {
    let (netns, outside) = (Netns::new(oci)?, Outside::new(oci)?);
    for number in [0, 1] {
        Run::shell(&outside.link(number, &netns.path())).text()?;
        netns.ip(&format!("link set eth{number} address 02:00:00:00:00:01"))?;
    }
    refused(oci, &netns, &["eth0 and eth1 have the same MAC address 02:00:00:00:00:01"])
}

fn cannot_be_moved(oci: &Oci) -> Result<()> {
    let (netns, outside) = (Netns::new(oci)?, Outside::new(oci)?);
    Run::shell(&outside.link(0, &netns.path())).text()?;
    netns.ip("link set eth0 mtu 65535")?;
    refused(oci, &netns, &["the MTU 65535 of network link eth0"])
}

fn vanishes(oci: &Oci) -> Result<()> {
    let (netns, outside) = (Netns::new(oci)?, Outside::new(oci)?);
    Run::shell(&outside.link(0, &netns.path())).text()?;
    let mut container = oci.runtime.create(&oci.bundle_in(&netns.path(), REACHES)?)?;
    drop(netns);
    container.command(&["start"]).text()?;
    same("exit code", container.wait()?, 0)?;
    same("output", container.stdout()?.trim(), "reached")?;
    container.delete()
}

fn hosts_own(oci: &Oci) -> Result<()> {
    if !oci.runtime.is_kata() {
        return Err(skip("a runtime that moves traffic"));
    }
    let own = format!("/proc/{}/ns/net", std::process::id());
    let by_path = oci.bundle_in(&own, "true")?;
    let by_absence = oci.bundle("true")?.with(|config| {
        if let Some(namespaces) = config["linux"]["namespaces"].as_array_mut() {
            namespaces.retain(|namespace| namespace["type"] != "network");
        }
    })?;
    for bundle in [by_path, by_absence] {
        let output = oci.runtime.run_bundle(&bundle)?;
        ensure!(output.code != 0, "not refused: {output}");
        has(&output.stderr, "`--network host`")?;
        has(&output.stderr, "use a bridge network")?;
    }
    Ok(())
}
