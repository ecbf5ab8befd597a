//! The Linux calls that the runtime needs, made safe: processes, namespaces, mounts, cgroups, terminals, files.
//!
//! Mechanism only: nothing here knows of sandboxes, decides anything, or logs. Nearly all `unsafe` code of the
//! host side is in this crate.

pub mod cgroup;
pub mod clock;
pub mod file;
pub mod file_system;
mod host;
pub mod ledger;
pub mod link;
pub mod mount;
pub mod namespace;
pub mod netlink;
pub mod nftables;
pub mod process;
pub mod pty;
pub mod signal;
pub mod tap;

pub use host::{ThisHost, remove_tree};
