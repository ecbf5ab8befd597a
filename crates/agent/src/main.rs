//! `kata-agent`: PID 1 of the guest, and its container runtime.
//!
//! The one binary has three roles. As PID 1 it brings the guest up and serves the `protocol` crate's Agent service
//! on vsock. As `kata-agent container-init` it is the single-threaded process that PID 1 starts for each
//! container and each exec, which becomes the user's program: cloning, changing namespaces and the like act on
//! whole processes and must not happen in PID 1. As the kernel's modprobe(8) it loads modules.

#![deny(unsafe_code)]

mod boot;
mod cgroup;
mod console;
mod container;
mod containers;
mod devices;
mod disks;
mod error;
mod filesystem;
mod init;
mod launch;
mod loopback;
mod marks;
mod modules;
mod network;
mod notify;
mod pci;
mod process;
mod reaper;
mod resources;
mod resync;
mod rpc;
mod shm;
mod sockets;
mod spec;
mod stats;
mod stdio;
mod sys;
mod uevent;
mod watch;

use std::env;
use std::process::ExitCode;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

fn main() -> ExitCode {
    let started = since_boot();
    let arguments: Vec<String> =
        env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["container-init", control] => init::main(control),
        // In these words the kernel asks.
        ["-q", "--", module] => match modules::load(module) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                console::err(&format!("kata-agent: {}", error.chain()));
                ExitCode::FAILURE
            }
        },
        ["--version"] => {
            console::out(&format!("kata-agent {}", env!("CARGO_PKG_VERSION")));
            ExitCode::SUCCESS
        }
        // The kernel hands words of its command line that it does not know to PID 1.
        _ if rustix::process::getpid().is_init() => boot::main(started),
        _ => {
            console::err(
                "kata-agent: this is the first process of a guest and runs only as PID 1 there",
            );
            ExitCode::from(2)
        }
    }
}

/// How long the guest's kernel has run.
fn since_boot() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or_default(),
        u32::try_from(now.tv_nsec).unwrap_or_default(),
    )
}
