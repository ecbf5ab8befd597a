//! What containerd asks about tasks, and what it changes without ending them.

use containerd_shim_protos::api::{
    ConnectResponse, PidsResponse, ProcessInfo, StateResponse, StatsResponse, Status,
    UpdateTaskRequest,
};
use containerd_shim_protos::events::task as event;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::topics;

use crate::error::Error;
use crate::process::Exit;
use crate::shim::Shim;
use crate::stats;

impl Shim {
    pub(crate) fn state(&self, id: &str, exec: &str) -> Result<StateResponse, Error> {
        let (container, process) = self.process(id, exec)?;
        let exit = process.exit();
        let stdio = process.stdio.clone();
        Ok(StateResponse {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            bundle: container.bundle.to_string_lossy().into_owned(),
            pid: container.pid,
            status: process.status.get().into(),
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            terminal: stdio.terminal,
            exit_status: exit.as_ref().map_or(0, |exit| exit.code),
            exited_at: exit.map(|Exit { at, .. }| at).into(),
            ..Default::default()
        })
    }

    /// The host's pid that stands for all of the container's processes, which have pids of the guest's.
    pub(crate) fn pids(&self, id: &str) -> Result<PidsResponse, Error> {
        let container = self.container(id)?;
        container.init.check_alive()?;
        let pid = container.pid;
        let processes = vec![ProcessInfo { pid, ..Default::default() }];
        Ok(PidsResponse { processes, ..Default::default() })
    }

    pub(crate) async fn pause(&self, id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        container.init.check(Status::RUNNING, "pause")?;
        self.sandbox()?.pause(&container.id).await?;
        container.init.status.set(Status::PAUSED);
        let told = event::TaskPaused { container_id: id.to_owned(), ..Default::default() };
        self.events.publish(topics::TASK_PAUSED_EVENT_TOPIC, &told);
        Ok(())
    }

    pub(crate) async fn resume(&self, id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        container.init.check(Status::PAUSED, "resume")?;
        self.sandbox()?.resume(&container.id).await?;
        container.init.status.set(Status::RUNNING);
        let told = event::TaskResumed { container_id: id.to_owned(), ..Default::default() };
        self.events.publish(topics::TASK_RESUMED_EVENT_TOPIC, &told);
        Ok(())
    }

    pub(crate) async fn update(&self, request: UpdateTaskRequest) -> Result<(), Error> {
        let container = self.container(&request.id)?;
        container.init.check_alive()?;
        let resources = request.resources.into_option().unwrap_or_default().value;
        let resources = String::from_utf8(resources)
            .map_err(|_| Error::invalid("the resources are not JSON: they are not UTF-8"))?;
        Ok(self.sandbox()?.update(&container.id, resources).await?)
    }

    pub(crate) async fn stats(&self, id: &str) -> Result<StatsResponse, Error> {
        let container = self.container(id)?;
        container.init.check_alive()?;
        let stats = self.sandbox()?.stats(&container.id).await?;
        let stats = MessageField::some(stats::encode(&stats, self.metrics)?);
        Ok(StatsResponse { stats, ..Default::default() })
    }

    pub(crate) fn connect(&self, id: &str) -> Result<ConnectResponse, Error> {
        let container = self.container(id)?;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: container.pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    /// Ends the shim, unless containers are left: containerd says so after each one's deletion.
    pub(crate) fn shutdown(&self) {
        if self.containers.borrow().is_empty() && self.creating.get() == 0 {
            self.done.notify_one();
        }
    }
}
