//! The contract between the host's sandbox process and the guest's `kata-agent`.
//!
//! Control is ttrpc on [`CONTROL_PORT`]; the messages are generated from `proto/agent.proto` and used as they
//! are on both sides. Process stdio and other bulk are raw vsock streams to [`STREAM_PORT`], each opened with a
//! [`Token`]. The guest speaks first: as soon as its vsock device is there it opens a stream to the host's
//! [`READY_PORT`] and closes it.

#![deny(unsafe_code)]

pub mod loopback;
pub mod paths;

/// The messages of `agent.proto`.
#[allow(warnings, clippy::all, clippy::pedantic, clippy::restriction, reason = "generated")]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// The client and server of `agent.proto`.
#[allow(warnings, clippy::all, clippy::pedantic, clippy::restriction, reason = "generated")]
pub mod agent_ttrpc {
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}

pub use oci_spec::runtime as oci;

/// The version of the OCI runtime spec that states and new specs are written in.
pub const OCI_VERSION: &str = "1.2.1";

/// This side's version of the protocol; see the version rule in `agent.proto`.
pub const VERSION: u32 = 1;

/// The guest's port of the ttrpc service.
pub const CONTROL_PORT: u32 = 1024;

/// The guest's port of raw streams: stdio, terminals.
pub const STREAM_PORT: u32 = 1025;

/// The host's port that the agent connects to once, to say that it is listening.
pub const READY_PORT: u32 = 1026;

/// The port of raw streams to the other side's loopback, in the guest as on the host: see [`loopback`].
pub const LOOPBACK_PORT: u32 = 1027;

/// The host's port that the agent opens a stream to for each connection to a socket of the host; see `Socket`.
pub const SOCKET_PORT: u32 = 1028;

/// Seconds and nanoseconds of `device::ECHO_TIME`, by which the agent has watchers told of what the host has changed.
pub const ECHO_TIME: (i64, i64) = (0x6b61_7461_6563_686f, 123_456_789);

/// What a raw stream starts with: who opens it proves by these bytes that the agent told it of the stream.
pub type Token = [u8; 16];
