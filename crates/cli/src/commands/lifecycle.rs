//! `create`, `kill`, `delete`.

use std::io::IsTerminal as _;
use std::path::Path;

use anyhow::{Context as _, bail};
use sandbox::{Bundle, Config, Console, ContainerId, Created, Root};

use super::Context;
use crate::args;

/// One line where a container will run without hardware virtualisation.
pub(super) fn warn_of_emulation(config: &Config) {
    if config.hypervisor.qemu.acceleration == sandbox::AccelerationConfig::Auto
        && let Some(obstacle) = hypervisor::detect().obstacle
    {
        tracing::warn!("running without KVM, by emulation: {obstacle}");
    }
}

/// Creates a container as the flags say; its init's stand-in on the host is the answer.
pub(super) fn create_container(
    context: &Context<'_>,
    root: &Root,
    id: &ContainerId,
    bundle: &Bundle,
    args: &args::Create,
    console: Console,
    foreground: bool,
) -> anyhow::Result<Created> {
    if args.preserve_fds > 0 {
        bail!(
            "--preserve-fds {}: file descriptors of the host cannot be passed into a VM",
            args.preserve_fds
        );
    }
    let config = context.config()?;
    // Without a log and a terminal our stderr is the container's, which podman keeps as its log.
    if context.global.log.is_some() || std::io::stderr().is_terminal() {
        warn_of_emulation(&config);
    }
    let request = sandbox::Create {
        root,
        id,
        bundle,
        config,
        systemd_cgroup: context.global.systemd_cgroup,
        console,
        foreground,
        program: &Context::program(),
    };
    let mut created = sandbox::create(&request)?;
    // Last, and whole: whoever sees the file may act on it.
    if let Err(error) = write_pid_file(args.pid_file.as_deref(), created.process.pid()) {
        drop(sandbox::delete(root, id, true));
        drop(created.process.wait());
        return Err(error);
    }
    Ok(created)
}

pub(super) fn write_pid_file(path: Option<&Path>, pid: u32) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    linux::file::replace(path, pid.to_string().as_bytes())
        .with_context(|| format!("cannot write pid file {}", path.display()))
}

pub(super) fn create(context: &Context<'_>, args: &args::Create) -> anyhow::Result<()> {
    let root = context.root()?;
    let id = ContainerId::new(&args.id)?;
    let console = match &args.console_socket {
        Some(socket) => Console::Socket(socket.clone()),
        None => Console::Caller,
    };
    let bundle = Bundle::load(&args.bundle)?;
    if args.console_socket.is_none() && bundle.process()?.terminal().unwrap_or_default() {
        // runc's words.
        bail!("cannot allocate tty if runc will detach without setting console socket");
    }
    create_container(context, &root, &id, &bundle, args, console, false).map(drop)
}

pub(super) fn kill(context: &Context<'_>, args: &args::Kill) -> anyhow::Result<()> {
    let Some(signal) = linux::signal::parse(&args.signal) else {
        // runc's words.
        bail!("unknown signal {:?}", args.signal);
    };
    Ok(sandbox::kill(&context.root()?, &ContainerId::new(&args.id)?, signal, args.all)?)
}

pub(super) fn delete(context: &Context<'_>, args: &args::Delete) -> anyhow::Result<()> {
    let root = context.root()?;
    for id in &args.ids {
        sandbox::delete(&root, &ContainerId::new(id)?, args.force)?;
    }
    Ok(())
}
