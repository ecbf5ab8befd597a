//! What a door can ask: each of the OCI commands, from a short-lived synchronous process.
//!
//! Whatever these functions need to know of a container is on disk, and whatever they want of it they ask its sandbox
//! process; they hold nothing themselves and may die at any point.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use linux::ThisHost;
use linux::ledger::Ledger;
use linux::process::ProcessId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use serde::Serialize;

use crate::control::{Client, Processes, Request, Response, Stats};
use crate::error::{Chain, Error};
use crate::hooks;
use crate::spec::Bundle;
use crate::state::{ContainerDir, ContainerId, ContainerRecord, Root};
use crate::status::{Operation, Status};

/// How long a sandbox process may take to kill its container before it is killed itself.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a sandbox process may take to go after its container has exited.
const EXIT_TIMEOUT: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// SIGKILL's number.
const SIGKILL: u32 = 9;

/// Gives back all that a container has taken, and with the last one its sandbox; and forgets it.
///
/// # Errors
///
/// When something would not go; it stays written down, for another try.
pub(crate) fn give_back(dir: &ContainerDir) -> Result<(), Error> {
    let mut ledgers = vec![dir.ledger()];
    if !dir.has_siblings() {
        ledgers.push(dir.vm().ledger());
    }
    for path in ledgers.into_iter().filter(|path| path.exists()) {
        Ledger::open(&path)
            .and_then(|ledger| ledger.settle(&ThisHost))
            .map_err(Error::host("give back all that is in", path))?;
    }
    dir.remove()
}

/// [`give_back`] on the way out after another error, which is the one to tell.
pub(crate) fn settle(dir: &ContainerDir) {
    if let Err(error) = give_back(dir) {
        tracing::error!(error = %Chain(&error), "not everything could be given back; use delete --force");
    }
}

/// The state that hooks read from their standard input.
pub(crate) fn hook_state(bundle: &Bundle, id: &ContainerId, status: Status, pid: u32) -> Vec<u8> {
    let state = State {
        oci_version: protocol::OCI_VERSION.to_owned(),
        id: id.as_str().to_owned(),
        status,
        pid,
        bundle: bundle.path.clone(),
        annotations: bundle.spec.annotations().clone().unwrap_or_default(),
        rootfs: bundle.rootfs().unwrap_or_default(),
        created: String::new(),
        owner: String::new(),
    };
    serde_json::to_vec(&state).unwrap_or_default()
}

/// A container's state, as the OCI spec's `state` and runc print it.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// The version of the spec that this state is in.
    pub oci_version: String,
    /// The container's id.
    pub id: String,
    /// The host process that stands for it; 0 when it is stopped.
    pub pid: u32,
    /// Where it is in its life.
    pub status: Status,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its root file system on the host.
    #[serde(skip_serializing_if = "is_empty")]
    pub rootfs: PathBuf,
    /// RFC 3339.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub created: String,
    /// Its annotations.
    #[serde(skip_serializing_if = "std::collections::HashMap::is_empty")]
    pub annotations: std::collections::HashMap<String, String>,
    /// The user who owns it.
    pub owner: String,
}

fn is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

/// A container's state.
///
/// # Errors
///
/// [`Error::NoSuchContainer`].
pub fn state(root: &Root, id: &ContainerId) -> Result<State, Error> {
    Ok(State::of(root.find(id)?.current()?))
}

impl State {
    fn of(record: ContainerRecord) -> Self {
        let stopped = record.status == Status::Stopped;
        Self {
            oci_version: protocol::OCI_VERSION.to_owned(),
            id: record.id,
            status: record.status,
            pid: record.process.filter(|_| !stopped).map_or(0, |process| process.pid),
            bundle: record.bundle,
            rootfs: record.rootfs,
            created: record.created,
            annotations: record.annotations,
            owner: String::new(),
        }
    }
}

