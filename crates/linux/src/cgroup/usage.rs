//! What a cgroup has used, from the files of v1 and of v2.

use std::fs;
use std::path::Path;

use serde::Serialize;

use super::{Cgroup, Directory};

/// What a cgroup has used.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Usage {
    /// CPU time, in nanoseconds.
    pub cpu_ns: u64,
    /// Of it, in user mode.
    pub cpu_user_ns: u64,
    /// Of it, in the kernel.
    pub cpu_system_ns: u64,
    /// CPU time of each CPU, in nanoseconds; v1 only.
    pub cpu_each_ns: Vec<u64>,
    /// Periods of the CPU quota that have passed, those in which it was used up, and nanoseconds spent waiting.
    pub cpu_throttling: (u64, u64, u64),
    /// Memory in use now, in bytes.
    pub memory: u64,
    /// The most memory ever in use, where the kernel tells.
    pub memory_peak: u64,
    /// The memory limit, in bytes; `None`: none.
    pub memory_limit: Option<u64>,
    /// Lines of `memory.stat`.
    pub memory_stat: Vec<(String, u64)>,
    /// Processes killed for want of memory.
    pub oom_kills: u64,
    /// Processes and threads.
    pub pids: u64,
}

/// v1's `cpuacct.stat` counts in these: sysconf(3)'s `_SC_CLK_TCK`, 100 a second on all architectures of ours.
const TICK_NS: u64 = 10_000_000;

/// v1 says "no limit" by a number near the top of the address space.
const V1_NO_LIMIT: u64 = 1 << 62;

pub(super) fn read(cgroup: &Cgroup) -> Usage {
    let mut usage = Usage::default();
    for directory in cgroup.directories() {
        if directory.unified {
            continue;
        }
        for controller in &directory.controllers {
            read_v1(controller, &directory.path, &mut usage);
        }
    }
    if let Some(directory) = cgroup.unified() {
        read_v2(directory, &mut usage);
    }
    usage
}

fn read_v1(controller: &str, path: &Path, usage: &mut Usage) {
    match controller {
        "cpuacct" => {
            usage.cpu_ns = number(path, "cpuacct.usage").unwrap_or(0);
            let stat = table(path, "cpuacct.stat");
            usage.cpu_user_ns = value(&stat, "user") * TICK_NS;
            usage.cpu_system_ns = value(&stat, "system") * TICK_NS;
            let each = fs::read_to_string(path.join("cpuacct.usage_percpu")).unwrap_or_default();
            usage.cpu_each_ns =
                each.split_whitespace().filter_map(|text| text.parse().ok()).collect();
        }
        "cpu" => {
            let stat = table(path, "cpu.stat");
            usage.cpu_throttling = (
                value(&stat, "nr_periods"),
                value(&stat, "nr_throttled"),
                value(&stat, "throttled_time"),
            );
        }
        "memory" => {
            usage.memory = number(path, "memory.usage_in_bytes").unwrap_or(0);
            usage.memory_peak = number(path, "memory.max_usage_in_bytes").unwrap_or(0);
            usage.memory_limit =
                number(path, "memory.limit_in_bytes").filter(|&limit| limit < V1_NO_LIMIT);
            usage.memory_stat = table(path, "memory.stat");
            usage.oom_kills = value(&table(path, "memory.oom_control"), "oom_kill");
        }
        "pids" => usage.pids = number(path, "pids.current").unwrap_or(0),
        _ => {}
    }
}

/// What v1 has told already stays: on a hybrid host the v2 hierarchy has few controllers.
fn read_v2(directory: &Directory, usage: &mut Usage) {
    let path = &directory.path;
    if usage.cpu_ns == 0 {
        let stat = table(path, "cpu.stat");
        usage.cpu_ns = value(&stat, "usage_usec") * 1000;
        usage.cpu_user_ns = value(&stat, "user_usec") * 1000;
        usage.cpu_system_ns = value(&stat, "system_usec") * 1000;
        if usage.cpu_throttling == (0, 0, 0) {
            usage.cpu_throttling = (
                value(&stat, "nr_periods"),
                value(&stat, "nr_throttled"),
                value(&stat, "throttled_usec") * 1000,
            );
        }
    }
    if let Some(memory) = number(path, "memory.current") {
        usage.memory = memory;
        usage.memory_peak = number(path, "memory.peak").unwrap_or(0);
        usage.memory_limit = number(path, "memory.max");
        usage.memory_stat = table(path, "memory.stat");
        usage.oom_kills = value(&table(path, "memory.events"), "oom_kill");
    }
    if let Some(pids) = number(path, "pids.current") {
        usage.pids = pids;
    }
}

/// The one number in a file; `None` where there is no file or it says `max`.
fn number(directory: &Path, name: &str) -> Option<u64> {
    fs::read_to_string(directory.join(name)).ok()?.trim().parse().ok()
}

/// A file of lines of a name and a number.
fn table(directory: &Path, name: &str) -> Vec<(String, u64)> {
    let text = fs::read_to_string(directory.join(name)).unwrap_or_default();
    let pair = |line: &str| {
        let (name, number) = line.split_once(' ')?;
        Some((name.to_owned(), number.trim().parse().ok()?))
    };
    text.lines().filter_map(pair).collect()
}

fn value(table: &[(String, u64)], name: &str) -> u64 {
    table.iter().find(|(known, _)| known == name).map_or(0, |&(_, value)| value)
}
