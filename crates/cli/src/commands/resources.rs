//! `update` and `events`.

use std::io::Read;
use std::path::Path;
use std::time::Duration;
use std::{fs, io};

use anyhow::{Context as _, bail};
use rustix::event::{Timespec, poll};
use sandbox::{ContainerId, ErrorKind};
use serde_json::{Value, json};

use super::Context;
use crate::{args, output, runc_json};

pub(super) fn update(context: &Context<'_>, args: &args::Update) -> anyhow::Result<()> {
    let resources = match &args.resources {
        Some(path) => read_resources(path)?,
        None => resources_of_flags(args),
    };
    let id = ContainerId::new(&args.id)?;
    Ok(sandbox::update(&context.root()?, &id, resources.to_string())?)
}

fn read_resources(path: &Path) -> anyhow::Result<Value> {
    let mut text = String::new();
    if path.as_os_str() == "-" {
        io::stdin().read_to_string(&mut text).context("cannot read stdin")?;
    } else {
        text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    }
    serde_json::from_str(&text).with_context(|| format!("cannot understand {}", path.display()))
}

fn resources_of_flags(args: &args::Update) -> Value {
    let mut resources = json!({});
    let mut set = |section: &str, member: &str, value: Value| {
        if !value.is_null() {
            resources[section][member] = value;
        }
    };
    set("cpu", "period", json!(args.cpu_period));
    set("cpu", "quota", json!(args.cpu_quota));
    set("cpu", "shares", json!(args.cpu_share));
    set("cpu", "cpus", json!(args.cpuset_cpus));
    set("cpu", "mems", json!(args.cpuset_mems));
    set("memory", "limit", json!(args.memory));
    set("memory", "reservation", json!(args.memory_reservation));
    set("memory", "swap", json!(args.memory_swap));
    set("pids", "limit", json!(args.pids_limit));
    set("blockIO", "weight", json!(args.blkio_weight));
    resources
}

pub(super) fn events(context: &Context<'_>, args: &args::Events) -> anyhow::Result<()> {
    let root = context.root()?;
    let id = ContainerId::new(&args.id)?;
    let interval = Timespec::try_from(parse_duration(&args.interval)?)
        .with_context(|| format!("--interval {} is too long", args.interval))?;
    loop {
        match sandbox::stats(&root, &id) {
            Ok(stats) => {
                output::line(json!({
                    "type": "stats", "id": args.id, "data": runc_json::stats(&stats),
                }));
            }
            // It has ended since the last time; runc ends silently then too.
            Err(error) if !args.stats && ended(&error) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        if args.stats {
            return Ok(());
        }
        // Nothing is polled for: this is how long to wait.
        poll(&mut [], Some(&interval)).context("cannot wait")?;
    }
}

fn ended(error: &sandbox::Error) -> bool {
    matches!(error.kind(), ErrorKind::InvalidState | ErrorKind::NotFound | ErrorKind::Unavailable)
}

/// Go's durations, as far as anybody writes them: `5s`, `500ms`, `1m`.
fn parse_duration(text: &str) -> anyhow::Result<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..digits]
        .parse()
        .with_context(|| format!("{text:?} is not a time like 5s or 500ms"))?;
    Ok(match &text[digits..] {
        "ms" => Duration::from_millis(number),
        "s" => Duration::from_secs(number),
        "m" => Duration::from_secs(number * 60),
        _ => bail!("{text:?} is not a time like 5s or 500ms"),
    })
}

#[cfg(test)]
mod tests {
    use super::parse_duration;
    use std::time::Duration;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        assert_eq!(parse_duration("5s").unwrap(), Duration::from_secs(5));
        assert_eq!(parse_duration("250ms").unwrap(), Duration::from_millis(250));
        for bad in ["", "5", "s", "5h", "-1s"] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
    }
}
