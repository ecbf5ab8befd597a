//! Limits, in the files of v1 and of v2.

use std::fs;
use std::path::Path;

use super::{Cgroup, Directory, Error};

/// Limits on the host processes of a sandbox. What is `None` or empty is left as it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Limits {
    /// The most memory, in bytes, everything of the sandbox counted. -1: no limit.
    pub memory: Option<i64>,
    /// The most memory and swap together, in bytes, as in the OCI spec. -1: no limit.
    pub memory_swap: Option<i64>,
    /// Below this many bytes memory is reclaimed last. -1: no such mark.
    pub memory_reservation: Option<i64>,
    /// A relative share of CPU time, 2 to 262144, in v1's terms.
    pub cpu_shares: Option<u64>,
    /// CPU time in microseconds in every period. -1: no limit.
    pub cpu_quota: Option<i64>,
    /// The length of a period in microseconds.
    pub cpu_period: Option<u64>,
    /// CPUs to run on, a list as in cpuset(7): `0-2,7`.
    pub cpuset_cpus: Option<String>,
    /// Memory nodes to use, a list as in cpuset(7).
    pub cpuset_mems: Option<String>,
    /// A relative share of disk time, 10 to 1000, in v1's terms.
    pub blkio_weight: Option<u16>,
    /// Limits of single disks.
    pub blkio_throttles: Vec<Throttle>,
}

/// A limit of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Throttle {
    /// The disk's major and minor device numbers.
    pub device: (i64, i64),
    /// What is limited.
    pub what: Throttled,
    /// How many of it a second.
    pub rate: u64,
}

/// What a [`Throttle`] limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Throttled {
    /// Bytes read.
    ReadBytes,
    /// Bytes written.
    WriteBytes,
    /// Reads.
    Reads,
    /// Writes.
    Writes,
}

pub(super) fn apply(cgroup: &Cgroup, limits: &Limits) -> Result<(), Error> {
    memory(cgroup, limits)?;
    cpu(cgroup, limits)?;
    cpuset(cgroup, limits)?;
    blkio(cgroup, limits)
}

/// The directory of a controller that a limit needs.
fn needed<'a>(
    cgroup: &'a Cgroup,
    resource: &'static str,
    controller: &str,
) -> Result<&'a Directory, Error> {
    cgroup.controller(controller).ok_or_else(|| Error::Unsupported {
        resource,
        problem: format!("this host has no cgroup controller `{controller}` for it"),
    })
}

fn write(path: &Path, value: &str) -> Result<(), Error> {
    fs::write(path, value).map_err(|source| Error::Set {
        path: path.to_owned(),
        value: value.to_owned(),
        source,
    })
}

/// 0 is how Docker says "not set".
fn given<T: PartialEq + From<u8>>(value: Option<T>) -> Option<T> {
    value.filter(|value| *value != T::from(0))
}

fn memory(cgroup: &Cgroup, limits: &Limits) -> Result<(), Error> {
    let (limit, swap) = (given(limits.memory), given(limits.memory_swap));
    let reservation = given(limits.memory_reservation);
    if limit.is_none() && swap.is_none() && reservation.is_none() {
        return Ok(());
    }
    let directory = needed(cgroup, "memory", "memory")?;
    let path = |name: &str| directory.path.join(name);
    if directory.unified {
        if let Some(swap) = swap {
            let problem =
                "a limit of memory and swap needs a limit of memory, and not a larger one";
            let value = match (swap, limit) {
                (-1, _) => "max".to_owned(),
                (swap, Some(limit)) if limit > 0 && swap >= limit => (swap - limit).to_string(),
                _ => return Err(unsupported("memory", problem)),
            };
            // Not there without swap accounting; then there is nothing to limit.
            let swap_max = path("memory.swap.max");
            if swap_max.exists() {
                write(&swap_max, &value)?;
            }
        }
        if let Some(limit) = limit {
            write(&path("memory.max"), &or_max(limit))?;
        }
        return reservation.map_or(Ok(()), |low| write(&path("memory.low"), &or_max(low)));
    }
    let both = path("memory.memsw.limit_in_bytes");
    if swap.is_some_and(|swap| swap > 0) && !both.exists() {
        return Err(unsupported("memory and swap", "this host's kernel does not account swap"));
    }
    let set_limit =
        || limit.map_or(Ok(()), |limit| write(&path("memory.limit_in_bytes"), &limit.to_string()));
    let set_both = || match swap.filter(|_| both.exists()) {
        Some(swap) => write(&both, &swap.to_string()),
        None => Ok(()),
    };
    // memsw must never be below the other: which goes first depends on whether they grow or shrink.
    if set_limit().is_ok() {
        set_both()?;
    } else {
        set_both()?;
        set_limit()?;
    }
    let soft = path("memory.soft_limit_in_bytes");
    reservation.map_or(Ok(()), |bytes| write(&soft, &bytes.to_string()))
}

fn unsupported(resource: &'static str, problem: &str) -> Error {
    Error::Unsupported { resource, problem: problem.to_owned() }
}

