//! `delete`: what containerd runs when a shim has died or a task could not be created.

use std::fs;
use std::io;

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use rustix::process::Signal;
use sandbox::ContainerId;

use crate::args::Args;
use crate::error::Error;
use crate::group::{self, Place};
use crate::rootfs;
use crate::start;

/// 128 + SIGKILL: how a task ends whose shim has gone.
const KILLED: u32 = 137;

/// Gives back what the container has taken, from its ledger alone; answers a `DeleteResponse`.
///
/// A container that is not there, or never was, is a success.
///
/// # Errors
///
/// When something would not go; it can be tried again.
pub(crate) fn delete(args: &Args) -> Result<Vec<u8>, Error> {
    let bundle = start::bundle(args)?;
    let process = start::process(&bundle);
    if let Some(process) = process {
        // The sandbox's own bundle: whatever of its shim is left has lost its containerd.
        process.signal(Signal::KILL).map_err(Error::host("kill", process.pid.to_string()))?;
    }
    let root = crate::root(&args.namespace)?;
    sandbox::delete(&root, &ContainerId::new(&args.id)?, true)?;
    rootfs::unmount_here(&bundle);
    if matches!(Place::of(&bundle), Ok(Place::Sandbox)) {
        remove_socket(args)?;
    }
    let response = DeleteResponse {
        pid: process.map_or(0, |process| process.pid),
        exit_status: KILLED,
        exited_at: Some(Timestamp::now()).into(),
        ..Default::default()
    };
    response.write_to_bytes().map_err(|source| Error::Message {
        action: "encode",
        what: "DeleteResponse",
        source,
    })
}

/// Removes the socket that the shim of this sandbox listened on.
pub(crate) fn remove_socket(args: &Args) -> Result<(), Error> {
    let socket = group::socket(None, &args.address, &args.namespace, &args.id);
    match fs::remove_file(&socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::host("remove", socket)(error))
        }
        _ => Ok(()),
    }
}
