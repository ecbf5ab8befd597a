//! Tap interfaces: the kernel's `Documentation/networking/tuntap.rst`.

#![expect(unsafe_code, reason = "TUNSETIFF has no wrapper")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

/// Makes a tap named `name` in the calling thread's network namespace and answers one queue of it.
///
/// Frames on the fd have a `virtio_net_hdr` of 12 bytes before them and no `tun_pi`, as a virtio-net back end wants
/// them. The tap goes when the last fd of it is closed.
///
/// # Errors
///
/// When `/dev/net/tun` is missing, the name is not one of 1 to 15 bytes, or it is taken (EBUSY).
pub fn create(name: &str, multi_queue: bool) -> io::Result<File> {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    let queues = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queues;
    let mut request = Request { name: [0; 16], flags: 0, rest: [0; 22] };
    if name.is_empty() || name.len() > 15 || name.bytes().any(|byte| byte == 0 || byte == b'/') {
        let text = format!("`{}` cannot be the name of a network link", name.escape_debug());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // The flags are 16 bits wide in `struct ifreq`.
    request.flags = u16::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: `request` is laid out as `struct ifreq` (40 bytes on 64-bit), which TUNSETIFF reads and writes.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let header: libc::c_int = 12;
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) };
    if result == 0 { Ok(tun) } else { Err(io::Error::last_os_error()) }
}

/// `struct ifreq` with its union's `ifr_flags`.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// Lets frames with unfinished checksums, and TCP segments of up to 64 KiB, come and go by a tap's fd, told of in the
/// `virtio_net_hdr`. Hypervisors do it when their guest says that it can; others must know to handle them.
///
/// # Errors
///
/// What TUNSETOFFLOAD says.
pub fn accept_offloads(tap: &File) -> io::Result<()> {
    let offloads = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    let result =
        unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