fn or_max(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

fn cpu(cgroup: &Cgroup, limits: &Limits) -> Result<(), Error> {
    let shares = given(limits.cpu_shares);
    let (quota, period) = (given(limits.cpu_quota), given(limits.cpu_period));
    if shares.is_none() && quota.is_none() && period.is_none() {
        return Ok(());
    }
    let directory = needed(cgroup, "cpu", "cpu")?;
    let path = |name: &str| directory.path.join(name);
    if directory.unified {
        if let Some(shares) = shares {
            write(&path("cpu.weight"), &weight_of_shares(shares).to_string())?;
        }
        return if quota.is_none() && period.is_none() {
            Ok(())
        } else {
            let max = path("cpu.max");
            let now = fs::read_to_string(&max).unwrap_or_default();
            write(&max, &cpu_max(&now, quota, period))
        };
    }
    if let Some(shares) = shares {
        write(&path("cpu.shares"), &shares.to_string())?;
    }
    let set_period =
        || period.map_or(Ok(()), |period| write(&path("cpu.cfs_period_us"), &period.to_string()));
    let set_quota =
        || quota.map_or(Ok(()), |quota| write(&path("cpu.cfs_quota_us"), &quota.to_string()));
    // Their ratio must not exceed a parent's at any moment: which goes first depends on the old values.
    if set_period().is_ok() {
        set_quota()
    } else {
        set_quota()?;
        set_period()
    }
}

/// What goes into `cpu.max`, given what is there: "quota period".
fn cpu_max(now: &str, quota: Option<i64>, period: Option<u64>) -> String {
    let mut fields = now.split_whitespace();
    let old_quota = fields.next().unwrap_or("max");
    let old_period = fields.next().unwrap_or("100000");
    let quota = quota.map_or(old_quota.to_owned(), or_max);
    let period = period.map_or(old_period.to_owned(), |period| period.to_string());
    format!("{quota} {period}")
}

/// From v1's 2..262144 to v2's 1..10000, as all OCI runtimes convert it.
fn weight_of_shares(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

fn cpuset(cgroup: &Cgroup, limits: &Limits) -> Result<(), Error> {
    let given = |list: &Option<String>| list.clone().filter(|list| !list.trim().is_empty());
    for (name, list) in
        [("cpuset.cpus", given(&limits.cpuset_cpus)), ("cpuset.mems", given(&limits.cpuset_mems))]
    {
        if let Some(list) = list {
            let directory = needed(cgroup, "cpuset", "cpuset")?;
            write(&directory.path.join(name), &list)?;
        }
    }
    Ok(())
}

fn blkio(cgroup: &Cgroup, limits: &Limits) -> Result<(), Error> {
    let weight = given(limits.blkio_weight);
    if weight.is_none() && limits.blkio_throttles.is_empty() {
        return Ok(());
    }
    let v1 = cgroup.controller("blkio");
    let directory = v1.map_or_else(|| needed(cgroup, "blkio", "io"), Ok)?;
    if let Some(weight) = weight {
        let converted = 1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9999 / 990;
        let bfq = u64::from(weight);
        let names: [(&str, u64); 2] = if directory.unified {
            [("io.bfq.weight", bfq), ("io.weight", converted)]
        } else {
            [("blkio.weight", bfq), ("blkio.bfq.weight", bfq)]
        };
        let (name, value) =
            names.iter().find(|(name, _)| directory.path.join(name).exists()).ok_or_else(|| {
                unsupported("blkio weight", "no I/O scheduler of this host's kernel knows weights")
            })?;
        write(&directory.path.join(name), &value.to_string())?;
    }
    for throttle in &limits.blkio_throttles {
        let (name, value) = throttle.line(directory.unified);
        let path = directory.path.join(name);
        if !path.exists() {
            return Err(unsupported("blkio", "this host's kernel cannot throttle disks"));
        }
        write(&path, &value)?;
    }
    Ok(())
}

impl Throttle {
    /// The file and the line to write to it.
    fn line(&self, unified: bool) -> (&'static str, String) {
        let ((major, minor), rate) = (self.device, self.rate);
        let (v1, v2) = match self.what {
            Throttled::ReadBytes => ("blkio.throttle.read_bps_device", "rbps"),
            Throttled::WriteBytes => ("blkio.throttle.write_bps_device", "wbps"),
            Throttled::Reads => ("blkio.throttle.read_iops_device", "riops"),
            Throttled::Writes => ("blkio.throttle.write_iops_device", "wiops"),
        };
        match (unified, rate) {
            (true, 0) => ("io.max", format!("{major}:{minor} {v2}=max")),
            (true, _) => ("io.max", format!("{major}:{minor} {v2}={rate}")),
            (false, _) => (v1, format!("{major}:{minor} {rate}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Throttle, Throttled, cpu_max, weight_of_shares};

    #[test]
    fn cpu_max_keeps_what_was_not_given() {
        assert_eq!(cpu_max("max 100000\n", Some(150_000), None), "150000 100000");
        assert_eq!(cpu_max("50000 100000\n", None, Some(20_000)), "50000 20000");
        assert_eq!(cpu_max("50000 100000\n", Some(-1), None), "max 100000");
        assert_eq!(cpu_max("", Some(1000), None), "1000 100000");
    }

    #[test]
    fn shares_become_weights_as_other_runtimes_have_it() {
        let table = [(0, 1), (2, 1), (1024, 39), (262_144, 10_000), (u64::MAX, 10_000)];
        for (shares, weight) in table {
            assert_eq!(weight_of_shares(shares), weight, "{shares}");
        }
    }

    #[test]
    fn a_throttle_has_its_line_in_both_versions() {
        let throttle = Throttle { device: (8, 16), what: Throttled::WriteBytes, rate: 1000 };
        assert_eq!(throttle.line(true), ("io.max", "8:16 wbps=1000".to_owned()));
        assert_eq!(
            throttle.line(false),
            ("blkio.throttle.write_bps_device", "8:16 1000".to_owned())
        );
    }
}
