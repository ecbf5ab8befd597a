//! Running one more process in a container.

use std::io;
use std::path::Path;

use linux::process::{Child, Command};
use protocol::oci;
use rustix::process::Signal;

use crate::console::{self, Console};
use crate::error::Error;
use crate::launch::{Channel, Order, Process, Report};
use crate::operations::lawful;
use crate::spec::Bundle;
use crate::stand_in;
use crate::state::{ContainerDir, ContainerId, Root};
use crate::status::Operation;
use crate::stdio::Stdio;

/// A process to be run in a container.
#[derive(Debug)]
pub struct Exec<'a> {
    /// Where the container's state is.
    pub root: &'a Root,
    /// The container.
    pub id: &'a ContainerId,
    /// The OCI spec's `process`.
    pub process: &'a oci::Process,
    /// Its standard streams.
    pub console: Console,
    /// The `kata` binary.
    pub program: &'a Path,
}

/// The defaults for an exec: the container's own `process`.
///
/// # Errors
///
/// When the container does not run, or its bundle has gone.
pub fn exec_defaults(root: &Root, id: &ContainerId) -> Result<oci::Process, Error> {
    let (_, record) = lawful(root, id, Operation::Exec)?;
    Bundle::load(&record.bundle)?.process().cloned()
}

fn exec_request(process: &oci::Process) -> Result<String, Error> {
    crate::spec::check_process(process, "process")?;
    serde_json::to_string(process).map_err(|error| Error::invalid(format!("process: {error}")))
}

/// Runs a process in a container and answers its stand-in, a child of the caller, once the process runs.
///
/// # Errors
///
/// When the container does not run, or the program cannot be run.
pub fn exec_detached(request: &Exec<'_>) -> Result<Child, Error> {
    let (dir, _) = lawful(request.root, request.id, Operation::Exec)?;
    let terminal = request.process.terminal().unwrap_or_default();
    let mut command = Command::new(request.program);
    console::attach(&mut command, terminal, &request.console, request.process)?;
    let (mut channel, theirs) = Channel::pair().map_err(Error::host("create", "a socket pair"))?;
    let number = command.pass(theirs);
    command.name("kata").args(["stand-in".to_owned(), number.to_string()]);
    if matches!(request.console, Console::Socket(_)) {
        command.controlling_terminal();
    } else {
        command.new_session();
    }
    let mut child =
        command.spawn().map_err(Error::host("start the stand-in from", request.program))?;
    let order = order(request, &dir)?;
    let gone = |_: io::Error| Error::Told {
        text: "the exec's stand-in ended early".into(),
        kind: crate::error::ErrorKind::Internal,
    };
    let answer = channel.tell(&order).and_then(|()| channel.hear());
    match answer.map_err(gone) {
        Ok(Report::Ready { .. }) => Ok(child),
        failed => {
            drop(child.signal(Signal::KILL));
            drop(child.wait());
            match failed? {
                Report::Failed { text, kind } => Err(Error::Told { text, kind }),
                _ => Err(gone(io::ErrorKind::InvalidData.into())),
            }
        }
    }
}

/// Runs a process in a container, with the caller's own standard streams, to its end. Answers its exit code. The calling
/// process is its stand-in.
///
/// # Errors
///
/// When the container does not run, or the program cannot be run.
pub fn exec_here(request: &Exec<'_>) -> Result<u8, Error> {
    let (dir, _) = lawful(request.root, request.id, Operation::Exec)?;
    let terminal = request.process.terminal().unwrap_or_default();
    let stdio = Stdio::own(terminal).map_err(Error::host("keep", "the standard streams"))?;
    stand_in::run(order(request, &dir)?, stdio, None)
}

fn order(request: &Exec<'_>, dir: &ContainerDir) -> Result<Order, Error> {
    Ok(Order {
        vm: dir.vm().clone(),
        id: request.id.as_str().to_owned(),
        terminal: request.process.terminal().unwrap_or_default(),
        what: Process::Exec(exec_request(request.process)?),
    })
}
