//! The life of processes: started, signalled, waited for, deleted.

use std::rc::Rc;

use containerd_shim_protos::api::{
    CloseIORequest, DeleteResponse, ExecProcessRequest, KillRequest, ResizePtyRequest,
    StartResponse, Status, WaitResponse,
};
use containerd_shim_protos::events::task as event;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::topics;
use sandbox::{Chain, ErrorKind, ProcessStreams};
use tokio::task::spawn_local;
use tracing::{info, warn};

use crate::error::Error;
use crate::process::{Exit, Process};
use crate::rootfs;
use crate::shim::{Container, Shim};
use crate::stdio::{Relay, Stdio};

/// How an exec ends whose program could not be run.
const NOT_RUN: u32 = 255;

impl Shim {
    /// Runs a created container's program, or the process of an exec.
    pub(crate) async fn start(
        self: Rc<Self>,
        id: &str,
        exec: &str,
    ) -> Result<StartResponse, Error> {
        let (container, process) = self.process(id, exec)?;
        process.check(Status::CREATED, "start")?;
        // Its end is told after its start, however short its life.
        let starting = process.hold();
        if exec.is_empty() {
            self.sandbox()?.start(&container.id).await?;
        } else {
            self.start_exec(&container, &process).await?;
        }
        if process.status.get() == Status::CREATED {
            process.status.set(Status::RUNNING);
        }
        let pid = container.pid;
        if exec.is_empty() {
            let told = event::TaskStart { container_id: id.to_owned(), pid, ..Default::default() };
            self.events.publish(topics::TASK_START_EVENT_TOPIC, &told);
        } else {
            let told = event::TaskExecStarted {
                container_id: id.to_owned(),
                exec_id: exec.to_owned(),
                pid,
                ..Default::default()
            };
            self.events.publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &told);
        }
        drop(starting);
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn start_exec(
        self: &Rc<Self>,
        container: &Rc<Container>,
        process: &Rc<Process>,
    ) -> Result<(), Error> {
        let started = async {
            let opened = process.stdio.open()?;
            let made = self
                .sandbox()?
                .exec(&container.id, &process.spec, process.stdio.wanted(), process.size.get())
                .await?;
            Ok::<_, Error>((opened, made))
        };
        match started.await {
            Ok((opened, ProcessStreams { exec, streams })) => {
                process.attach(Relay::start(opened, streams));
                process.engine_id.replace(exec);
                spawn_local(Rc::clone(self).watch_end(Rc::clone(container), Rc::clone(process)));
                Ok(())
            }
            Err(error) => {
                process.end(Exit { code: NOT_RUN, ..Exit::killed() });
                Err(error)
            }
        }
    }

    /// Waits for a process's end in the guest, notes it and tells containerd.
    pub(crate) async fn watch_end(self: Rc<Self>, container: Rc<Container>, process: Rc<Process>) {
        let exec = process.engine_id.borrow().clone();
        let ended = match self.sandbox() {
            Ok(sandbox) => sandbox.wait(&container.id, &exec).await.map_err(Error::from),
            Err(error) => Err(error),
        };
        let exit = match ended {
            Ok(ended) => {
                Exit { code: ended.code.into(), at: Timestamp::now(), written: ended.written }
            }
            Err(error) => {
                warn!(process = process.name, error = %Chain(&error), "lost: taken for killed");
                Exit::killed()
            }
        };
        process.started().await;
        info!(process = process.name, code = exit.code, "ended");
        if !process.end(exit.clone()) {
            return;
        }
        let id = container.id.as_str().to_owned();
        let told = event::TaskExit {
            id: if process.exec_id.is_empty() { id.clone() } else { process.exec_id.clone() },
            container_id: id,
            pid: container.pid,
            exit_status: exit.code,
            exited_at: MessageField::some(exit.at),
            ..Default::default()
        };
        self.events.publish(topics::TASK_EXIT_EVENT_TOPIC, &told);
    }

    /// Registers one more process; it is run by `start`.
    pub(crate) fn exec(&self, request: ExecProcessRequest) -> Result<(), Error> {
        let container = self.container(&request.id)?;
        container.init.check_alive()?;
        let known = container.execs.borrow().contains_key(&request.exec_id);
        if known || request.exec_id.is_empty() {
            let what = format!("exec {} of container {}", request.exec_id, request.id);
            return Err(Error::AlreadyExists { what });
        }
        let spec = request.spec.into_option().unwrap_or_default().value;
        let spec = String::from_utf8(spec)
            .map_err(|_| Error::invalid("the exec's spec is not JSON: it is not UTF-8"))?;
        let stdio = Stdio {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        let process = Process::new(&request.id, &request.exec_id, stdio, spec);
        container.execs.borrow_mut().insert(request.exec_id.clone(), Rc::new(process));
        let told = event::TaskExecAdded {
            container_id: request.id,
            exec_id: request.exec_id,
            ..Default::default()
        };
        self.events.publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &told);
        Ok(())
    }

