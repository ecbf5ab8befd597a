//! Pseudo-terminals, pty(7), and file descriptors sent over Unix sockets, unix(7).

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::termios::{
    OptionalActions, Termios, Winsize, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize,
};

/// Both ends of a new pseudo-terminal.
#[derive(Debug)]
pub struct Pty {
    /// The end of whoever shows the terminal to a person.
    pub master: File,
    /// The end of the program that runs in it.
    pub slave: File,
    /// The name of the slave: `/dev/pts/3`.
    pub name: PathBuf,
}

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WindowSize {
    /// Its height.
    pub rows: u16,
    /// Its width.
    pub columns: u16,
}

impl Pty {
    /// Opens one from `/dev/ptmx`. It does not become anybody's controlling terminal.
    ///
    /// # Errors
    ///
    /// When devpts is not mounted or has none left.
    pub fn open() -> io::Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = ioctl_tiocgptpeer(&master, flags)?;
        let name = PathBuf::from(std::ffi::OsStr::from_bytes(name.as_bytes()));
        Ok(Self { master: master.into(), slave: slave.into(), name })
    }
}

/// Makes the terminal pass bytes as they are, both ways, and answers how it was, for [`restore`].
///
/// # Errors
///
/// ENOTTY where `terminal` is none.
pub fn set_raw(terminal: impl AsFd) -> io::Result<Termios> {
    let before = tcgetattr(&terminal)?;
    let mut raw = before.clone();
    raw.make_raw();
    tcsetattr(&terminal, OptionalActions::Now, &raw)?;
    Ok(before)
}

/// Makes the terminal as it was.
///
/// # Errors
///
/// ENOTTY where `terminal` is none.
pub fn restore(terminal: impl AsFd, before: &Termios) -> io::Result<()> {
    Ok(tcsetattr(terminal, OptionalActions::Now, before)?)
}

/// The terminal's size.
///
/// # Errors
///
/// ENOTTY where `terminal` is none.
pub fn window_size(terminal: impl AsFd) -> io::Result<WindowSize> {
    let size = tcgetwinsize(terminal)?;
    Ok(WindowSize { rows: size.ws_row, columns: size.ws_col })
}

/// Sets the terminal's size; its foreground processes get SIGWINCH.
///
/// # Errors
///
/// ENOTTY where `terminal` is none.
pub fn set_window_size(terminal: impl AsFd, size: WindowSize) -> io::Result<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(tcsetwinsize(terminal, size)?)
}

/// Makes `terminal` the controlling terminal of the calling process, which must lead a session that has none. For a
/// child to be made see [`Command::controlling_terminal`](crate::process::Command::controlling_terminal).
///
/// # Errors
///
/// EPERM where the process leads no session, or the terminal is another session's.
pub fn make_controlling(terminal: impl AsFd) -> io::Result<()> {
    Ok(rustix::process::ioctl_tiocsctty(terminal)?)
}

/// Sends the master of a terminal to the console socket at `path`, as the OCI runtimes' callers expect it: one message,
/// one descriptor, the terminal's name as the bytes (runc's `docs/terminals.md`).
///
/// # Errors
///
/// When nobody listens there.
pub fn send_to_console_socket(path: &Path, pty: &Pty) -> io::Result<()> {
    let socket = UnixStream::connect(path)?;
    send_fds(&socket, pty.name.as_os_str().as_bytes(), &[&pty.master])
}

/// Sends bytes, at least one, with descriptors beside them.
///
/// # Errors
///
/// What sendmsg(2) says, and when not all bytes went at once.
pub fn send_fds<F: AsFd>(socket: impl AsFd, bytes: &[u8], fds: &[F]) -> io::Result<()> {
    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many file descriptors"));
    }
    let sent = sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// The most descriptors that [`send_fds`] sends and [`receive_fds`] takes in one message.
pub const MOST_FDS: usize = 16;

/// Receives one message of at most `limit` bytes, and the descriptors beside it, close-on-exec. No bytes: the peer has
/// closed the socket.
///
/// # Errors
///
/// What recvmsg(2) says, and when there were more than [`MOST_FDS`] descriptors.
pub fn receive_fds(socket: impl AsFd, limit: usize) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; limit];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let fds = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if message.flags.contains(rustix::net::ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "too many file descriptors"));
    }
    bytes.truncate(message.bytes);
    Ok((bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::{Pty, WindowSize, receive_fds, send_to_console_socket, set_raw, set_window_size};
    use crate::process::Command;
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_raw_terminal_passes_bytes_as_they_are() {
        let mut pty = Pty::open().unwrap();
        set_raw(&pty.slave).unwrap();
        pty.slave.write_all(b"a\n\x03").unwrap();
        let mut bytes = [0; 3];
        pty.master.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"a\n\x03");
    }

    #[test]
    fn the_console_socket_gets_one_descriptor_that_is_the_master() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let mut pty = Pty::open().unwrap();
        send_to_console_socket(&path, &pty).unwrap();
        let (socket, _) = listener.accept().unwrap();
        let (name, mut fds) = receive_fds(&socket, 4096).unwrap();
        assert_eq!(name, pty.name.as_os_str().as_encoded_bytes());
        assert_eq!(fds.len(), 1);
        set_raw(&pty.slave).unwrap();
        pty.slave.write_all(b"x").unwrap();
        let mut byte = [0];
        File::from(fds.remove(0)).read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }

    #[test]
    fn a_child_can_have_it_as_its_controlling_terminal_with_its_size() {
        let mut pty = Pty::open().unwrap();
        set_window_size(&pty.master, WindowSize { rows: 33, columns: 101 }).unwrap();
        let mut command = Command::new("/bin/sh");
        let end = || pty.slave.try_clone().unwrap().into();
        command
            .args(["-c", "stty size </dev/tty"])
            .stdio(end(), end(), end())
            .controlling_terminal();
        let mut child = command.spawn().unwrap();
        let mut text = [0; 8];
        pty.master.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"33 101\r\n");
        assert!(child.wait().unwrap().success());
    }
}
