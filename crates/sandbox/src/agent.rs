//! The client of the guest's agent: one call, one method, one deadline; errors in our kinds.

use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use hypervisor::GuestStream;
use protocol::agent as wire;
use protocol::agent_ttrpc::AgentClient;
use ttrpc::r#async::transport::Socket;
use ttrpc::r#async::{Client, ClientStreamReceiver};
use ttrpc::context::{Context, with_duration};
use ttrpc::{Code, Error as RpcError};

use crate::error::{Error, ErrorKind, from_guest};

/// A connection to the agent. Clones share it; calls may overlap.
#[derive(Clone)]
pub(crate) struct Agent {
    client: AgentClient,
    timeout: Duration,
    console: PathBuf,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("timeout", &self.timeout).finish_non_exhaustive()
    }
}

impl Agent {
    /// Speaks over `stream`; each call but [`Self::wait`] has `timeout` to be answered. `console` is named in errors.
    pub(crate) fn new(stream: GuestStream, timeout: Duration, console: PathBuf) -> Self {
        Self { client: AgentClient::new(Client::new(Socket::new(stream))), timeout, console }
    }

    fn context(&self) -> Context {
        with_duration(self.timeout)
    }

    /// Awaits `call` and puts its failure in our words.
    async fn told<T>(
        &self,
        what: &'static str,
        call: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, Error> {
        // The client's own deadline is a status too; ours is there for a guest that answers nothing at all.
        match tokio::time::timeout(self.timeout + Duration::from_secs(1), call).await {
            Ok(answer) => answer.map_err(|error| self.error(what, error)),
            Err(_) => Err(self.late(what)),
        }
    }

    fn late(&self, what: &'static str) -> Error {
        let seconds = self.timeout.as_secs();
        Error::GuestTimeout { what, seconds, console: self.console.clone() }
    }

    fn error(&self, what: &'static str, error: RpcError) -> Error {
        let RpcError::RpcStatus(status) = error else {
            let message = format!("the guest's agent could not {what}: {error}");
            return Error::Agent { message: from_guest(&message), kind: ErrorKind::Unavailable };
        };
        let kind = match status.code() {
            Code::DEADLINE_EXCEEDED => return self.late(what),
            Code::NOT_FOUND => ErrorKind::NotFound,
            Code::ALREADY_EXISTS => ErrorKind::AlreadyExists,
            Code::INVALID_ARGUMENT => ErrorKind::InvalidArgument,
            Code::FAILED_PRECONDITION => ErrorKind::InvalidState,
            Code::UNIMPLEMENTED => ErrorKind::Unsupported,
            Code::UNAVAILABLE => ErrorKind::Unavailable,
            _ => ErrorKind::Internal,
        };
        Error::Agent { message: from_guest(&status.message), kind }
    }

    pub(crate) async fn hello(&self) -> Result<wire::HelloResponse, Error> {
        let request = wire::HelloRequest { version: protocol::VERSION, ..Default::default() };
        self.told("say hello", self.client.hello(self.context(), &request)).await
    }

    pub(crate) async fn resync(&self, request: wire::ResyncRequest) -> Result<(), Error> {
        self.told("take its clock and names", self.client.resync(self.context(), &request)).await?;
        Ok(())
    }

    pub(crate) async fn configure_network(
        &self,
        request: wire::ConfigureNetworkRequest,
    ) -> Result<(), Error> {
        let call = self.client.configure_network(self.context(), &request);
        self.told("configure its network", call).await?;
        Ok(())
    }

    pub(crate) async fn bridge_loopback(
        &self,
        request: wire::BridgeLoopbackRequest,
    ) -> Result<(), Error> {
        let call = self.client.bridge_loopback(self.context(), &request);
        self.told("bridge its loopback", call).await?;
        Ok(())
    }

    pub(crate) async fn mount(&self, request: wire::MountRequest) -> Result<(), Error> {
        self.told("mount", self.client.mount(self.context(), &request)).await?;
        Ok(())
    }

    pub(crate) async fn create(
        &self,
        request: wire::CreateContainerRequest,
    ) -> Result<wire::ProcessCreated, Error> {
        let call = self.client.create_container(self.context(), &request);
        self.told("create the container", call).await
    }

    pub(crate) async fn start(&self, container: &str) -> Result<(), Error> {
        let request = named(container);
        let call = self.client.start_container(self.context(), &request);
        self.told("start the container", call).await?;
        Ok(())
    }

    /// Kills what is left of a container and forgets it.
    pub(crate) async fn remove(&self, container: &str) -> Result<(), Error> {
        let request = named(container);
        self.told("remove the container", self.client.remove(self.context(), &request)).await?;
        Ok(())
    }

    /// Tells the guest's watchers of what has changed in containers' volumes.
    pub(crate) async fn changed(&self, changes: Vec<wire::Change>) -> Result<(), Error> {
        let request = wire::ChangedRequest { changes, ..Default::default() };
        self.told("tell watchers", self.client.changed(self.context(), &request)).await?;
        Ok(())
    }

    pub(crate) async fn exec(
        &self,
        request: wire::ExecRequest,
    ) -> Result<wire::ProcessCreated, Error> {
        self.told("run a process", self.client.exec(self.context(), &request)).await
    }

    pub(crate) async fn signal(&self, request: wire::SignalRequest) -> Result<(), Error> {
        self.told("send a signal", self.client.signal(self.context(), &request)).await?;
        Ok(())
    }

    pub(crate) async fn resize(&self, request: wire::ResizeTtyRequest) -> Result<(), Error> {
        self.told("resize a terminal", self.client.resize_tty(self.context(), &request)).await?;
        Ok(())
    }

    /// Waits for a process's end, for as long as it takes. An empty `exec`: the container's init.
    pub(crate) async fn wait(
        &self,
        container: &str,
        exec: &str,
    ) -> Result<wire::WaitResponse, Error> {
        let request = wire::ProcessRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            ..Default::default()
        };
        let answer = self.client.wait(Context::default(), &request).await;
        answer.map_err(|error| self.error("wait for a process", error))
    }

    pub(crate) async fn update(&self, container: &str, resources: String) -> Result<(), Error> {
        let request = wire::UpdateRequest {
            container_id: container.to_owned(),
            resources_json: resources.into_bytes(),
            ..Default::default()
        };
        self.told("change limits", self.client.update(self.context(), &request)).await?;
        Ok(())
    }

    pub(crate) async fn pause(&self, container: &str) -> Result<(), Error> {
        let request = named(container);
        self.told("pause the container", self.client.pause(self.context(), &request)).await?;
        Ok(())
    }

    pub(crate) async fn resume(&self, container: &str) -> Result<(), Error> {
        let request = named(container);
        self.told("resume the container", self.client.resume(self.context(), &request)).await?;
        Ok(())
    }

    pub(crate) async fn stats(&self, container: &str) -> Result<wire::StatsResponse, Error> {
        let request = named(container);
        self.told("tell its figures", self.client.stats(self.context(), &request)).await
    }

    pub(crate) async fn processes(
        &self,
        container: &str,
    ) -> Result<wire::ProcessesResponse, Error> {
        let request = named(container);
        self.told("list its processes", self.client.processes(self.context(), &request)).await
    }

    pub(crate) async fn events(&self) -> Result<ClientStreamReceiver<wire::Event>, Error> {
        let request = wire::Empty::default();
        self.told("tell its events", self.client.events(self.context(), &request)).await
    }
}

fn named(container: &str) -> wire::ContainerRequest {
    wire::ContainerRequest { container_id: container.to_owned(), ..Default::default() }
}
