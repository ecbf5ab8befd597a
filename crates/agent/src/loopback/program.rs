//! eBPF programs of the kind `BPF_PROG_TYPE_CGROUP_SOCK_ADDR`, which change where sockets of the containers go.
//!
//! The kernel runs them on connect(2), and on sending and receiving UDP; they see and change the address as the caller
//! gave it, see `struct bpf_sock_addr` of bpf(2). Only sockets of the guest's own network namespace are meant: what a
//! container does in namespaces that it made is its own.

use std::io;
use std::net::SocketAddrV4;
use std::os::fd::AsFd;

use rustix::fs::{Mode, OFlags};

use crate::devices::{EXIT, instruction, move_value};
use crate::{cgroup, sys};

const BPF_CGROUP_INET4_CONNECT: u32 = 10;
const BPF_CGROUP_UDP4_SENDMSG: u32 = 14;
const BPF_CGROUP_UDP4_RECVMSG: u32 = 19;

/// Of `struct bpf_sock_addr`.
const USER_IP4: i16 = 4;
const USER_PORT: i16 = 24;

/// Has what the containers send to `server` go to `port` at the same address, and come from `server` when it comes back.
///
/// # Errors
///
/// What bpf(2) says.
pub(super) fn redirect(server: SocketAddrV4, port: u16) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let cgroup = rustix::fs::open(cgroup::parent(), flags, Mode::empty())?;
    let (there, back) =
        (program(server, port), program(SocketAddrV4::new(*server.ip(), port), server.port()));
    for (place, program) in [
        (BPF_CGROUP_INET4_CONNECT, &there),
        (BPF_CGROUP_UDP4_SENDMSG, &there),
        (BPF_CGROUP_UDP4_RECVMSG, &back),
    ] {
        sys::attach_address_program(cgroup.as_fd(), place, program)?;
    }
    Ok(())
}

/// Changes the port of `from` to `to`, and lets all pass.
fn program(from: SocketAddrV4, to: u16) -> Vec<u64> {
    const GET_NETNS_COOKIE: u32 = 122;
    // Both are in network byte order there, the port in the lower half of its word.
    let ip = u32::from_ne_bytes(from.ip().octets());
    let port = |port: u16| u32::from(port.to_be());
    let act = [
        load(2, USER_IP4),
        differs(2, ip, 4),
        load(2, USER_PORT),
        differs(2, port(from.port()), 2),
        move_value(2, port(to)),
        store(2, USER_PORT),
    ];
    let over = i16::try_from(act.len()).unwrap_or(i16::MAX);
    let mut program = vec![
        copy(CONTEXT, 1),
        call(GET_NETNS_COOKIE),
        copy(7, 0),
        // Of nothing it is that of the first namespace, the guest's own.
        zero(1),
        call(GET_NETNS_COOKIE),
        instruction(0x5d, 0, 7, over, 0),
    ];
    program.extend(act);
    program.extend([move_value(0, 1), EXIT]);
    program
}

/// The register that keeps the context over calls.
const CONTEXT: u8 = 6;

/// `target = *(u32 *)(context + offset)`.
fn load(target: u8, offset: i16) -> u64 {
    instruction(0x61, target, CONTEXT, offset, 0)
}

/// `*(u32 *)(context + offset) = source`.
fn store(source: u8, offset: i16) -> u64 {
    instruction(0x63, CONTEXT, source, offset, 0)
}

/// Jumps over `over` instructions unless the register, as 32 bits, is `value`.
fn differs(register: u8, value: u32, over: i16) -> u64 {
    instruction(0x56, register, 0, over, value)
}

/// All 64 bits.
fn copy(target: u8, source: u8) -> u64 {
    instruction(0xbf, target, source, 0, 0)
}

fn zero(target: u8) -> u64 {
    instruction(0xb7, target, 0, 0, 0)
}

fn call(function: u32) -> u64 {
    instruction(0x85, 0, 0, 0, function)
}
