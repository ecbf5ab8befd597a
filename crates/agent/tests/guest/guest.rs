//! A guest, and the calls that a host makes to it.

use std::cell::Cell;
use std::env;
use std::error::Error;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use hypervisor::{Port, SharedDirectory, Vm, VmSpec, VsockAddress, detect};
use image::Image;
use linux::ledger::Ledger;
use protocol::agent::{
    ContainerRequest, CreateContainerRequest, Empty, ExecRequest, HelloRequest, MountRequest,
    ProcessCreated, ProcessRequest, SignalRequest, Streams, UpdateRequest, WaitResponse,
};
use protocol::agent_ttrpc::AgentClient;
use protocol::{CONTROL_PORT, READY_PORT, STREAM_PORT, paths};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;
use ttrpc::context::{Context, with_duration};

/// For one call, and for a guest to boot, on a slow and busy host.
const DEADLINE: Duration = Duration::from_mins(3);

/// The images' root in the guest.
const ROOT: &str = "/run/kata/share/root";

/// A booted guest with a share that holds a small root file system.
pub(crate) struct Guest {
    pub(crate) agent: AgentClient,
    vsock: VsockAddress,
    vm: Box<dyn Vm>,
    _directory: TempDir,
    containers: Cell<u32>,
}

/// What a process did.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: u32,
    pub(crate) out: String,
    pub(crate) err: String,
    pub(crate) exit: WaitResponse,
}

/// The machine that can be had here, or what is missing.
pub(crate) fn machine() -> Result<VmSpec, String> {
    if !rustix::process::geteuid().is_root() {
        return Err("root".into());
    }
    let there = Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status();
    there.map_err(|error| format!("qemu-system-x86_64: {error}"))?;
    if !Path::new(BUSYBOX).exists() {
        return Err(format!("{BUSYBOX}, statically linked"));
    }
    let image = image().map_err(|error| error.to_string())?;
    Ok(VmSpec {
        acceleration: detect().acceleration,
        vcpus: 1,
        max_vcpus: 2,
        memory_mib: 256,
        max_memory_mib: 256,
        kernel: image.kernel(),
        initrd: image.initrd(),
        cmdline: String::new(),
        share: None,
        program: None,
        device_program: (env::current_exe().unwrap_or_default(), vec!["device".into()]),
    })
}

fn image() -> Result<Image, image::Error> {
    if let Some(directory) = env::var_os("KATA_IMAGE") {
        return Image::open(Path::new(&directory));
    }
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../build/share/kata-containers");
    Image::open(&tree).or_else(|_| Image::find())
}

const BUSYBOX: &str = "/bin/busybox";

