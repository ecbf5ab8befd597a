//! The Linux calls that the runtime needs, made safe: processes, namespaces, mounts, cgroups, files.
//!
//! Mechanism only: nothing here knows of sandboxes, decides anything, or logs. Nearly all `unsafe` code of the
//! host side is in this crate.

pub mod file;
pub mod ledger;
pub mod process;
