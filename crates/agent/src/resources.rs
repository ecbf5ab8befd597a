//! From the OCI spec's resources, which are of cgroup version 1, to the files of version 2.

use std::fmt::Display;

use protocol::oci::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use crate::error::Error;

/// A value to write to a file of a cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    pub(crate) file: String,
    pub(crate) value: String,
    /// Whether the container can run as well without it: a device or a weight that this guest does not have.
    pub(crate) optional: bool,
}

fn setting(file: &str, value: impl Display) -> Setting {
    Setting { file: file.to_owned(), value: format!("{value}"), optional: false }
}

fn optional(file: &str, value: impl Display) -> Setting {
    Setting { optional: true, ..setting(file, value) }
}

/// What to write for the members of `resources` that are there, in order. `current` reads a file as it is now.
///
/// # Errors
///
/// When they contradict each other.
pub(crate) fn settings(
    resources: &LinuxResources,
    current: impl Fn(&str) -> Option<String>,
) -> Result<Vec<Setting>, Error> {
    let mut settings = Vec::new();
    if let Some(cpu) = resources.cpu() {
        add_cpu(cpu, &current, &mut settings);
    }
    if let Some(memory) = resources.memory() {
        add_memory(memory, &current, &mut settings)?;
    }
    if let Some(pids) = resources.pids() {
        settings.push(setting("pids.max", limit(Some(pids.limit()).filter(|&limit| limit > 0))));
    }
    if let Some(block) = resources.block_io() {
        add_block_io(block, &mut settings);
    }
    for huge in resources.hugepage_limits().iter().flatten() {
        settings.push(setting(&format!("hugetlb.{}.max", huge.page_size()), huge.limit()));
        // Not in every kernel; where it is, it is what makes the limit hold for reservations.
        settings.push(optional(&format!("hugetlb.{}.rsvd.max", huge.page_size()), huge.limit()));
    }
    for (file, value) in resources.unified().iter().flatten() {
        if file.contains('/') || !file.contains('.') {
            return Err(Error::Invalid(format!("unified resource {file:?} is not a file's name")));
        }
        settings.push(setting(file, value));
    }
    Ok(settings)
}

fn limit<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "max".to_owned(), |value| value.to_string())
}

/// cgroup 1's 2..262144 onto cgroup 2's 1..10000, as runc does.
fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

fn add_cpu(cpu: &LinuxCpu, current: &impl Fn(&str) -> Option<String>, settings: &mut Vec<Setting>) {
    if let Some(idle) = cpu.idle() {
        settings.push(setting("cpu.idle", idle));
    }
    // 0 is "not given".
    if let Some(shares) = cpu.shares().filter(|&shares| shares > 0) {
        settings.push(setting("cpu.weight", weight_of_shares(shares)));
    }
    if let Some(burst) = cpu.burst() {
        settings.push(optional("cpu.max.burst", burst));
    }
    let period = cpu.period().filter(|&period| period > 0);
    if cpu.quota().is_some() || period.is_some() {
        let now = current("cpu.max").unwrap_or_default();
        let mut now = now.split_whitespace();
        let (quota_now, period_now) = (now.next().unwrap_or("max"), now.next().unwrap_or("100000"));
        let quota = match cpu.quota() {
            Some(quota) if quota > 0 => quota.to_string(),
            Some(_) => "max".to_owned(),
            None => quota_now.to_owned(),
        };
        let period = period.map_or_else(|| period_now.to_owned(), |period| period.to_string());
        settings.push(setting("cpu.max", format!("{quota} {period}")));
    }
    // The host's CPUs and nodes: where the guest has fewer, it may use all it has.
    for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
            settings.push(optional(file, list));
        }
    }
}

