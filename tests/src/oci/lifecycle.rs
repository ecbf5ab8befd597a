//! create, start, kill, delete, run, pause, update, hooks.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use linux::process::ProcessId;
use rustix::process::Signal;
use serde_json::{Value, json};
use testkit::eventually;
use testkit::runtime::{gone, reap};

use super::Oci;
use crate::case::{Case, case, has, same, skip};

pub(super) const CASES: &[Case<Oci>] = &[
    case("a created container runs its program only after start", created_then_started),
    case("run ends with the program's exit code", run_code),
    case("run --detach leaves a running container and its pid", run_detached),
    case("the reaped pid of a container has the program's exit code", reaped_code),
    case("kill takes names and numbers", kill_by_name),
    case("SIGKILL ends a container with 137", killed),
    case("kill --all ends every process of a container", kill_all),
    case("kill of a stopped container says that it is not running", kill_stopped),
    case("delete refuses a running container, delete --force ends it", delete_running),
    case("delete of an unknown container says that it does not exist", delete_unknown),
    case("delete of a created container ends it", delete_created),
    case("an id is refused while it is in use", duplicate),
    case("start is refused twice", start_twice),
    case("a paused container does nothing until it is resumed", pause),
    case("update changes the memory limit that the container sees", update),
    case("hooks run at their time with the state on stdin", hooks),
    case("a failing hook undoes create and tells its stderr", failing_hook),
    case("the init pid dies with a SIGKILL from outside and delete works", init_killed),
];

fn created_then_started(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("echo ran; exit 7")?;
    let mut container = oci.runtime.create(&bundle)?;
    let state = container.state()?;
    same("status", &state["status"], &json!("created"))?;
    same("id", &state["id"], &json!(bundle.id))?;
    same("bundle", &state["bundle"], &json!(bundle.dir))?;
    same("pid", &state["pid"], &json!(container.pid))?;
    ensure!(state["ociVersion"].is_string(), "no ociVersion in {state}");
    ensure!(ProcessId::of(container.pid).is_some(), "there is no process {}", container.pid);
    same("stdout before start", container.stdout()?, String::new())?;
    container.command(&["start"]).text()?;
    same("exit code", container.wait()?, 7)?;
    same("stdout", container.stdout()?, "ran\n".to_owned())?;
    container.wait_for("stopped")?;
    container.delete()?;
    let output = container.command(&["state"]).output()?;
    ensure!(output.code != 0, "state of a deleted container: {output}");
    has(&output.stderr, "does not exist")
}

fn run_code(oci: &Oci) -> Result<()> {
    let output = oci.run("echo out; echo err >&2; exit 42")?.ended(42)?;
    same("stdout", output.text(), "out".to_owned())?;
    has(&output.stderr, "err\n")?;
    oci.run("true")?.success().map(drop)
}

fn run_detached(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("exec sleep 1000")?;
    let pid_file = bundle.dir.join("pid");
    let run = oci.runtime.run(&["run", "--detach", "--pid-file"]).arg(&pid_file);
    run.arg("--bundle").arg(&bundle.dir).arg(&bundle.id).text()?;
    let pid: u32 = fs::read_to_string(pid_file)?.parse()?;
    let id = bundle.id.as_str();
    let state: Value = serde_json::from_str(&oci.runtime.run(&["state", id]).text()?)?;
    let outcome = same("status", &state["status"], &json!("running")).and(same(
        "pid",
        &state["pid"],
        &json!(pid),
    ));
    oci.runtime.run(&["kill", id, "KILL"]).text()?;
    same("exit code", reap(pid)?, 137)?;
    oci.runtime.run(&["delete", id]).text()?;
    outcome
}

fn reaped_code(oci: &Oci) -> Result<()> {
    for code in [0, 255] {
        let container = oci.runtime.start(&oci.bundle(&format!("exit {code}"))?)?;
        same("exit code", container.wait()?, code)?;
        container.delete()?;
    }
    Ok(())
}

