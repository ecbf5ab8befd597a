//! Waiting, always with a deadline.

use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Asks again and again until `question` has an answer, for facts that no event tells of.
///
/// # Errors
///
/// The question's own error, at once; or, after `deadline`, one that says `what` did not happen.
pub fn eventually<T>(
    deadline: Duration,
    what: &str,
    mut question: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let end = Instant::now() + deadline;
    let mut pause = Duration::from_millis(5);
    loop {
        if let Some(answer) = question()? {
            return Ok(answer);
        }
        if Instant::now() >= end {
            bail!("{what}: not within {deadline:?}");
        }
        #[expect(clippy::disallowed_methods, reason = "the one place where tests may poll")]
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(200));
    }
}

/// Waits until `fd` can be read, or has ended; `false` after `deadline`.
///
/// # Errors
///
/// What poll(2) says.
pub fn readable(fd: impl AsFd, deadline: Duration) -> Result<bool> {
    let end = Instant::now() + deadline;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: i64::try_from(left.as_secs())?,
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)) {
            Ok(count) => return Ok(count > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The host's free memory, in MiB.
///
/// # Errors
///
/// When `/proc/meminfo` cannot be read.
pub fn memory_mib() -> Result<u64> {
    let table = std::fs::read_to_string("/proc/meminfo")?;
    let line = table.lines().find(|line| line.starts_with("MemAvailable:")).unwrap_or_default();
    Ok(line.split_whitespace().nth(1).unwrap_or("0").parse::<u64>()? / 1024)
}

#[cfg(test)]
mod tests {
    use super::{eventually, readable};
    use std::io::Write;
    use std::time::Duration;

    #[test]
    fn a_question_without_an_answer_ends_with_words() {
        let error =
            eventually::<()>(Duration::from_millis(1), "pigs fly", || Ok(None)).unwrap_err();
        assert!(error.to_string().starts_with("pigs fly: not within"));
    }

    #[test]
    fn a_pipe_is_readable_once_something_is_in_it() {
        let (read, mut write) = std::io::pipe().unwrap();
        assert!(!readable(&read, Duration::ZERO).unwrap());
        write.write_all(b"x").unwrap();
        assert!(readable(&read, Duration::from_secs(5)).unwrap());
    }
}
