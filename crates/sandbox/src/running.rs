//! A created container, until it has ended.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use hypervisor::Vm;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::{spawn_blocking, spawn_local};
use tracing::{error, info, warn};

use crate::error::{Chain, Error};
use crate::launch::Caller;
use crate::server::{Sandbox, VmRequest, exit_code};
use crate::status::Status;
use crate::stdio::Relay;

/// How a container exits whose machine was killed: 128 + SIGKILL.
const KILLED: u8 = 137;

/// How the sandbox process ends.
pub(crate) struct Ended {
    pub(crate) code: u8,
    /// Whether whoever would clean up has gone.
    pub(crate) orphaned: bool,
}

/// A created container and its machine.
pub(crate) struct Running {
    pub(crate) sandbox: Rc<Sandbox>,
    pub(crate) vm: Box<dyn Vm>,
    pub(crate) vm_orders: mpsc::Receiver<VmRequest>,
    pub(crate) control: UnixListener,
    pub(crate) relay: Relay,
    /// What took how long, for the log of whoever waits.
    pub(crate) phases: Vec<(String, u64)>,
    /// The container's terminal, whose size the guest's shall have.
    pub(crate) tty: Option<OwnedFd>,
}

impl Running {
    /// Ends a container that nobody waits for any more.
    pub(crate) async fn abandon(self) -> Ended {
        warn!("the caller is gone: its container ends");
        if let Err(error) = self.vm.kill().await {
            warn!(error = %Chain(&error), "the machine was not killed");
        }
        Ended { code: KILLED, orphaned: true }
    }

    /// Serves until the container has ended; one in the foreground ends with its caller.
    pub(crate) async fn until_ended(mut self, mut caller: Caller, foreground: bool) -> Ended {
        let (ended, end) = watch::channel(None);
        let orphaned = Rc::new(Cell::new(false));
        if foreground {
            let (orphaned, vm) = (Rc::clone(&orphaned), self.sandbox.vm.clone());
            spawn_local(async move {
                caller.gone().await;
                orphaned.set(true);
                // A machine that has ended needs no more orders.
                drop(vm.send(VmRequest::Kill).await);
            });
        } else {
            drop(caller);
        }
        spawn_local(accept(self.control, Rc::clone(&self.sandbox)));
        spawn_local(watch_init(Rc::clone(&self.sandbox), self.relay, ended));
        spawn_local(watch_oom(Rc::clone(&self.sandbox)));
        if let Err(error) = forward_signals(&self.sandbox, self.tty) {
            warn!(%error, "signals are not forwarded");
        }
        let code = own_machine(&mut self.vm, &mut self.vm_orders, end).await;

        self.sandbox.record.borrow_mut().exit_code = Some(code);
        if let Err(error) = self.sandbox.set_status(Status::Stopped) {
            error!(error = %Chain(&error), "the exit was not written down");
        }
        if let Err(error) = self.vm.kill().await {
            warn!(error = %Chain(&error), "the machine was not killed");
        }
        info!(code, "container ended");
        Ended { code, orphaned: orphaned.get() }
    }
}

/// Does what is asked of the machine until the container or the machine has ended; answers the container's exit code.
async fn own_machine(
    vm: &mut Box<dyn Vm>,
    orders: &mut mpsc::Receiver<VmRequest>,
    mut end: watch::Receiver<Option<u8>>,
) -> u8 {
    let mut machine_ended = vm.ended();
    loop {
        tokio::select! {
            // In this order: a container that has exited has exited, however its machine ends.
            biased;
            code = end.wait_for(Option::is_some) => {
                return code.ok().and_then(|code| *code).unwrap_or(KILLED);
            }
            exit = machine_ended.wait_for(Option::is_some) => {
                let exit = exit.ok().and_then(|exit| exit.clone());
                error!(?exit, "the machine ended under its container");
                return KILLED;
            }
            order = orders.recv() => match order {
                Some(VmRequest::Attach(device, answer)) => {
                    drop(answer.send(vm.attach(device).await.map_err(Error::from)));
                }
                Some(VmRequest::Detach(id, answer)) => {
                    drop(answer.send(vm.detach(&id).await.map_err(Error::from)));
                }
                Some(VmRequest::Kill) | None => return KILLED,
            },
        }
    }
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

/// Tells `ended` when the container's init has exited and all it had written has been delivered.
async fn watch_init(sandbox: Rc<Sandbox>, relay: Relay, ended: watch::Sender<Option<u8>>) {
    match sandbox.agent.wait(sandbox.dir.id().as_str(), "").await {
        Ok(exit) => {
            let written = [exit.stdout_bytes, exit.stderr_bytes];
            if spawn_blocking(move || relay.finish(written)).await.is_err() {
                error!("the last output may be lost");
            }
            if exit.oom_killed {
                warn!("the guest's kernel killed a process: out of memory");
            }
            ended.send_replace(Some(exit_code(exit.exit_code)));
        }
        Err(error) => {
            // The machine's end, which is watched too, explains it; if the machine lives, the agent is broken.
            error!(error = %Chain(&error), "the container's init is lost");
            ended.send_replace(Some(KILLED));
        }
    }
}

async fn watch_oom(sandbox: Rc<Sandbox>) {
    let Ok(mut events) = sandbox.agent.events().await else { return };
    while let Ok(Some(event)) = events.recv().await {
        if event.has_oom() {
            warn!(
                container = crate::error::from_guest(&event.container_id),
                "out of memory in the guest"
            );
        }
    }
}

/// Forwards the signals that this process is sent to the container's init, and its terminal's size.
fn forward_signals(sandbox: &Rc<Sandbox>, tty: Option<OwnedFd>) -> io::Result<()> {
    let kinds = [
        SignalKind::hangup(),
        SignalKind::interrupt(),
        SignalKind::quit(),
        SignalKind::terminate(),
        SignalKind::user_defined1(),
        SignalKind::user_defined2(),
    ];
    for kind in kinds {
        let mut signals = signal(kind)?;
        let sandbox = Rc::clone(sandbox);
        spawn_local(async move {
            while signals.recv().await.is_some() {
                let number = kind.as_raw_value().unsigned_abs();
                if let Err(error) = sandbox.signal(number, false).await {
                    warn!(number, error = %Chain(&error), "signal not forwarded");
                }
            }
        });
    }
    if let Some(tty) = tty {
        let mut changes = signal(SignalKind::window_change())?;
        let sandbox = Rc::clone(sandbox);
        spawn_local(async move {
            while changes.recv().await.is_some() {
                let Ok(size) = linux::pty::window_size(&tty) else { continue };
                if let Err(error) = sandbox.resize("", size.rows, size.columns).await {
                    warn!(error = %Chain(&error), "terminal not resized");
                }
            }
        });
    }
    Ok(())
}
