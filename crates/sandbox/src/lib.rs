//! The engine: sandboxes, their containers and processes.
//!
//! One *sandbox process* ([`serve`]) owns a virtual machine and everything about it; every other process is a client that
//! may die freely. The doors (the OCI command line, the containerd shim, embedding programs) call the functions of this
//! crate root, which are plain and synchronous; each is one of the OCI runtime's operations.

#![forbid(unsafe_code)]

mod agent;
mod boot;
mod config;
mod console;
mod container;
mod control;
mod create;
mod disks;
mod embedded;
mod error;
mod exec;
mod hooks;
mod interfaces;
mod launch;
mod loopback;
mod oom;
mod operations;
mod outside;
mod pod;
pub mod pool;
mod process;
mod resize;
mod resources;
mod running;
mod sandbox;
mod server;
mod sockets;
mod spec;
mod stand_in;
mod state;
mod status;
mod stdio;
pub mod template;
mod update;
mod watch;

pub use config::{
    AccelerationConfig, Config, HypervisorConfig, ImageConfig, PoolConfig, SandboxConfig,
    TemplateConfig, TemplateMode,
};
pub use console::Console;
pub use control::{GuestProcess, Processes, Stats};
pub use create::{Create, Created, create};
pub use embedded::{Boot, Ended, ProcessStreams, Sandbox, Streams};
pub use error::{Chain, Error, ErrorKind};
pub use exec::{Exec, exec_defaults, exec_detached, exec_here};
pub use oom::out_of_memory;
pub use operations::{
    State, delete, kill, list, pause, processes, resume, start, state, stats, update,
};
pub use process::serve;
pub use spec::Bundle;
pub use stand_in::{attend, serve as stand_in};
pub use state::{ContainerId, Root};
pub use status::{Operation, Status};
