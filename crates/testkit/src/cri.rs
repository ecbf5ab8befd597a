//! The Kubernetes container runtime interface: what a kubelet asks of containerd, over gRPC.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use h2::client;
use http::{HeaderMap, Request};
use protobuf::Message;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::time::timeout;

use crate::run::DEADLINE;

/// The messages of `cri.proto`.
#[allow(warnings, clippy::all, clippy::pedantic, clippy::restriction, reason = "generated")]
pub mod api {
    include!(concat!(env!("OUT_DIR"), "/cri.rs"));
}

/// A client.
#[derive(Debug)]
pub struct Cri {
    socket: PathBuf,
    runtime: Runtime,
}

impl Cri {
    /// A client of what listens at `socket`; it connects anew for each call.
    ///
    /// # Errors
    ///
    /// When there can be no event loop.
    pub fn new(socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { socket: socket.to_owned(), runtime })
    }

    /// Calls a method of `RuntimeService`.
    ///
    /// # Errors
    ///
    /// What the service says, or that it says nothing in time.
    pub fn call<A: Message>(&self, method: &str, request: &impl Message) -> Result<A> {
        let request = request.write_to_bytes()?;
        let called = async { timeout(DEADLINE, self.exchange(method, request)).await };
        let answer = self.runtime.block_on(called)??;
        Ok(A::parse_from_bytes(&answer)?)
    }

    async fn exchange(&self, method: &str, request: Vec<u8>) -> Result<Vec<u8>> {
        let stream = UnixStream::connect(&self.socket).await?;
        let (mut send, connection) = client::handshake(stream).await?;
        let driving = tokio::spawn(connection);
        let head = Request::post(format!("http://localhost/runtime.v1.RuntimeService/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())?;
        let (response, mut body) = send.send_request(head, false)?;
        // A message of gRPC: not compressed, its length, itself.
        let mut frame = vec![0];
        frame.extend(u32::try_from(request.len())?.to_be_bytes());
        frame.extend(request);
        body.send_data(Bytes::from(frame), true)?;
        let response = response.await?;
        let head = response.headers().clone();
        let mut body = response.into_body();
        let mut answer = Vec::new();
        while let Some(chunk) = body.data().await {
            let chunk = chunk?;
            body.flow_control().release_capacity(chunk.len())?;
            answer.extend_from_slice(&chunk);
        }
        let trailers = body.trailers().await?.unwrap_or_default();
        driving.abort();
        let status = |name: &str| {
            let find = |headers: &HeaderMap| headers.get(name)?.to_str().ok().map(str::to_owned);
            find(&trailers).or_else(|| find(&head)).unwrap_or_default()
        };
        if status("grpc-status") != "0" {
            bail!("{method}: {} (code {})", status("grpc-message"), status("grpc-status"));
        }
        Ok(answer.get(5..).context("an answer without a message")?.to_vec())
    }
}

/// How long a container may take to end after SIGTERM, in seconds.
pub const GRACE: i64 = 2;

/// How long a state may take to come about.
pub const PATIENCE: Duration = Duration::from_mins(1);
