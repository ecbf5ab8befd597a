//! containerd's door: `containerd-shim-kata-v2`.
//!
//! containerd runs this program to start a shim, which then serves containerd's Task API for one sandbox and all
//! containers in it; and once more to clean up after a shim that has died. The shim's process *is* the sandbox process: it
//! owns the virtual machine, and what it takes from the host is in the ledger of the sandbox crate. What containerd expects
//! is in its `core/runtime/v2/README.md`.

#![forbid(unsafe_code)]

mod args;
mod bootstrap;
mod delete;
mod error;
mod events;
mod group;
mod info;
mod life;
mod options;
mod process;
mod query;
mod rootfs;
mod serve;
mod shim;
mod start;
mod stats;
mod stdio;
mod task;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use sandbox::{Chain, Root};
use serde_json::Value;

use crate::args::{Action, Args};

pub use error::Error;

/// The name that containerd looks for where a runtime is called `io.containerd.kata.v2`.
pub const NAME: &str = "containerd-shim-kata-v2";

/// Does what containerd asks by the command line; `features` is the OCI runtime spec's `features.md` of this program.
#[must_use]
pub fn main(arguments: &[OsString], features: &Value) -> ExitCode {
    match run(arguments, features) {
        Ok(answer) => {
            // A containerd that does not read the answer will ask `delete`.
            drop(io::stdout().write_all(&answer));
            ExitCode::SUCCESS
        }
        Err(error) => {
            drop(writeln!(io::stderr(), "{NAME}: {}", Chain(&error)));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[OsString], features: &Value) -> Result<Vec<u8>, Error> {
    let words: Vec<_> = arguments.iter().skip(1).map(|word| word.to_string_lossy()).collect();
    let args = Args::parse(words.iter().map(AsRef::as_ref))?;
    match args.action {
        Action::Version => Ok(info::version()),
        Action::Info => info::info(features),
        Action::Start => start::start(&args),
        Action::Delete => delete::delete(&args),
        Action::Serve(socket) => serve::serve(&args, socket).map(|()| Vec::new()),
    }
}

/// Where the state of the containers of a containerd namespace is: an operator's `--root`.
fn root(namespace: &str) -> Result<Root, Error> {
    Ok(Root::new(&Root::default_path().join("containerd").join(namespace))?)
}
