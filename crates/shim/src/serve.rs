//! Being the shim: one process and one thread for a sandbox, from containerd's first request to its last.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener as SyncListener;
use std::rc::Rc;
use std::time::Duration;

use containerd_shim_protos::ttrpc;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::timeout;
use tracing::{info, warn};
use ttrpc::asynchronous::{Server, transport::Listener};

use crate::args::Args;
use crate::error::Error;
use crate::events::{self, Publisher};
use crate::shim::Shim;
use crate::{delete, task};

/// How long the last events may take to reach containerd.
const LAST_EVENTS: Duration = Duration::from_secs(10);

/// Serves on the inherited listening socket `number` until containerd has no more use for it.
///
/// # Errors
///
/// When the socket or the event loop cannot be had.
pub(crate) fn serve(args: &Args, number: i32) -> Result<(), Error> {
    log(args.debug);
    let socket = linux::process::inherited(number)
        .map_err(Error::host("inherit socket", number.to_string()))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(Error::host("start", "the event loop"))?;
    let served = LocalSet::new().block_on(&runtime, run(args.clone(), socket));
    runtime.shutdown_background();
    served
}

async fn run(args: Args, socket: OwnedFd) -> Result<(), Error> {
    let listener = SyncListener::from(socket);
    let listener = listener
        .set_nonblocking(true)
        .and_then(|()| UnixListener::from_std(listener))
        .map_err(Error::host("listen on", "the inherited socket"))?;
    let (calls, mut called) = mpsc::unbounded_channel();
    let mut server = Server::new()
        .add_listener(Listener::from(listener))
        .register_service(task::services(calls));
    let failed = |source| Error::Serve { address: args.id.clone(), source };
    server.start().await.map_err(failed)?;

    let address = events::address(&args.events, &args.address);
    let (publisher, forwarding) = Publisher::new(&args.namespace, address);
    let forwarding = spawn_local(forwarding);
    let shim = Rc::new(Shim::new(args.clone(), publisher));
    info!(id = args.id, namespace = args.namespace, "serving");
    loop {
        tokio::select! {
            call = called.recv() => match call {
                Some(call) => drop(spawn_local(call(Rc::clone(&shim)))),
                None => break,
            },
            () = shim.done.notified() => break,
        }
    }
    if let Some(sandbox) = shim.sandbox.take() {
        sandbox.end().await;
    }
    if let Err(error) = delete::remove_socket(&args) {
        warn!(%error, "the socket is left");
    }
    shim.events.close();
    if timeout(LAST_EVENTS, forwarding).await.is_err() {
        warn!("containerd does not take the last events");
    }
    info!(id = args.id, "done");
    Ok(())
}

/// Logs to the standard error, which is containerd's log.
fn log(debug: bool) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("KATA_LOG").unwrap_or_else(|_| {
        tracing_subscriber::EnvFilter::new(if debug { "debug" } else { "info" })
    });
    // Already set where the caller logs itself.
    drop(
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_ansi(false)
            .with_writer(io::stderr)
            .try_init(),
    );
}
