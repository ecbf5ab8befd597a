//! Privileged containers, devices, the host's namespaces, and Docker in a container.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testkit::Run;
use testkit::docker::IMAGE;

use super::{Docker, refused};
use crate::case::{Case, case, has, same, skip};

pub(super) const CASES: &[Case<Docker>] = &[
    case("--privileged gives devices, and of a virtual machine none of the host's", devices),
    case("networks and file systems whose kernel modules are not loaded yet are there", modules),
    case("--device gives /dev/fuse and /dev/net/tun, to an ordinary container", fuse_and_tun),
    case("--device gives a block device of the host, :r read-only", block_device),
    case("--device of what a VM cannot have is refused by name", other_device),
    case("--pid, --ipc, --uts, --userns and --cgroupns host run", host_namespaces),
    case("--pid container: of another VM is refused by name", foreign_namespace),
    case("seccomp=unconfined and --cap-add take effect", unconfined),
];

pub(super) const NESTED: &[Case<Docker>] =
    &[case("Docker runs a container on overlay2 in a privileged container", docker_in_docker)];

/// Whether root here has all capabilities; where not, runc has no privileged containers.
fn needs_root_with_all(docker: &Docker) -> Result<()> {
    let status = fs::read_to_string("/proc/self/status")?;
    let bounding = status.lines().find_map(|line| line.strip_prefix("CapBnd:"));
    let bounding = u64::from_str_radix(bounding.unwrap_or_default().trim(), 16)?;
    let last: u32 = fs::read_to_string("/proc/sys/kernel/cap_last_cap")?.trim().parse()?;
    if docker.is_kata || bounding.count_ones() > last {
        return Ok(());
    }
    Err(skip("a root that has every capability"))
}

fn devices(docker: &Docker) -> Result<()> {
    needs_root_with_all(docker)?;
    let text = docker.once(&["--privileged"], "ls /dev; echo --; cat /proc/partitions")?;
    let (names, partitions) = text.split_once("--").context("no list")?;
    for name in ["fuse", "kmsg", "net", "loop-control"] {
        has(names, name)?;
    }
    if docker.is_kata {
        for name in ["kvm", "sda", "vda", "nvme0n1"] {
            ensure!(!names.split_whitespace().any(|one| one == name), "/dev/{name} is there");
            ensure!(!partitions.contains(name), "disk {name} is there");
        }
    }
    Ok(())
}

fn modules(docker: &Docker) -> Result<()> {
    needs_root_with_all(docker)?;
    let line = "ip link add name br9 type bridge && ip link add v9 type veth && \
                ip link set v9 master br9 && ls /sys/class/net/br9/brif; \
                cd /scratch && mkdir l u w m && mount -t overlay -o lowerdir=l,upperdir=u,workdir=w o m && \
                echo x >m/x && cat u/x; : <>/dev/net/tun && echo tun; : <>/dev/fuse && echo fuse";
    let text = docker.once(&["--privileged", "--tmpfs", "/scratch"], line)?;
    same("what is there", text.as_str(), "v9\nx\ntun\nfuse")
}

fn fuse_and_tun(docker: &Docker) -> Result<()> {
    let flags = ["--device", "/dev/fuse", "--device", "/dev/net/tun:/dev/mytun"];
    let line = ": <>/dev/fuse && echo fuse; : <>/dev/mytun && echo tun; test -e /dev/net/tun || echo no more";
    same("devices", docker.once(&flags, line)?.as_str(), "fuse\ntun\nno more")
}

/// A block device of the host: a file through a loop device; taken down when dropped.
struct LoopDevice {
    device: String,
    file: PathBuf,
}

impl LoopDevice {
    fn new(file: PathBuf) -> Result<Self> {
        fs::write(&file, vec![0; 1 << 20])?;
        let made = Run::new("losetup").args(["-f", "--show"]).arg(&file).output()?;
        if made.code != 0 {
            return Err(skip("a free loop device"));
        }
        Ok(Self { device: made.text(), file })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        drop(Run::new("losetup").args(["-d", &self.device]).output());
    }
}

