//! The sandbox process: from a [`Launch`] until the last container of the sandbox has gone.
//!
//! It owns the machine and everything about it. It is in the first container's cgroup and network namespace, so that
//! what the machine uses is counted there; everything it starts dies with it; its mounts are in its own mount namespace.
//! What else it takes from the host is in the ledger.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use hypervisor::VmProcesses;
use linux::ledger::{Ledger, Undo};
use linux::namespace::Network;
use linux::process::ProcessId;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::LocalSet;
use tracing::error;

use crate::boot::{self, Machine};
use crate::error::{Chain, Error};
use crate::launch::{Channel, Launch, Report};
use crate::operations::settle;
use crate::running::{Caller, Running};
use crate::server;
use crate::stand_in::join_each;
use crate::state::{ContainerId, SandboxRecord};

/// Runs the sandbox process whose launch comes over `channel`, until its last container has gone.
///
/// Answers the exit code for the process, which nobody looks at: a container's is its stand-in's.
#[must_use]
pub fn serve(channel: OwnedFd) -> u8 {
    let mut channel = Channel::inherited(channel);
    // Where there is none, its caller has ended, and nothing was taken yet.
    let Ok(launch) = channel.hear::<Launch>() else { return 1 };
    let prepared =
        log_to(&launch.vm.log()).and_then(|()| own_mounts()).and_then(|()| Prepared::new(launch));
    let prepared = prepared.and_then(|prepared| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Ok((prepared, runtime.map_err(Error::host("start", "the event loop"))?))
    });
    match prepared {
        Ok((prepared, runtime)) => {
            let code = LocalSet::new().block_on(&runtime, prepared.run(channel, None));
            runtime.shutdown_background();
            code
        }
        Err(error) => {
            let report = Report::Failed { text: Chain(&error).to_string(), kind: error.kind() };
            // Nobody else is there to be told.
            drop(channel.tell(&report));
            1
        }
    }
}

/// Gives the calling process a mount namespace of its own. It must have one thread yet.
pub(crate) fn own_mounts() -> Result<(), Error> {
    linux::namespace::unshare_mounts().map_err(Error::host("create", "a mount namespace"))
}

/// What is known and taken before the asynchronous part.
pub(crate) struct Prepared {
    pub(crate) launch: Launch,
    pub(crate) ledger: Ledger,
    pub(crate) began: Instant,
}

impl Prepared {
    /// Moves the calling process into the sandbox's cgroup and network namespace.
    pub(crate) fn new(launch: Launch) -> Result<Self, Error> {
        let began = Instant::now();
        let vm = &launch.vm;
        join_each(&launch.cgroups, std::process::id());
        let netns = Network::open(&launch.netns)
            .and_then(|netns| netns.enter().and_then(|()| netns.identity()))
            .map_err(Error::host("enter network namespace", &launch.netns))?;
        let own = ProcessId::own().map_err(Error::host("read", "/proc/self/stat"))?;
        vm.write(&SandboxRecord::new(own, netns))?;
        let ledger = Ledger::open(&vm.ledger()).map_err(Error::host("open", vm.ledger()))?;
        Ok(Self { launch, ledger, began })
    }

    /// Takes over a machine that is there: writes down what it has, `paths` among it, and has its processes be where they
    /// would be had we started them.
    pub(crate) fn own(
        &mut self,
        paths: [PathBuf; 2],
        processes: &VmProcesses,
    ) -> Result<(), Error> {
        let mut undo: Vec<_> = paths.map(|path| Undo::RemoveTree { path }).into();
        let pids = std::iter::once(processes.hypervisor).chain(processes.devices.iter().copied());
        for pid in pids {
            join_each(&self.launch.cgroups, pid);
            undo.extend(ProcessId::of(pid).map(Undo::Kill));
        }
        let path = self.launch.vm.ledger();
        let mut record = |entry| self.ledger.record(entry);
        undo.into_iter().try_for_each(&mut record).map_err(Error::host("write", path))
    }

    /// Serves until the last container has gone; boots a machine, unless there is one. Answers the exit code.
    pub(crate) async fn run(self, mut channel: Channel, machine: Option<Machine>) -> u8 {
        let vm = self.launch.vm.clone();
        let id = ContainerId::new(&self.launch.id);
        let control = UnixListener::bind(vm.control());
        let heard = control.and_then(|control| {
            channel.tell(&Report::Listening)?;
            let socket = channel.into_socket();
            socket.set_nonblocking(true)?;
            Ok((control, Caller::new(UnixStream::from_std(socket)?)))
        });
        let (control, mut caller) = match heard {
            Ok(heard) => heard,
            Err(error) => {
                error!(%error, path = %vm.control().display(), "cannot listen");
                return 1;
            }
        };
        let booted = tokio::select! {
            booted = boot::boot(self, machine) => booted,
            () = caller.gone() => {
                // It would have cleaned up.
                if let Ok(id) = id {
                    settle(&vm.container(&id));
                }
                return 1;
            }
        };
        match booted {
            Ok(booted) => {
                let orphan = Running::new(booted, control).until_empty(caller).await;
                if let Some(orphan) = orphan {
                    settle(&orphan);
                }
                0
            }
            Err(error) => {
                error!(error = %Chain(&error), "no machine");
                // The stand-in asks and is told why; then `create` ends us, or has ended.
                tokio::select! {
                    () = server::refuse_all(control, &error) => {}
                    () = caller.gone() => {}
                }
                1
            }
        }
    }
}

/// Lets what this process, and the library it is, has to say go to the sandbox's log.
pub(crate) fn log_to(path: &Path) -> Result<(), Error> {
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(path);
    let log = log.map_err(Error::host("open", path))?;
    let moved = rustix::stdio::dup2_stdout(log.as_fd())
        .and_then(|()| rustix::stdio::dup2_stderr(log.as_fd()));
    moved.map_err(io::Error::from).map_err(Error::host("redirect streams to", path))?;
    let filter = tracing_subscriber::EnvFilter::try_from_env("KATA_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    // Already set where the library's caller logs itself, and in a keeper, whose log this one takes over.
    drop(
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_ansi(false)
            .with_writer(io::stderr)
            .try_init(),
    );
    Ok(())
}
