//! What the sandbox process does with what it is asked over `control.sock`.

use std::io;
use std::rc::Rc;

use protocol::agent as wire;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tracing::{debug, info, warn};

use crate::container::Container;
use crate::control::{Asked, GuestProcess, LONGEST_LINE, Processes, Request, Response, Stats};
use crate::error::{Chain, Error, ErrorKind};
use crate::sandbox::{SIGKILL, Sandbox, streams, tty_size};
use crate::status::{Operation, Status};

impl Sandbox {
    /// Serves one connection to `control.sock` until it ends.
    pub(crate) async fn serve(self: Rc<Self>, stream: UnixStream) {
        let (read, mut write) = stream.into_split();
        let mut read = BufReader::new(read);
        // The processes that live no longer than this connection.
        let mut mine: Vec<(Rc<Container>, String)> = Vec::new();
        loop {
            let Asked { container, request } = match receive(&mut read).await {
                Ok(Some(asked)) => asked,
                Ok(None) => break,
                Err(error) => {
                    warn!(%error, "a request could not be read");
                    break;
                }
            };
            debug!(container, ?request, "asked");
            let answer = match request {
                Request::Wait { exec } => {
                    let ended = self.wait(&container, &exec);
                    tokio::select! {
                        answer = ended => answer,
                        // Nothing is asked during a wait: whatever comes is the connection's end.
                        _ = read.fill_buf() => break,
                    }
                }
                request => self.handle(&container, request).await,
            };
            if let Ok(Response::Process { exec, .. }) = &answer
                && let Ok(container) = self.container(&container)
            {
                mine.push((container, exec.clone()));
            }
            if send(&mut write, &response(answer)).await.is_err() {
                break;
            }
        }
        for (container, exec) in mine {
            if exec.is_empty() {
                self.let_go(&container).await;
            } else if container.forget_exec(&exec) {
                info!(exec, "its stand-in is gone: killed");
                let killed = self.agent.signal(container.signal_request(&exec, SIGKILL, false));
                if let Err(error) = killed.await {
                    debug!(error = %Chain(&error), "the exec was not killed");
                }
            }
        }
    }

    async fn handle(&self, id: &str, request: Request) -> Result<Response, Error> {
        if let Request::Create(new) = request {
            return self.create(id, *new).await;
        }
        if let Request::Release = request {
            self.released(id).await;
            return Ok(Response::Done);
        }
        let container = &*self.container(id)?;
        match request {
            Request::Start => self.start(container).await?,
            Request::Signal { exec, signal, all } => {
                self.signal(container, &exec, signal, all).await?;
            }
            Request::Exec { process, streams, size, pid } => {
                return self.exec(container, process, streams, size, pid).await;
            }
            Request::Resize { exec, rows, columns } => {
                self.resize(container, exec, (rows, columns)).await?;
            }
            Request::Pause => self.pause(container).await?,
            Request::Resume => self.resume(container).await?,
            Request::Update { resources } => self.update(container, resources).await?,
            Request::Stats => {
                container.check(Operation::Events)?;
                let stats = self.agent.stats(id).await?;
                return Ok(Response::Stats(Box::new(stats.into())));
            }
            Request::Processes => {
                container.check(Operation::Ps)?;
                return self.processes(container).await.map(Response::Processes);
            }
            Request::Disown => container.disown(),
            // Those are done above.
            Request::Create(_) | Request::Release | Request::Wait { .. } => {}
        }
        Ok(Response::Done)
    }

    pub(crate) async fn start(&self, container: &Container) -> Result<(), Error> {
        container.check(Operation::Start)?;
        // Since Docker 28 the network arrives between create and start.
        self.rescan_network().await?;
        self.agent.start(container.id()).await?;
        // A program that ends at once may have been noticed already.
        if container.status() == Status::Created {
            container.set_status(Status::Running)?;
        }
        Ok(())
    }

    pub(crate) async fn pause(&self, container: &Container) -> Result<(), Error> {
        container.check(Operation::Pause)?;
        self.agent.pause(container.id()).await?;
        container.set_status(Status::Paused)
    }

