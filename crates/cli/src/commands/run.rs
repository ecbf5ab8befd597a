//! `run`: create, start, wait, delete.

use std::io;
use std::os::fd::AsFd;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use linux::pty;
use sandbox::{Bundle, Console, ContainerId};

use super::{Context, lifecycle};
use crate::args;

pub(super) fn run(context: &Context<'_>, args: &args::Run) -> anyhow::Result<ExitCode> {
    let root = context.root()?;
    let id = ContainerId::new(&args.create.id)?;
    let bundle = Bundle::load(&args.create.bundle)?;
    let wants_terminal = bundle.process()?.terminal().unwrap_or_default();
    let console = match (&args.create.console_socket, args.detach) {
        (Some(socket), true) => Console::Socket(socket.clone()),
        // runc's words, both.
        (Some(_), false) => {
            bail!("cannot use console socket if runc will not detach or allocate tty")
        }
        (None, true) if wants_terminal => {
            bail!("cannot allocate tty if runc will detach without setting console socket")
        }
        (None, _) => Console::Caller,
    };
    let raw = RawTerminal::new(wants_terminal && !args.detach)?;
    let mut created = lifecycle::create_container(
        context,
        &root,
        &id,
        &bundle,
        &args.create,
        console,
        !args.detach,
    )?;
    if let Err(error) = sandbox::start(&root, &id) {
        // The first error is the one to tell.
        drop(sandbox::delete(&root, &id, true));
        return Err(error.into());
    }
    if args.detach {
        return Ok(ExitCode::SUCCESS);
    }
    let code = sandbox::attend(&mut created.process)?;
    drop(raw);
    if !args.keep {
        sandbox::delete(&root, &id, true)?;
    }
    Ok(ExitCode::from(code))
}

/// The caller's terminal in raw mode, until it is dropped: what is typed is the guest's terminal's to understand.
pub(super) struct RawTerminal(Option<rustix::termios::Termios>);

impl RawTerminal {
    /// Puts the terminal in raw mode where `wanted`.
    pub(super) fn new(wanted: bool) -> anyhow::Result<Self> {
        if !wanted {
            return Ok(Self(None));
        }
        let before = pty::set_raw(io::stdin().as_fd())
            .context("the process wants a terminal (process.terminal) and stdin is none")?;
        Ok(Self(Some(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // A terminal that has gone needs no restoring.
            drop(pty::restore(io::stdin().as_fd(), before));
        }
    }
}
