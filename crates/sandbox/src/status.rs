//! Where a container is in its life, and what may be done to it there.
//!
//! The OCI runtime spec names four statuses ([runtime.md, "State"]); `Paused` is every runtime's addition. What each status
//! allows is decided here and nowhere else. Where runc is kinder than the spec we do as runc does, and say so at the
//! line; how a refusal is worded is runc's too, since containerd and Docker read it.
//!
//! [runtime.md, "State"]: https://github.com/opencontainers/runtime-spec/blob/v1.2.0/runtime.md#state

use std::fmt;

use serde::{Deserialize, Serialize};

/// A container's status, spelled as `state` prints it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// `create` has begun and not finished.
    Creating,
    /// Everything is set up; the user's program has not run.
    Created,
    /// The user's program has run and has not exited.
    Running,
    /// Running, with its processes frozen in the guest.
    Paused,
    /// The user's program has exited, or its sandbox has gone.
    Stopped,
}

/// Something a caller may ask of a container: the OCI or runc command of that name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the command of that name")]
pub enum Operation {
    Start,
    Exec,
    Kill,
    Pause,
    Resume,
    Update,
    Ps,
    Events,
    Delete,
    ForceDelete,
}

impl Status {
    /// Whether `operation` is lawful on a container in this status.
    #[must_use]
    pub fn allows(self, operation: Operation) -> bool {
        use Operation as Op;
        use Status as St;
        match operation {
            Op::Start => self == St::Created,
            // runc lets a process join before the user's program starts; so do we.
            Op::Exec => matches!(self, St::Created | St::Running),
            Op::Kill => matches!(self, St::Created | St::Running | St::Paused),
            Op::Pause => matches!(self, St::Created | St::Running),
            Op::Resume => self == St::Paused,
            Op::Update | Op::Ps | Op::Events => {
                matches!(self, St::Created | St::Running | St::Paused)
            }
            // The spec allows `delete` only on a stopped container. runc also deletes a created one, killing it first, and
            // containerd relies on that after a failed `start`.
            Op::Delete => matches!(self, St::Created | St::Stopped),
            Op::ForceDelete => true,
        }
    }

    /// runc's words for why `operation` is not lawful now. Readers: containerd's runc shim (`process/utils.go`:
    /// "container not running", "process already finished") and CRI-O.
    #[must_use]
    pub(crate) fn refusal(self, operation: Operation, id: &str) -> String {
        match (operation, self) {
            (Operation::Start, Self::Stopped) => "cannot start a container that has stopped".into(),
            (Operation::Start, _) => "cannot start an already running container".into(),
            (Operation::Exec, Self::Paused) => "cannot exec in a paused container".into(),
            (Operation::Exec, _) => "cannot exec in a container that has stopped".into(),
            (Operation::Resume, _) => "container not paused".into(),
            (Operation::Pause, Self::Paused) => "container already paused".into(),
            (Operation::Delete, _) => {
                format!("cannot delete container {id} that is not stopped: {self}")
            }
            _ => "container not running".into(),
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Operation as Op, Status as St};

    /// The whole table, so that a reviewer can hold it against the spec at a glance.
    const LAWFUL: &str = "
                 start exec kill pause resume update ps events delete force
        creating   -    -    -     -      -     -     -    -     -      x
        created    x    x    x     x      -     x     x    x     x      x
        running    -    x    x     x      -     x     x    x     -      x
        paused     -    -    x     -      x     x     x    x     -      x
        stopped    -    -    -     -      -     -     -    -     x      x
    ";

    #[test]
    fn every_operation_in_every_status() {
        let statuses = [St::Creating, St::Created, St::Running, St::Paused, St::Stopped];
        let operations = [
            Op::Start,
            Op::Exec,
            Op::Kill,
            Op::Pause,
            Op::Resume,
            Op::Update,
            Op::Ps,
            Op::Events,
            Op::Delete,
            Op::ForceDelete,
        ];
        let rows = LAWFUL.trim().lines().skip(1);
        assert_eq!(rows.clone().count(), statuses.len());
        for (status, row) in statuses.into_iter().zip(rows) {
            let mut cells = row.split_whitespace();
            assert_eq!(cells.next(), Some(status.to_string().as_str()));
            for operation in operations {
                let lawful = cells.next() == Some("x");
                assert_eq!(status.allows(operation), lawful, "{operation:?} while {status}");
            }
        }
    }

    #[test]
    fn refusals_hold_the_words_that_clients_parse() {
        assert!(St::Stopped.refusal(Op::Kill, "c").contains("container not running"));
        assert_eq!(
            St::Running.refusal(Op::Delete, "c"),
            "cannot delete container c that is not stopped: running"
        );
    }
}
