//! Fixtures for black-box tests: bundles, an OCI runtime driven as containerd's shim drives it, private Docker and
//! containerd daemons, terminals, and the check that nothing is left behind on the host.
//!
//! The same fixtures drive runc and our own runtime: a test states what both must do. Everything is made below one
//! [`Work`] directory, and whatever a fixture starts it ends when it is dropped, also when a test panics.
//!
//! Only tests depend on this crate.

#![deny(unsafe_code)]

pub mod bundle;
pub mod console;
pub mod containerd;
pub mod cri;
pub mod docker;
pub mod image;
pub mod podman;
pub mod pods;
pub mod residue;
pub mod run;
pub mod runtime;
pub mod streams;
pub mod wait;
mod work;

pub use bundle::Bundle;
pub use run::{Output, Run};
pub use runtime::{Container, Runtime};
pub use wait::eventually;
pub use work::Work;
