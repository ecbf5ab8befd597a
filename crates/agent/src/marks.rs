//! When a process's making got how far, for the host's log: what a start costs is looked for there.

use protocol::agent::Mark;
use serde::{Deserialize, Serialize};

use crate::since_boot;

/// Moments and their names, in the order of time.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub(crate) struct Marks(Vec<(String, u64)>);

impl Marks {
    /// Notes that now `name` is done.
    pub(crate) fn mark(&mut self, name: &str) {
        let now = u64::try_from(since_boot().as_micros()).unwrap_or(u64::MAX);
        self.0.push((name.to_owned(), now));
    }

    /// Appends those of another process.
    pub(crate) fn append(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// As the host is told.
    pub(crate) fn to_wire(&self) -> Vec<Mark> {
        let mark = |(name, boot_us): &(String, u64)| Mark {
            name: name.clone(),
            boot_us: *boot_us,
            ..Mark::default()
        };
        self.0.iter().map(mark).collect()
    }
}
