//! What is measured: the runtimes under test, ours also with what can be turned on and off, and gVisor's where it is there.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde_json::Value;
use testkit::{Runtime, eventually};

use crate::Bench;

/// For a machine of the pool to be made on a busy host.
const MADE: Duration = Duration::from_mins(5);

/// A runtime that is measured.
pub(super) struct Variant {
    pub(super) runtime: Runtime,
    /// Whether its configuration has a pool.
    pool: bool,
}

impl Variant {
    /// Makes ready for a start that is to be measured, and waits until what the last one has left behind is done.
    pub(super) fn settle(&self) -> Result<()> {
        if !self.pool {
            return Ok(());
        }
        self.runtime.run(&["pool", "fill"]).within(MADE).text()?;
        eventually(MADE, "the pool is full", || {
            let text = self.runtime.run(&["pool", "list", "--format", "json"]).text()?;
            let list: Vec<Value> = serde_json::from_str(&text)?;
            let full = !list.is_empty() && list.iter().all(|one| one["ready"] == true);
            Ok(full.then_some(()))
        })
    }

    /// Whether Docker's bridge can be its containers' network.
    pub(super) fn has_bridge(&self) -> bool {
        self.runtime.name != "runsc"
    }

    /// Whether a pool's machines are what is measured: then those of one start only.
    pub(super) fn is_pool(&self) -> bool {
        self.pool
    }
}

impl Drop for Variant {
    fn drop(&mut self) {
        if self.pool {
            drop(self.runtime.run(&["pool", "drain"]).text());
            testkit::runtime::reap_orphans();
        }
    }
}

/// All of them.
pub(super) fn variants(bench: &Bench) -> Result<Vec<Variant>> {
    let mut variants = Vec::new();
    for runtime in &bench.runtimes {
        variants.push(Variant { runtime: runtime.clone(), pool: false });
        if !runtime.is_kata() {
            variants.extend(gvisor(bench)?);
            continue;
        }
        let pool = bench.work.path().join("pool");
        for (word, text) in [
            ("boot", "[template]\nmode = \"off\"\n".to_owned()),
            ("pool", format!("[pool]\nsize = 1\ndirectory = \"{}\"\n", pool.display())),
        ] {
            let mut variant = runtime.clone();
            variant.name = format!("{}-{word}", runtime.name);
            variant.root = runtime.root.with_file_name(&variant.name);
            fs::create_dir_all(&variant.root)?;
            variant.config = Some(merged(bench, runtime, word, &text)?);
            variants.push(Variant { runtime: variant, pool: word == "pool" });
        }
    }
    Ok(variants)
}

/// The runtime's configuration, with tables that it does not have, or members of those that it has.
fn merged(bench: &Bench, runtime: &Runtime, word: &str, more: &str) -> Result<std::path::PathBuf> {
    let base = runtime.config.as_ref().map(fs::read_to_string).transpose()?.unwrap_or_default();
    let (table, members) = more.split_once('\n').unwrap_or((more, ""));
    let text = if base.contains(table) {
        base.replace(table, &format!("{table}\n{members}"))
    } else {
        format!("{base}\n{more}")
    };
    let path = bench.work.path().join(format!("{word}.toml"));
    fs::write(&path, text)?;
    Ok(path)
}

/// gVisor's `runsc`, if it is installed: with the least of a host that it can have, as a container of `runc spec` does.
fn gvisor(bench: &Bench) -> Result<Option<Variant>> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let Some(runsc) =
        std::env::split_paths(&path).map(|dir| dir.join("runsc")).find(|it| it.exists())
    else {
        return Ok(None);
    };
    let script = bench.work.path().join("runsc");
    write_script(
        &script,
        &format!("exec {} --network=none --ignore-cgroups \"$@\"", runsc.display()),
    )?;
    Ok(Some(Variant { runtime: Runtime::new(&bench.work, "runsc", &script)?, pool: false }))
}

fn write_script(path: &Path, line: &str) -> Result<()> {
    fs::write(path, format!("#!/bin/sh\n{line}\n"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}
