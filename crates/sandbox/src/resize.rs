//! What its containers ask of the size of a machine, at the start and with each change. Pure.
//!
//! A limit that grows beyond the machine has the machine grow: vCPUs and memory are plugged in before the limit is raised,
//! so that what `docker update` says it gives is there. A limit that shrinks takes them out again where the guest lets
//! them go; the container's own cgroup holds it to its limit meanwhile.

use protocol::oci::LinuxResources;

use crate::config::SandboxConfig;
use crate::resources::PERIOD_US;

const MIB: u64 = 1 << 20;

/// Machines larger than the usual one come in steps of this, so that few shapes, and few templates, serve all limits.
const STEP_MIB: u32 = 1024;

/// How large a machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) vcpus: u32,
    pub(crate) memory_mib: u32,
}

impl Size {
    /// Whatever is larger of each.
    pub(crate) fn or_larger(self, other: Self) -> Self {
        Self {
            vcpus: self.vcpus.max(other.vcpus),
            memory_mib: self.memory_mib.max(other.memory_mib),
        }
    }
}

/// The machine for containers with these limits, on a host of this size, which no machine exceeds. Those without a limit
/// share what a machine has that is made for one of them.
///
/// One with a small memory limit gets the usual machine all the same: its own cgroup in the guest holds it to its limit,
/// and memory that the guest does not touch costs the host nothing.
pub(crate) fn size(all: &[Option<LinuxResources>], config: &SandboxConfig, host: Size) -> Size {
    let cpus = joint(all, cpu_time, u64::from(config.vcpus) * THOUSAND);
    let vcpus = u32::try_from(cpus.div_ceil(THOUSAND)).unwrap_or(u32::MAX);
    let usual = u64::from(config.memory_mib) * MIB;
    let bytes = joint(all, memory_limit, usual);
    // What a machine of the usual size offers its containers is what is left of it.
    let memory_mib = if all.iter().all(|one| memory_limit(one.as_ref()).is_none()) {
        config.memory_mib
    } else {
        let mib = with_page_table(bytes).div_ceil(MIB) + u64::from(config.guest_overhead_mib);
        let mib = u32::try_from(mib).ok().and_then(|mib| mib.checked_next_multiple_of(STEP_MIB));
        mib.unwrap_or(u32::MAX)
    };
    Size {
        vcpus: vcpus.clamp(1, host.vcpus.max(1)),
        memory_mib: memory_mib.min(host.memory_mib).max(config.memory_mib),
    }
}

/// The sum of the limits of a kind, and once `usual` for all that have none.
fn joint(
    all: &[Option<LinuxResources>],
    limit: fn(Option<&LinuxResources>) -> Option<u64>,
    usual: u64,
) -> u64 {
    let limited = all.iter().filter_map(|one| limit(one.as_ref())).fold(0, u64::saturating_add);
    let free = all.is_empty() || all.iter().any(|one| limit(one.as_ref()).is_none());
    limited.saturating_add(if free { usual } else { 0 })
}

const THOUSAND: u64 = 1000;

/// The CPU time that a container may take, in thousandths of a CPU: its quota, else that of the CPUs it may run on.
fn cpu_time(resources: Option<&LinuxResources>) -> Option<u64> {
    let cpu = resources?.cpu().as_ref()?;
    let quota = cpu.quota().and_then(|quota| u64::try_from(quota).ok()).filter(|&us| us > 0);
    if let Some(quota) = quota {
        let period = cpu.period().filter(|&us| us > 0).unwrap_or(PERIOD_US);
        return Some(quota.saturating_mul(THOUSAND).div_ceil(period));
    }
    let count = count(cpu.cpus().as_deref().unwrap_or_default());
    Some(u64::from(count) * THOUSAND).filter(|&time| time > 0)
}

/// In bytes.
fn memory_limit(resources: Option<&LinuxResources>) -> Option<u64> {
    let limit = resources?.memory().as_ref()?.limit()?;
    u64::try_from(limit).ok().filter(|&limit| limit > 0)
}