    pub(crate) async fn resume(&self, container: &Container) -> Result<(), Error> {
        container.check(Operation::Resume)?;
        self.agent.resume(container.id()).await?;
        container.set_status(Status::Running)
    }

    /// Sends a signal to a process, or with `all` to every process of the container. SIGKILL of its init ends it even if
    /// the guest does not answer.
    pub(crate) async fn signal(
        &self,
        container: &Container,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        if exec.is_empty() {
            container.check(Operation::Kill)?;
        }
        let sent = self.agent.signal(container.signal_request(exec, signal, all)).await;
        match sent {
            Err(error)
                if signal == SIGKILL
                    && exec.is_empty()
                    && error.kind() == ErrorKind::Unavailable =>
            {
                warn!(error = %Chain(&error), "the guest does not answer: ending its machine");
                self.end().await;
                Ok(())
            }
            sent => sent,
        }
    }

    pub(crate) async fn resize(
        &self,
        container: &Container,
        exec: String,
        size: (u16, u16),
    ) -> Result<(), Error> {
        let request = wire::ResizeTtyRequest {
            container_id: container.id().to_owned(),
            exec_id: exec,
            size: Some(tty_size(size)).into(),
            ..Default::default()
        };
        self.agent.resize(request).await
    }

    pub(crate) async fn exec(
        &self,
        container: &Container,
        process: String,
        wanted: [bool; 3],
        size: Option<(u16, u16)>,
        pid: u32,
    ) -> Result<Response, Error> {
        container.check(Operation::Exec)?;
        let exec = container.name_exec();
        let request = wire::ExecRequest {
            container_id: container.id().to_owned(),
            exec_id: exec.clone(),
            process_json: process.into_bytes(),
            streams: Some(streams(wanted)).into(),
            tty_size: size.map(tty_size).into(),
            ..Default::default()
        };
        let tokens = self.agent.exec(request).await?.into();
        container.add_exec(&exec, pid);
        Ok(Response::Process { exec, tokens, vsock: self.vsock.clone(), phases: Vec::new() })
    }

    /// Waits for a process's end. An empty `exec`: the container's init.
    pub(crate) async fn wait(&self, id: &str, exec: &str) -> Result<Response, Error> {
        let container = self.container(id)?;
        let ended = self.agent.wait(id, exec).await?;
        let code = exit_code(ended.exit_code);
        if exec.is_empty() {
            if ended.oom_killed {
                // Before the end is told: who watches looks no further then.
                container.tell_out_of_memory().await;
            }
            container.ended(code);
            info!(container = id, code, "container ended");
        } else {
            container.forget_exec(exec);
        }
        Ok(Response::Ended { code, written: [ended.stdout_bytes, ended.stderr_bytes] })
    }

    async fn processes(&self, container: &Container) -> Result<Processes, Error> {
        let answer = self.agent.processes(container.id()).await?;
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
        Ok(Processes { host: container.host_processes(), guest })
    }
}

/// Answers whatever is asked with `error`, for as long as it is awaited.
pub(crate) async fn refuse_all(control: UnixListener, error: &Error) {
    while let Ok((stream, _)) = control.accept().await {
        let (read, mut write) = stream.into_split();
        let mut read = BufReader::new(read);
        if let Ok(Some(_)) = receive(&mut read).await {
            let answer = Response::Failed { text: Chain(error).to_string(), kind: error.kind() };
            // Who asked may have gone.
            drop(send(&mut write, &answer).await);
        }
    }
}

fn response(answer: Result<Response, Error>) -> Response {
    answer.unwrap_or_else(|error| Response::Failed {
        text: Chain(&error).to_string(),
        kind: error.kind(),
    })
}

/// The guest's word for an exit code, kept within what an exit code can be.
fn exit_code(code: u32) -> u8 {
    u8::try_from(code).unwrap_or(u8::MAX)
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

async fn receive(read: &mut (impl AsyncBufReadExt + Unpin)) -> io::Result<Option<Asked>> {
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
