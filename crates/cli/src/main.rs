//! `kata`: one executable, which acts by the name it is called by and its first argument.
//!
//! - `kata-runtime …`: the OCI command line, and the operator's commands.
//! - `containerd-shim-kata-v2 …`: containerd's shim.
//! - `kata sandbox FD`, `kata stand-in FD`, `kata device CONFIG`: roles that the runtime starts itself in; nobody else
//!   calls them.

#![forbid(unsafe_code)]

mod args;
mod commands;
mod log;
mod output;
mod roles;
mod runc_json;

use std::env;
use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().collect();
    if let Some(code) = roles::dispatch(&arguments) {
        return code;
    }
    if roles::is_shim(&arguments) {
        return match serde_json::to_value(runc_json::features()) {
            Ok(features) => shim::main(&arguments, &features),
            Err(error) => output::failed(&error.into()),
        };
    }
    let cli = match args::Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => return output::usage(&error),
    };
    let log = match log::Log::open(&cli.global) {
        Ok(log) => log,
        Err(error) => return output::failed(&error),
    };
    log.install();
    match commands::run(&cli) {
        Ok(code) => code,
        Err(error) => {
            log.fatal(&error);
            ExitCode::FAILURE
        }
    }
}
