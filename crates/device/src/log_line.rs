//! The libraries' complaints, a line each on stderr.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU32, Ordering};

use log::{LevelFilter, Log, Metadata, Record};

/// A guest can cause complaints at will: there are no more than this.
const MOST_LINES: u32 = 100;

struct Stderr {
    lines: AtomicU32,
}

static STDERR: Stderr = Stderr { lines: AtomicU32::new(0) };

impl Log for Stderr {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let before = self.lines.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |lines| {
            (lines < MOST_LINES).then_some(lines + 1)
        });
        let Ok(before) = before else { return };
        let last = if before + 1 == MOST_LINES { " (no more is logged)" } else { "" };
        // What the guest named must not reach a terminal as it is.
        let text = record.args().to_string();
        drop(writeln!(io::stderr(), "kata device: {}{last}", text.escape_debug()));
    }

    fn flush(&self) {}
}

/// Has warnings and errors of the libraries on stderr.
pub(crate) fn start() {
    if log::set_logger(&STDERR).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}

/// Has a panic of any thread end the process: a device that lost a thread would be silent for ever.
pub(crate) fn end_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        log::error!("{panic}");
        std::process::abort();
    }));
}
