//! What a service in a container gives: network, web server, database, disk. The programs are the host's own, bound
//! read-only into the container, so that both runtimes run the same ones.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testkit::docker::{Docker, IMAGE};
use testkit::{Run, eventually};

use super::figures::Figures;

/// What must be installed.
pub(super) const PROGRAMS: [&str; 6] =
    ["iperf3", "nginx", "ab", "redis-server", "redis-benchmark", "fio"];

/// How long a stream or a disk test runs, in seconds.
const SECONDS: &str = "5";

/// A container with the host's programs.
struct Service<'a> {
    docker: &'a Docker,
    id: String,
    address: String,
}

impl<'a> Service<'a> {
    fn start(docker: &'a Docker, runtime: &str, dir: &Path) -> Result<Self> {
        let volume = format!("{}:/volume", dir.display());
        let run = docker.run(&["run", "-d", "--runtime", runtime, "-v", &volume]);
        let run = run.args(["--tmpfs", "/tmpfs:size=256m", "-v", "/usr:/usr:ro"]);
        let run = run.args(["-v", "/usr/lib:/lib:ro", "-v", "/usr/lib64:/lib64:ro"]);
        let id = run.args([IMAGE, "sleep", "100000"]).text()?;
        let mut service = Self { docker, id, address: String::new() };
        let format = "{{.NetworkSettings.IPAddress}}";
        service.address = docker.run(&["inspect", "--format", format, &service.id]).text()?;
        Ok(service)
    }

    fn exec(&self, words: &[&str]) -> Run {
        self.docker.run(&["exec", &self.id]).args(words).within(Duration::from_mins(5))
    }

    fn background(&self, words: &[&str]) -> Result<()> {
        self.docker.run(&["exec", "-d", &self.id]).args(words).text().map(drop)
    }

    /// What a shell line on the host prints, as soon as the service answers it.
    fn ask(&self, line: &str) -> Result<String> {
        let mut last = String::new();
        let text = eventually(Duration::from_mins(1), "the service answers", || {
            let output = self.docker.host(line).within(Duration::from_mins(2)).output()?;
            last = output.to_string();
            Ok((output.code == 0).then(|| output.text()))
        });
        text.with_context(|| last)
    }
}

impl Drop for Service<'_> {
    fn drop(&mut self) {
        drop(self.docker.run(&["rm", "-f", &self.id]).output());
    }
}

/// Measures one round on one runtime.
pub(super) fn measure(
    docker: &Docker,
    runtime: &str,
    dir: &Path,
    figures: &mut Figures,
) -> Result<()> {
    let dir = dir.join(runtime);
    fs::create_dir_all(&dir)?;
    let service = Service::start(docker, runtime, &dir)?;
    let mut add = |what: &str, unit, value| figures.add(what, unit, runtime, value);
    network(&service, &mut add)?;
    web(&service, &mut add)?;
    database(&service, &mut add)?;
    for (place, directory) in [("root", "/"), ("volume", "/volume"), ("tmpfs", "/tmpfs")] {
        disk(&service, place, directory, &mut add)?;
    }
    Ok(())
}

type Add<'a> = dyn FnMut(&str, &'static str, f64) + 'a;

fn network(service: &Service<'_>, add: &mut Add<'_>) -> Result<()> {
    service.background(&["iperf3", "-s"])?;
    let address = &service.address;
    for (what, flag) in [("host to container", ""), ("container to host", "-R")] {
        // With -J it ends with 0 whatever happens.
        let line = format!(
            "text=$(iperf3 -J -c {address} -t {SECONDS} {flag}); echo \"$text\"; \
             ! echo \"$text\" | grep -q '\"error\":'"
        );
        let text = service.ask(&line)?;
        let report: Value = serde_json::from_str(&text)?;
        let bits = report.pointer("/end/sum_received/bits_per_second").and_then(Value::as_f64);
        add(&format!("iperf3 TCP, {what}"), "Mbit/s", bits.with_context(|| text.clone())? / 1e6);
    }
    // round-trip min/avg/max = 0.1/0.2/0.3 ms
    let text = service.ask(&format!("busybox ping -c 20 -i 0.1 {address}"))?;
    let average = text.rsplit('=').next().and_then(|times| times.split('/').nth(1));
    add("ping, average round trip", "ms", average.context("no times")?.trim().parse()?);
    Ok(())
}

