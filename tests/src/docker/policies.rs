//! What the daemon does by itself with containers, and what it tells of them: restart policies, health checks, events; and
//! what users do to containers that run: detach, attach, rename, signals to execs.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testkit::{Run, eventually};

use super::{Docker, Running};
use crate::case::{Case, case, has, same, skip};

pub(super) const CASES: &[Case<Docker>] = &[
    case("restart policies: on-failure so often, always until it is stopped", restart_policies),
    case("a health check is healthy, and then unhealthy", health),
    case("docker events tells of a container's life in order", events),
    case("docker attach joins, detach keys leave, docker rename renames", attach),
    case("docker exec's process gets signals, and is paused with its container", exec_signals),
    case("ten containers are started at once", at_once),
];

/// For a suite of its own, since it takes long.
pub(super) const SOAK: &[Case<Docker>] =
    &[case("containers run one after the other, two hundred times, and leave nothing", sequence)];

const DEADLINE: Duration = Duration::from_mins(2);

/// How often, unless `SOAK` says otherwise.
const RUNS: usize = 200;

fn sequence(docker: &Docker) -> Result<()> {
    let runs = std::env::var("SOAK").ok().and_then(|text| text.parse().ok()).unwrap_or(RUNS);
    let open = |pid: u32| fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
    let daemon = docker.daemon.pid();
    let mut before = None;
    for number in 0..runs {
        let text = docker.once(&[], &format!("echo run {number}"))?;
        same("output", text, format!("run {number}"))?;
        // After the first, since the daemon opens some files once.
        before.get_or_insert_with(|| open(daemon));
    }
    let after = open(daemon);
    let before = before.unwrap_or_default();
    ensure!(after <= before + 10, "the daemon has {after} files open, after {before}");
    Ok(())
}

/// Waits until a field of `docker inspect` is this.
fn becomes(container: &Running<'_>, field: &str, value: &str) -> Result<()> {
    eventually(DEADLINE, &format!("{field} is {value}"), || {
        Ok((container.inspect(field)? == value).then_some(()))
    })
}

fn restart_policies(docker: &Docker) -> Result<()> {
    let failing = docker.start(&["--restart", "on-failure:2"], "echo began; exit 3")?;
    becomes(&failing, "{{.RestartCount}} {{.State.Status}}", "2 exited")?;
    same("starts", failing.run(&["logs"]).text()?.matches("began").count(), 3)?;
    failing.remove()?;
    let line = "echo began; trap 'exit 0' TERM; while [ ! -e /go ]; do sleep 0.1; done; rm /go";
    let always = docker.start(&["--restart", "unless-stopped"], line)?;
    always.wait_for_log("began")?;
    always.exec(&[], "touch /go")?;
    becomes(&always, "{{.RestartCount}} {{.State.Status}}", "1 running")?;
    always.wait_for_log("began\nbegan")?;
    always.run(&["stop", "-t", "60"]).text()?;
    same("stopped", always.inspect("{{.State.Status}}")?.as_str(), "exited")?;
    always.remove()
}

fn health(docker: &Docker) -> Result<()> {
    let flags = ["--health-cmd", "test ! -e /ill", "--health-interval", "1s"];
    let more = ["--health-retries", "1", "--health-timeout", "60s"];
    let container = docker.sleeper(&[flags, more].concat())?;
    becomes(&container, "{{.State.Health.Status}}", "healthy")?;
    container.exec(&[], "touch /ill")?;
    becomes(&container, "{{.State.Health.Status}}", "unhealthy")?;
    container.remove()
}

fn events(docker: &Docker) -> Result<()> {
    let container = docker.sleeper(&[])?;
    container.exec(&[], "true")?;
    for words in [&["pause"][..], &["unpause"], &["stop", "-t", "60"]] {
        container.run(words).text()?;
    }
    let filter = format!("container={}", container.id);
    let words =
        ["events", "--since", "10m", "--until", "0s", "--format", "{{.Action}}", "--filter"];
    let expected = ["create", "start", "exec_create", "exec_start", "pause", "unpause", "kill"];
    // The last of them comes some time after `docker stop` has ended.
    let told = eventually(DEADLINE, "the stop is told", || {
        let text = docker.run(&words).arg(&filter).text()?;
        Ok(text.lines().any(|line| line == "stop").then_some(text))
    })?;
    let mut lines = told.lines().map(|line| line.split(':').next().unwrap_or_default());
    for action in expected {
        ensure!(lines.any(|line| line == action), "no {action} at its place in {told:?}");
    }
    let rest: Vec<_> = lines.collect();
    ensure!(rest.contains(&"die") && rest.contains(&"stop"), "{rest:?}");
    container.remove()
}

