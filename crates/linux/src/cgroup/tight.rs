//! A memory limit close to what is used, for a moment.

use std::fs;
use std::path::PathBuf;

use super::{Cgroup, Error};

/// As long as it lives the cgroup may use hardly more memory than it did.
#[derive(Debug)]
pub struct Tight {
    /// What was in which file, in the order of their change.
    before: Vec<(PathBuf, String)>,
}

pub(super) fn tighten(cgroup: &Cgroup, room: u64) -> Result<Option<Tight>, Error> {
    let Some(directory) = cgroup.controller("memory") else { return Ok(None) };
    let limit = cgroup.usage().memory.saturating_add(room).to_string();
    let files = if directory.unified {
        [("memory.swap.max", "0"), ("memory.max", limit.as_str())]
    } else {
        // This order: the limit of both may not be below that of memory alone.
        [("memory.limit_in_bytes", limit.as_str()), ("memory.memsw.limit_in_bytes", &limit)]
    };
    let mut tight = Tight { before: Vec::new() };
    for (name, value) in files {
        let path = directory.path.join(name);
        // Without accounting of swap the file is not there.
        let Ok(before) = fs::read_to_string(&path) else { continue };
        fs::write(&path, value).map_err(|source| Error::Set {
            path: path.clone(),
            value: value.to_owned(),
            source,
        })?;
        tight.before.push((path, before.trim().to_owned()));
    }
    Ok(Some(tight))
}

impl Drop for Tight {
    fn drop(&mut self) {
        for (path, before) in self.before.iter().rev() {
            // A cgroup that has gone has no limits.
            drop(fs::write(path, before));
        }
    }
}