fn web(service: &Service<'_>, add: &mut Add<'_>) -> Result<()> {
    let configuration = "daemon off; error_log /dev/null; pid /tmp/nginx.pid; user root; \
        events {} http { access_log off; client_body_temp_path /tmp/1; proxy_temp_path /tmp/2; \
        fastcgi_temp_path /tmp/3; uwsgi_temp_path /tmp/4; scgi_temp_path /tmp/5; \
        server { listen 8080; root /www; } }";
    let prepare = format!(
        "mkdir -p /www /tmp; echo root:x:0:0::/:/bin/sh >/etc/passwd; echo root:x:0: >/etc/group; \
         dd if=/dev/zero of=/www/index.html bs=1k count=4 2>/dev/null; echo '{configuration}' >/nginx.conf"
    );
    service.exec(&["sh", "-c", &prepare]).text()?;
    service.background(&["/usr/sbin/nginx", "-c", "/nginx.conf"])?;
    let text = service.ask(&format!("ab -q -n 500 -c 4 http://{}:8080/", service.address))?;
    ensure!(text.contains("Failed requests:        0"), "{text}");
    add("nginx, 4 KiB page, 4 clients", "1/s", number_after(&text, "Requests per second:")?);
    Ok(())
}

fn database(service: &Service<'_>, add: &mut Add<'_>) -> Result<()> {
    service.background(&["redis-server", "--save", "", "--protected-mode", "no"])?;
    // One that finds no server yet waits for ever.
    let address = &service.address;
    let line = format!(
        "redis-cli -h {address} ping && redis-benchmark -h {address} -c 4 -n 2000 -t set,get --csv"
    );
    let text = service.ask(&line)?;
    for what in ["SET", "GET"] {
        let row = text.lines().find_map(|line| line.strip_prefix(&format!("\"{what}\",\"")));
        let rate = row.and_then(|row| row.split('"').next()).context("no rate")?;
        add(&format!("redis {what}, 4 clients"), "1/s", rate.parse()?);
    }
    Ok(())
}

fn disk(service: &Service<'_>, place: &str, directory: &str, add: &mut Add<'_>) -> Result<()> {
    let tests = [
        ("sequential write", "write", "1m", "write", "bw_bytes", 1.0 / f64::from(1 << 20), "MiB/s"),
        ("sequential read", "read", "1m", "read", "bw_bytes", 1.0 / f64::from(1 << 20), "MiB/s"),
        ("4 KiB random write", "randwrite", "4k", "write", "iops", 1.0, "1/s"),
        ("4 KiB random read", "randread", "4k", "read", "iops", 1.0, "1/s"),
    ];
    for (what, mode, block, side, field, scale, unit) in tests {
        let mode = format!("--rw={mode}");
        let (block, runtime) = (format!("--bs={block}"), format!("--runtime={SECONDS}"));
        let directory = format!("--directory={directory}");
        let fio = ["fio", "--name=fio", "--size=64m", "--ioengine=psync", "--time_based"];
        let run = service.exec(&fio).args([&mode, &block, &runtime, &directory]);
        let text = run.arg("--output-format=json").text()?;
        let json = text.find('{').map_or("", |start| &text[start..]);
        let report: Value = serde_json::from_str(json).context("fio's report")?;
        let value = report.pointer(&format!("/jobs/0/{side}/{field}")).and_then(Value::as_f64);
        add(&format!("fio {what}, {place}"), unit, value.with_context(|| text.clone())? * scale);
    }
    Ok(())
}

fn number_after(text: &str, words: &str) -> Result<f64> {
    let rest = text.split(words).nth(1).and_then(|rest| rest.split_whitespace().next());
    Ok(rest.with_context(|| format!("no {words:?}"))?.parse()?)
}
