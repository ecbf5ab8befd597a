//! From a spec's `linux.resources` to the limits of the machine's host processes. Pure.
//!
//! The guest's kernel enforces what the container asked for to the letter: its own cgroup gets the spec's numbers. The
//! host's cgroup holds the machine as a whole, which is more than the container: its memory limit leaves room for the
//! guest's kernel and the hypervisor, and processes are not counted there, since a guest's are not the host's.

use linux::cgroup::{Limits, Throttle, Throttled};
use protocol::oci::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use serde_json::Value;

use crate::config::SandboxConfig;
use crate::resize::with_page_table;

const MIB: u64 = 1 << 20;

/// The kernel's own period for CPU quotas, in microseconds.
pub(crate) const PERIOD_US: u64 = 100_000;

/// The limits of the sandbox's host processes.
pub(crate) fn host_limits(resources: Option<&LinuxResources>, config: &SandboxConfig) -> Limits {
    let Some(resources) = resources else { return Limits::default() };
    let room = (u64::from(config.guest_overhead_mib) + u64::from(config.host_overhead_mib)) * MIB;
    let with_room = |bytes: i64| {
        u64::try_from(bytes).ok().filter(|&bytes| bytes > 0).map_or(bytes, |bytes| {
            i64::try_from(with_page_table(bytes).saturating_add(room)).unwrap_or(i64::MAX)
        })
    };
    let memory = resources.memory().as_ref();
    let cpu = resources.cpu().as_ref();
    let block = resources.block_io().as_ref();
    let mut throttles = Vec::new();
    if let Some(block) = block {
        let mut add = |devices: &Option<Vec<LinuxThrottleDevice>>, what: Throttled| {
            throttles.extend(devices.iter().flatten().map(|throttle| Throttle {
                device: (throttle.major(), throttle.minor()),
                what,
                rate: throttle.rate(),
            }));
        };
        add(block.throttle_read_bps_device(), Throttled::ReadBytes);
        add(block.throttle_write_bps_device(), Throttled::WriteBytes);
        add(block.throttle_read_iops_device(), Throttled::Reads);
        add(block.throttle_write_iops_device(), Throttled::Writes);
    }
    // Zero is how Docker's JSON says "not asked for".
    Limits {
        memory: memory.and_then(LinuxMemory::limit).filter(|&n| n != 0).map(with_room),
        memory_swap: memory.and_then(LinuxMemory::swap).filter(|&n| n != 0).map(with_room),
        memory_reservation: memory
            .and_then(LinuxMemory::reservation)
            .filter(|&n| n != 0)
            .map(with_room),
        cpu_shares: cpu.and_then(LinuxCpu::shares).filter(|&n| n != 0),
        cpu_quota: cpu.and_then(LinuxCpu::quota).filter(|&n| n != 0),
        cpu_period: cpu.and_then(LinuxCpu::period).filter(|&n| n != 0),
        cpuset_cpus: cpu.and_then(|cpu| cpu.cpus().clone()).filter(|list| !list.is_empty()),
        cpuset_mems: cpu.and_then(|cpu| cpu.mems().clone()).filter(|list| !list.is_empty()),
        blkio_weight: block.and_then(LinuxBlockIo::weight).filter(|&n| n != 0),
        blkio_throttles: throttles,
    }
}

/// The limits of the host processes of a sandbox with several containers, which all use the one machine: together they
/// may have what each may have, and anything as soon as one of them may. Which CPUs they run on is not changed.
pub(crate) fn joint_limits(all: &[Option<LinuxResources>], config: &SandboxConfig) -> Limits {
    if let [one] = all {
        return host_limits(one.as_ref(), config);
    }
    let sum = |of: &dyn Fn(&LinuxResources) -> Option<i64>| {
        let each = all.iter().map(|one| of(one.as_ref()?).filter(|&n| n > 0));
        each.sum::<Option<i64>>().unwrap_or(-1)
    };
    let room = (u64::from(config.guest_overhead_mib) + u64::from(config.host_overhead_mib)) * MIB;
    let with_room = |bytes: i64| {
        u64::try_from(bytes).map_or(-1, |bytes| {
            i64::try_from(with_page_table(bytes).saturating_add(room)).unwrap_or(i64::MAX)
        })
    };
    let memory = sum(&|one| one.memory().as_ref()?.limit());
    let swap = sum(&|one| one.memory().as_ref()?.swap());
    let quota = sum(&|one| {
        let cpu = one.cpu().as_ref()?;
        let period = cpu.period().filter(|&period| period > 0).unwrap_or(PERIOD_US);
        let quota = u64::try_from(cpu.quota()?).ok()?.checked_mul(PERIOD_US)? / period;
        i64::try_from(quota).ok()
    });
    Limits {
        memory: Some(with_room(memory)),
        memory_swap: Some(with_room(if memory < 0 { -1 } else { swap })),
        cpu_quota: Some(quota),
        cpu_period: Some(PERIOD_US),
        ..Limits::default()
    }
}