fn make_root(root: &Path) -> Result<(), Box<dyn Error>> {
    for name in ["bin", "dev", "etc", "proc", "r", "root", "sys", "tmp"] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::copy(BUSYBOX, root.join("bin/busybox"))?;
    let applets = Command::new(BUSYBOX).arg("--list").output()?.stdout;
    for name in String::from_utf8(applets)?.lines().filter(|&name| name != "busybox") {
        symlink("busybox", root.join("bin").join(name))?;
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")?;
    Ok(())
}

impl Guest {
    /// Boots one, and has it mount the share.
    pub(crate) async fn boot(mut spec: VmSpec) -> Result<Self, Box<dyn Error>> {
        let directory = tempfile::tempdir()?;
        let share = directory.path().join("share");
        make_root(&share.join("root"))?;
        spec.share = Some(SharedDirectory { tag: paths::SHARE_TAG.into(), path: share });
        let mut ledger = Ledger::open(&directory.path().join("ledger"))?;
        let driver = hypervisor::driver("qemu")?;
        let mut vm = driver.launch(&spec, directory.path(), &mut ledger).await?;
        let mut ready = vm.listen(Port(READY_PORT)).await?;
        vm.boot().await?;
        timeout(DEADLINE, ready.recv()).await?.ok_or("the guest ended")?;
        let control = vm.vsock().connect(Port(CONTROL_PORT)).await?;
        let socket = ttrpc::r#async::transport::Socket::new(control);
        let agent = AgentClient::new(ttrpc::r#async::Client::new(socket));
        let hello = HelloRequest { version: 1, ..HelloRequest::default() };
        agent.hello(context(), &hello).await?;
        let mount = MountRequest {
            source: paths::SHARE_TAG.into(),
            target: paths::SHARE.into(),
            fstype: "virtiofs".into(),
            ..MountRequest::default()
        };
        agent.mount(context(), &mount).await?;
        let vsock = vm.vsock();
        Ok(Self { agent, vsock, vm, _directory: directory, containers: Cell::new(0) })
    }

    /// Powers it off, and waits until the machine has ended.
    pub(crate) async fn shut_down(self) -> Result<(), Box<dyn Error>> {
        self.agent.shutdown(context(), &Empty::default()).await?;
        let mut ended = self.vm.ended();
        timeout(DEADLINE, ended.wait_for(Option::is_some)).await??;
        Ok(())
    }

    /// An id that no container has.
    pub(crate) fn id(&self) -> String {
        self.containers.set(self.containers.get() + 1);
        format!("test-{}", self.containers.get())
    }

    /// Opens a stream.
    pub(crate) async fn stream(&self, token: &[u8]) -> Result<UnixStream, Box<dyn Error>> {
        let mut stream = self.vsock.connect(Port(STREAM_PORT)).await?;
        stream.write_all(token).await?;
        Ok(stream)
    }

    /// Reads a stream to its end.
    pub(crate) async fn read(&self, token: &[u8]) -> Result<String, Box<dyn Error>> {
        let mut text = String::new();
        timeout(DEADLINE, self.stream(token).await?.read_to_string(&mut text)).await??;
        Ok(text)
    }

    /// Creates a container.
    pub(crate) async fn create(
        &self,
        id: &str,
        spec: &Value,
        stdin: bool,
    ) -> ttrpc::Result<ProcessCreated> {
        let request = CreateContainerRequest {
            container_id: id.to_owned(),
            spec_json: spec.to_string().into_bytes(),
            streams: Some(streams(stdin)).into(),
            ..CreateContainerRequest::default()
        };
        self.agent.create_container(context(), &request).await
    }

    /// Starts it.
    pub(crate) async fn start(&self, id: &str) -> ttrpc::Result<()> {
        self.agent.start_container(context(), &container(id)).await.map(drop)
    }

    /// Waits for a process.
    pub(crate) async fn wait(&self, id: &str, exec: &str) -> ttrpc::Result<WaitResponse> {
        let request = ProcessRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..ProcessRequest::default()
        };
        self.agent.wait(context(), &request).await
    }

    /// Sends the init a signal.
    pub(crate) async fn kill(&self, id: &str, signal: u32) -> ttrpc::Result<()> {
        let request =
            SignalRequest { container_id: id.to_owned(), signal, ..SignalRequest::default() };
        self.agent.signal(context(), &request).await.map(drop)
    }

    /// Changes its limits.
    pub(crate) async fn update(&self, id: &str, resources: &Value) -> ttrpc::Result<()> {
        let request = UpdateRequest {
            container_id: id.to_owned(),
            resources_json: resources.to_string().into_bytes(),
            ..UpdateRequest::default()
        };
        self.agent.update(context(), &request).await.map(drop)
    }

    /// Removes it.
    pub(crate) async fn remove(&self, id: &str) -> ttrpc::Result<()> {
        self.agent.remove(context(), &container(id)).await.map(drop)
    }

    /// Runs a container from its creation to its removal.
    pub(crate) async fn run(&self, spec: &Value) -> Result<Run, Box<dyn Error>> {
        let id = self.id();
        let created = self.create(&id, spec, false).await?;
        self.start(&id).await?;
        let exit = self.wait(&id, "").await?;
        let run = self.output(&created, exit).await?;
        self.remove(&id).await?;
        Ok(run)
    }

    /// Starts an exec.
    pub(crate) async fn start_exec(
        &self,
        id: &str,
        exec: &str,
        process: &Value,
    ) -> ttrpc::Result<ProcessCreated> {
        let request = ExecRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            process_json: process.to_string().into_bytes(),
            streams: Some(streams(false)).into(),
            ..ExecRequest::default()
        };
        self.agent.exec(context(), &request).await
    }

    /// Runs an exec to its end.
    pub(crate) async fn exec(&self, id: &str, process: &Value) -> Result<Run, Box<dyn Error>> {
        let exec = self.id();
        let created = self.start_exec(id, &exec, process).await?;
        let exit = self.wait(id, &exec).await?;
        self.output(&created, exit).await
    }

    async fn output(
        &self,
        created: &ProcessCreated,
        exit: WaitResponse,
    ) -> Result<Run, Box<dyn Error>> {
        let (out, err) = (self.read(&created.stdout).await?, self.read(&created.stderr).await?);
        Ok(Run { code: exit.exit_code, out, err, exit })
    }
}

/// Of every call.
pub(crate) fn context() -> Context {
    with_duration(DEADLINE)
}

/// A request that names a container.
pub(crate) fn container(id: &str) -> ContainerRequest {
    ContainerRequest { container_id: id.to_owned(), ..ContainerRequest::default() }
}

fn streams(stdin: bool) -> Streams {
    Streams { stdin, stdout: true, stderr: true, ..Streams::default() }
}

/// A process of root's in `/`.
pub(crate) fn process(arguments: &[&str]) -> Value {
    const CAPABILITIES: [&str; 6] =
        ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_MKNOD", "CAP_SETGID", "CAP_SETUID"];
    json!({
        "terminal": false,
        "cwd": "/",
        "args": arguments,
        "user": {"uid": 0, "gid": 0},
        "env": ["PATH=/bin"],
        "capabilities": {
            "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES,
        },
    })
}

/// A container that runs a shell script, with what containerd gives every container.
pub(crate) fn shell(script: &str) -> Value {
    spec(&["sh", "-c", script])
}

/// A container with what containerd gives every one.
pub(crate) fn spec(arguments: &[&str]) -> Value {
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    json!({
        "ociVersion": "1.0.2",
        "hostname": "box",
        "root": {"path": PathBuf::from(ROOT), "readonly": false},
        "process": process(arguments),
        "mounts": [
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=64m"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "ro"]),
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}],
            "resources": {
                "devices": [{"allow": false, "access": "rwm"}],
                "memory": {"limit": 67_108_864, "swap": 67_108_864},
                "pids": {"limit": 100},
            },
            "maskedPaths": ["/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/sys"],
        },
    })
}
