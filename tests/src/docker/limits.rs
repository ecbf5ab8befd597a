//! Limits, statistics, privileges.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testkit::eventually;

use super::Docker;
use crate::case::{Case, case, has, same};

pub(super) const CASES: &[Case<Docker>] = &[
    case("-m and --cpus are seen inside, and docker update changes them", limits),
    case("docker stats tells plausible memory, CPU and processes", stats),
    case("docker top tells the container's host processes", top),
    case("a container that takes more than its memory is killed", out_of_memory),
    case("--cap-drop, --user, no-new-privileges and seccomp hold", privileges),
    case("--sysctl and --ulimit are set", sysctl_and_ulimit),
    case("--privileged has all capabilities and its devices", privileged),
    case("--init reaps and forwards signals", init),
];

/// The memory limit and the CPU quota over its period, under cgroup v2 or v1, in hundredths of a CPU.
const LIMITS: &str = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null; \
    if [ -e /sys/fs/cgroup/cpu.max ]; then read q p </sys/fs/cgroup/cpu.max; \
    else q=$(cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us) p=$(cat /sys/fs/cgroup/cpu/cpu.cfs_period_us); fi; \
    echo $((q * 100 / p))";

fn limits(docker: &Docker) -> Result<()> {
    let container = docker.sleeper(&["-m", "128m", "--cpus", "0.5"])?;
    same("limits", container.exec(&[], LIMITS)?.as_str(), "134217728\n50")?;
    container.run(&["update", "-m", "96m", "--memory-swap", "96m", "--cpus", "0.8"]).text()?;
    same("updated", container.exec(&[], LIMITS)?.as_str(), "100663296\n80")?;
    container.remove()
}

fn stats(docker: &Docker) -> Result<()> {
    let container = docker.start(&[], "while :; do :; done")?;
    let ask = || -> Result<Value> {
        let text = container.run(&["stats", "--no-stream", "--format", "{{json .}}"]).text()?;
        Ok(serde_json::from_str(&text)?)
    };
    let stats = eventually(Duration::from_mins(1), "docker stats sees the busy loop", || {
        let stats = ask()?;
        let cpu =
            stats["CPUPerc"].as_str().unwrap_or_default().trim_end_matches('%').parse::<f64>();
        Ok((cpu.unwrap_or_default() > 20.0).then_some(stats))
    })?;
    let pids: u64 = stats["PIDs"].as_str().context("no PIDs")?.parse()?;
    ensure!(pids > 0, "no processes: {stats}");
    let memory = stats["MemUsage"].as_str().unwrap_or_default();
    ensure!(!memory.starts_with("0B"), "no memory: {stats}");
    container.remove()
}

fn top(docker: &Docker) -> Result<()> {
    let container = docker.sleeper(&[])?;
    let pid = container.inspect("{{.State.Pid}}")?;
    let text = container.run(&["top"]).text()?;
    let pids: Vec<_> =
        text.lines().skip(1).filter_map(|line| line.split_whitespace().nth(1)).collect();
    ensure!(pids.contains(&pid.as_str()), "{pid} is not in {text}");
    container.remove()
}

fn out_of_memory(docker: &Docker) -> Result<()> {
    let line = "head -c 300m /dev/zero | tail -c 200m >/dev/null; echo code $?";
    let output = docker.once_run(&["-m", "64m", "--memory-swap", "64m"], line).output()?;
    let survived = output.text().contains("code 0");
    ensure!(!survived, "nothing was killed: {output}");
    Ok(())
}

fn privileges(docker: &Docker) -> Result<()> {
    let flags = [
        "--cap-drop",
        "ALL",
        "--cap-add",
        "NET_RAW",
        "--security-opt",
        "no-new-privileges",
        "--user",
        "1000:2000",
    ];
    let line =
        "id -u; id -g; grep -E '^(CapBnd|NoNewPrivs|Seccomp):' /proc/self/status | tr '\\t' ' '";
    let text = docker.once(&flags, line)?;
    for part in ["1000\n2000", "CapBnd: 0000000000002000", "NoNewPrivs: 1", "Seccomp: 2"] {
        has(&text, part)?;
    }
    let dir = docker.directory()?;
    let profile = dir.join("profile.json");
    let text = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO"}]}"#;
    std::fs::write(&profile, text)?;
    let option = format!("seccomp={}", profile.display());
    let output =
        docker.once_run(&["--security-opt", &option], "mkdir /tmp/x").output()?.ended(1)?;
    std::fs::remove_dir_all(dir)?;
    has(&output.stderr, "Operation not permitted")
}

fn sysctl_and_ulimit(docker: &Docker) -> Result<()> {
    let flags = [
        "--sysctl",
        "net.ipv4.ip_default_ttl=77",
        "--ulimit",
        "nofile=300:600",
        "--ulimit",
        "core=0",
    ];
    let text =
        docker.once(&flags, "cat /proc/sys/net/ipv4/ip_default_ttl; ulimit -n; ulimit -Hn")?;
    same("settings", text.as_str(), "77\n300\n600")
}

fn privileged(docker: &Docker) -> Result<()> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let bounding = status.lines().find_map(|line| line.strip_prefix("CapBnd:"));
    let bounding = u64::from_str_radix(bounding.unwrap_or_default().trim(), 16)?;
    let last: u32 = std::fs::read_to_string("/proc/sys/kernel/cap_last_cap")?.trim().parse()?;
    if !docker.is_kata && bounding.count_ones() <= last {
        return Err(crate::case::skip("a root that has every capability"));
    }
    let text = docker.once(
        &["--privileged"],
        "grep CapEff /proc/self/status; mount -t tmpfs x /tmp && echo mounted",
    )?;
    has(&text, "mounted")
}

fn init(docker: &Docker) -> Result<()> {
    let found = testkit::Run::shell("command -v docker-init").output()?;
    if found.code != 0 {
        return Err(crate::case::skip("docker-init (Debian: tini)"));
    }
    let text = docker.once(&["--init"], "cat /proc/1/comm")?;
    ensure!(text.contains("init") || text.contains("tini"), "{text}");
    Ok(())
}