fn kill_by_name(oci: &Oci) -> Result<()> {
    let line = "trap 'echo usr1' USR1; trap 'echo hup' HUP; trap 'exit 5' TERM; echo ready; \
                while :; do sleep 0.1; done";
    let mut container = oci.runtime.start(&oci.bundle(line)?)?;
    for (signal, word) in
        [("", "ready\n"), ("SIGUSR1", "usr1\n"), ("1", "hup\n"), ("USR1", "usr1\n")]
    {
        if !signal.is_empty() {
            container.kill(signal)?;
        }
        eventually(Duration::from_secs(30), &format!("the trap of {signal:?} runs"), || {
            Ok(container.stdout()?.ends_with(word).then_some(()))
        })?;
    }
    let output = container.command(&["kill"]).arg("SIGNONSENSE").output()?;
    ensure!(output.code != 0, "an unknown signal: {output}");
    // Without a signal: SIGTERM.
    container.command(&["kill"]).text()?;
    same("exit code", container.wait()?, 5)?;
    container.delete()
}

fn killed(oci: &Oci) -> Result<()> {
    let container = oci.sleeper()?;
    container.kill("9")?;
    same("exit code", container.wait()?, 137)?;
    container.delete()
}

fn kill_all(oci: &Oci) -> Result<()> {
    let container = oci.runtime.start(&oci.bundle("sleep 1000 & sleep 1000 & exec sleep 1000")?)?;
    container.command(&["kill", "--all"]).arg("KILL").text()?;
    same("exit code", container.wait()?, 137)?;
    container.delete()
}

fn kill_stopped(oci: &Oci) -> Result<()> {
    let container = oci.runtime.start(&oci.bundle("true")?)?;
    container.wait()?;
    container.wait_for("stopped")?;
    let output = container.command(&["kill"]).arg("TERM").output()?;
    ensure!(output.code != 0, "{output}");
    let text = output.stderr.to_lowercase();
    let parsed = ["os: process already finished", "container not running", "no such process"];
    ensure!(
        parsed.iter().any(|phrase| text.contains(phrase)),
        "nothing containerd knows: {output}"
    );
    container.delete()
}

fn delete_running(oci: &Oci) -> Result<()> {
    let container = oci.sleeper()?;
    let output = container.command(&["delete"]).output()?;
    ensure!(output.code != 0, "{output}");
    has(&output.stderr, "that is not stopped: running")?;
    container.command(&["delete", "--force"]).text()?;
    same("exit code", container.wait()?, 137)
}

fn delete_unknown(oci: &Oci) -> Result<()> {
    let output = oci.runtime.run(&["delete", "kt-nobody"]).output()?;
    ensure!(output.code != 0, "{output}");
    has(&output.stderr, "does not exist")?;
    oci.runtime.run(&["delete", "--force", "kt-nobody"]).text().map(drop)
}

fn delete_created(oci: &Oci) -> Result<()> {
    let container = oci.runtime.create(&oci.bundle("true")?)?;
    container.delete()?;
    container.wait().map(drop)
}

fn duplicate(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("true")?;
    let container = oci.runtime.create(&bundle)?;
    let again =
        oci.runtime.run(&["create", "--bundle"]).arg(&bundle.dir).arg(&bundle.id).output()?;
    ensure!(again.code != 0, "{again}");
    has(&again.stderr, "container with given ID already exists")?;
    same("status", container.status()?, "created".to_owned())?;
    container.command(&["delete", "--force"]).text().map(drop)
}

fn start_twice(oci: &Oci) -> Result<()> {
    let container = oci.sleeper()?;
    let output = container.command(&["start"]).output()?;
    ensure!(output.code != 0, "{output}");
    has(&output.stderr, "cannot start an already running container")?;
    container.command(&["delete", "--force"]).text().map(drop)
}

fn pause(oci: &Oci) -> Result<()> {
    let line = "while :; do echo x; sleep 0.05; done";
    let mut container = oci.runtime.start(&oci.bundle(line)?)?;
    let more = |container: &mut testkit::Container, than: usize| -> Result<()> {
        eventually(Duration::from_secs(30), "the container writes", || {
            Ok((container.stdout()?.len() > than).then_some(()))
        })
    };
    more(&mut container, 0)?;
    container.command(&["pause"]).text()?;
    same("status", container.status()?, "paused".to_owned())?;
    let refused = container.exec(&["true"]).output()?;
    ensure!(refused.code != 0, "exec in a paused container: {refused}");
    has(&refused.stderr, "paused")?;
    // What was on its way may still come; after that, nothing.
    let mut before = container.stdout()?.len();
    eventually(Duration::from_secs(30), "the container is silent", || {
        #[expect(clippy::disallowed_methods, reason = "silence has no event")]
        std::thread::sleep(Duration::from_millis(500));
        let now = container.stdout()?.len();
        let silent = now == before;
        before = now;
        Ok(silent.then_some(()))
    })?;
    let twice = container.command(&["pause"]).output()?;
    ensure!(twice.code != 0, "pause of a paused container: {twice}");
    container.command(&["resume"]).text()?;
    same("status", container.status()?, "running".to_owned())?;
    more(&mut container, before)?;
    container.command(&["delete", "--force"]).text().map(drop)
}