/// The states of all containers, by id. One that is being removed meanwhile is left out.
///
/// # Errors
///
/// When the root cannot be read.
pub fn list(root: &Root) -> Result<Vec<State>, Error> {
    Ok(root.list()?.iter().filter_map(|id| state(root, id).ok()).collect())
}

/// Finds a container that `operation` is lawful on.
pub(crate) fn lawful(
    root: &Root,
    id: &ContainerId,
    operation: Operation,
) -> Result<(ContainerDir, ContainerRecord), Error> {
    let dir = root.find(id)?;
    let record = dir.current()?;
    if record.status.allows(operation) {
        return Ok((dir, record));
    }
    Err(Error::WrongStatus { id: record.id, operation, status: record.status })
}

fn ask(
    root: &Root,
    id: &ContainerId,
    operation: Operation,
    request: &Request,
) -> Result<Response, Error> {
    let (dir, _) = lawful(root, id, operation)?;
    Client::connect(&dir)?.ask(request)
}

/// Runs the user's program of a created container, and then its poststart hooks.
///
/// # Errors
///
/// When the container is not created, or the guest cannot run the program.
pub fn start(root: &Root, id: &ContainerId) -> Result<(), Error> {
    let (dir, mut record) = lawful(root, id, Operation::Start)?;
    Client::connect(&dir)?.ask(&Request::Start)?;
    let hooks = record.hooks.take();
    let hooks = hooks.and_then(|hooks| hooks.poststart().clone()).unwrap_or_default();
    // What it was made: by now its program may have ended.
    record.status = Status::Running;
    let state = serde_json::to_vec(&State::of(record)).unwrap_or_default();
    // "If any poststart hook fails, the runtime MUST log a warning, but the remaining hooks and lifecycle continue."
    // (runtime.md, "Lifecycle", 10)
    for hook in &hooks {
        if let Err(error) = hooks::run("poststart", std::slice::from_ref(hook), &state) {
            tracing::warn!(error = %Chain(&error), "a hook failed");
        }
    }
    Ok(())
}

/// Sends a signal to a container's init, or with `all` to every process of it.
///
/// # Errors
///
/// When it does not run. With `all` that is a success, as for runc.
pub fn kill(root: &Root, id: &ContainerId, signal: u32, all: bool) -> Result<(), Error> {
    let (dir, record) = match lawful(root, id, Operation::Kill) {
        Err(Error::WrongStatus { status: Status::Stopped, .. }) if all => return Ok(()),
        found => found?,
    };
    let told = Client::connect(&dir).and_then(|mut client| {
        if signal == SIGKILL {
            client
                .set_timeout(Some(KILL_TIMEOUT))
                .map_err(Error::host("set up", dir.vm().control()))?;
        }
        client.ask(&Request::Signal { exec: String::new(), signal, all })
    });
    match (told, record.process) {
        // Whatever it hangs in, SIGKILL ends it.
        (Err(Error::SandboxGone { .. }), Some(process)) if signal == SIGKILL => {
            process.signal(Signal::KILL).map_err(Error::host("kill", process.pid.to_string()))?;
            Ok(())
        }
        (told, _) => told.map(|_| ()),
    }
}

/// Deletes a container, and its sandbox, from the host; `force` kills it before if need be, and finds a container that does
/// not exist deleted.
///
/// # Errors
///
/// When it runs and `force` is not given, or something would not go: then it can be tried again.
pub fn delete(root: &Root, id: &ContainerId, force: bool) -> Result<(), Error> {
    let dir = match root.find(id) {
        Err(Error::NoSuchContainer { .. }) if force => return Ok(()),
        found => found?,
    };
    let record = dir.read()?;
    if !force {
        lawful(root, id, Operation::Delete)?;
    }
    end(&dir, record.as_ref())?;
    let hooks = record.and_then(|record| record.hooks);
    let poststop = hooks.and_then(|hooks| hooks.poststop().clone()).unwrap_or_default();
    let state = state(root, id).ok().and_then(|state| serde_json::to_vec(&state).ok());
    {
        // A `create` that is still there has noticed the end of its sandbox process and cleans up.
        let _lock = linux::file::lock(&dir.vm().lock());
        give_back(&dir)?;
    }
    for hook in &poststop {
        if let Err(error) =
            hooks::run("poststop", std::slice::from_ref(hook), state.as_deref().unwrap_or_default())
        {
            tracing::warn!(error = %Chain(&error), "a hook failed");
        }
    }
    Ok(())
}

