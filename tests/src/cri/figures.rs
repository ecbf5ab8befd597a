//! What a pod costs: time to its first and second container, and memory. `suites pod-figures`, not part of the tests.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::Result;
use testkit::pods::Pod;
use testkit::residue::Host;

use super::Pods;
use crate::report::Report;

const ROUNDS: usize = 5;

/// Measures one runtime.
pub(super) fn measure(pods: &Pods, name: &str, host: &Host, report: &mut Report) -> Result<()> {
    let before = host.snapshot()?;
    let (mut first, mut second, mut memory) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let began = Instant::now();
        let pod = pods.pod()?;
        pod.run_line("one", "sleep 1000")?;
        first.push(began.elapsed());
        let began = Instant::now();
        pod.run_line("two", "sleep 1000")?;
        second.push(began.elapsed());
        memory.push(proportional_set(&pod)?);
        drop(pod);
        host.expect(&before)?;
    }
    for times in [&mut first, &mut second] {
        times.sort();
    }
    memory.sort_unstable();
    report.say(&format!(
        "{name}: pod with a running container {}, one more container {}, memory of a pod with two {} MiB (medians of {ROUNDS})",
        seconds(first[ROUNDS / 2]),
        seconds(second[ROUNDS / 2]),
        memory[ROUNDS / 2] >> 10,
    ));
    Ok(())
}

fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}

/// What all processes of a pod take, in KiB, what they share counted in parts: proc_pid_smaps(5), Pss. They are found by the
/// pod's cgroup and by its id on the command line.
fn proportional_set(pod: &Pod<'_>) -> Result<u64> {
    let parent = pod.config.linux.cgroup_parent.clone();
    let mut sum = 0;
    for entry in fs::read_dir("/proc")?.flatten() {
        let read = |name| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        let ours = read("cgroup").contains(&parent) || read("cmdline").contains(&pod.id);
        if !ours || !entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let rollup = read("smaps_rollup");
        let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
        let number = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        sum += number.unwrap_or_default();
    }
    Ok(sum)
}
