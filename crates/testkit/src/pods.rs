//! A node for pods: a containerd with its CRI plugin, a bridge by CNI in a network namespace of its own, and images.

use std::cell::{Ref, RefCell};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use protobuf::MessageField;
use serde_json::json;

use crate::containerd::{Containerd, Setup};
use crate::cri::api::{
    Container as ContainerId, ContainerConfig, ContainerMetadata, CreateContainerRequest, Empty,
    ExecSyncRequest, ExecSyncResponse, ImageSpec, LinuxContainerConfig,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, NamespaceMode, NamespaceOption,
    Pod as PodId, PodSandboxConfig, PodSandboxMetadata, RunPodSandboxRequest, StopContainerRequest,
};
use crate::cri::{Cri, GRACE};
use crate::{Run, Work, image};

/// The image of the pods' containers.
pub const IMAGE: &str = "docker.io/library/busybox:latest";

/// The image of the container that a pod begins with.
const PAUSE: &str = "docker.io/library/pause:latest";

/// Debian's directory of CNI plugins.
const PLUGINS: &str = "/usr/lib/cni";

/// The node; its pods must be gone when it is dropped.
#[derive(Debug)]
pub struct Node {
    /// Its containerd's CRI.
    pub cri: Cri,
    daemon: RefCell<Containerd>,
    netns: String,
    dir: PathBuf,
    mark: String,
}

