//! The keeper: a sandbox process that has its machine before it has a container.

use std::fs;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hypervisor::{Hypervisor, VmProcesses, VmSpec};
use linux::ledger::Ledger;
use linux::mount::Tree;
use linux::process::ProcessId;
use rustix::fs::{Mode, OFlags};
use tokio::net::UnixListener;
use tokio::task::LocalSet;
use tracing::{debug, error, info, warn};

use super::{DOOR, Entry, Order, Place, READY, SHAPE, TAKEN, rehearsal, tidy};
use crate::boot::{self, Machine};
use crate::config::Config;
use crate::error::{Chain, Error};
use crate::launch::{Channel, Launch, Report};
use crate::process::{self, Prepared};
use crate::template::{self, Origin};

/// A machine of the pool must not take the processor from those that run.
const NICE: i32 = 10;

/// How long an idle guest may still be at something.
const SETTLED: Duration = Duration::from_secs(2);

/// Makes a machine for the pool, waits for who claims it and is then its sandbox process. The order comes over `channel`.
/// Answers the exit code for the process.
#[must_use]
pub fn keep(channel: OwnedFd) -> u8 {
    let mut channel = Channel::inherited(channel);
    // Where there is none, its caller has ended, and nothing was taken yet.
    let Ok(order) = channel.hear::<Order>() else { return 1 };
    match Keeper::new(order).and_then(|keeper| keeper.map_or(Ok(0), |keeper| keeper.run(&channel)))
    {
        Ok(code) => code,
        Err(error) => {
            error!(error = %Chain(&error), "the pool's machine is given up");
            // Who started us may have gone long ago.
            drop(writeln!(channel.socket(), "{}", Chain(&error)));
            1
        }
    }
}

/// A place in the pool, which is given back when it ends unclaimed.
struct Keeper {
    place: Place,
    name: String,
    config: Config,
    spec: VmSpec,
    driver: Box<dyn Hypervisor>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // What was claimed is in the sandbox's ledger. What would not go is taken for dead by whoever fills the pool next.
        drop(fs::remove_file(self.place.ready().join(&self.name)));
        if !self.place.claimed().join(&self.name).exists() {
            drop(linux::remove_tree(&self.dir()));
        }
    }
}

impl Keeper {
    /// Takes a place, if the pool has one.
    fn new(order: Order) -> Result<Option<Self>, Error> {
        let Order { config, device_program } = order;
        let own = ProcessId::own().map_err(Error::host("read", "/proc/self/stat"))?;
        let driver = hypervisor::driver(&config.hypervisor.driver)?;
        let place = Place::of(&config);
        place.create()?;
        let mut spec = boot::machine_spec(&config, None, PathBuf::new(), device_program)?;
        let shape = template::name(driver.as_ref(), &spec)?;
        let name = Entry::name(own);
        let dir = place.machines().join(&name);
        if let Some(share) = &mut spec.share {
            share.path = dir.join("share");
        }
        let keeper = Self { place, name, config, spec, driver };
        let _lock = keeper.place.lock()?;
        let wanted = usize::try_from(keeper.config.pool.size).unwrap_or(usize::MAX);
        if tidy(&keeper.place, &shape) >= wanted {
            return Ok(None);
        }
        for path in [dir.join("share"), dir.join("vm")] {
            fs::create_dir_all(&path).map_err(Error::host("create", path))?;
        }
        let path = dir.join(SHAPE);
        fs::write(&path, shape).map_err(Error::host("write", path))?;
        Ok(Some(keeper))
    }

    fn dir(&self) -> PathBuf {
        self.place.machines().join(&self.name)
    }

    fn run(self, starter: &Channel) -> Result<u8, Error> {
        let dir = self.dir();
        process::log_to(&dir.join("keeper.log"))?;
        linux::namespace::unshare_network()
            .map_err(Error::host("create", "a network namespace"))?;
        process::own_mounts()?;
        let share = dir.join("share");
        linux::mount::share(&share).map_err(Error::host("share", &share))?;
        boot::share_modules(&self.config, &share)?;
        let nice = lower_priority();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(Error::host("start", "the event loop"))?;
        let code = LocalSet::new().block_on(&runtime, async {
            let door = dir.join(DOOR);
            let door = UnixListener::bind(&door).map_err(Error::host("listen on", door))?;
            let machine = Box::pin(self.make(&dir)).await?;
            let ready = self.place.ready().join(&self.name);
            fs::write(&ready, "").map_err(Error::host("write", ready))?;
            // Nobody may be listening any more.
            drop(starter.socket().write_all(READY.as_bytes()));
            drop(starter.socket().shutdown(Shutdown::Both));
            info!("ready");
            let Some((machine, channel)) = wait(machine, &door).await? else { return Ok(0) };
            drop(door);
            if nice {
                raise_priority(&machine.vm.processes());
            }
            Box::pin(self.become_sandbox(machine, channel)).await
        });
        runtime.shutdown_background();
        code
    }

