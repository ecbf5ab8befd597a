//! The sandbox process: from a [`Launch`] to a created container, and on until the container has ended.
//!
//! ```text
//! launched ─ namespaces, cgroup ─┬─ hooks of the runtime namespace (in `create`) ─┬─ interfaces ─ container ─ ready ─ serving
//!                                ├─ machine boots, agent says hello ──────────────┤
//!                                └─ root and mounts bound below the share ────────┘
//! ```
//!
//! The process is the container's init to the host: it is in the container's cgroup and network namespace and exits with
//! its exit code. Everything it starts dies with it; its mounts are in its own mount namespace. What else it takes from
//! the host is in the ledger.

use std::fs::OpenOptions;
use std::io::{self, BufRead, BufReader as SyncReader};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream as SyncStream;
use std::path::PathBuf;
use std::time::Instant;

use linux::cgroup::{Cgroup, Driver};
use linux::ledger::Ledger;
use linux::process::ProcessId;
use protocol::oci::LinuxNamespaceType;
use tokio::task::LocalSet;
use tracing::error;

use crate::boot;
use crate::error::{Chain, Error, ErrorKind};
use crate::launch::{Caller, Launch, Report};
use crate::resources;
use crate::running::Ended;
use crate::spec::Bundle;
use crate::state::{ContainerDir, ContainerId, SandboxRecord};
use crate::stdio::Stdio;

/// Runs the sandbox process whose launch comes over `channel`, until its container has ended.
///
/// Answers the exit code for the process: the container's, or 1 where it was not created.
#[must_use]
pub fn serve(channel: OwnedFd) -> u8 {
    let channel = SyncStream::from(channel);
    match Prepared::new(&channel) {
        Ok(prepared) => prepared.run(channel),
        // Nobody is there to be told anything but the other end of the channel.
        Err(error) => {
            report_blocking(&channel, &failure(&error));
            1
        }
    }
}

fn failure(error: &Error) -> Report {
    Report::Failed { text: Chain(error).to_string(), kind: error.kind() }
}

fn report_blocking(mut channel: &SyncStream, report: &Report) {
    if let Ok(mut line) = serde_json::to_vec(report) {
        line.push(b'\n');
        // A reader that has gone needs no report.
        drop(io::Write::write_all(&mut channel, &line));
    }
}

/// What is known and taken before the asynchronous part.
pub(crate) struct Prepared {
    pub(crate) launch: Launch,
    pub(crate) bundle: Bundle,
    pub(crate) dir: ContainerDir,
    pub(crate) stdio: Stdio,
    pub(crate) ledger: Ledger,
    pub(crate) cgroup: Option<Cgroup>,
    pub(crate) netns: PathBuf,
    pub(crate) began: Instant,
}

impl Prepared {
    fn new(channel: &SyncStream) -> Result<Self, Error> {
        let began = Instant::now();
        let mut line = String::new();
        let told = SyncReader::new(channel)
            .read_line(&mut line)
            .and_then(|_| Ok(serde_json::from_str(&line)?));
        let launch: Launch = told.map_err(Error::host("read the launch from", "create"))?;

        let id = ContainerId::new(&launch.id)?;
        let dir = launch.root.find(&id)?;
        let stdio =
            Stdio::own(launch.terminal).map_err(Error::host("keep", "the standard streams"))?;
        if stdio.terminal {
            // Refused for the caller's own terminal, which its session keeps: it forwards what happens to it.
            drop(linux::pty::make_controlling(&stdio.stdin));
        }
        redirect_own_streams(&dir)?;

        let own = ProcessId::own().map_err(Error::host("read", "/proc/self/stat"))?;
        dir.vm().write(&SandboxRecord::new(own, Vec::new()))?;
        let mut ledger =
            Ledger::open(&dir.vm().ledger()).map_err(Error::host("open", dir.vm().ledger()))?;
        let bundle = Bundle::new(launch.bundle.clone(), launch.spec.clone())?;
        let cgroup = join_cgroup(&launch, &bundle, own, &dir, &mut ledger)?;
        let netns = join_namespaces(&bundle)?;
        Ok(Self { launch, bundle, dir, stdio, ledger, cgroup, netns, began })
    }

