//! The bridge, published ports, names, and no network at all.

use std::net::UdpSocket;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use testkit::eventually;

use super::{Docker, Running};
use crate::case::{Case, case, has, same, skip};

pub(super) const CASES: &[Case<Docker>] = &[
    case("the interface has the address, MAC, MTU and route that inspect tells", interface),
    case("a published port is reached from the host", published),
    case("a published UDP port is reached from the host", published_udp),
    case("a container reaches another by its address", neighbours),
    case("--network none has a loopback and nothing else", no_network),
    case("resolv.conf, hosts and hostname are Docker's", names),
    case("a container reaches the host through the bridge", to_host),
];

fn interface(docker: &Docker) -> Result<()> {
    let mac = "02:42:ac:1f:fa:77";
    let container = docker.sleeper(&["--mac-address", mac])?;
    let address = container.inspect("{{.NetworkSettings.IPAddress}}")?;
    let gateway = container.inspect("{{.NetworkSettings.Gateway}}")?;
    let text = container.exec(
        &[],
        "ip -o addr show dev eth0; ip route; cat /sys/class/net/eth0/mtu \
                                    /sys/class/net/eth0/address",
    )?;
    for part in
        [format!("{address}/24"), format!("default via {gateway}"), "1500".into(), mac.into()]
    {
        has(&text, &part)?;
    }
    container.remove()
}

/// A container that serves one page with the text `page`.
fn server<'a>(docker: &'a Docker, flags: &[&str]) -> Result<Running<'a>> {
    let line = "echo page >/var/www/index.html; httpd -f -p 80 -h /var/www & echo serving; wait";
    let container = docker.start(flags, line)?;
    container.wait_for_log("serving")?;
    Ok(container)
}

fn published(docker: &Docker) -> Result<()> {
    let container = server(docker, &["-p", "18080:80"])?;
    let address = container.inspect("{{.NetworkSettings.IPAddress}}")?;
    for host in ["127.0.0.1:18080", "172.31.250.1:18080", &address] {
        let line = format!("curl -sS --max-time 20 http://{host}/");
        let page = eventually(Duration::from_mins(1), &format!("{host} answers"), || {
            let output = docker.host(&line).output()?;
            Ok((output.code == 0).then(|| output.text()))
        })?;
        same(host, page.as_str(), "page")?;
    }
    container.remove()?;
    let output = docker.host("curl -sS --max-time 5 http://127.0.0.1:18080/").output()?;
    ensure!(output.code != 0, "the port is still served: {output}");
    Ok(())
}

fn published_udp(docker: &Docker) -> Result<()> {
    // The image has no server for UDP: the host's, with the host's libraries.
    const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";
    if !Path::new("/usr/bin/socat").exists() || !Path::new(LIBRARIES).exists() {
        return Err(skip("Debian's socat on x86-64"));
    }
    let line = format!(
        "echo serving; exec /host{LIBRARIES}/ld-linux-x86-64.so.2 --library-path /host{LIBRARIES} \
         /host/usr/bin/socat UDP-LISTEN:53,fork PIPE"
    );
    let flags = ["-p", "18053:53/udp", "-v", "/usr:/host/usr:ro"];
    let container = docker.start(&flags, &line)?;
    container.wait_for_log("serving")?;
    let socket = linux::namespace::inside(&docker.host_netns(), || UdpSocket::bind("0.0.0.0:0"))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    for host in ["127.0.0.1:18053", "172.31.250.1:18053"] {
        eventually(Duration::from_mins(1), &format!("{host} answers"), || {
            socket.send_to(b"echo", host)?;
            let mut text = [0; 16];
            // Datagrams may be lost before the server is there.
            let heard = socket.recv(&mut text).is_ok_and(|length| &text[..length] == b"echo");
            Ok(heard.then_some(()))
        })?;
    }
    container.remove()
}

fn neighbours(docker: &Docker) -> Result<()> {
    let container = server(docker, &[])?;
    let address = container.inspect("{{.NetworkSettings.IPAddress}}")?;
    let line = format!(
        "wget -q -O - http://{address}/ && ping -c 1 -W 10 {address} >/dev/null && echo pong"
    );
    same("page", docker.once(&[], &line)?.as_str(), "page\npong")?;
    container.remove()
}

fn no_network(docker: &Docker) -> Result<()> {
    let text = docker.once(
        &["--network", "none"],
        "ls /sys/class/net; ping -c 1 -W 5 127.0.0.1 >/dev/null && echo loopback",
    )?;
    let lines: Vec<_> = text.lines().filter(|line| *line != "lo" && *line != "loopback").collect();
    has(&text, "loopback")?;
    // Kernels with tunnels built in show their unused devices in every namespace.
    ensure!(!lines.iter().any(|line| line.starts_with("eth")), "{text}");
    Ok(())
}

fn names(docker: &Docker) -> Result<()> {
    let flags = [
        "--hostname",
        "my-name",
        "--dns",
        "192.0.2.53",
        "--dns-search",
        "example.org",
        "--add-host",
        "other:192.0.2.7",
    ];
    let text = docker.once(&flags, "hostname; cat /etc/hostname /etc/resolv.conf /etc/hosts")?;
    same("hostnames", text.matches("my-name").count() >= 3, true)?;
    for part in
        ["nameserver 192.0.2.53", "search example.org", "192.0.2.7\tother", "127.0.0.1\tlocalhost"]
    {
        has(&text, part)?;
    }
    Ok(())
}

fn to_host(docker: &Docker) -> Result<()> {
    let text = docker.once(&[], "ping -c 2 -W 10 172.31.250.1")?;
    has(&text, " 0% packet loss")
}
