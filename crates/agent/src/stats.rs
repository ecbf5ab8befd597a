//! What a container uses, and the processes that it has.

use std::collections::HashMap;
use std::fs;

use protocol::agent::{BlockStats, GuestProcess, InterfaceStats, StatsResponse};

use crate::cgroup::{Cgroup, field};

/// Reads a container's counters. What the kernel does not count is 0.
pub(crate) fn container(cgroup: &Cgroup) -> StatsResponse {
    let read = |file: &str| cgroup.read(file).unwrap_or_default();
    let number = |file: &str| read(file).trim().parse().unwrap_or_default();
    let cpu = read("cpu.stat");
    let count = |name: &str| field(&cpu, name).unwrap_or_default();
    StatsResponse {
        cpu_usage_us: count("usage_usec"),
        cpu_user_us: count("user_usec"),
        cpu_system_us: count("system_usec"),
        cpu_periods: count("nr_periods"),
        cpu_throttled_periods: count("nr_throttled"),
        cpu_throttled_us: count("throttled_usec"),
        memory_usage: number("memory.current"),
        // "max" is no number, and no limit.
        memory_limit: number("memory.max"),
        memory_peak: number("memory.peak"),
        swap_usage: number("memory.swap.current"),
        memory_stat: name_values(&read("memory.stat")),
        pids: number("pids.current"),
        pids_limit: number("pids.max"),
        oom_kills: cgroup.oom_kills(),
        io: read("io.stat").lines().filter_map(block).collect(),
        interfaces: interfaces(&fs::read_to_string("/proc/net/dev").unwrap_or_default()),
        ..StatsResponse::default()
    }
}

fn name_values(text: &str) -> HashMap<String, u64> {
    let pairs = text.lines().filter_map(|line| line.split_once(' '));
    pairs.filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?))).collect()
}

/// A line of io.stat: `254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`.
fn block(line: &str) -> Option<BlockStats> {
    let mut words = line.split_whitespace();
    let (major, minor) = words.next()?.split_once(':')?;
    let values: HashMap<_, _> = words.filter_map(|word| word.split_once('=')).collect();
    let value = |name: &str| values.get(name).and_then(|text| text.parse().ok()).unwrap_or(0);
    Some(BlockStats {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        read_bytes: value("rbytes"),
        write_bytes: value("wbytes"),
        reads: value("rios"),
        writes: value("wios"),
        ..BlockStats::default()
    })
}

/// The lines of /proc/net/dev after its two of heading, see proc_pid_net(5); without the loopback.
fn interfaces(text: &str) -> Vec<InterfaceStats> {
    let lines = text.lines().skip(2).filter_map(|line| line.split_once(':'));
    let all = lines.map(|(name, counters)| {
        let counters: Vec<u64> =
            counters.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let at = |place: usize| counters.get(place).copied().unwrap_or_default();
        InterfaceStats {
            name: name.trim().to_owned(),
            rx_bytes: at(0),
            rx_packets: at(1),
            rx_errors: at(2),
            rx_dropped: at(3),
            tx_bytes: at(8),
            tx_packets: at(9),
            tx_errors: at(10),
            tx_dropped: at(11),
            ..InterfaceStats::default()
        }
    });
    all.filter(|interface| interface.name != "lo").collect()
}

/// The container's processes; those that end meanwhile are left out.
pub(crate) fn processes(cgroup: &Cgroup) -> Vec<GuestProcess> {
    cgroup.processes().into_iter().filter_map(process).collect()
}

fn process(pid: u32) -> Option<GuestProcess> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    parse(pid, &stat, &status, &command)
}

fn parse(pid: u32, stat: &str, status: &str, command: &[u8]) -> Option<GuestProcess> {
    // The name, field 2 of proc_pid_stat(5), may hold spaces and brackets.
    let (start, end) = (stat.find('(')?, stat.rfind(')')?);
    let name = stat.get(start + 1..end)?;
    let fields: Vec<&str> = stat.get(end + 2..)?.split_whitespace().collect();
    // Counted as the manual does, from 1.
    let at = |number: usize| fields.get(number - 3).copied();
    let ticks = |number: usize| at(number).and_then(|text| text.parse::<u64>().ok());
    let uid = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    let command: Vec<_> = command.split(|&byte| byte == 0).map(String::from_utf8_lossy).collect();
    let command = command.join(" ").trim_end().to_owned();
    Some(GuestProcess {
        pid,
        ppid: at(4)?.parse().ok()?,
        uid: uid.split_whitespace().next()?.parse().ok()?,
        cpu_ms: (ticks(14)? + ticks(15)?) * MS_A_TICK,
        start_ms: ticks(22)? * MS_A_TICK,
        tty: terminal(at(7)?.parse().ok()?),
        command: if command.is_empty() { format!("[{name}]") } else { command },
        ..GuestProcess::default()
    })
}

/// USER_HZ is 100 on every architecture that we run on.
const MS_A_TICK: u64 = 10;

/// The name of a controlling terminal, as ps(1) says it.
fn terminal(device: u64) -> String {
    let (major, minor) = (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xf_ff00);
    match major {
        0 => "?".to_owned(),
        136..144 => format!("pts/{}", (major - 136) * 256 + minor),
        _ => format!("{major}:{minor}"),
    }
}

#[cfg(test)]
mod tests {
    use super::{block, interfaces, parse};

    #[test]
    fn a_process_with_a_strange_name_is_read() {
        let stat = "12 (a) b (c) S 1 12 12 34816 12 4194304 1 0 0 0 7 3 0 0 20 0 1 0 500 0 0";
        let process = parse(12, stat, "Name:\ta\nUid:\t33\t33\t33\t33\n", b"").unwrap();
        assert_eq!((process.ppid, process.uid), (1, 33));
        assert_eq!((process.cpu_ms, process.start_ms), (100, 5000));
        assert_eq!((process.tty.as_str(), process.command.as_str()), ("pts/0", "[a) b (c]"));
        let process = parse(12, stat, "Uid:\t0\n", b"sleep\x0010\0").unwrap();
        assert_eq!(process.command, "sleep 10");
    }

    #[test]
    fn counters_are_at_their_places() {
        let text = "Inter-|   Receive\n face |bytes\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  \
                    eth0: 10 2 3 4 0 0 0 0 50 6 7 8 0 0 0 0\n";
        let all = interfaces(text);
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].rx_bytes, all[0].rx_dropped, all[0].tx_bytes), (10, 4, 50));
        let disk = block("254:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0").unwrap();
        assert_eq!((disk.major, disk.minor, disk.writes), (254, 16, 4));
    }
}
