//! Names and numbers of signals, signal(7).

/// The number of a signal given as people and programs give it: `SIGTERM`, `TERM`, `term`, `15`, `RTMIN+3`, `SIGRTMAX-1`.
///
/// `None` where there is no such signal. 0, the test for being there, is not one.
#[must_use]
pub fn parse(text: &str) -> Option<u32> {
    if let Ok(number) = text.parse::<u32>() {
        return (1..=LAST).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(&(number, _)) = NAMES.iter().find(|(_, known)| *known == name) {
        return Some(number);
    }
    let offset = |rest: &str, sign: char| match rest {
        "" => Some(0),
        rest => rest.strip_prefix(sign)?.parse::<u32>().ok(),
    };
    let number = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) => FIRST_REAL_TIME.checked_add(offset(rest, '+')?)?,
        (_, Some(rest)) => LAST.checked_sub(offset(rest, '-')?)?,
        _ => return None,
    };
    (FIRST_REAL_TIME..=LAST).contains(&number).then_some(number)
}

/// The name of a signal: `SIGTERM`, `SIGRTMIN+3`. `None` where there is no such signal.
#[must_use]
pub fn name(number: u32) -> Option<String> {
    let known = || NAMES.iter().find(|(known, _)| *known == number);
    match number {
        FIRST_REAL_TIME => Some("SIGRTMIN".to_owned()),
        _ if (FIRST_REAL_TIME..=LAST).contains(&number) => {
            Some(format!("SIGRTMIN+{}", number - FIRST_REAL_TIME))
        }
        _ => known().map(|(_, name)| format!("SIG{name}")),
    }
}

/// glibc keeps 32 and 33 for itself.
const FIRST_REAL_TIME: u32 = 34;
const LAST: u32 = 64;

/// x86 and Arm share these numbers. Where two names share one, the usual one comes first.
const NAMES: [(u32, &str); 35] = [
    (1, "HUP"),
    (2, "INT"),
    (3, "QUIT"),
    (4, "ILL"),
    (5, "TRAP"),
    (6, "ABRT"),
    (6, "IOT"),
    (7, "BUS"),
    (8, "FPE"),
    (9, "KILL"),
    (10, "USR1"),
    (11, "SEGV"),
    (12, "USR2"),
    (13, "PIPE"),
    (14, "ALRM"),
    (15, "TERM"),
    (16, "STKFLT"),
    (17, "CHLD"),
    (17, "CLD"),
    (18, "CONT"),
    (19, "STOP"),
    (20, "TSTP"),
    (21, "TTIN"),
    (22, "TTOU"),
    (23, "URG"),
    (24, "XCPU"),
    (25, "XFSZ"),
    (26, "VTALRM"),
    (27, "PROF"),
    (28, "WINCH"),
    (29, "IO"),
    (29, "POLL"),
    (30, "PWR"),
    (31, "SYS"),
    (31, "UNUSED"),
];

#[cfg(test)]
mod tests {
    use super::{name, parse};

    #[test]
    fn a_signal_is_known_by_number_and_by_name_in_any_case() {
        for text in ["15", "TERM", "term", "SIGTERM", "SigTerm"] {
            assert_eq!(parse(text), Some(15), "{text}");
        }
        assert_eq!(parse("RTMIN+3"), Some(37));
        assert_eq!(parse("SIGRTMAX-1"), Some(63));
        assert_eq!(parse("rtmin"), Some(34));
        for text in
            ["", "0", "65", "-1", "SIG", "FOO", "SIGSIGTERM", "RTMIN+31", "RTMINX", "RTMAX+1"]
        {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn every_name_leads_back_to_its_number() {
        for number in (1..=31).chain(34..=64) {
            assert_eq!(parse(&name(number).unwrap()), Some(number));
        }
        assert_eq!(name(0), None);
        assert_eq!(name(32), None);
    }
}
