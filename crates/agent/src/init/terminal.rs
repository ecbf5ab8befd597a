//! A terminal for the process: a pair of the container's own devpts.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::mount::MsFlags;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use super::failure::{During, Failure};
use super::mounts;
use super::paths::{self, Make};
use super::request::Report;
use super::rootfs::Root;
use crate::launch::report;

/// Makes a terminal with this many rows and columns the controlling one and the standard streams, and sends its
/// master to PID 1. With a root that is not yet entered, the terminal also is that root's console.
pub(super) fn open(
    control: &OwnedFd,
    (rows, columns): (u16, u16),
    root: Option<&Root>,
) -> Result<(), Failure> {
    let action = || "open a terminal: /dev/pts/ptmx".to_owned();
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = match root {
        Some(root) => {
            let within = ResolveFlags::IN_ROOT;
            rustix::fs::openat2(&root.fd, "dev/pts/ptmx", flags, Mode::empty(), within)
        }
        None => rustix::fs::open("/dev/pts/ptmx", flags, Mode::empty()),
    };
    let master = master.during(action)?;
    rustix::pty::unlockpt(&master).during(action)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(
        &master,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )
    .during(action)?;
    if (rows, columns) != (0, 0) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&slave, size).during(action)?;
    }
    if let Some(root) = root {
        let console = paths::ensure(root.fd.as_fd(), Path::new("/dev/console"), Make::File)
            .during(|| "create /dev/console".to_owned())?;
        let source = paths::of(slave.as_fd());
        mounts::call(Some(&source), &console, None, MsFlags::MS_BIND, None)?;
    }
    report(control, &Report::Terminal, Some(master.as_fd())).during(action)?;
    rustix::process::ioctl_tiocsctty(&slave).during(action)?;
    rustix::stdio::dup2_stdin(&slave).during(action)?;
    rustix::stdio::dup2_stdout(&slave).during(action)?;
    rustix::stdio::dup2_stderr(&slave).during(action)
}
