//! containerd's Task API: each method hands its request to the thread that owns everything, and its answer back.
//!
//! Version 3 is version 2 under another name (`containerd.task.v3.Task`); both are served on one socket, so that any
//! containerd finds the one it knows.

use std::collections::HashMap;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest,
    StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim_async::{Task, create_task};
use containerd_shim_protos::ttrpc;
use futures::FutureExt;
use futures::future::LocalBoxFuture;
use tokio::sync::{mpsc, oneshot};
use ttrpc::r#async::{Service, TtrpcContext};

use crate::error::Error;
use crate::shim::Shim;

const VERSION_3: &str = "containerd.task.v3.Task";
const VERSION_2: &str = "containerd.task.v2.Task";

/// A request on its way to the thread that owns the sandbox.
pub(crate) type Call = Box<dyn FnOnce(Rc<Shim>) -> LocalBoxFuture<'static, ()> + Send>;

/// The service: it may be called on any thread, and owns nothing.
#[derive(Clone)]
struct Door {
    calls: mpsc::UnboundedSender<Call>,
}

impl fmt::Debug for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Door").finish_non_exhaustive()
    }
}

/// Both versions of the service, whose calls come out at `calls`.
pub(crate) fn services(calls: mpsc::UnboundedSender<Call>) -> HashMap<String, Service> {
    let door = Door { calls };
    let mut services = create_task(Arc::new(door.clone()));
    if let Some(service) = create_task(Arc::new(door)).remove(VERSION_3) {
        services.insert(VERSION_2.to_owned(), service);
    }
    services
}

impl Door {
    /// Has `work` done to its end, whatever becomes of the connection that asked for it.
    async fn call<T, F>(
        &self,
        work: impl FnOnce(Rc<Shim>) -> F + Send + 'static,
    ) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, Error>> + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let call: Call = Box::new(move |shim| {
            async move {
                // A caller that has gone wants no answer.
                drop(answer.send(work(shim).await));
            }
            .boxed_local()
        });
        let gone = || ttrpc::Error::Others("the shim is ending".to_owned());
        self.calls.send(call).map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?.map_err(ttrpc::Error::from)
    }
}

fn done(_: ()) -> Empty {
    Empty::default()
}

#[async_trait]
impl Task for Door {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        self.call(|shim| async move { shim.create(request).await }).await
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        self.call(|shim| async move { shim.start(&request.id, &request.exec_id).await }).await
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        self.call(|shim| async move { shim.delete(&request.id, &request.exec_id).await }).await
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        self.call(|shim| async move { shim.state(&request.id, &request.exec_id) }).await
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        self.call(|shim| async move { shim.pids(&request.id) }).await
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.call(|shim| async move { shim.pause(&request.id).await }).await.map(done)
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.call(|shim| async move { shim.resume(&request.id).await }).await.map(done)
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        let what = "checkpoint of a container in a VM is not supported".to_owned();
        Err(Error::Unsupported { what }.into())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        self.call(|shim| async move { shim.kill(&request).await }).await.map(done)
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.call(|shim| async move { shim.exec(request) }).await.map(done)
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        self.call(|shim| async move { shim.resize(&request).await }).await.map(done)
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        self.call(|shim| async move { shim.close_io(&request) }).await.map(done)
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        self.call(|shim| async move { shim.update(request).await }).await.map(done)
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        self.call(|shim| async move { shim.wait(&request.id, &request.exec_id).await }).await
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        self.call(|shim| async move { shim.stats(&request.id).await }).await
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        self.call(|shim| async move { shim.connect(&request.id) }).await
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        let ended = |shim: Rc<Shim>| async move {
            shim.shutdown();
            Ok(())
        };
        self.call(ended).await.map(done)
    }
}
