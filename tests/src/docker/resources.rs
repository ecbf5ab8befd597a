//! Every limit that has a flag, and `docker update` on a running container: up, down, and memory that comes back.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testkit::eventually;

use super::{Docker, Running};
use crate::case::{Case, case, has, same, skip};

pub(super) const CASES: &[Case<Docker>] = &[
    case("each limit of memory, CPU and processes is set in the container's cgroup", each_limit),
    case("--pids-limit holds", pids),
    case("--cpuset-cpus says on how many CPUs a container runs", cpuset),
    case("--device-read-bps and the others are set on the host's cgroup", throttles),
    case("docker update gives a running container CPUs and memory, and takes them back", update),
    case("docker update refuses what cannot be, and changes nothing", bad_update),
    case("memory that a container frees goes back to the host", freed_memory),
    case(
        "a container that is killed for lack of memory ends with 137 and is OOMKilled",
        oom_killed,
    ),
    case("a container goes on when a process of it is killed for lack of memory", oom_survived),
];

/// Prints the first of these files of the container's cgroup that is there: version 2's name or version 1's.
fn first_of(v2: &str, v1: &str) -> String {
    format!("cd /sys/fs/cgroup; cat {v2} 2>/dev/null || cat {v1}")
}

fn each_limit(docker: &Docker) -> Result<()> {
    let flags = ["-m", "64m", "--memory-swap", "80m", "--memory-reservation", "32m"];
    let more = ["--cpus", "0.5", "--cpu-shares", "512", "--pids-limit", "20"];
    let container = docker.sleeper(&[flags, more].concat())?;
    let limits = [
        ("memory.max", "memory/memory.limit_in_bytes", ["67108864"; 2]),
        // Version 2 counts swap alone, version 1 both. A kernel without accounting of swap has neither.
        (
            "memory.swap.max",
            "memory/memory.memsw.limit_in_bytes || echo 83886080",
            ["16777216", "83886080"],
        ),
        ("memory.low", "memory/memory.soft_limit_in_bytes", ["33554432"; 2]),
        ("cpu.max", "cpu/cpu.cfs_quota_us", ["50000 100000", "50000"]),
        ("cpu.weight", "cpu/cpu.shares", ["20", "512"]),
        ("pids.max", "pids/pids.max", ["20"; 2]),
    ];
    for (v2, v1, values) in limits {
        let value = container.exec(&[], &first_of(v2, v1))?;
        ensure!(values.contains(&value.as_str()), "{v2} is {value}, none of {values:?}");
    }
    container.remove()
}

fn pids(docker: &Docker) -> Result<()> {
    let line = "for i in $(seq 60); do sleep 100 & done";
    let output = docker.once_run(&["--pids-limit", "30"], line).output()?;
    ensure!(output.code != 0, "60 processes: {output}");
    has(&output.stderr, "can't fork")
}

fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn cpuset(docker: &Docker) -> Result<()> {
    same("one", docker.once(&["--cpuset-cpus", "0"], "nproc")?.as_str(), "1")?;
    if cpus() < 2 {
        return Err(skip("two CPUs"));
    }
    same("two", docker.once(&["--cpuset-cpus", "0-1"], "nproc")?.as_str(), "2")
}

/// A file of the host's cgroup that the container's process is in.
fn host_cgroup(container: &Running<'_>, controller: &str, file: &str) -> Result<PathBuf> {
    let pid = container.inspect("{{.State.Pid}}")?;
    let table = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    // cgroups(7): hierarchy, controllers, path.
    let path = table.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        controllers.split(',').any(|name| name == controller).then_some(path)
    });
    let path = path.context("a controller of cgroup version 1")?;
    Ok(Path::new("/sys/fs/cgroup").join(controller).join(path.trim_start_matches('/')).join(file))
}

fn throttles(docker: &Docker) -> Result<()> {
    let disk = fs::read_dir("/sys/block")?.flatten().map(|entry| entry.file_name()).find(|name| {
        let name = name.to_string_lossy();
        ["loop", "zram", "ram", "dm"].iter().all(|other| !name.starts_with(other))
    });
    let Some(disk) = disk else { return Err(skip("a disk")) };
    if !Path::new("/sys/fs/cgroup/blkio").exists() {
        return Err(skip("a host with the blkio controller of cgroup version 1"));
    }
    let disk = disk.to_string_lossy().into_owned();
    let number = fs::read_to_string(format!("/sys/block/{disk}/dev"))?;
    let rates = [
        ("read_bps", "--device-read-bps", "1mb", 1 << 20),
        ("write_bps", "--device-write-bps", "2mb", 2 << 20),
        ("read_iops", "--device-read-iops", "30", 30),
        ("write_iops", "--device-write-iops", "40", 40),
    ];
    let flags: Vec<_> = rates
        .iter()
        .flat_map(|(_, flag, rate, _)| [(*flag).to_owned(), format!("/dev/{disk}:{rate}")])
        .collect();
    let container = docker.sleeper(&flags.iter().map(String::as_str).collect::<Vec<_>>())?;
    for (name, _, _, rate) in rates {
        let path = host_cgroup(&container, "blkio", &format!("blkio.throttle.{name}_device"))?;
        same(name, fs::read_to_string(path)?.trim(), &format!("{} {rate}", number.trim()))?;
    }
    container.remove()
}