    /// A machine with an agent that knows its work, its vCPUs stopped.
    async fn make(&self, dir: &Path) -> Result<Machine, Error> {
        let path = dir.join("ledger");
        let mut ledger = Ledger::open(&path).map_err(Error::host("open", &path))?;
        let (driver, config) = (self.driver.as_ref(), &self.config);
        let place = dir.join("vm");
        let mut machine =
            Machine::start(driver, &self.spec, config, &place, &mut ledger, "").await?;
        let rehearsed =
            rehearsal::rehearse(&machine.agent, &machine.vm.vsock(), &dir.join("share")).await;
        if let Err(error) = rehearsed {
            warn!(error = %Chain(&error), "the machine is not as fast as it could be");
        }
        // The agent starts its next `container-init` a moment after the last was employed, and tells nobody.
        tokio::time::sleep(SETTLED).await;
        machine.vm.pause().await?;
        Ok(machine)
    }

    /// Goes on as any sandbox process does.
    async fn become_sandbox(
        &self,
        mut machine: Machine,
        mut channel: Channel,
    ) -> Result<u8, Error> {
        let dir = self.dir();
        fs::write(dir.join(TAKEN), "").map_err(Error::host("write", dir.join(TAKEN)))?;
        // Where there is none, who has claimed us has ended.
        let Ok(launch) = channel.hear::<Launch>() else {
            drop(fs::remove_file(self.place.claimed().join(&self.name)));
            return Ok(1);
        };
        let prepared = self.move_in(launch, &machine);
        if let Err(error) = &prepared {
            let report = Report::Failed { text: Chain(error).to_string(), kind: error.kind() };
            // Nobody else is there to be told.
            drop(channel.tell(&report));
        }
        machine.origin = Origin::Pool;
        Ok(prepared?.run(channel, Some(machine)).await)
    }

    /// Takes what a sandbox process takes, and puts the machine where it is looked for.
    fn move_in(&self, launch: Launch, machine: &Machine) -> Result<Prepared, Error> {
        process::log_to(&launch.vm.log())?;
        let mut prepared = Prepared::new(launch)?;
        let (dir, claim) = (self.dir(), self.place.claimed().join(&self.name));
        let (share, state) = (dir.join("share"), dir.join("vm"));
        prepared.own([claim, dir], &machine.vm.processes())?;
        let vm = &prepared.launch.vm;
        share_as(&share, &vm.share())?;
        std::os::unix::fs::symlink(state, vm.machine())
            .map_err(Error::host("create", vm.machine()))?;
        Ok(prepared)
    }
}

/// Waits for who claims the machine; nothing where it ends before.
async fn wait(
    mut machine: Machine,
    door: &UnixListener,
) -> Result<Option<(Machine, Channel)>, Error> {
    let mut ended = machine.vm.ended();
    let accepted = tokio::select! {
        accepted = door.accept() => accepted,
        _ = ended.wait_for(Option::is_some) => {
            warn!("the machine ended unclaimed");
            return Ok(None);
        }
    };
    machine.vm.resume().await?;
    let socket = accepted.and_then(|(stream, _)| stream.into_std()).and_then(|socket| {
        socket.set_nonblocking(false)?;
        Ok(socket)
    });
    let socket = socket.map_err(Error::host("listen on", DOOR))?;
    let mut channel = Channel::inherited(socket.into());
    // An error is its end, which is noticed next.
    drop(channel.tell(&Report::Claimed));
    Ok(Some((machine, channel)))
}

/// Puts the directory that the guest sees where the sandbox's is looked for: one mount, in two places.
fn share_as(from: &Path, to: &Path) -> Result<(), Error> {
    fs::create_dir_all(to).map_err(Error::host("create", to))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let target = rustix::fs::open(to, flags, Mode::empty()).map_err(io::Error::from);
    target
        .and_then(|target| Tree::open(from, true)?.attach(target))
        .map_err(Error::host("attach the machine's share to", to))
}

/// Answers whether it was lowered: only by who can raise it again.
fn lower_priority() -> bool {
    let can = rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::SYS_NICE));
    can && rustix::process::setpriority_process(None, NICE).is_ok()
}

/// Gives this process and the machine's, with all of their threads, the usual priority.
fn raise_priority(machine: &VmProcesses) {
    let pids = [std::process::id(), machine.hypervisor].into_iter();
    for pid in pids.chain(machine.devices.iter().copied()) {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let numbers = tasks.filter_map(|task| task.file_name().to_str()?.parse().ok());
        for thread in numbers.filter_map(rustix::process::Pid::from_raw) {
            if let Err(error) = rustix::process::setpriority_process(Some(thread), 0) {
                debug!(%error, "a thread has just ended");
            }
        }
    }
}
