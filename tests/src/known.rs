//! The known differences: cases that fail on a runtime for a reason. `docs/compatibility.md` tells the same to people.

struct Known {
    suite: &'static str,
    case: &'static str,
    runtime: &'static str,
    reason: &'static str,
}

const KNOWN: &[Known] = &[];

/// Why this case fails on this runtime, where that is known.
pub(crate) fn reason(suite: &str, case: &str, runtime: &str) -> Option<&'static str> {
    KNOWN
        .iter()
        .find(|known| known.suite == suite && known.case == case && known.runtime == runtime)
        .map(|known| known.reason)
}