/// The CPUs, and the MiB of memory, that the container's kernel has.
fn machine(container: &Running<'_>) -> Result<(usize, u64)> {
    let text =
        container.exec(&[], "nproc; sed -n 's/MemTotal: *\\(.*\\) kB/\\1/p' /proc/meminfo")?;
    let mut numbers = text.lines().map(str::parse::<u64>);
    let mut next = || numbers.next().context("too few numbers");
    Ok((usize::try_from(next()??)?, next()?? / 1024))
}

fn update(docker: &Docker) -> Result<()> {
    let cpus = cpus().min(2);
    if testkit::wait::memory_mib()? < 5000 {
        return Err(skip("5 GB of memory"));
    }
    let container = docker.sleeper(&["-m", "128m", "--memory-swap", "128m", "--cpus", "1"])?;
    let before = machine(&container)?;
    let more = ["update", "-m", "3g", "--memory-swap", "3g", "--cpus", &cpus.to_string()];
    container.run(&more).text()?;
    let limit = first_of("memory.max", "memory/memory.limit_in_bytes");
    same("raised", container.exec(&[], &limit)?.as_str(), "3221225472")?;
    let grown = machine(&container)?;
    ensure!(grown.0 >= cpus && grown.1 >= 3072, "{grown:?} is less than was given");
    // More than there was.
    container.exec(&[], "dd if=/dev/zero of=/dev/null bs=600M count=1")?;
    container.run(&["update", "-m", "64m", "--memory-swap", "64m", "--cpus", "1"]).text()?;
    same("lowered", container.exec(&[], &limit)?.as_str(), "67108864")?;
    if docker.is_kata {
        same("CPUs as before", machine(&container)?.0, before.0)?;
        eventually(Duration::from_mins(1), "the machine is as small as before", || {
            Ok((machine(&container)?.1 < grown.1).then_some(()))
        })?;
    }
    let output =
        container.exec_run(&[], "dd if=/dev/zero of=/dev/null bs=200M count=1").output()?;
    ensure!(output.code != 0, "200 MB within 64: {output}");
    container.remove()
}

fn bad_update(docker: &Docker) -> Result<()> {
    let container = docker.sleeper(&["-m", "64m", "--memory-swap", "64m"])?;
    // No host has CPU 4000.
    let output = container.run(&["update", "--cpuset-cpus", "4000"]).output()?;
    ensure!(output.code != 0, "{output}");
    let output = container.run(&["update", "-m", "128m"]).output()?;
    ensure!(output.code != 0, "more memory than memory and swap: {output}");
    let limit = first_of("memory.max", "memory/memory.limit_in_bytes");
    same("limit", container.exec(&[], &limit)?.as_str(), "67108864")?;
    container.remove()
}

/// What `docker stats` says of the memory, in MiB.
fn memory(container: &Running<'_>) -> Result<f64> {
    let text = container.run(&["stats", "--no-stream", "--format", "{{.MemUsage}}"]).text()?;
    let used = text.split_whitespace().next().unwrap_or_default();
    let number = used.trim_end_matches(|c: char| c.is_ascii_alphabetic()).parse::<f64>()?;
    let unit = used.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
    let in_mib = [("B", 1.0 / 1_048_576.0), ("KiB", 1.0 / 1024.0), ("MiB", 1.0), ("GiB", 1024.0)];
    let factor = in_mib.iter().find(|(name, _)| *name == unit);
    Ok(number * factor.with_context(|| format!("no number of bytes: {text}"))?.1)
}

fn freed_memory(docker: &Docker) -> Result<()> {
    let container = docker.sleeper(&["-m", "900m"])?;
    let before = memory(&container)?;
    // Held until it is told to go, so that what is measured is there.
    let hold = "dd if=/dev/zero bs=600M count=1 2>/dev/null | { head -c 1 >/dev/null; touch /held; \
                while [ ! -e /go ]; do sleep 0.1; done; }";
    container.exec(&["-d"], hold)?;
    eventually(Duration::from_mins(1), "the memory is taken", || {
        Ok((memory(&container)? > before + 500.0).then_some(()))
    })?;
    container.exec(&[], "touch /go")?;
    eventually(Duration::from_mins(1), "the memory is given back", || {
        Ok((memory(&container)? < before + 100.0).then_some(()))
    })?;
    container.remove()
}

const TOO_MUCH: &str = "dd if=/dev/zero of=/dev/null bs=200M count=1";

fn oom_killed(docker: &Docker) -> Result<()> {
    let flags = ["-m", "64m", "--memory-swap", "64m"];
    let container = docker.start(&flags, &format!("exec {TOO_MUCH}"))?;
    same("wait", container.run(&["wait"]).text()?.as_str(), "137")?;
    same("OOMKilled", container.inspect("{{.State.OOMKilled}}")?.as_str(), "true")?;
    container.remove()
}

fn oom_survived(docker: &Docker) -> Result<()> {
    let flags = ["-m", "64m", "--memory-swap", "64m"];
    let line = format!("{TOO_MUCH}; echo ended with $?; sleep 1000");
    let container = docker.start(&flags, &line)?;
    container.wait_for_log("ended with 137")?;
    let filter = format!("container={}", container.id);
    let events = ["events", "--since", "10m", "--until", "0s", "--filter", "event=oom", "--filter"];
    eventually(Duration::from_secs(20), "docker has heard of it", || {
        let text = docker.run(&events).arg(&filter).text()?;
        Ok(text.contains(" oom ").then_some(()))
    })?;
    same("exec", container.exec(&[], "echo on")?.as_str(), "on")?;
    same(
        "limit",
        container.exec(&[], &first_of("memory.max", "memory/memory.limit_in_bytes"))?.as_str(),
        "67108864",
    )?;
    container.remove()
}
