//! From the kernel's first process to a serving agent.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use protocol::paths;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::process::{Resource, Rlimit};
use rustix::system::RebootCommand;

use crate::containers::Containers;
use crate::error::{Doing, Error};
use crate::reaper::Reaper;
use crate::stdio::Streams;
use crate::{cgroup, console, loopback, network, rpc, uevent};

/// The modules to load: an absolute path a line, in order.
const MODULES: &str = "/etc/kata/modules";

/// How many files a process may open: as service managers set it on hosts.
const FILES: u64 = 1 << 20;

/// Runs the guest; ends only by powering it off.
pub(crate) fn main(started: Duration) -> ExitCode {
    std::panic::set_hook(Box::new(|panic| {
        console::err(&format!("kata-agent: {panic}"));
        power_off();
    }));
    if let Err(error) = prepare() {
        console::err(&format!("kata-agent: cannot bring the guest up: {}", error.chain()));
        power_off();
        return ExitCode::FAILURE;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let served = match runtime {
        Ok(runtime) => runtime.block_on(serve(started)),
        Err(source) => Err(Error::guest("start the asynchronous runtime", source)),
    };
    if let Err(error) = served {
        console::err(&format!("kata-agent: {}", error.chain()));
    }
    power_off();
    ExitCode::FAILURE
}

/// Writes out what is not yet on the disks and powers the guest off. Returns only where that is not possible.
pub(crate) fn power_off() {
    rustix::fs::sync();
    if let Err(error) = rustix::system::reboot(RebootCommand::PowerOff) {
        console::err(&format!("kata-agent: cannot power off: {error}"));
    }
}

async fn serve(started: Duration) -> Result<(), Error> {
    network::bring_up_loopback().await?;
    let reaper = Arc::new(Reaper::default());
    let reaping = reaper.start()?;
    let streams = Arc::new(Streams::default());
    let listening = streams.listen()?;
    let bridging = loopback::serve()?;
    let containers = Arc::new(Containers::new(reaper, Arc::clone(&streams)));
    containers.prepare()?;
    let events = uevent::Events::open()?;
    let server = rpc::serve(containers, started).await?;
    tokio::spawn(uevent::follow(events));
    let error = tokio::select! {
        ended = reaping => ("reap processes", ended),
        ended = listening => ("take streams", ended),
        ended = bridging => ("take streams to the loopback", ended),
    };
    drop(server);
    let (action, ended) = error;
    Err(Error::guest(action, ended.unwrap_or_else(io::Error::other)))
}

fn prepare() -> Result<(), Error> {
    rustix::process::umask(Mode::empty());
    move_root()?;
    mount_all()?;
    // Warnings and worse on the console; the rest stays in dmesg.
    write("/proc/sys/kernel/printk", "3 4 1 3")?;
    load_modules(Path::new(MODULES))?;
    settings();
    // A container's process costs the agent a few; and what the spec does not limit, processes inherit.
    let files = Rlimit { current: Some(FILES), maximum: Some(FILES) };
    rustix::process::setrlimit(Resource::Nofile, files)
        .doing(|| "raise the limit of open files".to_owned())?;
    cgroup::prepare()?;
    for directory in [paths::RUN, paths::CONTAINERS, paths::SHARE] {
        fs::create_dir_all(directory).doing(|| format!("make {directory}"))?;
    }
    rustix::process::umask(Mode::from_raw_mode(0o022));
    Ok(())
}

/// Puts a mount of the root over itself. pivot_root(2) refuses to leave the kernel's initial root, which is
/// nobody's child; from here on the root is a child of that one, and containers can pivot.
fn move_root() -> Result<(), Error> {
    const STEP: &str = "/.root";
    let action = || "put a mount over the initial root".to_owned();
    fs::create_dir_all(STEP).doing(action)?;
    rustix::mount::mount_bind("/", STEP).doing(action)?;
    std::env::set_current_dir(STEP).doing(action)?;
    rustix::mount::mount_move(".", "/").doing(action)?;
    rustix::process::chroot(".").doing(action)?;
    std::env::set_current_dir("/").doing(action)?;
    // Mounts made later reach the containers that ask for it (`rslave`).
    let shared = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", shared).doing(action)
}

fn mount_all() -> Result<(), Error> {
    const SAFE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);
    const DEVICES: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);
    let table = [
        ("proc", "/proc", "proc", SAFE, c""),
        ("sysfs", "/sys", "sysfs", SAFE, c""),
        ("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, c"mode=755"),
        ("devpts", "/dev/pts", "devpts", DEVICES, c"gid=5,mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", "tmpfs", MountFlags::NOSUID.union(MountFlags::NODEV), c"mode=1777"),
        ("mqueue", "/dev/mqueue", "mqueue", SAFE, c""),
        ("tmpfs", "/run", "tmpfs", MountFlags::NOSUID.union(MountFlags::NODEV), c"mode=755"),
        ("tmpfs", "/tmp", "tmpfs", MountFlags::NOSUID.union(MountFlags::NODEV), c"mode=1777"),
        ("cgroup2", cgroup::ROOT, "cgroup2", SAFE, c"nsdelegate"),
    ];
    for (source, target, kind, flags, data) in table {
        // On sysfs the directory is there and cannot be made.
        if !Path::new(target).is_dir() {
            fs::create_dir_all(target).doing(|| format!("make {target}"))?;
        }
        match rustix::mount::mount(source, target, kind, flags, data) {
            // The kernel may have mounted devtmpfs itself.
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => return Err(Error::guest(format!("mount {kind} on {target}"), error)),
        }
    }
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        match symlink(target, link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::guest(format!("make the link {link}"), error));
            }
            _ => {}
        }
    }
    Ok(())
}

fn load_modules(list: &Path) -> Result<(), Error> {
    let text = match fs::read_to_string(list) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::guest(format!("read {}", list.display()), error)),
    };
    for path in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .doing(|| format!("open the kernel module {path}"))?;
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => {
                return Err(Error::guest(format!("load the kernel module {path}"), error));
            }
        }
    }
    Ok(())
}

/// Kernel settings that containers expect of a host. A kernel without one of them is as good.
fn settings() {
    for (path, value) in [
        // Clients ask for as many open files as the host's service manager allows, which may be very many.
        ("/proc/sys/fs/nr_open", "1073741816"),
        ("/proc/sys/fs/file-max", "9223372036854775807"),
        ("/proc/sys/fs/inotify/max_user_instances", "1024"),
        ("/proc/sys/fs/inotify/max_user_watches", "1048576"),
        ("/proc/sys/vm/max_map_count", "262144"),
        ("/proc/sys/vm/overcommit_memory", "1"),
        // Ourselves: see `modules`.
        ("/proc/sys/kernel/modprobe", "/init"),
        ("/proc/sys/kernel/pid_max", "4194304"),
        ("/proc/sys/kernel/panic", "1"),
        ("/proc/sys/net/ipv4/ip_forward", "1"),
        ("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"),
    ] {
        drop(fs::write(path, value));
    }
}

fn write(path: &str, value: &str) -> Result<(), Error> {
    fs::write(path, value).doing(|| format!("write {value} to {path}"))
}
