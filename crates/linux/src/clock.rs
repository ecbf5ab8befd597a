//! How fast the CPU's time stamp counter runs.

#![expect(unsafe_code, reason = "reading the counter is an intrinsic")]

use rustix::time::{ClockId, clock_gettime};

/// The counter and the time, read at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Reading {
    ticks: u64,
    nanoseconds: u64,
}

impl Reading {
    /// One of now. `None` where the CPU has no such counter.
    #[must_use]
    pub fn now() -> Option<Self> {
        const TRIES: usize = 8;
        // Where the counter was read between two looks at the clock, the best is that between the closest two.
        let readings = (0..TRIES).filter_map(|_| {
            let before = monotonic();
            let ticks = ticks()?;
            let after = monotonic();
            let width = after.saturating_sub(before);
            Some((width, Self { ticks, nanoseconds: before + width / 2 }))
        });
        readings.min_by_key(|(width, _)| *width).map(|(_, reading)| reading)
    }

    /// The frequency in kHz, by this and a later reading. `None` for what no CPU has.
    #[must_use]
    pub fn khz_until(&self, later: &Self) -> Option<u64> {
        const POSSIBLE: std::ops::RangeInclusive<u64> = 100_000..=20_000_000;
        let ticks = u128::from(later.ticks.checked_sub(self.ticks)?);
        let nanoseconds = u128::from(later.nanoseconds.checked_sub(self.nanoseconds)?);
        let khz = u64::try_from((ticks * 1_000_000).checked_div(nanoseconds)?).ok()?;
        POSSIBLE.contains(&khz).then_some(khz)
    }
}

/// Of the clock that nobody steps or slows down.
fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::MonotonicRaw);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default()
}

#[cfg(target_arch = "x86_64")]
#[expect(clippy::unnecessary_wraps, reason = "other CPUs have no such counter")]
fn ticks() -> Option<u64> {
    // SAFETY: every x86-64 CPU has the instruction, and Linux lets everybody use it.
    Some(unsafe { core::arch::x86_64::_rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn ticks() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::{Reading, monotonic};

    #[test]
    fn two_measurements_of_one_counter_agree() {
        let measure = || {
            let from = Reading::now()?;
            let start = monotonic();
            while monotonic() < start + 20_000_000 {}
            from.khz_until(&Reading::now()?)
        };
        let Some((one, other)) = measure().zip(measure()) else {
            println!("SKIPPED: needs a time stamp counter");
            return;
        };
        assert!(one.abs_diff(other) < one / 100, "{one} and {other} kHz");
    }

    #[test]
    fn no_time_is_no_frequency() {
        let reading = Reading { ticks: 7, nanoseconds: 7 };
        assert_eq!(reading.khz_until(&reading), None);
        let earlier = Reading { ticks: 5, nanoseconds: 9 };
        assert_eq!(reading.khz_until(&earlier), None);
    }
}
