//! The one module that prints: data to stdout, words to stderr.

use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use serde::Serialize;

/// Prints a line of data.
///
/// A reader that has gone (`| head`) is no error of ours.
pub(crate) fn line(text: impl Display) {
    drop(writeln!(io::stdout().lock(), "{text}"));
}

/// Prints a value as indented JSON.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Prints a line for a person.
pub(crate) fn words(text: impl Display) {
    drop(writeln!(io::stderr().lock(), "{text}"));
}

/// Prints an error with its causes.
pub(crate) fn failed(error: &anyhow::Error) -> ExitCode {
    words(format_args!("error: {error:#}"));
    ExitCode::FAILURE
}

/// Prints what clap says of the command line: help on stdout, a mistake on stderr.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    drop(error.print());
    if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