    /// Signals a process, or all of a container.
    pub(crate) async fn kill(&self, request: &KillRequest) -> Result<(), Error> {
        let (container, process) = self.process(&request.id, &request.exec_id)?;
        process.check_alive()?;
        let exec = process.engine_id.borrow().clone();
        if !request.exec_id.is_empty() && exec.is_empty() {
            return process.check(Status::RUNNING, "signal");
        }
        let sent = self.sandbox()?.signal(&container.id, &exec, request.signal, request.all).await;
        match sent {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidState) => {
                Err(Error::Finished { what: process.name.clone() })
            }
            sent => Ok(sent?),
        }
    }

    /// Waits for a process's end.
    pub(crate) async fn wait(&self, id: &str, exec: &str) -> Result<WaitResponse, Error> {
        let (_, process) = self.process(id, exec)?;
        let exit = process.ended().await;
        Ok(WaitResponse {
            exit_status: exit.code,
            exited_at: MessageField::some(exit.at),
            ..Default::default()
        })
    }

    /// Forgets a process that has ended; with a container's init goes the container.
    pub(crate) async fn delete(&self, id: &str, exec: &str) -> Result<DeleteResponse, Error> {
        let (container, process) = self.process(id, exec)?;
        match process.status.get() {
            Status::STOPPED => {}
            Status::CREATED if exec.is_empty() => self.remove_created(&container).await,
            Status::CREATED => {
                process.end(Exit::killed());
            }
            _ => process.check(Status::STOPPED, "delete")?,
        }
        let exit = process.exit().unwrap_or_else(Exit::killed);
        // What it has written is to be read before its pipes end.
        let relay = process.relay.take();
        if let Some(relay) = relay {
            relay.finish(exit.written).await;
        }
        if exec.is_empty() {
            self.remove(&container).await?;
        } else {
            container.execs.borrow_mut().remove(exec);
        }
        let pid = container.pid;
        if exec.is_empty() {
            let told = event::TaskDelete {
                container_id: id.to_owned(),
                pid,
                exit_status: exit.code,
                exited_at: MessageField::some(exit.at.clone()),
                ..Default::default()
            };
            self.events.publish(topics::TASK_DELETE_EVENT_TOPIC, &told);
        }
        Ok(DeleteResponse {
            pid,
            exit_status: exit.code,
            exited_at: MessageField::some(exit.at),
            ..Default::default()
        })
    }

    /// Ends a container that was never started.
    async fn remove_created(&self, container: &Container) {
        const SIGKILL: u32 = 9;
        if let Ok(sandbox) = self.sandbox()
            && let Err(error) = sandbox.signal(&container.id, "", SIGKILL, true).await
        {
            warn!(id = container.id.as_str(), error = %Chain(&error), "not killed");
            container.init.end(Exit::killed());
        }
        container.init.ended().await;
    }

    async fn remove(&self, container: &Container) -> Result<(), Error> {
        let sandbox = self.sandbox()?;
        let id = container.id.as_str();
        if id == self.args.id {
            // The sandbox's own container: what is left in it ends with it.
            sandbox.end().await;
        }
        sandbox.remove(&container.id).await?;
        rootfs::unmount(&container.bundle, Some(&sandbox)).await;
        self.containers.borrow_mut().remove(id);
        Ok(())
    }

    /// Tells a terminal its size.
    pub(crate) async fn resize(&self, request: &ResizePtyRequest) -> Result<(), Error> {
        let (container, process) = self.process(&request.id, &request.exec_id)?;
        process.check_alive()?;
        let cut = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
        let (rows, columns) = (cut(request.height), cut(request.width));
        let exec = process.engine_id.borrow().clone();
        if !request.exec_id.is_empty() && exec.is_empty() {
            process.size.set(Some((rows, columns)));
            return Ok(());
        }
        Ok(self.sandbox()?.resize(&container.id, &exec, rows, columns).await?)
    }

    /// Lets a process's input end.
    pub(crate) fn close_io(&self, request: &CloseIORequest) -> Result<(), Error> {
        let (_, process) = self.process(&request.id, &request.exec_id)?;
        if request.stdin {
            process.close_input();
        }
        Ok(())
    }
}
