//! The few system calls that have no safe form elsewhere.

#![expect(unsafe_code, reason = "calls that neither rustix, nix nor the linux crate has")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use tokio::io::unix::AsyncFd;

/// Which side of a [`fork`] the caller is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fork {
    /// The new process.
    Child,
    /// The one that called, and the child's pid as it sees it.
    Parent(u32),
}

/// Takes ownership of a fd that the process was started with.
///
/// # Errors
///
/// When it is not open.
pub(crate) fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD only looks the number up.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and by the contract of our command line the parent opened it for us alone.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC)?;
    Ok(fd)
}

/// Forks by clone(2) with `flags` (`CLONE_NEW*`, `CLONE_PARENT`), on a copy of the stack.
///
/// # Errors
///
/// What clone(2) says.
pub(crate) fn fork(flags: i32) -> io::Result<Fork> {
    let flags = i64::from(flags) | i64::from(libc::SIGCHLD);
    // SAFETY: without CLONE_VM this is a fork: the child has its own copy of everything. Only `container-init`
    // calls it, which has one thread, so no lock can be held by a thread that the child lacks.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match pid {
        0 => Ok(Fork::Child),
        _ => u32::try_from(pid).map(Fork::Parent).map_err(|_| io::Error::last_os_error()),
    }
}

/// Sends a signal of any number, the real-time ones included, to a process.
///
/// # Errors
///
/// What kill(2) says.
pub(crate) fn kill(pid: u32, signal: u32) -> io::Result<()> {
    let pid = i32::try_from(pid).ok().filter(|&pid| pid > 0);
    let (Some(pid), Ok(signal)) = (pid, i32::try_from(signal)) else {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    };
    // SAFETY: kill(2) touches no memory of ours.
    let result = unsafe { libc::kill(pid, signal) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Lets the runtime say when `fd` can be read or written.
///
/// # Errors
///
/// What epoll_ctl(2) says.
pub(crate) fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open, and the same, for as long as it lives.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// Marks every fd from 3 on as close-on-exec.
///
/// # Errors
///
/// What close_range(2) says.
pub(crate) fn close_on_exec() -> io::Result<()> {
    // SAFETY: the flag closes nothing; it only marks.
    let result =
        unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[repr(C)]
struct Entropy<const N: usize> {
    bits: libc::c_int,
    size: libc::c_int,
    bytes: [u8; N],
}

const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Credits `bytes` to the kernel's random number generator, see random(4).
///
/// # Errors
///
/// What the ioctl says.
pub(crate) fn add_entropy(urandom: &File, bytes: &[u8]) -> io::Result<()> {
    const AT_ONCE: usize = 64;
    for chunk in bytes.chunks(AT_ONCE) {
        let size = i32::try_from(chunk.len()).expect("a chunk is small");
        let mut entropy = Entropy::<AT_ONCE> { bits: size * 8, size, bytes: [0; AT_ONCE] };
        entropy.bytes[..chunk.len()].copy_from_slice(chunk);
        // SAFETY: the structure is the rand_pool_info of random(4), and `size` is within its array.
        let result = unsafe { libc::ioctl(urandom.as_raw_fd(), RNDADDENTROPY, &raw const entropy) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Makes the kernel's random number generator take a new seed from its pool at once, see random(4).
///
/// # Errors
///
/// What the ioctl says.
pub(crate) fn reseed(urandom: &File) -> io::Result<()> {
    // SAFETY: this ioctl takes no argument.
    let result = unsafe { libc::ioctl(urandom.as_raw_fd(), RNDRESEEDCRNG) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[repr(C)]
#[derive(Default)]
struct ProgramLoad {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    place: u32,
}

#[repr(C)]
struct ProgramAttach {
    target: u32,
    program: u32,
    place: u32,
    flags: u32,
    replaced: u32,
}

const BPF_PROG_LOAD: u32 = 5;
const BPF_PROG_ATTACH: u32 = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// Loads a device filter of eBPF `instructions` and attaches it to a cgroup, see bpf(2).
///
/// # Errors
///
/// What bpf(2) says.
pub(crate) fn attach_device_filter(cgroup: BorrowedFd<'_>, instructions: &[u64]) -> io::Result<()> {
    attach_program(cgroup, BPF_PROG_TYPE_CGROUP_DEVICE, BPF_CGROUP_DEVICE, instructions)
}

/// Loads a program of eBPF `instructions` that changes the addresses of sockets, and attaches it to a cgroup at `place`, a
/// `BPF_CGROUP_…` of bpf(2).
///
/// # Errors
///
/// What bpf(2) says.
pub(crate) fn attach_address_program(
    cgroup: BorrowedFd<'_>,
    place: u32,
    instructions: &[u64],
) -> io::Result<()> {
    attach_program(cgroup, BPF_PROG_TYPE_CGROUP_SOCK_ADDR, place, instructions)
}

fn attach_program(
    cgroup: BorrowedFd<'_>,
    kind: u32,
    place: u32,
    instructions: &[u64],
) -> io::Result<()> {
    let license = c"Apache-2.0";
    let load = ProgramLoad {
        kind,
        place,
        instruction_count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: instructions.as_ptr().expose_provenance() as u64,
        license: license.as_ptr().expose_provenance() as u64,
        ..ProgramLoad::default()
    };
    // SAFETY: the structure is the head of bpf_attr for this command; its pointers outlive the call.
    let program = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const load, size_of::<ProgramLoad>())
    };
    let number = RawFd::try_from(program).map_err(io::Error::other)?;
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above made this fd for us.
    let program = unsafe { OwnedFd::from_raw_fd(number) };
    let raw = |fd: RawFd| u32::try_from(fd).expect("an open fd is not negative");
    let attach = ProgramAttach {
        target: raw(cgroup.as_raw_fd()),
        program: raw(program.as_raw_fd()),
        place,
        flags: BPF_F_ALLOW_MULTI,
        replaced: 0,
    };
    // SAFETY: the structure is the head of bpf_attr for this command and names open fds.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of::<ProgramAttach>())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
