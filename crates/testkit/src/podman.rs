//! A podman of our own: storage, state, networks, and mount and network namespaces that go with it.
//!
//! Podman has no daemon, but what it keeps below fixed paths it shares with everybody: the addresses that CNI gave away,
//! the named network namespaces, locks in `/dev/shm`. In the rig's mount namespace those are other directories.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::containerd::end_processes_naming;
use crate::{Run, Work, eventually};

/// The rig; all its containers and namespaces go when it is dropped.
#[derive(Debug)]
pub struct Podman {
    /// Keeps the namespaces.
    holder: Child,
    dir: PathBuf,
    mark: String,
}

/// The image that is there: busybox.
pub const IMAGE: &str = "localhost/busybox";

impl Podman {
    /// Makes the namespaces and the configuration, and loads the image.
    ///
    /// # Errors
    ///
    /// When podman is not installed or does not work.
    pub fn start(work: &Work) -> Result<Self> {
        let dir = work.path().join("p");
        for name in ["root", "run", "tmp", "networks", "home"] {
            fs::create_dir_all(dir.join(name))?;
        }
        let place = dir.display().to_string();
        // Podman's own default of open files is more than a root without `CAP_SYS_RESOURCE` may give.
        let containers = format!(
            "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=4096:4096\"]\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n\
             [network]\nnetwork_config_dir = \"{place}/networks\"\n"
        );
        fs::write(dir.join("containers.conf"), containers)?;
        let storage = format!(
            "[storage]\ndriver = \"overlay\"\nrunroot = \"{place}/run\"\ngraphroot = \"{place}/root\"\n"
        );
        fs::write(dir.join("storage.conf"), storage)?;
        let policy = r#"{"default":[{"type":"insecureAcceptAnything"}]}"#;
        fs::write(dir.join("policy.json"), policy)?;
        // What is shared by all of podman on a host is hidden below file systems of our own.
        let line = "for place in /run/netns /var/lib/cni /dev/shm; do mkdir -p $place; \
                    mount -t tmpfs tmpfs $place; done; ip link set lo up; echo ready >\"$0\"; \
                    exec sleep infinity";
        let ready = dir.join("ready");
        let mut command = Command::new("unshare");
        command.args(["--mount", "--net", "sh", "-c", line]).arg(&ready).stdin(Stdio::null());
        let holder = command.spawn().context("cannot start unshare")?;
        let podman = Self { holder, dir, mark: work.mark().to_owned() };
        eventually(Duration::from_secs(20), "the namespaces are there", || {
            Ok(ready.exists().then_some(()))
        })?;
        let line = format!("tar -C '{}' -c . >'{place}/image.tar'", work.rootfs().display());
        Run::shell(&line).text()?;
        let image = format!("{place}/image.tar");
        podman.run(&["import", "--quiet", &image, IMAGE]).text()?;
        fs::remove_file(image)?;
        // The parent of all cgroups, which podman makes as it needs it and leaves.
        let parent = podman.cgroup_parent();
        let run = ["--runtime", "runc", "run", "--rm", "--network", "none", "--cgroup-parent"];
        podman.run(&run).args([parent.as_str(), IMAGE, "true"]).text()?;
        Ok(podman)
    }

    /// The words before podman's own arguments: a program in the rig's namespaces.
    fn inside(&self, program: &str) -> Vec<String> {
        let target = format!("--target={}", self.holder.id());
        ["nsenter", &target, "--mount", "--net", program].map(str::to_owned).into()
    }

    /// The whole command line of podman with these arguments, and its environment.
    pub fn words(&self, args: &[&str]) -> (Vec<String>, Vec<(&'static str, String)>) {
        let at = |name: &str| self.dir.join(name).to_string_lossy().into_owned();
        let mut words = self.inside("podman");
        for (option, name) in [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp")] {
            words.extend([option.to_owned(), at(name)]);
        }
        words.extend(args.iter().map(|&word| word.to_owned()));
        let environment = vec![
            ("CONTAINERS_CONF", at("containers.conf")),
            ("CONTAINERS_STORAGE_CONF", at("storage.conf")),
            ("HOME", at("home")),
        ];
        (words, environment)
    }

    /// podman with these arguments.
    pub fn run(&self, args: &[&str]) -> Run {
        let (words, environment) = self.words(args);
        let run = Run::new(&words[0]).args(&words[1..]);
        environment.iter().fold(run, |run, (name, value)| run.env(name, value))
    }

    /// A shell line in the rig's namespaces: what published ports take for the host.
    pub fn host(&self, line: &str) -> Run {
        let words = self.inside("sh");
        Run::new(&words[0]).args(&words[1..]).args(["-c", line])
    }

    /// The directory of the rig.
    pub fn dir(&self) -> &PathBuf {
        &self.dir
    }

    /// The cgroup below which its containers must be, for the residue check to find them.
    pub fn cgroup_parent(&self) -> String {
        format!("/{}", self.mark)
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        for kind in ["pod", "container"] {
            drop(self.run(&[kind, "rm", "--all", "--force", "--time", "0"]).output());
        }
        end_processes_naming(&self.dir);
        drop(self.holder.kill());
        drop(self.holder.wait());
        crate::residue::remove_cgroups(&self.mark);
    }
}

/// Whether the programs of the rig are there; else which are not.
pub fn missing_programs() -> Vec<&'static str> {
    let needed = ["podman", "conmon", "runc", "ip", "iptables", "nsenter", "unshare"];
    let there = |name: &str| {
        let look = Run::new("sh").args(["-c", "command -v \"$1\"", "sh", name]).output();
        look.is_ok_and(|output| output.code == 0)
    };
    needed.into_iter().filter(|name| !there(name)).collect()
}
