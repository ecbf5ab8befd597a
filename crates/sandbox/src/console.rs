//! Giving a child process the container's standard streams.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Stdio as ChildStdio;

use linux::process::Command;
use linux::pty::{self, Pty, WindowSize};
use protocol::oci::Process;

use crate::error::Error;

/// Where a process with a terminal finds it.
#[derive(Debug, Clone)]
pub enum Console {
    /// The caller's own standard streams: files and pipes, or the caller's terminal, which it has put in raw mode.
    Caller,
    /// A new terminal, whose master goes to this Unix socket.
    Socket(PathBuf),
}

/// Gives a child its standard streams: the caller's, or a new terminal's.
pub(crate) fn attach(
    command: &mut Command,
    wants_terminal: bool,
    console: &Console,
    process: &Process,
) -> Result<(), Error> {
    let inherit = ChildStdio::inherit;
    match (wants_terminal, console) {
        (false, Console::Socket(_)) => Err(Error::invalid(
            "cannot use console socket if the process has no terminal (process.terminal is false)",
        )),
        (_, Console::Caller) => {
            command.stdio(inherit(), inherit(), inherit());
            Ok(())
        }
        (true, Console::Socket(socket)) => {
            let pty = Pty::open().map_err(Error::host("open", "/dev/ptmx"))?;
            // The guest's terminal does what a terminal does; this one only carries bytes.
            pty::set_raw(&pty.slave).map_err(Error::host("set up", "the terminal"))?;
            if let Some(size) = process.console_size() {
                let cut = |number: u64| u16::try_from(number).unwrap_or_default();
                let size = WindowSize { rows: cut(size.height()), columns: cut(size.width()) };
                pty::set_window_size(&pty.slave, size)
                    .map_err(Error::host("set up", "the terminal"))?;
            }
            let copy = || -> Result<ChildStdio, Error> {
                let fd = pty.slave.as_fd().try_clone_to_owned();
                fd.map(ChildStdio::from).map_err(Error::host("keep", "the terminal"))
            };
            command.stdio(copy()?, copy()?, copy()?);
            pty::send_to_console_socket(socket, &pty)
                .map_err(Error::host("send the terminal to console socket", socket))
        }
    }
}
