//! User-defined networks, where containers find each other by name: Docker's resolver listens on the loopback of the
//! container's network namespace on the host.

use std::io;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testkit::docker::IMAGE;
use testkit::eventually;

use super::{Docker, Running};
use crate::case::{Case, case, has, same};

pub(super) const CASES: &[Case<Docker>] = &[
    case("containers of one network find and reach each other by name, runc's and ours", by_name),
    case("Docker's resolver answers by TCP too, and leaves its port to the container", resolver),
    case("names of the outside are asked of the servers of --dns", outside),
    case("a network is connected to a running container, and disconnected again", connected),
    case(
        "localhost in the container's network namespace reaches a server on its loopback",
        localhost,
    ),
];

/// A user-defined network, removed when dropped.
struct Network<'a> {
    docker: &'a Docker,
    name: String,
}

impl<'a> Network<'a> {
    fn new(docker: &'a Docker, word: &str) -> Result<Self> {
        let name = docker.name(word);
        docker.run(&["network", "create", &name]).text()?;
        Ok(Self { docker, name })
    }

    /// A server of one page, `page`, under the name `name`, on `runtime`.
    fn server(&self, runtime: &str, name: &str) -> Result<Running<'_>> {
        let line =
            "echo page >/var/www/index.html; httpd -p 80 -h /var/www; echo serving; sleep 1000";
        let words = ["run", "-d", "--runtime", runtime, "--network", &self.name];
        let run = self.docker.run(&words).args(["--network-alias", name]);
        let id = run.args([IMAGE, "sh", "-c", line]).text()?;
        let container = Running { docker: self.docker, id };
        container.wait_for_log("serving")?;
        Ok(container)
    }
}

impl Drop for Network<'_> {
    fn drop(&mut self) {
        drop(self.docker.run(&["network", "rm", &self.name]).output());
    }
}

fn by_name(docker: &Docker) -> Result<()> {
    let network = Network::new(docker, "names")?;
    let theirs = network.server("runc", "theirs")?;
    let ours = network.server(&docker.runtime, "ours")?;
    let asked = "for name in theirs ours; do wget -q -O - http://$name/ || exit 1; done";
    let flags = ["--network", &network.name];
    same("ours asks", docker.once(&flags, asked)?.as_str(), "page\npage")?;
    let text = theirs.exec(&[], asked).context("asked by runc's")?;
    same("runc's asks", text.as_str(), "page\npage")?;
    theirs.remove()?;
    ours.remove()
}

/// Asks for the address of `peer`: length, header, question.
const QUESTION: &str = r"\0\x16\x12\x34\x01\0\0\1\0\0\0\0\0\0\4peer\0\0\1\0\1";

fn resolver(docker: &Docker) -> Result<()> {
    let network = Network::new(docker, "tcp")?;
    let container = docker.sleeper(&["--network", &network.name, "--network-alias", "peer"])?;
    let address = container.inspect(&format!(
        "{{{{(index .NetworkSettings.Networks \"{}\").IPAddress}}}}",
        network.name
    ))?;
    let last: Vec<_> = address
        .split('.')
        .filter_map(|part| part.parse().ok())
        .map(|part: u8| format!("{part:02x}"))
        .collect();
    let line = format!(
        "printf '{QUESTION}' | timeout 20 nc 127.0.0.11 53 | head -c 44 | hexdump -v -e '1/1 \"%02x\"'"
    );
    let answer = container.exec(&[], &line)?;
    ensure!(answer.ends_with(&last.concat()), "{answer} does not end with {address}");
    // As where packets are rewritten: a DNS server of the container's own takes all addresses.
    let line =
        "nc -l -p 53 & sleep 1; kill $! && echo bound; nslookup peer >/dev/null && echo found";
    same("own server", container.exec(&[], line)?.as_str(), "bound\nfound")?;
    container.remove()
}