/// Sees to it that nothing of a container runs any more, and with the last one nothing of its sandbox.
fn end(dir: &ContainerDir, record: Option<&ContainerRecord>) -> Result<(), Error> {
    let stopped = record.is_some_and(|record| record.status == Status::Stopped);
    if let Some(process) = record.and_then(|record| record.process) {
        end_process(process, stopped)?;
    }
    let Some(sandbox) = dir.vm().read()? else { return Ok(()) };
    if dir.has_siblings() {
        let released = Client::connect(dir).and_then(|mut client| {
            client
                .set_timeout(Some(KILL_TIMEOUT))
                .map_err(Error::host("set up", dir.vm().control()))?;
            client.ask(&Request::Release)
        });
        if released.is_ok() || !sandbox.process.is_alive() {
            return Ok(());
        }
        // Whatever it hangs in: without an answer nothing in it can be trusted to be gone.
        return end_process(sandbox.process, false);
    }
    end_process(sandbox.process, stopped)
}

/// Waits for a process of ours that is on its way out, or kills it; either way it is gone afterwards.
fn end_process(process: ProcessId, on_its_way: bool) -> Result<(), Error> {
    let name = || process.pid.to_string();
    let Some(pidfd) = process.open().map_err(Error::host("open process", name()))? else {
        return Ok(());
    };
    let ended = |pidfd: &OwnedFd| {
        let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&EXIT_TIMEOUT)), Ok(1..))
    };
    if on_its_way && ended(&pidfd) {
        return Ok(());
    }
    process.signal(Signal::KILL).map_err(Error::host("kill", name()))?;
    if ended(&pidfd) {
        return Ok(());
    }
    Err(Error::Host { action: "kill", path: name().into(), source: io::ErrorKind::TimedOut.into() })
}

/// Freezes a container.
///
/// # Errors
///
/// When it does not run.
pub fn pause(root: &Root, id: &ContainerId) -> Result<(), Error> {
    ask(root, id, Operation::Pause, &Request::Pause).map(|_| ())
}

/// Thaws a container.
///
/// # Errors
///
/// When it is not paused.
pub fn resume(root: &Root, id: &ContainerId) -> Result<(), Error> {
    ask(root, id, Operation::Resume, &Request::Resume).map(|_| ())
}

/// Changes a container's limits to those that `resources`, the OCI spec's `linux.resources` as JSON, has.
///
/// # Errors
///
/// When it does not run, or a limit is refused.
pub fn update(root: &Root, id: &ContainerId, resources: String) -> Result<(), Error> {
    ask(root, id, Operation::Update, &Request::Update { resources }).map(|_| ())
}

/// A container's figures, as its guest has them.
///
/// # Errors
///
/// When it does not run.
pub fn stats(root: &Root, id: &ContainerId) -> Result<Stats, Error> {
    match ask(root, id, Operation::Events, &Request::Stats)? {
        Response::Stats(stats) => Ok(*stats),
        _ => Err(Error::SandboxGone { id: id.as_str().to_owned() }),
    }
}

/// A container's processes.
///
/// # Errors
///
/// When it does not run.
pub fn processes(root: &Root, id: &ContainerId) -> Result<Processes, Error> {
    match ask(root, id, Operation::Ps, &Request::Processes)? {
        Response::Processes(processes) => Ok(processes),
        _ => Err(Error::SandboxGone { id: id.as_str().to_owned() }),
    }
}
