//! A container that no user asked for, made and ended in a new machine before it is put into the pool.
//!
//! The first container of a machine costs several times what the second does: an emulator translates code the first time
//! that it runs, kernel and agent fault their memory in, caches are empty. Here nobody waits for it.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use hypervisor::{Port, VsockAddress};
use protocol::agent as wire;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::agent::Agent;
use crate::error::Error;

/// How long a rehearsal may take, on a host that is busy with better things.
const REHEARSAL: Duration = Duration::from_mins(2);

/// The container's id, and its directory in the share.
const NAME: &str = "rehearsal";

/// How often. The second time what depends on the first is ready, too.
const TIMES: usize = 2;

/// A whole x86-64 ELF program, elf(5), that writes a line to its standard output and exits with 0.
const PROGRAM: &[u8] = &[
    0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, // 64 bits, little-endian
    2, 0, 0x3e, 0, 1, 0, 0, 0, // an executable for x86-64
    0x78, 0, 0x40, 0, 0, 0, 0, 0, // which begins at 0x400078,
    0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, // has its program headers here, no sections,
    0, 0, 0, 0, 0x40, 0, 0x38, 0, 1, 0, 0x40, 0, 0, 0, 0, 0, // and one program header:
    1, 0, 0, 0, 5, 0, 0, 0, // load, readable and executable,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0,
    0, // from 0 to 0x400000
    0x98, 0, 0, 0, 0, 0, 0, 0, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0,
    0, // 0x98 bytes
    0x6a, 1, 0x58, // push 1; pop rax (write)
    0x89, 0xc7, // mov edi, eax
    0xbe, 0x95, 0, 0x40, 0, // mov esi, 0x400095
    0x6a, 3, 0x5a, // push 3; pop rdx
    0x0f, 0x05, // syscall
    0x6a, 0x3c, 0x58, // push 60; pop rax (exit)
    0x31, 0xff, // xor edi, edi
    0x0f, 0x05, // syscall
    0x0f, 0x0b, 0x90, 0x90, 0x90, 0x90, 0x90, // never reached
    b'o', b'k', b'\n',
];

/// Makes, runs and removes a container whose root is in `share`, over the streams that `vsock` opens.
pub(super) async fn rehearse(
    agent: &Agent,
    vsock: &VsockAddress,
    share: &Path,
) -> Result<(), Error> {
    let stage = share.join(NAME);
    let result = async {
        build(&stage).map_err(failed("prepare"))?;
        let program = async {
            for _ in 0..TIMES {
                perform(agent, vsock).await?;
            }
            Ok(())
        };
        timeout(REHEARSAL, program)
            .await
            .unwrap_or_else(|_| Err(failed("finish")(std::io::ErrorKind::TimedOut.into())))
    }
    .await;
    linux::remove_tree(&stage).map_err(failed("remove what is left of"))?;
    result
}

/// The container's root, with what must be there as the share itself is read-only to the guest.
fn build(stage: &Path) -> std::io::Result<()> {
    for directory in ["proc", "sys", "dev", "etc"] {
        fs::create_dir_all(stage.join("rootfs").join(directory))?;
    }
    for file in ["hostname", "hosts", "resolv.conf"] {
        fs::write(stage.join(file), "")?;
        fs::write(stage.join("rootfs/etc").join(file), "")?;
    }
    let path = stage.join("rootfs/true");
    let mut program =
        fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(&path)?;
    program.write_all(PROGRAM)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

async fn perform(agent: &Agent, vsock: &VsockAddress) -> Result<(), Error> {
    let root = format!("{}/{NAME}", protocol::paths::SHARE);
    let streams = || Some(wire::Streams { stdout: true, stderr: true, ..Default::default() });
    let created = agent
        .create(wire::CreateContainerRequest {
            container_id: NAME.into(),
            spec_json: spec(&root).to_string().into_bytes(),
            streams: streams().into(),
            ..Default::default()
        })
        .await?;
    let outputs = [open(vsock, &created.stdout)?, open(vsock, &created.stderr)?];
    let exec = agent
        .exec(wire::ExecRequest {
            container_id: NAME.into(),
            exec_id: "exec-1".into(),
            process_json: process().to_string().into_bytes(),
            streams: streams().into(),
            ..Default::default()
        })
        .await?;
    let exec_outputs = [open(vsock, &exec.stdout)?, open(vsock, &exec.stderr)?];
    agent.wait(NAME, "exec-1").await?;
    agent.start(NAME).await?;
    agent.wait(NAME, "").await?;
    for mut output in outputs.into_iter().chain(exec_outputs) {
        // A few bytes that the guest has sent by now, or its end.
        let mut said = Vec::new();
        output.read_to_end(&mut said).map_err(failed("hear"))?;
    }
    agent.remove(NAME).await
}

fn open(vsock: &VsockAddress, token: &[u8]) -> Result<UnixStream, Error> {
    let open = || {
        let mut stream = vsock.connect_blocking(Port(protocol::STREAM_PORT))?;
        stream.set_read_timeout(Some(REHEARSAL))?;
        stream.write_all(token)?;
        Ok(stream)
    };
    open().map_err(failed("open a stream for"))
}

/// A failure of the host in words of ours.
fn failed(action: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    Error::host(action, "the rehearsal")
}

fn process() -> Value {
    let capabilities = ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_NET_BIND_SERVICE"];
    json!({
        "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
        "args": ["/true"],
        "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOSTNAME=rehearsal"],
        "cwd": "/",
        "capabilities": {
            "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
        },
        "oomScoreAdj": 0,
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
    })
}

