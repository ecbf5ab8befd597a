//! A sandbox, until its last container has gone.

use std::rc::Rc;

use hypervisor::Vm;
use tokio::io::AsyncReadExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::spawn_local;
use tracing::{error, info, warn};

use crate::boot::Booted;
use crate::error::{Chain, Error, ErrorKind};
use crate::interfaces;
use crate::resize::Size;
use crate::sandbox::{Sandbox, VmRequest};
use crate::state::ContainerDir;

/// The `create` that has started this sandbox process.
pub(crate) struct Caller(UnixStream);

impl Caller {
    pub(crate) fn new(socket: UnixStream) -> Self {
        Self(socket)
    }

    /// Waits for its end. Cancel safe: it says nothing more.
    pub(crate) async fn gone(&mut self) {
        let mut nothing = [0];
        while self.0.read(&mut nothing).await.is_ok_and(|length| length > 0) {}
    }
}

/// A sandbox and its machine.
pub(crate) struct Running {
    sandbox: Rc<Sandbox>,
    vm: Box<dyn Vm>,
    vm_orders: mpsc::Receiver<VmRequest>,
    control: UnixListener,
}

impl Running {
    pub(crate) fn new(booted: Booted, control: UnixListener) -> Self {
        let (vm_requests, vm_orders) = mpsc::channel(4);
        let (sandbox, vm) = Sandbox::new(booted, vm_requests);
        Self { sandbox: Rc::new(sandbox), vm, vm_orders, control }
    }

    /// The sandbox.
    pub(crate) fn sandbox(&self) -> Rc<Sandbox> {
        Rc::clone(&self.sandbox)
    }

    /// Serves until the caller has gone and no container is left. Answers the directory that nobody else will remove.
    pub(crate) async fn until_empty(mut self, mut caller: Caller) -> Option<ContainerDir> {
        spawn_local(accept(self.control, Rc::clone(&self.sandbox)));
        spawn_local(interfaces::follow(Rc::clone(&self.sandbox)));
        spawn_local(watch_guest(Rc::clone(&self.sandbox)));
        let mut changes = self.sandbox.changes();
        let mut machine_ended = self.vm.ended();
        let mut alone = false;
        loop {
            if alone && self.sandbox.is_empty() {
                break;
            }
            tokio::select! {
                // In this order: a container that has exited has exited, however its machine ends.
                biased;
                _ = changes.changed() => {}
                () = caller.gone(), if !alone => alone = true,
                exit = machine_ended.wait_for(Option::is_some) => {
                    let exit = exit.ok().and_then(|exit| exit.clone());
                    error!(?exit, "the machine ended under its containers");
                    self.sandbox.all_killed();
                    break;
                }
                order = self.vm_orders.recv() => match order {
                    Some(VmRequest::Attach(device, answer)) => {
                        drop(answer.send(self.vm.attach(device).await.map_err(Error::from)));
                    }
                    Some(VmRequest::Detach(id, answer)) => {
                        drop(answer.send(self.vm.detach(&id).await.map_err(Error::from)));
                    }
                    Some(VmRequest::Resize(size, answer)) => {
                        let resized = tokio::select! {
                            resized = self.vm.resize(size.vcpus, size.memory_mib) => resized,
                            // It may take long, and nobody needs it any more.
                            () = empty(&self.sandbox), if alone => break,
                        };
                        let given = resized.map_err(Error::from).and_then(|got| given(size, got));
                        drop(answer.send(given));
                    }
                    Some(VmRequest::Kill) | None => {
                        self.sandbox.all_killed();
                        break;
                    }
                },
            }
        }
        if let Err(error) = self.vm.kill().await {
            warn!(error = %Chain(&error), "the machine was not killed");
        }
        info!("the sandbox ended");
        self.sandbox.orphan()
    }
}

/// Waits until no container is in the sandbox.
async fn empty(sandbox: &Sandbox) {
    let mut changes = sandbox.changes();
    while !sandbox.is_empty() && changes.changed().await.is_ok() {}
}

/// Whether a machine has got what it was to get. What it still has beyond that is no error: the guest uses it.
fn given(wanted: Size, (vcpus, memory_mib): (u32, u32)) -> Result<(), Error> {
    info!(vcpus, memory_mib, ?wanted, "the machine was resized");
    if vcpus >= wanted.vcpus && memory_mib >= wanted.memory_mib {
        return Ok(());
    }
    let text = format!(
        "the virtual machine could not grow to {} vCPUs and {} MiB of memory: it has {vcpus} and {memory_mib} MiB",
        wanted.vcpus, wanted.memory_mib
    );
    Err(Error::Told { text, kind: ErrorKind::Internal })
}

async fn accept(control: UnixListener, sandbox: Rc<Sandbox>) {
    loop {
        match control.accept().await {
            Ok((stream, _)) => {
                spawn_local(Rc::clone(&sandbox).serve(stream));
            }
            Err(error) => {
                error!(%error, "no more requests are taken");
                return;
            }
        }
    }
}

async fn watch_guest(sandbox: Rc<Sandbox>) {
    let Ok(mut events) = sandbox.agent.events().await else { return };
    while let Ok(Some(event)) = events.recv().await {
        if event.has_oom() {
            let id = crate::error::from_guest(&event.container_id);
            warn!(container = id, "out of memory in the guest");
            if let Ok(container) = sandbox.container(&event.container_id) {
                spawn_local(async move { container.tell_out_of_memory().await });
            }
        }
        if event.has_watching() {
            sandbox.watch_volumes();
        }
    }
}
