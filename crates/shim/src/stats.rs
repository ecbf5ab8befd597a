//! A container's figures as containerd takes them: those of a version 1 or of a version 2 cgroup, as the host has.

use std::path::Path;

use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use sandbox::Stats;

use crate::error::Error;

/// Which kind of figures containerd expects here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    One,
    Two,
}

impl Version {
    /// The host's.
    pub(crate) fn of_host() -> Self {
        let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        if unified { Self::Two } else { Self::One }
    }
}

/// Encodes `stats`.
///
/// # Errors
///
/// When they cannot be encoded.
pub(crate) fn encode(stats: &Stats, version: Version) -> Result<Any, Error> {
    let (type_url, value) = match version {
        Version::One => ("io.containerd.cgroups.v1.Metrics", version_one(stats).write_to_bytes()),
        Version::Two => ("io.containerd.cgroups.v2.Metrics", version_two(stats).write_to_bytes()),
    };
    let value =
        value.map_err(|source| Error::Message { action: "encode", what: "metrics", source })?;
    Ok(Any { type_url: type_url.to_owned(), value, ..Default::default() })
}

fn some<T>(value: T) -> MessageField<T> {
    MessageField::some(value)
}

fn line(stats: &Stats, name: &str) -> u64 {
    stats.memory_stat.get(name).copied().unwrap_or_default()
}

/// The cgroup's own word for no limit.
fn limit(value: u64) -> u64 {
    if value == 0 { u64::MAX } else { value }
}

fn version_one(stats: &Stats) -> v1::Metrics {
    const NS: u64 = 1000;
    let get = |name| line(stats, name);
    v1::Metrics {
        pids: some(v1::PidsStat {
            current: stats.pids,
            limit: stats.pids_limit,
            ..Default::default()
        }),
        cpu: some(v1::CPUStat {
            usage: some(v1::CPUUsage {
                total: stats.cpu_usage_us.saturating_mul(NS),
                kernel: stats.cpu_system_us.saturating_mul(NS),
                user: stats.cpu_user_us.saturating_mul(NS),
                ..Default::default()
            }),
            throttling: some(v1::Throttle {
                periods: stats.cpu_periods,
                throttled_periods: stats.cpu_throttled_periods,
                throttled_time: stats.cpu_throttled_us.saturating_mul(NS),
                ..Default::default()
            }),
            ..Default::default()
        }),
        memory: some(v1::MemoryStat {
            cache: get("file"),
            rss: get("anon"),
            mapped_file: get("file_mapped"),
            dirty: get("file_dirty"),
            writeback: get("file_writeback"),
            pg_fault: get("pgfault"),
            pg_maj_fault: get("pgmajfault"),
            inactive_anon: get("inactive_anon"),
            active_anon: get("active_anon"),
            inactive_file: get("inactive_file"),
            active_file: get("active_file"),
            unevictable: get("unevictable"),
            total_cache: get("file"),
            total_rss: get("anon"),
            total_mapped_file: get("file_mapped"),
            total_dirty: get("file_dirty"),
            total_writeback: get("file_writeback"),
            total_pg_fault: get("pgfault"),
            total_pg_maj_fault: get("pgmajfault"),
            total_inactive_anon: get("inactive_anon"),
            total_active_anon: get("active_anon"),
            total_inactive_file: get("inactive_file"),
            total_active_file: get("active_file"),
            total_unevictable: get("unevictable"),
            hierarchical_memory_limit: limit(stats.memory_limit),
            usage: some(v1::MemoryEntry {
                limit: limit(stats.memory_limit),
                usage: stats.memory_usage,
                max: stats.memory_peak,
                ..Default::default()
            }),
            swap: some(v1::MemoryEntry {
                limit: u64::MAX,
                usage: stats.memory_usage.saturating_add(stats.swap_usage),
                ..Default::default()
            }),
            ..Default::default()
        }),
        memory_oom_control: some(v1::MemoryOomControl {
            oom_kill: stats.oom_kills,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn version_two(stats: &Stats) -> v2::Metrics {
    let get = |name| line(stats, name);
    v2::Metrics {
        pids: some(v2::PidsStat {
            current: stats.pids,
            limit: stats.pids_limit,
            ..Default::default()
        }),
        cpu: some(v2::CPUStat {
            usage_usec: stats.cpu_usage_us,
            user_usec: stats.cpu_user_us,
            system_usec: stats.cpu_system_us,
            nr_periods: stats.cpu_periods,
            nr_throttled: stats.cpu_throttled_periods,
            throttled_usec: stats.cpu_throttled_us,
            ..Default::default()
        }),
        memory: some(v2::MemoryStat {
            anon: get("anon"),
            file: get("file"),
            kernel_stack: get("kernel_stack"),
            slab: get("slab"),
            sock: get("sock"),
            shmem: get("shmem"),
            file_mapped: get("file_mapped"),
            file_dirty: get("file_dirty"),
            file_writeback: get("file_writeback"),
            anon_thp: get("anon_thp"),
            inactive_anon: get("inactive_anon"),
            active_anon: get("active_anon"),
            inactive_file: get("inactive_file"),
            active_file: get("active_file"),
            unevictable: get("unevictable"),
            slab_reclaimable: get("slab_reclaimable"),
            slab_unreclaimable: get("slab_unreclaimable"),
            pgfault: get("pgfault"),
            pgmajfault: get("pgmajfault"),
            usage: stats.memory_usage,
            usage_limit: limit(stats.memory_limit),
            max_usage: stats.memory_peak,
            swap_usage: stats.swap_usage,
            ..Default::default()
        }),
        memory_events: some(v2::MemoryEvents {
            oom: stats.oom_kills,
            oom_kill: stats.oom_kills,
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::{Version, encode, v1, v2};
    use containerd_shim_protos::protobuf::Message;
    use sandbox::Stats;

    #[test]
    fn both_versions_tell_the_same_figures_in_their_own_units() {
        let mut stats =
            Stats { cpu_usage_us: 7, memory_usage: 4096, oom_kills: 1, ..Stats::default() };
        stats.memory_stat.insert("inactive_file".into(), 1024);
        let one = encode(&stats, Version::One).unwrap();
        assert_eq!(one.type_url, "io.containerd.cgroups.v1.Metrics");
        let one = v1::Metrics::parse_from_bytes(&one.value).unwrap();
        assert_eq!(one.cpu.usage.total, 7000);
        assert_eq!(one.memory.usage.usage, 4096);
        // What Kubernetes subtracts for the working set.
        assert_eq!(one.memory.total_inactive_file, 1024);
        assert_eq!(one.memory.usage.limit, u64::MAX);
        let two = encode(&stats, Version::Two).unwrap();
        assert_eq!(two.type_url, "io.containerd.cgroups.v2.Metrics");
        let two = v2::Metrics::parse_from_bytes(&two.value).unwrap();
        assert_eq!(
            (two.cpu.usage_usec, two.memory.usage, two.memory.inactive_file),
            (7, 4096, 1024)
        );
        assert_eq!(two.memory_events.oom_kill, 1);
    }
}