/// The memory limit in bytes as a container sees it, under cgroup v2 or v1.
const LIMIT: &str = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes \
                     2>/dev/null || true";

fn update(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("exec sleep 1000")?.with(|config| {
        config["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
        config["linux"]["resources"]["pids"] = json!({"limit": 100});
    })?;
    let container = oci.runtime.start(&bundle)?;
    same("limit", container.shell(LIMIT)?, (64 << 20).to_string())?;
    container.command(&["update", "--memory", "96M"]).text()?;
    same("limit after --memory", container.shell(LIMIT)?, (96 << 20).to_string())?;
    let resources = json!({"memory": {"limit": 80 << 20}}).to_string();
    container.command(&["update", "--resources", "-"]).stdin(resources).text()?;
    same("limit after --resources", container.shell(LIMIT)?, (80 << 20).to_string())?;
    container.command(&["delete", "--force"]).text().map(drop)
}

fn script(path: &Path, text: &str) -> Result<()> {
    fs::write(path, format!("#!/bin/sh\n{text}\n"))?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

fn hooks(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("true")?;
    let (program, log) = (bundle.dir.join("hook"), bundle.dir.join("log"));
    script(&program, &format!("echo \"$1 $(tr -d '\\n')\" >>'{}'", log.display()))?;
    let kinds = ["prestart", "createRuntime", "poststart", "poststop"];
    let bundle = bundle.with(|config| {
        for kind in kinds {
            config["hooks"][kind] = json!([{"path": program, "args": ["hook", kind]}]);
        }
        config["hooks"]["startContainer"] =
            json!([{"path": "/bin/sh", "args": ["sh", "-c", "cat >/started"]}]);
    })?;
    let names = || -> Result<Vec<String>> {
        let text = fs::read_to_string(&log).unwrap_or_default();
        Ok(text.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect())
    };
    let container = oci.runtime.create(&bundle)?;
    same("hooks after create", names()?, vec!["prestart".into(), "createRuntime".into()])?;
    container.command(&["start"]).text()?;
    container.wait()?;
    same("hooks after start", names()?.len(), 3)?;
    container.delete()?;
    same("hooks", names()?, kinds.map(str::to_owned).to_vec())?;
    let text = fs::read_to_string(&log)?;
    for line in text.lines() {
        let (kind, state) = line.split_once(' ').context("a line without state")?;
        let state: Value = serde_json::from_str(state).context(line.to_owned())?;
        same("id in the state", &state["id"], &json!(bundle.id))?;
        same("bundle in the state", &state["bundle"], &json!(bundle.dir))?;
        ensure!(kind == "poststop" || state["pid"] == json!(container.pid), "no pid in {line}");
    }
    let started = fs::read_to_string(bundle.rootfs().join("started"));
    has(&started.context("the startContainer hook did not run in the container")?, &bundle.id)
}

fn failing_hook(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("true")?;
    let program = bundle.dir.join("hook");
    script(&program, "echo 'words of the hook' >&2; exit 3")?;
    let bundle = bundle.with(|config| {
        config["hooks"]["createRuntime"] = json!([{"path": program}]);
    })?;
    let Err(error) = oci.runtime.create(&bundle) else {
        anyhow::bail!("create succeeded");
    };
    has(&format!("{error:#}"), "words of the hook")?;
    let state = oci.runtime.run(&["state", &bundle.id]).output()?;
    has(&state.stderr, "does not exist")
}

fn init_killed(oci: &Oci) -> Result<()> {
    let container = oci.sleeper()?;
    let init = ProcessId::of(container.pid).ok_or_else(|| skip("a live init process"))?;
    init.signal(Signal::KILL)?;
    same("exit code", container.wait()?, 137)?;
    gone(init)?;
    container.wait_for("stopped")?;
    container.delete()
}