/// A DNS server that knows one address for all names.
struct Dns {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Dns {
    fn start(docker: &Docker, address: &str) -> Result<Self> {
        let bind = || UdpSocket::bind((address, 53));
        let socket = linux::namespace::inside(&docker.host_netns(), bind)?;
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                drop(answer(&socket));
            }
        });
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Dns {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        drop(self.thread.take().map(JoinHandle::join));
    }
}

/// Answers 192.0.2.55 to one question: RFC 1035, section 4.
fn answer(socket: &UdpSocket) -> io::Result<()> {
    let mut question = [0; 512];
    let (length, client) = socket.recv_from(&mut question)?;
    let name = question[..length].iter().skip(12).position(|&byte| byte == 0).unwrap_or(0);
    let end = (12 + name + 5).min(length);
    let mut answer = question[..2].to_vec();
    answer.extend([0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
    answer.extend(&question[12.min(end)..end]);
    answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 55]);
    socket.send_to(&answer, client).map(drop)
}

fn outside(docker: &Docker) -> Result<()> {
    let network = Network::new(docker, "outside")?;
    let gateway = "{{(index .IPAM.Config 0).Gateway}}";
    let gateway = docker.run(&["network", "inspect", "--format", gateway, &network.name]).text()?;
    let _dns = Dns::start(docker, &gateway)?;
    let text = docker.once(
        &["--network", &network.name, "--dns", &gateway],
        "cat /etc/resolv.conf; nslookup -type=a www.example.org",
    )?;
    has(&text, "nameserver 127.0.0.11")?;
    has(&text, "192.0.2.55")
}

fn connected(docker: &Docker) -> Result<()> {
    let network = Network::new(docker, "late")?;
    let theirs = network.server("runc", "theirs")?;
    let container = docker.sleeper(&[])?;
    for _ in 0..2 {
        docker.run(&["network", "connect", &network.name, &container.id]).text()?;
        let page = eventually(Duration::from_mins(1), "the network is there", || {
            // One that was begun before the guest had the interface goes the old way for ever.
            let output =
                container.exec_run(&[], "timeout 5 wget -q -O - http://theirs/").output()?;
            Ok((output.code == 0).then(|| output.text()))
        })?;
        same("page", page.as_str(), "page")?;
        let field =
            format!("{{{{(index .NetworkSettings.Networks \"{}\").IPAddress}}}}", network.name);
        let address = format!(" {}/", container.inspect(&field)?);
        has(&container.exec(&[], "ip -4 -o addr")?, &address)?;
        let text = theirs.exec(&[], &format!("ping -c 1 -W 30 {}", &container.id[..12]))?;
        has(&text, " 0% packet loss")?;

        docker.run(&["network", "disconnect", &network.name, &container.id]).text()?;
        eventually(Duration::from_mins(1), "the network is gone", || {
            let links = container.exec(&[], "ls /sys/class/net; ip -4 -o addr; ip route")?;
            let there = links.lines().filter(|line| line.starts_with("eth")).count();
            Ok((there == 1 && !links.contains(&address)).then_some(()))
        })?;
    }
    has(&container.exec(&[], "ping -c 1 -W 30 172.31.250.1")?, " 0% packet loss")?;
    container.remove()?;
    theirs.remove()
}

fn localhost(docker: &Docker) -> Result<()> {
    let line = "echo page >/var/www/index.html; httpd -p 127.0.0.1:80 -h /var/www; echo serving; sleep 1000";
    let container = docker.start(&[], line)?;
    container.wait_for_log("serving")?;
    let pid = container.inspect("{{.State.Pid}}")?;
    let dial = |port: u16| {
        let url = format!("http://localhost:{port}/");
        testkit::Run::new("nsenter").arg(format!("--net=/proc/{pid}/ns/net")).args([
            "curl",
            "-sS",
            "--max-time",
            "30",
            &url,
        ])
    };
    let page = eventually(Duration::from_mins(1), "the server answers", || {
        let output = dial(80).output()?;
        Ok((output.code == 0).then(|| output.text()))
    })?;
    same("page", page.as_str(), "page")?;
    let output = dial(81).output()?;
    ensure!(output.code != 0, "a port that nobody listens on answers: {output}");
    container.remove()
}
