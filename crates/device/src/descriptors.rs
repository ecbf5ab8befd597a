//! The file descriptors that a device process inherits: those of its configuration, and no others.

#![expect(
    unsafe_code,
    reason = "a number from the command line is a descriptor only because we say so"
)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use rustix::net::SocketType;
use rustix::net::sockopt::{socket_acceptconn, socket_type};

use crate::{Config, Error};

/// What a [`Config`] names, owned.
pub(crate) struct Descriptors {
    pub(crate) lifeline: OwnedFd,
    pub(crate) vsock_listener: OwnedFd,
    pub(crate) streams_listener: OwnedFd,
    pub(crate) host_streams: OwnedFd,
    pub(crate) fs_listener: Option<OwnedFd>,
}

impl Descriptors {
    /// Takes the descriptors of `config` and closes all others but the standard streams.
    ///
    /// The process must own no other descriptor: this is the first thing it does.
    pub(crate) fn inherit(config: &Config) -> Result<Self, Error> {
        let fs = config.fs.as_ref().map(|fs| fs.listener);
        let mut numbers = vec![
            ("lifeline", config.lifeline),
            ("vsock_listener", config.vsock_listener),
            ("streams_listener", config.streams_listener),
            ("host_streams", config.host_streams),
        ];
        numbers.extend(fs.map(|fd| ("fs.listener", fd)));
        numbers.sort_by_key(|&(_, fd)| fd);
        let mut next = STANDARD;
        for &(name, fd) in &numbers {
            let expected = "an open descriptor that nothing else names";
            let first = u32::try_from(fd).ok().filter(|&fd| fd >= next);
            let first = first.ok_or(Error::Descriptor { fd, name, expected })?;
            close(next, first)?;
            next = first + 1;
        }
        close(next, END)?;
        Ok(Self {
            lifeline: own("lifeline", config.lifeline)?,
            vsock_listener: listener("vsock_listener", config.vsock_listener)?,
            streams_listener: listener("streams_listener", config.streams_listener)?,
            host_streams: sequenced("host_streams", config.host_streams)?,
            fs_listener: fs.map(|fd| listener("fs.listener", fd)).transpose()?,
        })
    }
}

/// The first number that is not a standard stream.
const STANDARD: u32 = 3;
const END: u32 = u32::MAX;

/// Closes the descriptors from `first` up to, but not with, `end`.
fn close(first: u32, end: u32) -> Result<(), Error> {
    if first >= end {
        return Ok(());
    }
    // SAFETY: `inherit` is called before this process owns any descriptor, so nobody's is closed.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, end - 1, 0) };
    if result == 0 {
        return Ok(());
    }
    let source = io::Error::last_os_error();
    Err(Error::Jail { action: "close inherited descriptors", source })
}

fn own(name: &'static str, fd: RawFd) -> Result<OwnedFd, Error> {
    // SAFETY: F_GETFD takes any number, and reads only.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if flags < 0 {
        return Err(Error::Descriptor { fd, name, expected: "open" });
    }
    // SAFETY: the descriptor is open, no standard stream, and no two fields have the same: `inherit` has compared them.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok(owned)
}

fn listener(name: &'static str, fd: RawFd) -> Result<OwnedFd, Error> {
    let owned = own(name, fd)?;
    let listens = socket_acceptconn(&owned).unwrap_or(false)
        && socket_type(&owned).is_ok_and(|kind| kind == SocketType::STREAM);
    let expected = "a listening Unix stream socket";
    if listens { Ok(owned) } else { Err(Error::Descriptor { fd, name, expected }) }
}

fn sequenced(name: &'static str, fd: RawFd) -> Result<OwnedFd, Error> {
    let owned = own(name, fd)?;
    let right = socket_type(&owned).is_ok_and(|kind| kind == SocketType::SEQPACKET);
    let expected = "a SOCK_SEQPACKET socket";
    if right { Ok(owned) } else { Err(Error::Descriptor { fd, name, expected }) }
}
