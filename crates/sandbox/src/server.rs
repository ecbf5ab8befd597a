//! A running sandbox: what the sandbox process does once its first container is created.
//!
//! One thread owns everything here; tasks on it take turns, and no borrow is held across an await. A request that waits
//! (for a process, for the guest) keeps no other one waiting.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;

use hypervisor::{Device, VsockAddress};
use linux::ledger::Ledger;
use network::Network;
use protocol::agent as wire;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, info, warn};

use crate::agent::Agent;
use crate::control::{GuestProcess, LONGEST_LINE, Processes, Request, Response, Stats};
use crate::error::{Chain, Error, ErrorKind};
use crate::state::{ContainerDir, ContainerRecord};
use crate::status::{Operation, Status};
use crate::stdio::Tokens;

/// SIGKILL, which must work on a guest that answers nothing.
const SIGKILL: u32 = 9;

/// A request to whoever owns the machine.
pub(crate) enum VmRequest {
    /// Add a device.
    Attach(Device, oneshot::Sender<Result<(), Error>>),
    /// Take the device with this id away.
    Detach(String, oneshot::Sender<Result<(), Error>>),
    /// End the machine.
    Kill,
}

/// A sandbox with its container.
pub(crate) struct Sandbox {
    pub(crate) agent: Agent,
    pub(crate) dir: ContainerDir,
    pub(crate) record: RefCell<ContainerRecord>,
    pub(crate) ledger: RefCell<Ledger>,
    pub(crate) network: RefCell<Network>,
    pub(crate) netns: PathBuf,
    pub(crate) vsock: VsockAddress,
    pub(crate) vm: mpsc::Sender<VmRequest>,
    pub(crate) cgroup: Option<linux::cgroup::Cgroup>,
    pub(crate) config: crate::config::SandboxConfig,
    pub(crate) execs: RefCell<HashMap<String, u32>>,
    pub(crate) execs_made: Cell<u64>,
}

impl Sandbox {
    fn id(&self) -> &str {
        self.dir.id().as_str()
    }

    fn check(&self, operation: Operation) -> Result<(), Error> {
        let status = self.record.borrow().status;
        if status.allows(operation) {
            return Ok(());
        }
        Err(Error::WrongStatus { id: self.id().to_owned(), operation, status })
    }

    /// Changes the status, on disk too.
    pub(crate) fn set_status(&self, status: Status) -> Result<(), Error> {
        self.record.borrow_mut().status = status;
        self.dir.write(&self.record.borrow())
    }

    /// Serves one connection to `control.sock` until it ends.
    pub(crate) async fn serve(self: Rc<Self>, stream: UnixStream) {
        let (read, mut write) = stream.into_split();
        let mut read = BufReader::new(read);
        // The execs that live no longer than this connection.
        let mut mine: Vec<String> = Vec::new();
        loop {
            let request = match receive(&mut read).await {
                Ok(Some(request)) => request,
                Ok(None) => break,
                Err(error) => {
                    warn!(%error, "a request could not be read");
                    break;
                }
            };
            debug!(?request, "asked");
            let answer = match request {
                Request::WaitExec { exec } => {
                    let ended = self.wait_exec(&exec);
                    tokio::select! {
                        answer = ended => answer,
                        // Nothing is asked during a wait: whatever comes is the connection's end.
                        _ = read.fill_buf() => break,
                    }
                }
                request => self.handle(request).await,
            };
            let response = answer.unwrap_or_else(|error| Response::Failed {
                text: Chain(&error).to_string(),
                kind: error.kind(),
            });
            if let Response::Exec { exec, .. } = &response {
                mine.push(exec.clone());
            }
            if send(&mut write, &response).await.is_err() {
                break;
            }
        }
        for exec in mine {
            if self.execs.borrow_mut().remove(&exec).is_some() {
                info!(exec, "its stand-in is gone: killed");
                if let Err(error) =
                    self.agent.signal(self.signal_request(&exec, SIGKILL, false)).await
                {
                    debug!(error = %Chain(&error), "the exec was not killed");
                }
            }
        }
    }

