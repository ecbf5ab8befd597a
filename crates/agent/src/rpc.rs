//! The Agent service: each method decodes, makes one call, and encodes.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use protocol::agent::{self, Empty, Event, HelloResponse, ProcessCreated, WaitResponse};
use protocol::{CONTROL_PORT, VERSION, agent_ttrpc, oci};
use tokio::sync::broadcast::error::RecvError;
use ttrpc::r#async::{Server, ServerStreamSender, TtrpcContext};

use crate::containers::Containers;
use crate::error::Error;
use crate::loopback::Loopback;
use crate::{boot, filesystem, network, notify, resync, since_boot, spec, stats, uevent};

/// What the service needs.
#[derive(Debug)]
struct Service {
    containers: Arc<Containers>,
    loopback: Loopback,
    started: Duration,
    ready: Duration,
}

/// Serves, until the returned server is dropped.
pub(crate) async fn serve(containers: Arc<Containers>, started: Duration) -> Result<Server, Error> {
    let loopback = Loopback::default();
    let service = Service { containers, loopback, started, ready: since_boot() };
    let serving = async {
        let mut server = Server::new()
            .bind(&format!("vsock://-1:{CONTROL_PORT}"))?
            .register_service(agent_ttrpc::create_agent(Arc::new(service)));
        server.start().await?;
        Ok(server)
    };
    serving.await.map_err(|error: ttrpc::Error| {
        Error::guest(format!("serve on vsock port {CONTROL_PORT}"), std::io::Error::other(error))
    })
}

/// Runs to its end what changes something, whatever becomes of the connection that asked for it.
async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> ttrpc::Result<T> {
    let done = tokio::spawn(work).await;
    done.unwrap_or_else(|error| {
        Err(Error::guest("finish the request", std::io::Error::other(error)))
    })
    .map_err(ttrpc::Error::from)
}

fn done(result: Result<(), Error>) -> ttrpc::Result<Empty> {
    result?;
    Ok(Empty::default())
}

#[async_trait]
impl agent_ttrpc::Agent for Service {
    async fn hello(
        &self,
        _: &TtrpcContext,
        request: agent::HelloRequest,
    ) -> ttrpc::Result<HelloResponse> {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let uname = rustix::system::uname();
        Ok(HelloResponse {
            version: VERSION.min(request.version.max(1)),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: uname.release().to_string_lossy().into_owned(),
            kernel_ms: ms(self.started),
            ready_ms: ms(self.ready),
            ..HelloResponse::default()
        })
    }

    async fn resync(
        &self,
        _: &TtrpcContext,
        request: agent::ResyncRequest,
    ) -> ttrpc::Result<Empty> {
        done(resync::resync(&request))
    }

    async fn configure_network(
        &self,
        _: &TtrpcContext,
        request: agent::ConfigureNetworkRequest,
    ) -> ttrpc::Result<Empty> {
        done(Ok(whole(network::configure(request)).await?))
    }

    async fn bridge_loopback(
        &self,
        _: &TtrpcContext,
        request: agent::BridgeLoopbackRequest,
    ) -> ttrpc::Result<Empty> {
        done(self.loopback.bridge(&request))
    }

    async fn mount(&self, _: &TtrpcContext, request: agent::MountRequest) -> ttrpc::Result<Empty> {
        done(Ok(whole(filesystem::mount(request)).await?))
    }

    async fn unmount(
        &self,
        _: &TtrpcContext,
        request: agent::UnmountRequest,
    ) -> ttrpc::Result<Empty> {
        done(filesystem::unmount(&request.target))
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: agent::CreateContainerRequest,
    ) -> ttrpc::Result<ProcessCreated> {
        whole(Arc::clone(&self.containers).create(request)).await
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        done(Ok(whole(Arc::clone(&self.containers).start(request.container_id)).await?))
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: agent::ExecRequest,
    ) -> ttrpc::Result<ProcessCreated> {
        whole(Arc::clone(&self.containers).exec(request)).await
    }

    async fn signal(
        &self,
        _: &TtrpcContext,
        request: agent::SignalRequest,
    ) -> ttrpc::Result<Empty> {
        done(self.containers.signal(&request))
    }

    async fn resize_tty(
        &self,
        _: &TtrpcContext,
        request: agent::ResizeTtyRequest,
    ) -> ttrpc::Result<Empty> {
        let size = request.size.get_or_default();
        let process = self.containers.process(&request.container_id, &request.exec_id)?;
        done(process.resize(size.rows, size.columns))
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        request: agent::ProcessRequest,
    ) -> ttrpc::Result<WaitResponse> {
        let exit = self.containers.wait(&request.container_id, &request.exec_id).await?;
        Ok(WaitResponse {
            exit_code: exit.status.code(),
            stdout_bytes: exit.stdout_bytes,
            stderr_bytes: exit.stderr_bytes,
            oom_killed: exit.oom_killed,
            exited_at_ns: exit.at_ns,
            ..WaitResponse::default()
        })
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: agent::UpdateRequest,
    ) -> ttrpc::Result<Empty> {
        let resources: oci::LinuxResources = spec::resources(&request.resources_json)?;
        uevent::use_all_cpus();
        done(self.containers.cgroup(&request.container_id)?.limit(&resources))
    }

    async fn pause(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        done(Ok(whole(Arc::clone(&self.containers).pause(request.container_id, true)).await?))
    }

    async fn resume(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        done(Ok(whole(Arc::clone(&self.containers).pause(request.container_id, false)).await?))
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::StatsResponse> {
        Ok(stats::container(&self.containers.cgroup(&request.container_id)?))
    }

    async fn processes(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<agent::ProcessesResponse> {
        let processes = stats::processes(&self.containers.cgroup(&request.container_id)?);
        Ok(agent::ProcessesResponse { processes, ..agent::ProcessesResponse::default() })
    }

    async fn changed(
        &self,
        _: &TtrpcContext,
        request: agent::ChangedRequest,
    ) -> ttrpc::Result<Empty> {
        // It asks the host for each of them: not a matter for the thread that serves.
        let told =
            tokio::task::spawn_blocking(move || notify::tell_watchers(&request.changes)).await;
        done(told.unwrap_or_else(|error| {
            Err(Error::guest("tell watchers", std::io::Error::other(error)))
        }))
    }

    async fn remove(
        &self,
        _: &TtrpcContext,
        request: agent::ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        done(Ok(whole(Arc::clone(&self.containers).remove(request.container_id)).await?))
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        _: Empty,
        sender: ServerStreamSender<Event>,
    ) -> ttrpc::Result<()> {
        let mut events = self.containers.events();
        loop {
            match events.recv().await {
                Ok(event) => sender.send(&event).await?,
                // The host reads too slowly; the later ones are as good.
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return Ok(()),
            }
        }
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.containers.kill_all();
        filesystem::release().await;
        tokio::spawn(async {
            // Nothing tells when the host has read the answer; it is in the device's queue at once.
            tokio::time::sleep(Duration::from_millis(50)).await;
            boot::power_off();
        });
        Ok(Empty::default())
    }
}
