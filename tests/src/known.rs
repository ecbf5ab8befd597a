//! The known differences: cases that fail on a runtime for a reason. `docs/compatibility.md` tells the same to people.

struct Known {
    suite: &'static str,
    case: &'static str,
    runtime: &'static str,
    reason: &'static str,
}

const KNOWN: &[Known] = &[
    Known {
        suite: "oci",
        case: "ro leaves what is mounted below writable",
        runtime: "kata-runtime",
        reason: "the guest's kernel makes mounts below a read-only bind when they are first looked at, with its flags",
    },
    Known {
        suite: "oci",
        case: "hooks run at their time with the state on stdin",
        runtime: "runc",
        reason: "runc 1.1 runs poststart hooks at the end of create; the specification wants them after start",
    },
    Known {
        suite: "oci",
        case: "a grandchild that keeps stdout open does not delay the exit",
        runtime: "runc",
        reason: "runc's foreground exec waits for the end of its pipes, not for the program",
    },
    Known {
        suite: "oci",
        case: "an ociVersion of another major version is refused",
        runtime: "runc",
        reason: "runc does not look at ociVersion",
    },
    Known {
        suite: "oci",
        case: "a full disk under the state directory is a clear error",
        runtime: "runc",
        reason: "runc 1.1 fails, but says `%!w(<nil>)`",
    },
    Known {
        suite: "crash",
        case: "the command killed at ten moments of create",
        runtime: "runc",
        reason: "runc 1.1 leaves cgroups when it is killed before it has written its state",
    },
    Known {
        suite: "crash",
        case: "the command killed at moments of run",
        runtime: "runc",
        reason: "runc 1.1 leaves cgroups when it is killed before it has written its state",
    },
];

/// Why this case fails on this runtime, where that is known.
pub(crate) fn reason(suite: &str, case: &str, runtime: &str) -> Option<&'static str> {
    KNOWN
        .iter()
        .find(|known| known.suite == suite && known.case == case && known.runtime == runtime)
        .map(|known| known.reason)
}