/// So many bytes, and what the guest's kernel keeps of them: `struct page`, 64 bytes for each 4 KiB.
pub(crate) fn with_page_table(bytes: u64) -> u64 {
    bytes.saturating_add(bytes / 64)
}

/// How many CPUs are in a list as of cpuset(7): `0-2,7`. What is no such list counts nothing: the kernel refuses it.
fn count(list: &str) -> u32 {
    let range = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        last.checked_sub(first)?.checked_add(1)
    };
    list.split(',').filter_map(range).fold(0, u32::saturating_add)
}

/// What the host has: the most that a machine can be.
pub(crate) fn host() -> Size {
    // Not `available_parallelism`: that is what the container's cgroup, in which this process is, leaves of it.
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    let memory = rustix::system::sysinfo();
    let memory_mib = memory.totalram.saturating_mul(memory.mem_unit.into()) / MIB;
    Size {
        vcpus: count(online.trim()).max(1),
        memory_mib: u32::try_from(memory_mib).unwrap_or(u32::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::{Size, count, size};
    use crate::config::SandboxConfig;
    use protocol::oci::LinuxResources;
    use serde_json::{Value, json};

    fn sized(all: &[Value]) -> (u32, u32) {
        let config = SandboxConfig {
            vcpus: 1,
            memory_mib: 2048,
            guest_overhead_mib: 128,
            ..SandboxConfig::default()
        };
        let all: Vec<Option<LinuxResources>> =
            all.iter().map(|json| serde_json::from_value(json.clone()).unwrap()).collect();
        let size = size(&all, &config, Size { vcpus: 4, memory_mib: 16384 });
        (size.vcpus, size.memory_mib)
    }

    #[test]
    fn a_machine_has_whole_cpus_and_room_for_its_kernel() {
        let cases = [
            (json!(null), (1, 2048)),
            (json!({}), (1, 2048)),
            (json!({"cpu": {"quota": 150_000, "period": 100_000}}), (2, 2048)),
            (json!({"cpu": {"quota": 9_900_000}}), (4, 2048)),
            (json!({"cpu": {"quota": -1}}), (1, 2048)),
            (json!({"cpu": {"cpus": "0,2-3"}}), (3, 2048)),
            (json!({"cpu": {"cpus": "0-3", "quota": 200_000}}), (2, 2048)),
            (json!({"memory": {"limit": 268_435_456}}), (1, 2048)),
            (json!({"memory": {"limit": 2_147_483_648_u64}}), (1, 3072)),
            // 8 GiB less what the kernel needs beside it, and what it needs for 8 GiB of pages.
            (json!({"memory": {"limit": (8192_u64 - 128) << 20}}), (1, 9216)),
            (json!({"memory": {"limit": 1_u64 << 50}}), (1, 16384)),
            (json!({"memory": {"limit": -1}}), (1, 2048)),
        ];
        for (json, expected) in cases {
            assert_eq!(sized(std::slice::from_ref(&json)), expected, "{json}");
        }
        assert_eq!(sized(&[]), (1, 2048));
    }

    #[test]
    fn several_containers_have_room_beside_each_other() {
        let limited = json!({"cpu": {"quota": 60_000}, "memory": {"limit": 2_147_483_648_u64}});
        assert_eq!(sized(&[limited.clone(), limited.clone()]), (2, 5120));
        assert_eq!(sized(&[limited.clone(), json!({}), json!({})]), (2, 5120));
        assert_eq!(sized(&[json!({}), json!({})]), (1, 2048));
    }

    #[test]
    fn a_list_of_cpus_is_counted() {
        let table = [("0", 1), ("0-3", 4), ("0,2-3, 7", 4), ("", 0), ("x", 0), ("3-1", 0)];
        for (list, expected) in table {
            assert_eq!(count(list), expected, "{list:?}");
        }
        assert_eq!(count("0-4294967295"), 0);
    }
}
