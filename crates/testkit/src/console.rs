//! Terminals: the console socket of `create` and `exec`, and a terminal of our own for clients that want one.

use std::fs::{self, File};
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetwinsize, tcsetwinsize};

use crate::run::{DEADLINE, code};
use crate::wait::readable;

/// A socket for `--console-socket`: the runtime sends the terminal's master through it.
#[derive(Debug)]
pub struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ConsoleSocket {
    /// Listens at `path`.
    ///
    /// # Errors
    ///
    /// What bind(2) says.
    pub fn listen(path: &Path) -> Result<Self> {
        let listener = UnixListener::bind(path)?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the one terminal that is sent.
    ///
    /// # Errors
    ///
    /// When nobody connects in time, or not exactly one fd comes.
    pub fn receive(&self) -> Result<Terminal> {
        ensure!(readable(&self.listener, DEADLINE)?, "nobody connected to the console socket");
        let (stream, _) = self.listener.accept()?;
        ensure!(readable(&stream, DEADLINE)?, "nothing came through the console socket");
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        recvmsg(
            &stream,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        let mut fds: Vec<OwnedFd> = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        ensure!(fds.len() == 1, "{} fds came through the console socket, not one", fds.len());
        Ok(Terminal::of(fds.remove(0).into()))
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.path));
    }
}

/// The master side of a terminal.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    seen: Vec<u8>,
    child: Option<Child>,
}

impl Terminal {
    fn of(master: File) -> Self {
        Self { master, seen: Vec::new(), child: None }
    }

    /// Starts `command` with a new terminal as its controlling terminal and stdio, 24 rows of 80 columns.
    ///
    /// # Errors
    ///
    /// When no terminal can be made or the program not be started.
    pub fn start(command: &[&str], environment: &[(&str, &str)]) -> Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?.into_string()?;
        let slave = File::options().read(true).write(true).open(name)?;
        let mut terminal = Self::of(master.into());
        terminal.resize(24, 80)?;
        // setsid(1) takes its standard input as the controlling terminal.
        let child = Command::new("setsid")
            .args(["--ctty", "--wait"])
            .args(command)
            .envs(environment.iter().copied())
            .stdin(slave.try_clone()?)
            .stdout(slave.try_clone()?)
            .stderr(slave)
            .spawn()
            .context("cannot start setsid")?;
        terminal.child = Some(child);
        Ok(terminal)
    }

    /// Types `text`.
    ///
    /// # Errors
    ///
    /// When the other side is gone.
    pub fn send(&mut self, text: &str) -> Result<()> {
        Ok(self.master.write_all(text.as_bytes())?)
    }

    /// Gives it a new size; the foreground processes get SIGWINCH.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(tcsetwinsize(&self.master, size)?)
    }

    /// Its size: rows, columns.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn size(&self) -> Result<(u16, u16)> {
        let size = tcgetwinsize(&self.master)?;
        Ok((size.ws_row, size.ws_col))
    }

    /// Reads until `text` has come, and answers all that came up to its end. What came is then forgotten.
    ///
    /// # Errors
    ///
    /// When it does not come in time, or the terminal ends without it; the message says what did come.
    pub fn expect(&mut self, text: &str) -> Result<String> {
        let end = Instant::now() + DEADLINE;
        loop {
            let seen = String::from_utf8_lossy(&self.seen).into_owned();
            if let Some(at) = seen.find(text) {
                let taken = seen[..at + text.len()].to_owned();
                self.seen = seen.as_bytes()[at + text.len()..].to_vec();
                return Ok(taken);
            }
            if !self.read(end.saturating_duration_since(Instant::now()))? {
                bail!("waited for {text:?}, saw {seen:?}");
            }
        }
    }

    /// Reads to the end of the terminal and answers what came; then waits for the command, and answers its exit code.
    ///
    /// # Errors
    ///
    /// When it does not end in time.
    pub fn finish(mut self) -> Result<(String, i32)> {
        while self.read(DEADLINE)? {}
        let seen = String::from_utf8_lossy(&self.seen).into_owned();
        let Some(mut child) = self.child.take() else { return Ok((seen, 0)) };
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        if !readable(&pidfd, DEADLINE)? {
            child.kill()?;
            child.wait()?;
            bail!("the command on the terminal did not end; it wrote {seen:?}");
        }
        Ok((seen, code(child.wait()?)))
    }

    /// Reads what there is; `false` at the end or the deadline.
    fn read(&mut self, deadline: Duration) -> Result<bool> {
        if !readable(&self.master, deadline)? {
            return Ok(false);
        }
        let mut bytes = [0; 4096];
        match self.master.read(&mut bytes) {
            Ok(0) => Ok(false),
            Ok(count) => {
                self.seen.extend_from_slice(&bytes[..count]);
                Ok(true)
            }
            // EIO: the last slave was closed.
            Err(error) if error.raw_os_error() == Some(5) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Terminal;

    #[test]
    fn a_shell_on_a_terminal_sees_size_input_and_resize() {
        let mut terminal = Terminal::start(&["sh"], &[("PS1", "")]).unwrap();
        terminal.send("stty size; test -t 0 && echo ter''minal\n").unwrap();
        terminal.expect("24 80").unwrap();
        terminal.expect("\nterminal").unwrap();
        terminal.resize(30, 99).unwrap();
        terminal.send("stty size; exit 7\n").unwrap();
        let (seen, code) = terminal.finish().unwrap();
        assert!(seen.contains("30 99"), "{seen}");
        assert_eq!(code, 7);
    }
}
