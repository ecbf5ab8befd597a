//! kubectl's exec, attach and port-forward.

use std::process::{Command, Stdio};

use anyhow::Result;
use testkit::cri::PATIENCE;
use testkit::cri::api::{AttachRequest, ExecRequest, PortForwardRequest, Stream};
use testkit::eventually;
use testkit::streams::{Streams, channel};

use super::Pods;
use crate::case::{Case, case, has, same};

pub(super) const CASES: &[Case<Pods>] = &[
    case("an exec streams input, output, error and its exit code", exec),
    case("an exec with a terminal follows the size of its window", terminal),
    case("attach joins the streams of a container that runs", attach),
    case("a port of the pod is forwarded, also one of a server on its loopback", port_forward),
];

fn open(pods: &Pods, method: &str, request: &impl protobuf::Message) -> Result<Streams> {
    let Stream { url, .. } = pods.node.cri.call(method, request)?;
    Streams::open(&pods.node, &url)
}

fn exec(pods: &Pods) -> Result<()> {
    let pod = pods.pod()?;
    let id = pod.run_line("one", "sleep 1000")?;
    let request = ExecRequest {
        container_id: id,
        cmd: ["sh", "-c", "read line; echo got $line; echo err >&2; exit 7"]
            .map(str::to_owned)
            .to_vec(),
        stdin: true,
        stdout: true,
        stderr: true,
        ..Default::default()
    };
    let mut streams = open(pods, "Exec", &request)?;
    streams.send(channel::STDIN, b"word\n")?;
    streams.expect(channel::STDOUT, "got word")?;
    streams.expect(channel::STDERR, "err")?;
    streams.finish()?;
    has(&streams.text(channel::ERROR), "\"message\":\"7\"")
}

fn terminal(pods: &Pods) -> Result<()> {
    let pod = pods.pod()?;
    let id = pod.run_line("one", "sleep 1000")?;
    let request = ExecRequest {
        container_id: id,
        cmd: vec!["sh".into()],
        tty: true,
        stdin: true,
        stdout: true,
        ..Default::default()
    };
    let mut streams = open(pods, "Exec", &request)?;
    streams.send(channel::RESIZE, br#"{"Width":77,"Height":33}"#)?;
    streams.send(
        channel::STDIN,
        b"until stty size | grep -q '33 77'; do sleep 0.1; done; echo resi''zed; exit\n",
    )?;
    streams.expect(channel::STDOUT, "resized")?;
    streams.finish()
}

fn attach(pods: &Pods) -> Result<()> {
    let pod = pods.pod()?;
    let mut config =
        pod.container_config("one", "while read line; do echo got $line; done; echo end of input");
    config.stdin = true;
    let id = pod.run(config)?;
    for word in ["first", "second"] {
        let request = AttachRequest {
            container_id: id.clone(),
            stdin: true,
            stdout: true,
            stderr: true,
            ..Default::default()
        };
        let mut streams = open(pods, "Attach", &request)?;
        streams.send(channel::STDIN, format!("{word}\n").as_bytes())?;
        streams.expect(channel::STDOUT, &format!("got {word}"))?;
    }
    same("it runs", pod.text(&id, "echo still")?.as_str(), "still")
}

fn port_forward(pods: &Pods) -> Result<()> {
    let pod = pods.pod()?;
    let line = "echo hello >/tmp/index.html; httpd -f -p 127.0.0.1:8081 -h /tmp";
    let id = pod.run_line("one", line)?;
    eventually(PATIENCE, "the server answers inside", || {
        Ok(pod.text(&id, "wget -q -O - http://127.0.0.1:8081/").ok())
    })?;
    // containerd 1.6 has socat do it where its own dialing would not be in the namespace.
    let has_socat = Command::new("socat").arg("-V").stdout(Stdio::null()).status().is_ok();
    if !has_socat {
        return Err(crate::case::skip("socat"));
    }
    let page = eventually(PATIENCE, "the port is forwarded", || {
        let request = PortForwardRequest {
            pod_sandbox_id: pod.id.clone(),
            port: vec![8081],
            ..Default::default()
        };
        let Stream { url, .. } = pods.node.cri.call("PortForward", &request)?;
        let mut streams = Streams::open(&pods.node, &format!("{url}?port=8081"))?;
        streams.send(0, b"GET / HTTP/1.0\r\n\r\n")?;
        Ok(streams.expect(0, "hello").ok().map(|()| streams.text(0)))
    })?;
    has(&page, "200 OK")
}