    fn run(self, channel: SyncStream) -> u8 {
        let dir = self.dir.clone();
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(source) => {
                let error = Error::Host { action: "start", path: "the event loop".into(), source };
                report_blocking(&channel, &failure(&error));
                return 1;
            }
        };
        let code = LocalSet::new().block_on(&runtime, async move {
            let mut caller = match Caller::new(channel) {
                Ok(caller) => caller,
                Err(source) => {
                    error!(%source, "no way to report");
                    return 1;
                }
            };
            let foreground = self.launch.foreground;
            let ended = match boot::create(self, &mut caller).await {
                Ok(running) => {
                    let ready = Report::Ready { phases: running.phases.clone() };
                    if caller.report(&ready).await.is_ok() {
                        running.until_ended(caller, foreground).await
                    } else {
                        running.abandon().await
                    }
                }
                Err(error) => {
                    error!(error = %Chain(&error), "not created");
                    Ended { code: 1, orphaned: caller.report(&failure(&error)).await.is_err() }
                }
            };
            if ended.orphaned {
                // The caller would have cleaned up; it is gone, so we do.
                crate::operations::settle(&dir);
            }
            ended.code
        });
        // A relay may still block in a read of the caller's stdin.
        runtime.shutdown_background();
        code
    }
}

/// Lets nothing that this process prints reach the container's streams.
fn redirect_own_streams(dir: &ContainerDir) -> Result<(), Error> {
    let path = dir.vm().log();
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
    let log = log.map_err(Error::host("open", &path))?;
    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
    let null = null.map_err(Error::host("open", "/dev/null"))?;
    let moved = rustix::stdio::dup2_stdin(null.as_fd())
        .and_then(|()| rustix::stdio::dup2_stdout(log.as_fd()))
        .and_then(|()| rustix::stdio::dup2_stderr(log.as_fd()));
    moved.map_err(io::Error::from).map_err(Error::host("redirect streams to", &path))?;
    let filter = tracing_subscriber::EnvFilter::try_from_env("KATA_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    // Already set where the library's caller logs itself.
    drop(
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_ansi(false)
            .with_writer(io::stderr)
            .try_init(),
    );
    Ok(())
}

fn join_cgroup(
    launch: &Launch,
    bundle: &Bundle,
    own: ProcessId,
    dir: &ContainerDir,
    ledger: &mut Ledger,
) -> Result<Option<Cgroup>, Error> {
    let linux_section = bundle.spec.linux().as_ref();
    let Some(path) = linux_section.and_then(|linux| linux.cgroups_path().as_ref()) else {
        return Ok(None);
    };
    let told = |error: linux::cgroup::Error| Error::Told {
        text: Chain(&error).to_string(),
        kind: ErrorKind::InvalidArgument,
    };
    let driver = if launch.systemd_cgroup { Driver::Systemd } else { Driver::Cgroupfs };
    let cgroup = Cgroup::create(&path.to_string_lossy(), driver, own.pid, ledger).map_err(told)?;
    let limits = resources::host_limits(bundle.resources(), &launch.config.sandbox);
    cgroup.apply(&limits).map_err(told)?;
    let directories = cgroup.directories().iter().map(|directory| directory.path.clone()).collect();
    dir.vm().write(&SandboxRecord::new(own, directories))?;
    Ok(Some(cgroup))
}

/// Enters the namespaces of the sandbox's host processes; answers a path to the network's.
fn join_namespaces(bundle: &Bundle) -> Result<PathBuf, Error> {
    let network = bundle
        .spec
        .linux()
        .iter()
        .flat_map(|linux| linux.namespaces().iter().flatten())
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Network)
        .and_then(|namespace| namespace.path().clone())
        .filter(|path| !path.as_os_str().is_empty());
    let netns = if let Some(path) = network {
        linux::namespace::enter(&path).map_err(Error::host("enter network namespace", &path))?;
        path
    } else {
        linux::namespace::unshare_network()
            .map_err(Error::host("create", "a network namespace"))?;
        PathBuf::from(format!("/proc/{}/ns/net", std::process::id()))
    };
    linux::namespace::unshare_mounts().map_err(Error::host("create", "a mount namespace"))?;
    Ok(netns)
}