fn attach(docker: &Docker) -> Result<()> {
    let (name, new_name) = (docker.name("attached"), docker.name("renamed"));
    let line = "while read line; do echo got $line; done; exit 4";
    let container = docker.start(&["-it", "--name", &name], line)?;
    container.run(&["rename"]).arg(&new_name).text()?;
    same("name", container.inspect("{{.Name}}")?, format!("/{new_name}"))?;
    for word in ["one", "two"] {
        let words = ["attach", "--detach-keys", "ctrl-x,x", &new_name];
        let mut terminal = super::lifecycle::on_terminal(docker, &words)?;
        terminal.send(&format!("{word}\n"))?;
        terminal.expect(&format!("got {word}"))?;
        terminal.send("\u{18}x")?;
        terminal.finish()?;
        same("running", container.inspect("{{.State.Running}}")?.as_str(), "true")?;
    }
    has(&container.run(&["logs"]).text()?, "got two")?;
    container.remove()
}

fn exec_signals(docker: &Docker) -> Result<()> {
    let container = docker.sleeper(&[])?;
    let count = "i=0; trap 'echo term >/heard; exit 0' TERM; \
                 while :; do i=$((i+1)); echo $i >/count; sleep 0.1; done";
    container.exec(&["-d"], count)?;
    let read = |file: &str| container.exec_run(&[], &format!("cat {file}")).output();
    eventually(DEADLINE, "the exec counts", || Ok((read("/count")?.code == 0).then_some(())))?;
    container.run(&["pause"]).text()?;
    let copied = || -> Result<Vec<u8>> {
        let from = format!("{}:/count", container.id);
        Ok(docker.run(&["cp", &from, "-"]).output()?.success()?.stdout)
    };
    let before = copied()?;
    same("it goes on", copied()? == before, true)?;
    container.run(&["unpause"]).text()?;
    eventually(DEADLINE, "it goes on", || Ok((copied()? != before).then_some(())))?;
    let exec = container.inspect("{{index .ExecIDs 0}}")?;
    let socket = docker.daemon.address();
    let socket = socket.trim_start_matches("unix://");
    let url = format!("http://docker/exec/{exec}/json");
    let told = Run::new("curl").args(["-s", "--unix-socket", socket, &url]).text()?;
    let told: serde_json::Value = serde_json::from_str(&told)?;
    // The pid on the host that stands for the exec, to which the daemon's signals go too.
    let pid = told["Pid"].as_u64().with_context(|| format!("no pid in {told}"))?;
    Run::new("kill").args(["-TERM", &pid.to_string()]).text()?;
    eventually(DEADLINE, "the exec hears SIGTERM", || {
        Ok((read("/heard")?.text() == "term").then_some(()))
    })?;
    container.remove()
}

fn at_once(docker: &Docker) -> Result<()> {
    const COUNT: u64 = 10;
    if testkit::wait::memory_mib()? < COUNT * 600 {
        return Err(skip(format!("{} MB of memory", COUNT * 600)));
    }
    let name = |number: u64| docker.name(&format!("once{number}"));
    let mut clients = Vec::new();
    for number in 0..COUNT {
        let line = format!("echo number {number}; sleep 1000");
        let name = name(number);
        let words = ["run", "-d", "--name", &name, "--runtime", &docker.runtime];
        let mut client = docker.client(&words);
        clients.push(client.args([testkit::docker::IMAGE, "sh", "-c", &line]).spawn()?);
    }
    let mut failed = Vec::new();
    for (number, mut client) in (0..COUNT).zip(clients) {
        if !client.wait()?.success() {
            failed.push(number);
        }
    }
    let logs: Result<Vec<_>> = (0..COUNT)
        .map(|number| {
            eventually(DEADLINE, "it speaks", || {
                let text = docker.run(&["logs", &name(number)]).output()?.text();
                Ok((!text.is_empty()).then_some(text))
            })
        })
        .collect();
    for number in 0..COUNT {
        docker.run(&["rm", "-f", &name(number)]).text()?;
    }
    ensure!(failed.is_empty(), "{failed:?} were not started");
    let expected: Vec<_> = (0..COUNT).map(|number| format!("number {number}")).collect();
    same("logs", logs?, expected)
}