/// `old` with what `update` has. Zero is how Docker's JSON says "as it was".
pub(crate) fn merged(
    old: Option<&LinuxResources>,
    update: &LinuxResources,
) -> Option<LinuxResources> {
    fn overlay(old: &mut Value, new: Value) {
        match (old, new) {
            (_, Value::Null) => {}
            (_, Value::Number(zero)) if zero.as_i64() == Some(0) => {}
            (_, Value::String(empty)) if empty.is_empty() => {}
            (Value::Object(old), Value::Object(new)) => {
                for (key, value) in new {
                    overlay(old.entry(key).or_insert(Value::Null), value);
                }
            }
            (old, new) => *old = new,
        }
    }
    let mut all = old.and_then(|old| serde_json::to_value(old).ok()).unwrap_or_default();
    overlay(&mut all, serde_json::to_value(update).ok()?);
    serde_json::from_value(all).ok()
}

#[cfg(test)]
mod tests {
    use super::{host_limits, joint_limits, merged};
    use crate::config::SandboxConfig;
    use protocol::oci::LinuxResources;
    use serde_json::{Value, json};

    fn resources(json: Value) -> LinuxResources {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn the_host_leaves_room_for_the_machine_and_counts_no_processes() {
        let config = SandboxConfig {
            guest_overhead_mib: 100,
            host_overhead_mib: 28,
            ..SandboxConfig::default()
        };
        let limits = host_limits(
            Some(&resources(json!({
                "memory": {"limit": 1 << 20, "swap": -1, "reservation": 0},
                "cpu": {"shares": 0, "quota": 5000, "cpus": ""},
                "pids": {"limit": 3},
            }))),
            &config,
        );
        assert_eq!(limits.memory, Some((1 << 20) + (1 << 14) + (128 << 20)));
        assert_eq!((limits.memory_swap, limits.memory_reservation), (Some(-1), None));
        assert_eq!(
            (limits.cpu_shares, limits.cpu_quota, limits.cpuset_cpus),
            (None, Some(5000), None)
        );
    }
    #[test]
    fn containers_of_one_machine_have_together_what_each_may_have() {
        let config = SandboxConfig {
            guest_overhead_mib: 100,
            host_overhead_mib: 28,
            ..SandboxConfig::default()
        };
        let half = resources(json!({
            "memory": {"limit": 256 << 20, "swap": 256 << 20},
            "cpu": {"quota": 25_000, "period": 50_000},
        }));
        let two = joint_limits(&[Some(half.clone()), Some(half.clone())], &config);
        assert_eq!(two.memory, Some((512 + 8 + 128) << 20));
        assert_eq!((two.cpu_quota, two.cpu_period), (Some(100_000), Some(100_000)));
        let free = joint_limits(&[Some(half.clone()), None], &config);
        assert_eq!((free.memory, free.memory_swap, free.cpu_quota), (Some(-1), Some(-1), Some(-1)));
        let one = joint_limits(&[Some(half.clone())], &config);
        assert_eq!(one.memory, host_limits(Some(&half), &config).memory);
    }

    #[test]
    fn an_update_changes_what_it_names() {
        let old = resources(json!({"memory": {"limit": 5, "swap": 6}, "cpu": {"quota": 7}}));
        let update = resources(json!({"memory": {"limit": 50, "swap": 0}}));
        let new = merged(Some(&old), &update).unwrap();
        assert_eq!(
            new,
            resources(json!({"memory": {"limit": 50, "swap": 6}, "cpu": {"quota": 7}}))
        );
        assert_eq!(merged(None, &update).unwrap().memory().as_ref().unwrap().limit(), Some(50));
    }
}