/// Much like what Docker asks for.
fn spec(root: &str) -> Value {
    let mount = |at: &str, kind: &str, options: &[&str]| json!({"destination": at, "type": kind, "source": kind, "options": options});
    let bind = |name: &str| {
        json!({
            "destination": format!("/etc/{name}"), "type": "bind",
            "source": format!("{root}/{name}"), "options": ["rbind", "rprivate"],
        })
    };
    let device = |kind: &str, access: &str| json!({"allow": true, "type": kind, "access": access});
    json!({
        "ociVersion": protocol::OCI_VERSION,
        "process": process(),
        "root": {"path": format!("{root}/rootfs"), "readonly": false},
        "hostname": NAME,
        "mounts": [
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", &["ro", "nosuid", "noexec", "nodev"]),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            bind("resolv.conf"), bind("hostname"), bind("hosts"),
        ],
        "linux": {
            "sysctl": {"net.ipv4.ip_unprivileged_port_start": "0"},
            "resources": {
                "devices": [
                    {"allow": false, "access": "rwm"}, device("c", "m"), device("b", "m"),
                    {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
                ],
                "memory": {}, "cpu": {"shares": 0}, "pids": {"limit": 0},
            },
            "namespaces": [
                {"type": "mount"}, {"type": "uts"}, {"type": "pid"}, {"type": "ipc"}, {"type": "cgroup"},
            ],
            "seccomp": {
                "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": [
                    {"names": ALLOWED, "action": "SCMP_ACT_ALLOW"},
                    {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
                     "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}]},
                ],
            },
            "maskedPaths": ["/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

/// Enough for the program and for what comes before it.
const ALLOWED: &[&str] = &[
    "access",
    "brk",
    "capget",
    "capset",
    "chdir",
    "close",
    "execve",
    "exit",
    "exit_group",
    "faccessat",
    "fchdir",
    "fchown",
    "fcntl",
    "fstat",
    "futex",
    "getcwd",
    "getdents64",
    "getpid",
    "getrandom",
    "ioctl",
    "lseek",
    "lstat",
    "mmap",
    "mprotect",
    "munmap",
    "newfstatat",
    "open",
    "openat",
    "poll",
    "prctl",
    "pread64",
    "prlimit64",
    "read",
    "readlink",
    "readlinkat",
    "recvfrom",
    "recvmsg",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_yield",
    "sendmsg",
    "sendto",
    "set_robust_list",
    "set_tid_address",
    "setgid",
    "setgroups",
    "setresgid",
    "setresuid",
    "setuid",
    "sigaltstack",
    "stat",
    "statfs",
    "statx",
    "uname",
    "write",
    "writev",
];

#[cfg(test)]
mod tests {
    use super::{NAME, build};
    use std::process::Command;

    #[test]
    fn the_program_says_ok_and_ends() {
        if !cfg!(target_arch = "x86_64") {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let stage = dir.path().join(NAME);
        build(&stage).unwrap();
        let output = Command::new(stage.join("rootfs/true")).output().unwrap();
        assert!(output.status.success(), "{:?}", output.status);
        assert_eq!(output.stdout, b"ok\n");
    }
}
