//! Network namespaces as they come: made by the runtime, given, filled at any moment.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use testkit::{Run, eventually};

use super::Oci;
use crate::case::{Case, case, has, same};

pub(super) const CASES: &[Case<Oci>] = &[
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

impl Oci {
    /// A bundle that runs a shell line in a given network namespace.
    fn bundle_in(&self, netns: &str, line: &str) -> Result<testkit::Bundle> {
        self.bundle(line)?.with(|config| {
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