impl Node {
    /// Starts one whose things are called by `word`, a letter or two, with `io.containerd.kata.v2` as the runtime handler `kata`, its shim in `shims` and its configuration
    /// in `config`.
    ///
    /// # Errors
    ///
    /// When containerd or a CNI plugin is not installed, or it does not become ready.
    pub fn start(
        work: &Work,
        word: &str,
        shims: Option<PathBuf>,
        config: Option<&Path>,
    ) -> Result<Self> {
        let dir = work.path().join(word);
        fs::create_dir_all(dir.join("cni"))?;
        let netns = format!("{}{word}", work.mark());
        Run::new("ip").args(["netns", "add", &netns]).text().context("`ip netns` is needed")?;
        Run::new("ip").args(["-n", &netns, "link", "set", "lo", "up"]).text()?;
        let network = json!({
            "cniVersion": "0.4.0",
            "name": work.mark(),
            "plugins": [{
                "type": "bridge",
                "bridge": "pods0",
                "isGateway": true,
                "ipam": {
                    "type": "host-local",
                    "dataDir": dir.join("ipam"),
                    "ranges": [[{"subnet": "172.31.251.0/24"}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            }],
        });
        fs::write(dir.join("cni/10-pods.conflist"), network.to_string())?;
        let cri = Some(configuration(&dir, config));
        let daemon = Containerd::start_with(&dir, Some(&netns), Setup { shims, cri })?;
        let node = Self {
            cri: Cri::new(&daemon.address)?,
            daemon: RefCell::new(daemon),
            netns,
            dir,
            mark: work.mark().to_owned(),
        };
        node.load(work)?;
        // The first pod makes the bridge and the cgroups that all are in; these stay.
        drop(node.run_pod("runc", node.pod_config(&work.id()))?);
        Ok(node)
    }

    fn load(&self, work: &Work) -> Result<()> {
        let path = "PATH=/bin:/usr/bin:/sbin:/usr/sbin";
        let images = [
            (IMAGE, json!({"Cmd": ["sh"], "Env": [path]})),
            (PAUSE, json!({"Cmd": ["sleep", "1000000"], "Env": [path]})),
        ];
        for (name, config) in images {
            let archive = image::archive(work, &self.dir, name, &config)?;
            let daemon = self.daemon.borrow();
            let run = daemon.ctr(&["--namespace", "k8s.io", "images", "import"]);
            run.arg(archive).text()?;
        }
        Ok(())
    }

    /// Its containerd.
    pub fn daemon(&self) -> Ref<'_, Containerd> {
        self.daemon.borrow()
    }

    /// Kills its containerd and starts it again.
    ///
    /// # Errors
    ///
    /// When it does not become ready.
    pub fn crash(&self) -> Result<()> {
        self.daemon.borrow_mut().crash()
    }

    /// A shell line in the node's network namespace.
    pub fn shell(&self, line: &str) -> Run {
        Run::new("nsenter").arg(format!("--net=/run/netns/{}", self.netns)).args(["sh", "-c", line])
    }

    /// Runs `action` in the node's network namespace.
    ///
    /// # Errors
    ///
    /// When it cannot be entered, and what `action` says.
    pub fn inside<T: Send>(&self, action: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        linux::namespace::inside(Path::new(&format!("/run/netns/{}", self.netns)), action)
    }

    /// What a pod is by default.
    pub fn pod_config(&self, name: &str) -> PodSandboxConfig {
        PodSandboxConfig {
            metadata: MessageField::some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("{name}-uid"),
                namespace: "tests".to_owned(),
                ..Default::default()
            }),
            hostname: name.to_owned(),
            log_directory: self.dir.join("logs").join(name).to_string_lossy().into_owned(),
            annotations: HashMap::new(),
            linux: MessageField::some(LinuxPodSandboxConfig {
                cgroup_parent: format!("/{}/{name}", self.mark),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// Runs a pod under `handler`.
    ///
    /// # Errors
    ///
    /// What containerd says.
    pub fn run_pod(&self, handler: &str, config: PodSandboxConfig) -> Result<Pod<'_>> {
        let request = RunPodSandboxRequest {
            config: MessageField::some(config.clone()),
            runtime_handler: handler.to_owned(),
            ..Default::default()
        };
        fs::create_dir_all(&config.log_directory)?;
        let PodId { pod_sandbox_id: id, .. } = self.cri.call("RunPodSandbox", &request)?;
        Ok(Pod { node: self, id, config })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(Run::new("ip").args(["netns", "delete", &self.netns]).output());
    }
}

fn configuration(dir: &Path, config: Option<&Path>) -> String {
    let plugin = "plugins.'io.containerd.grpc.v1.cri'";
    let options = config.map(|path| {
        format!("[{plugin}.containerd.runtimes.kata.options]\nConfigPath = '{}'\n", path.display())
    });
    format!(
        "[{plugin}]\nsandbox_image = '{PAUSE}'\nstream_server_address = '127.0.0.1'\n\
         stream_server_port = '0'\nrestrict_oom_score_adj = true\n\
         [{plugin}.cni]\nbin_dir = '{PLUGINS}'\nconf_dir = '{}/cni'\n\
         [{plugin}.containerd]\ndefault_runtime_name = 'runc'\n\
         [{plugin}.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n\
         [{plugin}.containerd.runtimes.kata]\nruntime_type = 'io.containerd.kata.v2'\n{}",
        dir.display(),
        options.unwrap_or_default()
    )
}

/// A pod; stopped and removed when dropped.
#[derive(Debug)]
pub struct Pod<'a> {
    /// Where it runs.
    pub node: &'a Node,
    /// Its id.
    pub id: String,
    /// What it was made of.
    pub config: PodSandboxConfig,
}

impl Pod<'_> {
    /// What a container that runs a shell line is by default.
    pub fn container_config(&self, name: &str, line: &str) -> ContainerConfig {
        ContainerConfig {
            metadata: MessageField::some(ContainerMetadata {
                name: name.to_owned(),
                ..Default::default()
            }),
            image: MessageField::some(ImageSpec { image: IMAGE.to_owned(), ..Default::default() }),
            command: vec!["sh".to_owned(), "-c".to_owned(), line.to_owned()],
            log_path: format!("{name}.log"),
            linux: MessageField::some(LinuxContainerConfig {
                security_context: MessageField::some(LinuxContainerSecurityContext {
                    namespace_options: MessageField::some(NamespaceOption {
                        // As a kubelet has it, unless the pod shares its process namespace.
                        pid: NamespaceMode::CONTAINER.into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// Creates a container.
    ///
    /// # Errors
    ///
    /// What containerd says.
    pub fn create(&self, config: ContainerConfig) -> Result<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: MessageField::some(config),
            sandbox_config: MessageField::some(self.config.clone()),
            ..Default::default()
        };
        let made: ContainerId = self.node.cri.call("CreateContainer", &request)?;
        Ok(made.container_id)
    }

    /// Starts a container.
    ///
    /// # Errors
    ///
    /// What containerd says.
    pub fn start(&self, id: &str) -> Result<()> {
        self.ask("StartContainer", id)
    }

    /// Creates and starts a container.
    ///
    /// # Errors
    ///
    /// What containerd says.
    pub fn run(&self, config: ContainerConfig) -> Result<String> {
        let id = self.create(config)?;
        self.start(&id)?;
        Ok(id)
    }

    /// Creates and starts a container that runs a shell line.
    ///
    /// # Errors
    ///
    /// What containerd says.
    pub fn run_line(&self, name: &str, line: &str) -> Result<String> {
        self.run(self.container_config(name, line))
    }

    fn ask(&self, method: &str, id: &str) -> Result<()> {
        let request = ContainerId { container_id: id.to_owned(), ..Default::default() };
        self.node.cri.call::<Empty>(method, &request).map(drop)
    }

    /// Stops a container.
    ///
    /// # Errors
    ///
    /// What containerd says.
    pub fn stop_container(&self, id: &str) -> Result<()> {
        let request = StopContainerRequest {
            container_id: id.to_owned(),
            timeout: GRACE,
            ..Default::default()
        };
        self.node.cri.call::<Empty>("StopContainer", &request).map(drop)
    }

    /// Removes a container.
    ///
    /// # Errors
    ///
    /// What containerd says.
    pub fn remove_container(&self, id: &str) -> Result<()> {
        self.ask("RemoveContainer", id)
    }

    /// Runs a shell line in a container.
    ///
    /// # Errors
    ///
    /// What containerd says; a failing exit code is no error here.
    pub fn exec(&self, id: &str, line: &str) -> Result<ExecSyncResponse> {
        let request = ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: ["sh", "-c", line].map(str::to_owned).to_vec(),
            timeout: 60,
            ..Default::default()
        };
        self.node.cri.call("ExecSync", &request)
    }

    /// What a shell line in a container writes.
    ///
    /// # Errors
    ///
    /// What containerd says, or when the line fails.
    pub fn text(&self, id: &str, line: &str) -> Result<String> {
        let answer = self.exec(id, line)?;
        anyhow::ensure!(
            answer.exit_code == 0,
            "{line}: exit code {}: {}",
            answer.exit_code,
            String::from_utf8_lossy(&answer.stderr)
        );
        Ok(String::from_utf8_lossy(&answer.stdout).trim().to_owned())
    }

    /// Stops the pod.
    ///
    /// # Errors
    ///
    /// What containerd says.
    pub fn stop(&self) -> Result<()> {
        let request = PodId { pod_sandbox_id: self.id.clone(), ..Default::default() };
        self.node.cri.call::<Empty>("StopPodSandbox", &request).map(drop)
    }

    /// Removes the pod, which forces its containers.
    ///
    /// # Errors
    ///
    /// What containerd says.
    pub fn remove(&self) -> Result<()> {
        let request = PodId { pod_sandbox_id: self.id.clone(), ..Default::default() };
        self.node.cri.call::<Empty>("RemovePodSandbox", &request).map(drop)
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        drop(self.stop());
        drop(self.remove());
    }
}
