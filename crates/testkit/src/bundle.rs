//! OCI bundles, made from Debian's static busybox.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{Run, Work};

/// A bundle: a directory with `config.json` and `rootfs`.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// Its directory.
    pub dir: PathBuf,
    /// The container id that its cgroup path is named after; the caller uses it for the container too.
    pub id: String,
    /// What [`Bundle::write`] writes to `config.json`.
    pub config: Value,
}

impl Bundle {
    /// Makes a bundle that runs `args` in a root file system of its own, with the configuration of `runc spec`.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn new<S: AsRef<str>>(work: &Work, args: &[S]) -> Result<Self> {
        let id = work.id();
        let dir = work.path().join("bundles").join(&id);
        fs::create_dir_all(&dir)?;
        Run::new("cp").arg("-al").arg(work.rootfs()).arg(dir.join("rootfs")).text()?;
        let mut config = default_config();
        config["process"]["args"] = args.iter().map(AsRef::as_ref).collect();
        config["linux"]["cgroupsPath"] = json!(format!("/{}/{id}", work.mark()));
        let bundle = Self { dir, id, config };
        bundle.write()?;
        Ok(bundle)
    }

    /// A bundle that runs a shell line.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn shell(work: &Work, line: &str) -> Result<Self> {
        Self::new(work, &["sh", "-c", line])
    }

    /// Its root file system.
    pub fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// Changes the configuration and writes it.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn with(mut self, change: impl FnOnce(&mut Value)) -> Result<Self> {
        change(&mut self.config);
        self.write()?;
        Ok(self)
    }

    /// Adds a mount and writes the configuration.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn mount(
        self,
        kind: &str,
        source: &str,
        destination: &str,
        options: &[&str],
    ) -> Result<Self> {
        let mount =
            json!({"type": kind, "source": source, "destination": destination, "options": options});
        self.with(|config| {
            if let Some(mounts) = config["mounts"].as_array_mut() {
                mounts.push(mount);
            }
        })
    }

    fn write(&self) -> Result<()> {
        let text = serde_json::to_vec_pretty(&self.config)?;
        fs::write(self.dir.join("config.json"), text).context("cannot write config.json")
    }
}

/// Makes a root file system at `path`: busybox with all its names, two users, and the usual directories.
///
/// # Errors
///
/// When busybox is not installed (Debian: busybox-static), or nothing can be written there.
pub fn make_rootfs(path: &Path) -> Result<()> {
    for name in ["bin", "dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "var/www"] {
        fs::create_dir_all(path.join(name))?;
    }
    fs::set_permissions(path.join("tmp"), Permissions::from_mode(0o1777))?;
    let names =
        Run::new("busybox").arg("--list").text().context("Debian's busybox-static is needed")?;
    let busybox =
        fs::canonicalize("/bin/busybox").or_else(|_| fs::canonicalize("/usr/bin/busybox"));
    fs::copy(busybox?, path.join("bin/busybox"))?;
    for name in names.lines().filter(|&name| name != "busybox") {
        symlink("busybox", path.join("bin").join(name))?;
    }
    fs::write(
        path.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\ntester:x:1000:1000:tester:/home:/bin/sh\n",
    )?;
    fs::write(path.join("etc/group"), "root:x:0:\ntester:x:1000:\nextra:x:2000:tester\n")?;
    // A program that exec(2) refuses, and one that nobody may execute.
    fs::write(path.join("bin/not-a-program"), "no interpreter line\n")?;
    fs::write(path.join("bin/not-executable"), "#!/bin/sh\n")?;
    fs::set_permissions(path.join("bin/not-a-program"), Permissions::from_mode(0o755))?;
    Ok(())
}

/// What `runc spec` answers, but for the terminal.
pub fn default_config() -> Value {
    let capabilities = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
                "ambient": capabilities,
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": false},
        "hostname": "tester",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi",
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}
