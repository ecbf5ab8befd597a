//! `state`, `list`, `ps`, `spec`, `--version`.

use std::fs::OpenOptions;
use std::io::Write;

use anyhow::Context as _;
use sandbox::{ContainerId, State};

use super::Context;
use crate::args::{self, Format};
use crate::{output, runc_json};

/// `docker info` takes what is before "version" for the name, and a line `commit: …`.
pub(super) fn version() {
    output::line(format_args!("kata-runtime version {}", env!("CARGO_PKG_VERSION")));
    output::line(format_args!("spec: {}", protocol::OCI_VERSION));
}

pub(super) fn state(context: &Context<'_>, id: &str) -> anyhow::Result<()> {
    output::json(&sandbox::state(&context.root()?, &ContainerId::new(id)?)?)
}

pub(super) fn list(context: &Context<'_>, args: &args::List) -> anyhow::Result<()> {
    let states = sandbox::list(&context.root()?)?;
    if args.quiet {
        for state in &states {
            output::line(&state.id);
        }
        return Ok(());
    }
    match args.format {
        Format::Json => {
            output::line(serde_json::to_string(&states)?);
            Ok(())
        }
        Format::Table => {
            let row = |state: &State| {
                [
                    state.id.clone(),
                    state.pid.to_string(),
                    state.status.to_string(),
                    state.bundle.display().to_string(),
                    state.created.clone(),
                    state.owner.clone(),
                ]
            };
            let head = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"];
            table(&head, states.iter().map(row));
            Ok(())
        }
    }
}

pub(super) fn ps(context: &Context<'_>, args: &args::Ps) -> anyhow::Result<()> {
    let processes = sandbox::processes(&context.root()?, &ContainerId::new(&args.id)?)?;
    match args.format {
        // `docker top` looks these up on the host.
        Format::Json => output::line(serde_json::to_string(&processes.host)?),
        Format::Table => {
            let rows = processes.guest.iter().map(|process| {
                let seconds = process.cpu_ms / 1000;
                let tty = if process.tty.is_empty() { "?" } else { &process.tty };
                [
                    process.uid.to_string(),
                    process.pid.to_string(),
                    process.ppid.to_string(),
                    tty.to_owned(),
                    format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60),
                    process.command.clone(),
                ]
            });
            table(&["UID", "PID", "PPID", "TTY", "TIME", "CMD"], rows);
        }
    }
    Ok(())
}

/// Prints columns three blanks apart, as runc does.
pub(super) fn table<const N: usize>(head: &[&str; N], rows: impl Iterator<Item = [String; N]>) {
    let mut all = vec![head.map(str::to_owned)];
    all.extend(rows);
    let mut widths = [0; N];
    for row in &all {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in &all {
        let cells: Vec<_> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        output::line(cells.join("   ").trim_end());
    }
}

pub(super) fn spec(args: &args::SpecFile) -> anyhow::Result<()> {
    let path = args.bundle.join("config.json");
    let text = serde_json::to_string_pretty(&runc_json::default_spec(args.rootless))?;
    let file = OpenOptions::new().write(true).create_new(true).open(&path);
    file.and_then(|mut file| writeln!(file, "{text}"))
        .with_context(|| format!("cannot write {}", path.display()))
}