    async fn handle(&self, request: Request) -> Result<Response, Error> {
        match request {
            Request::Start => self.start().await?,
            Request::Signal { signal, all } => self.signal(signal, all).await?,
            Request::Exec { process, stdin, stdout, stderr, size, pid } => {
                return self.exec(process, [stdin, stdout, stderr], size, pid).await;
            }
            Request::SignalExec { exec, signal } => {
                self.agent.signal(self.signal_request(&exec, signal, false)).await?;
            }
            Request::ResizeExec { exec, rows, columns } => {
                self.resize(&exec, rows, columns).await?;
            }
            Request::WaitExec { exec } => return self.wait_exec(&exec).await,
            Request::Pause => {
                self.check(Operation::Pause)?;
                self.agent.pause(self.id()).await?;
                self.set_status(Status::Paused)?;
            }
            Request::Resume => {
                self.check(Operation::Resume)?;
                self.agent.resume(self.id()).await?;
                self.set_status(Status::Running)?;
            }
            Request::Update { resources } => self.update(resources).await?,
            Request::Stats => {
                self.check(Operation::Events)?;
                let stats = self.agent.stats(self.id()).await?;
                return Ok(Response::Stats(Box::new(stats.into())));
            }
            Request::Processes => {
                self.check(Operation::Ps)?;
                return self.processes().await.map(Response::Processes);
            }
            Request::End => self.end().await,
        }
        Ok(Response::Done)
    }

    async fn start(&self) -> Result<(), Error> {
        self.check(Operation::Start)?;
        // Since Docker 28 the network arrives between create and start.
        self.rescan_network().await?;
        self.agent.start(self.id()).await?;
        // A program that ends at once may have been noticed already.
        if self.record.borrow().status == Status::Created {
            self.set_status(Status::Running)?;
        }
        Ok(())
    }

    async fn rescan_network(&self) -> Result<(), Error> {
        let now = network::scan()?;
        let difference = network::difference(&self.network.borrow(), &now);
        for link in &difference.removed {
            self.ask_vm(|answer| VmRequest::Detach(link.device_id(), answer)).await?;
            network::detach(link)?;
        }
        for link in &difference.added {
            let device = network::attach(link, &self.netns, &mut self.ledger.borrow_mut())?;
            self.ask_vm(|answer| VmRequest::Attach(device, answer)).await?;
        }
        if difference.configuration {
            self.agent.configure_network(now.request()).await?;
            self.network.replace(now);
        }
        Ok(())
    }