fn add_memory(
    memory: &LinuxMemory,
    current: &impl Fn(&str) -> Option<String>,
    settings: &mut Vec<Setting>,
) -> Result<(), Error> {
    // 0 is "not given", less is "no limit".
    let given = |value: Option<i64>| value.filter(|&value| value != 0);
    let maximum = |value: i64| limit(Some(value).filter(|&value| value > 0));
    let hard = given(memory.limit());
    if let (Some(limit), Some(true)) = (hard, memory.check_before_update()) {
        let used = current("memory.current").and_then(|text| text.trim().parse::<i64>().ok());
        if let Some(used) = used.filter(|&used| limit > 0 && used > limit) {
            return Err(Error::Invalid(format!(
                "the memory limit {limit} is below the usage {used}"
            )));
        }
    }
    // The spec's value is of memory and swap together.
    let swap = match (given(memory.swap()), hard) {
        (None, _) => None,
        (Some(total), _) if total < 0 => Some("max".to_owned()),
        (Some(total), Some(limit)) if limit > 0 && total < limit => {
            return Err(Error::Invalid(format!(
                "memory and swap {total} is below the memory limit {limit}"
            )));
        }
        (Some(total), Some(limit)) if limit > 0 => Some((total - limit).to_string()),
        (Some(_), _) => {
            return Err(Error::Invalid("a swap limit needs a memory limit".to_owned()));
        }
    };
    if let Some(swap) = swap {
        settings.push(optional("memory.swap.max", swap));
    }
    if let Some(limit) = hard {
        settings.push(setting("memory.max", maximum(limit)));
    }
    if let Some(reservation) = given(memory.reservation()) {
        settings.push(setting("memory.low", maximum(reservation)));
    }
    Ok(())
}

fn add_block_io(block: &LinuxBlockIo, settings: &mut Vec<Setting>) {
    if let Some(weight) = block.weight().filter(|&weight| weight > 0) {
        // 10..1000 onto 1..10000, as runc does.
        let weight = 1 + (u64::from(weight).clamp(10, 1000) - 10) * 9_999 / 990;
        settings.push(optional("io.weight", weight));
    }
    let mut throttle = |devices: &Option<Vec<LinuxThrottleDevice>>, name: &str| {
        for device in devices.iter().flatten() {
            let (major, minor) = (device.major(), device.minor());
            let rate = limit(Some(device.rate()).filter(|&rate| rate > 0));
            settings.push(optional("io.max", format!("{major}:{minor} {name}={rate}")));
        }
    };
    throttle(block.throttle_read_bps_device(), "rbps");
    throttle(block.throttle_write_bps_device(), "wbps");
    throttle(block.throttle_read_iops_device(), "riops");
    throttle(block.throttle_write_iops_device(), "wiops");
}

#[cfg(test)]
mod tests {
    use super::settings;
    use serde_json::{Value, json};

    fn written(resources: &Value) -> Vec<(String, String)> {
        let resources = serde_json::from_value(resources.clone()).unwrap();
        let current = |file: &str| (file == "cpu.max").then(|| "20000 50000\n".to_owned());
        let settings = settings(&resources, current).unwrap();
        settings.into_iter().map(|one| (one.file, one.value)).collect()
    }

    fn line(file: &str, value: &str) -> (String, String) {
        (file.to_owned(), value.to_owned())
    }

    #[test]
    fn swap_is_what_exceeds_the_memory_limit() {
        let memory = json!({"memory": {"limit": 1000, "swap": 1500, "reservation": 500}});
        let expected =
            [line("memory.swap.max", "500"), line("memory.max", "1000"), line("memory.low", "500")];
        assert_eq!(written(&memory), expected);
        let none = json!({"memory": {"limit": -1, "swap": -1}});
        assert_eq!(written(&none), [line("memory.swap.max", "max"), line("memory.max", "max")]);
    }

    #[test]
    fn an_update_of_the_quota_keeps_the_period() {
        assert_eq!(written(&json!({"cpu": {"quota": 10000}})), [line("cpu.max", "10000 50000")]);
        assert_eq!(written(&json!({"cpu": {"period": 1000}})), [line("cpu.max", "20000 1000")]);
        assert_eq!(written(&json!({"cpu": {"quota": -1}})), [line("cpu.max", "max 50000")]);
    }

    #[test]
    fn shares_become_the_weight_that_runc_gives() {
        assert_eq!(written(&json!({"cpu": {"shares": 1024}})), [line("cpu.weight", "39")]);
        assert_eq!(written(&json!({"cpu": {"shares": 2}})), [line("cpu.weight", "1")]);
        assert_eq!(written(&json!({"cpu": {"shares": 262_144}})), [line("cpu.weight", "10000")]);
    }

    #[test]
    fn what_is_not_given_is_not_written() {
        assert!(written(&json!({"cpu": {"shares": 0}, "memory": {"limit": 0}})).is_empty());
        assert_eq!(written(&json!({"pids": {"limit": -1}})), [line("pids.max", "max")]);
    }

    #[test]
    fn a_total_below_the_limit_is_refused() {
        let resources = serde_json::from_value(json!({"memory": {"limit": 9, "swap": 5}})).unwrap();
        assert!(settings(&resources, |_| None).is_err());
    }
}
