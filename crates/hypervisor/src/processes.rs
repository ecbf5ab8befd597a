//! The processes of one machine: they live together and end together.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::time::Duration;

use linux::process::{Child, ProcessId};
use rustix::process::Signal;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::log::{Log, last_words, panic_line};
use crate::{VmExit, VmProcess, VmProcesses};

/// A hypervisor that exits closes its sockets first, so its device process may be seen to end before it. This is how
/// long the hypervisor has to show that it was the first.
const GRACE: Duration = Duration::from_millis(500);

/// Logs end with their writers; only a descriptor that leaked into another process could hold one open.
const LOG_END: Duration = Duration::from_secs(1);

/// The running processes of a machine. Dropping this kills them.
#[derive(Debug)]
pub(crate) struct Processes {
    ids: [ProcessId; 2],
    ended: watch::Receiver<Option<VmExit>>,
    watcher: JoinHandle<()>,
}

/// What a machine's processes write.
#[derive(Debug)]
pub(crate) struct Logs {
    pub(crate) hypervisor: Log,
    pub(crate) devices: Log,
    pub(crate) console: Log,
}

impl Processes {
    /// Watches over both until they have ended. `lifeline` is held for the device process as long.
    pub(crate) fn watch(
        hypervisor: Child,
        devices: Child,
        lifeline: OwnedFd,
        logs: Logs,
    ) -> io::Result<Self> {
        let ids = [hypervisor.id()?, devices.id()?];
        let pidfd = |child: &Child| readable(child.pidfd().try_clone_to_owned()?);
        let pidfds = [pidfd(&hypervisor)?, pidfd(&devices)?];
        let (report, ended) = watch::channel(None);
        let watcher = tokio::spawn(async move {
            let exit = end(hypervisor, devices, &pidfds, lifeline, logs).await;
            report.send_replace(Some(exit));
        });
        Ok(Self { ids, ended, watcher })
    }

    pub(crate) fn ids(&self) -> VmProcesses {
        let [hypervisor, devices] = self.ids;
        VmProcesses { hypervisor: hypervisor.pid, devices: vec![devices.pid] }
    }

    pub(crate) fn ended(&self) -> watch::Receiver<Option<VmExit>> {
        self.ended.clone()
    }

    /// Kills both and waits until they have ended.
    pub(crate) async fn kill(&mut self) -> io::Result<()> {
        for id in self.ids {
            id.signal(Signal::KILL)?;
        }
        // It cannot fail but by a panic, and then there is nobody left to wait for.
        drop((&mut self.watcher).await);
        Ok(())
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for id in self.ids {
            // The watcher takes their statuses. A process that cannot be killed now is in the ledger.
            drop(id.signal(Signal::KILL));
        }
    }
}

/// Waits for the first end, ends the other, and tells of the first.
async fn end(
    mut hypervisor: Child,
    mut devices: Child,
    [hypervisor_end, devices_end]: &[AsyncFd<OwnedFd>; 2],
    lifeline: OwnedFd,
    mut logs: Logs,
) -> VmExit {
    let process = tokio::select! {
        biased;
        _ = hypervisor_end.readable() => VmProcess::Hypervisor,
        _ = devices_end.readable() => match timeout(GRACE, hypervisor_end.readable()).await {
            Ok(_) => VmProcess::Hypervisor,
            Err(_) => VmProcess::Devices,
        },
    };
    drop(lifeline);
    drop(hypervisor.signal(Signal::KILL));
    drop(devices.signal(Signal::KILL));
    // Both pidfds turn readable with the kill: neither wait below blocks.
    drop((hypervisor_end.readable().await, devices_end.readable().await));
    let statuses = [hypervisor.wait(), devices.wait()];
    let finish = async {
        logs.hypervisor.finish().await;
        logs.devices.finish().await;
        logs.console.finish().await;
    };
    // Too late a log is merely shorter.
    drop(timeout(LOG_END, finish).await);
    let [hypervisor_status, devices_status] = statuses.map(|status| status.ok().and_then(code));
    match process {
        VmProcess::Hypervisor => {
            let words = panic_line(logs.console.path())
                .unwrap_or_else(|| last_words(logs.hypervisor.path()));
            VmExit { process, status: hypervisor_status, words }
        }
        VmProcess::Devices => {
            VmExit { process, status: devices_status, words: last_words(logs.devices.path()) }
        }
    }
}

/// Lets tasks wait until `fd` can be read.
#[expect(
    deprecated,
    reason = "unsound only for a type that may change its descriptor; its successor is unsafe"
)]
pub(crate) fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, Interest::READABLE)
}

fn code(status: ExitStatus) -> Option<i32> {
    status.code().or_else(|| Some(128 + status.signal()?))
}

/// Opens the log files of a machine in `dir`. The writing ends are for hypervisor, devices and console.
pub(crate) fn logs(dir: &Path) -> io::Result<(Logs, [OwnedFd; 3])> {
    let open = |name: &str| Log::open(dir.join(name));
    let (hypervisor, hypervisor_end) = open("hypervisor.log")?;
    let (devices, devices_end) = open("devices.log")?;
    let (console, console_end) = open("console.log")?;
    Ok((Logs { hypervisor, devices, console }, [hypervisor_end, devices_end, console_end]))
}