    async fn ask_vm(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<(), Error>>) -> VmRequest,
    ) -> Result<(), Error> {
        let gone = || Error::SandboxGone { id: self.id().to_owned() };
        let (answer, answered) = oneshot::channel();
        self.vm.send(request(answer)).await.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }

    fn signal_request(&self, exec: &str, signal: u32, all: bool) -> wire::SignalRequest {
        wire::SignalRequest {
            container_id: self.id().to_owned(),
            exec_id: exec.to_owned(),
            signal,
            all,
            ..Default::default()
        }
    }

    /// Sends a signal to the container. SIGKILL ends it even if the guest does not answer.
    pub(crate) async fn signal(&self, signal: u32, all: bool) -> Result<(), Error> {
        self.check(Operation::Kill)?;
        let sent = self.agent.signal(self.signal_request("", signal, all)).await;
        match sent {
            Err(error) if signal == SIGKILL && error.kind() == ErrorKind::Unavailable => {
                warn!(error = %Chain(&error), "the guest does not answer: ending its machine");
                self.end().await;
                Ok(())
            }
            sent => sent,
        }
    }

    async fn end(&self) {
        // A receiver that is gone has ended the machine already.
        drop(self.vm.send(VmRequest::Kill).await);
    }

    /// Tells a process's terminal its size. An empty `exec`: the container's init.
    pub(crate) async fn resize(&self, exec: &str, rows: u16, columns: u16) -> Result<(), Error> {
        let request = wire::ResizeTtyRequest {
            container_id: self.id().to_owned(),
            exec_id: exec.to_owned(),
            size: Some(tty_size((rows, columns))).into(),
            ..Default::default()
        };
        self.agent.resize(request).await
    }

    async fn exec(
        &self,
        process: String,
        [stdin, stdout, stderr]: [bool; 3],
        size: Option<(u16, u16)>,
        pid: u32,
    ) -> Result<Response, Error> {
        self.check(Operation::Exec)?;
        let number = self.execs_made.get() + 1;
        self.execs_made.set(number);
        let exec = format!("exec-{number}");
        let request = wire::ExecRequest {
            container_id: self.id().to_owned(),
            exec_id: exec.clone(),
            process_json: process.into_bytes(),
            streams: Some(wire::Streams { stdin, stdout, stderr, ..Default::default() }).into(),
            tty_size: size.map(tty_size).into(),
            ..Default::default()
        };
        let created = self.agent.exec(request).await?;
        self.execs.borrow_mut().insert(exec.clone(), pid);
        Ok(Response::Exec { exec, tokens: Tokens::from(created), vsock: self.vsock.clone() })
    }

    async fn wait_exec(&self, exec: &str) -> Result<Response, Error> {
        let ended = self.agent.wait(self.id(), exec).await?;
        self.execs.borrow_mut().remove(exec);
        Ok(Response::Ended {
            code: exit_code(ended.exit_code),
            written: [ended.stdout_bytes, ended.stderr_bytes],
        })
    }

    async fn update(&self, resources: String) -> Result<(), Error> {
        self.check(Operation::Update)?;
        let parsed: protocol::oci::LinuxResources = serde_json::from_str(&resources)
            .map_err(|error| Error::invalid(format!("resources: {error}")))?;
        if let Some(cgroup) = &self.cgroup {
            cgroup.apply(&crate::resources::host_limits(Some(&parsed), &self.config)).map_err(
                |error| Error::Told { text: Chain(&error).to_string(), kind: ErrorKind::Internal },
            )?;
        }
        self.agent.update(self.id(), resources).await
    }

    async fn processes(&self) -> Result<Processes, Error> {
        let answer = self.agent.processes(self.id()).await?;
        let mut host = vec![std::process::id()];
        host.extend(self.execs.borrow().values());
        let guest = answer
            .processes
            .into_iter()
            .map(|process| GuestProcess {
                pid: process.pid,
                ppid: process.ppid,
                uid: process.uid,
                cpu_ms: process.cpu_ms,
                tty: crate::error::from_guest(&process.tty),
                command: crate::error::from_guest(&process.command),
            })
            .collect();
        Ok(Processes { host, guest })
    }
}

/// The guest's word for an exit code, kept within what an exit code can be.
pub(crate) fn exit_code(code: u32) -> u8 {
    u8::try_from(code).unwrap_or(u8::MAX)
}

pub(crate) fn tty_size((rows, columns): (u16, u16)) -> wire::TtySize {
    wire::TtySize { rows: rows.into(), columns: columns.into(), ..Default::default() }
}

impl From<wire::StatsResponse> for Stats {
    fn from(wire: wire::StatsResponse) -> Self {
        Self {
            cpu_usage_us: wire.cpu_usage_us,
            cpu_user_us: wire.cpu_user_us,
            cpu_system_us: wire.cpu_system_us,
            cpu_periods: wire.cpu_periods,
            cpu_throttled_periods: wire.cpu_throttled_periods,
            cpu_throttled_us: wire.cpu_throttled_us,
            memory_usage: wire.memory_usage,
            memory_limit: wire.memory_limit,
            memory_peak: wire.memory_peak,
            swap_usage: wire.swap_usage,
            memory_stat: wire.memory_stat.into_iter().collect(),
            pids: wire.pids,
            pids_limit: wire.pids_limit,
            oom_kills: wire.oom_kills,
        }
    }
}

async fn receive(read: &mut (impl AsyncBufReadExt + Unpin)) -> io::Result<Option<Request>> {
    let mut line = Vec::new();
    read.take(LONGEST_LINE).read_until(b'\n', &mut line).await?;
    if line.is_empty() {
        return Ok(None);
    }
    serde_json::from_slice(&line).map(Some).map_err(io::Error::from)
}

async fn send(write: &mut (impl AsyncWriteExt + Unpin), response: &Response) -> io::Result<()> {
    let mut line = serde_json::to_vec(response)?;
    line.push(b'\n');
    write.write_all(&line).await
}