fn block_device(docker: &Docker) -> Result<()> {
    let dir = docker.directory()?;
    let disk = LoopDevice::new(dir.join("disk"))?;
    let flag = format!("{}:/dev/mine", disk.device);
    let line = "printf written | dd of=/dev/mine bs=512 seek=1 conv=sync,fsync 2>/dev/null && test -b /dev/mine && \
                dd if=/dev/mine bs=512 skip=1 count=1 2>/dev/null | head -c 7; \
                dd if=/dev/mine bs=512 2>/dev/null | wc -c";
    let text = docker.once(&["--device", &flag], line)?;
    same("in the container", text.as_str(), "written1048576")?;
    Run::new("blockdev").args(["--flushbufs", &disk.device]).text()?;
    same("on the host", &fs::read(&disk.file)?[512..519], &b"written"[..])?;
    let line = "dd if=/dev/mine bs=512 skip=1 count=1 2>/dev/null | head -c 7; echo x >/dev/mine || echo no";
    let text = docker.once(&["--device", &format!("{flag}:r")], line)?;
    same("read-only", text.as_str(), "writtenno")?;
    drop(disk);
    Ok(fs::remove_dir_all(dir)?)
}

fn other_device(docker: &Docker) -> Result<()> {
    if !docker.is_kata {
        return Err(skip("a virtual machine"));
    }
    let words = ["run", "--rm", "--runtime", &docker.runtime, "--device", "/dev/cpu_dma_latency"];
    let run = docker.run(&words).args([IMAGE, "true"]);
    refused(run, 125, "/dev/cpu_dma_latency")
}

fn host_namespaces(docker: &Docker) -> Result<()> {
    for flag in ["--ipc", "--userns", "--cgroupns"] {
        same(flag, docker.once(&[flag, "host"], "echo here")?.as_str(), "here")?;
    }
    let text = docker.once(&["--uts", "host"], "hostname")?;
    same("the host's name", text, Run::new("hostname").text()?)?;
    // The guest's processes, or with runc the host's: not only the container's.
    let count: u32 = docker.once(&["--pid", "host"], "ls /proc | grep -c '^[0-9]'")?.parse()?;
    ensure!(count > 5, "{count} processes");
    Ok(())
}

fn foreign_namespace(docker: &Docker) -> Result<()> {
    if !docker.is_kata {
        return Err(skip("a virtual machine"));
    }
    let container = docker.sleeper(&[])?;
    let other = format!("container:{}", container.id);
    let words = ["run", "--rm", "--runtime", &docker.runtime, "--pid", &other, IMAGE, "true"];
    refused(docker.run(&words), 125, "the pid namespace /proc/")?;
    container.remove()
}

fn unconfined(docker: &Docker) -> Result<()> {
    let line = "grep -E '^(Seccomp|CapEff):' /proc/self/status | tr '\\t' ' '; unshare -m true && echo unshared";
    let flags =
        ["--cap-drop", "ALL", "--cap-add", "SYS_ADMIN", "--security-opt", "seccomp=unconfined"];
    let text = docker.once(&flags, line)?;
    same("status", text.as_str(), "CapEff: 0000000000200000\nSeccomp: 0\nunshared")
}

fn docker_in_docker(docker: &Docker) -> Result<()> {
    if !docker.is_kata {
        return Err(skip(
            "a virtual machine: with runc it would be the host's root that runs a daemon",
        ));
    }
    for program in
        ["/usr/sbin/dockerd", "/usr/bin/containerd", "/usr/sbin/runc", "/usr/sbin/iptables"]
    {
        if !PathBuf::from(program).exists() {
            return Err(skip(program));
        }
    }
    let dir = docker.directory()?;
    let script = dir.join("script");
    fs::write(&script, include_str!("programs/docker_in_docker.sh"))?;
    let script = format!("{}:/script:ro", script.display());
    let run =
        docker.run(&["run", "--rm", "--runtime", &docker.runtime, "--privileged", "-m", "1g"]);
    let run =
        run.args(["-v", "/usr:/usr:ro", "-v", "/usr/lib:/lib:ro", "-v", "/usr/lib64:/lib64:ro"]);
    let run = run.args(["-v", "/etc/alternatives:/etc/alternatives:ro", "-v", &script]);
    let run = run.args(["--tmpfs", "/data:exec", IMAGE, "sh", "/script"]);
    // Some ten programs of 50 MiB each start in an emulated machine.
    let text = run.within(Duration::from_mins(15)).text();
    fs::remove_dir_all(dir)?;
    same(
        "the inner container's words",
        text?.as_str(),
        "overlay on / type overlay\neth0\nfrom within",
    )
}
