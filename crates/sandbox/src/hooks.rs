//! OCI hooks that run on the host ([config.md, "POSIX-platform Hooks"]).
//!
//! They run in the caller's namespaces, the runtime namespace of the spec, so the short-lived `kata-runtime` process
//! runs them and not the sandbox process, which has left those namespaces.
//!
//! [config.md, "POSIX-platform Hooks"]: https://github.com/opencontainers/runtime-spec/blob/v1.2.0/config.md#posix-platform-hooks

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use linux::process::{Command, read_bounded};
use protocol::oci::Hook;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::Signal;

use crate::error::{Error, from_guest};

/// How long a hook without a timeout of its own may run.
const DEFAULT_TIMEOUT: Duration = Duration::from_mins(2);

/// How much of a failed hook's output its error tells.
const OUTPUT_LIMIT: u64 = 1 << 20;

/// Runs `hooks` one after the other, each with `state` (the container's state, as JSON) as its standard input.
///
/// # Errors
///
/// [`Error::Hook`] of the first that fails or does not end in time; those after it do not run.
pub(crate) fn run(when: &'static str, hooks: &[Hook], state: &[u8]) -> Result<(), Error> {
    hooks.iter().try_for_each(|hook| {
        run_one(hook, state).map_err(|what| Error::Hook { when, path: hook.path().clone(), what })
    })
}

fn run_one(hook: &Hook, state: &[u8]) -> Result<(), String> {
    if !hook.path().is_absolute() {
        return Err("its path is not absolute".into());
    }
    let mut input = memory_file()?;
    input.write_all(state).and_then(|()| input.rewind()).map_err(|error| error.to_string())?;
    let mut output = memory_file()?;
    let to_output = || output.try_clone().map(OwnedFd::from).map(Stdio::from);

    let mut command = Command::new(hook.path());
    if let Some(args) = hook.args() {
        if let Some(name) = args.first() {
            command.name(name);
        }
        command.args(args.iter().skip(1));
    }
    let environment = hook.env().iter().flatten();
    command
        .environment(environment.filter_map(|variable| variable.split_once('=')))
        .directory(Path::new("/"))
        .stdio(
            OwnedFd::from(input).into(),
            to_output().map_err(|error| error.to_string())?,
            to_output().map_err(|error| error.to_string())?,
        );
    let mut child = command.spawn().map_err(|error| error.to_string())?;

    let timeout = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok())
        .map_or(DEFAULT_TIMEOUT, Duration::from_secs);
    let limit = Timespec::try_from(timeout).map_err(|_| "its timeout is too long".to_owned())?;
    let ended = poll(&mut [PollFd::new(&child.pidfd(), PollFlags::IN)], Some(&limit));
    if !matches!(ended, Ok(1..)) {
        child.signal(Signal::KILL).map_err(|error| error.to_string())?;
        child.wait().map_err(|error| error.to_string())?;
        return Err(format!("it did not end within {} s", timeout.as_secs()));
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    if status.success() {
        return Ok(());
    }
    let written = output
        .rewind()
        .and_then(|()| read_bounded(&mut output, OUTPUT_LIMIT))
        .map(|bytes| from_guest(String::from_utf8_lossy(&bytes).trim()))
        .unwrap_or_default();
    Err(format!("{status}, output: {written}"))
}

fn memory_file() -> Result<File, String> {
    memfd_create("hook", MemfdFlags::CLOEXEC).map(File::from).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::run;
    use protocol::oci::Hook;

    fn shell(script: &str, timeout: i64) -> Hook {
        let json = serde_json::json!({
            "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["WHO=hook"], "timeout": timeout,
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_hook_reads_the_state_and_has_its_own_environment() {
        let hook = shell(r#"read line; test "$line" = state && test "$WHO" = hook"#, 10);
        run("prestart", &[hook], b"state\n").unwrap();
    }

    #[test]
    fn a_failed_hook_is_told_with_its_words_and_stops_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("mark");
        let second = shell(&format!("touch {}", mark.display()), 10);
        let error =
            run("prestart", &[shell("echo no bridge >&2; exit 3", 10), second], b"").unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("prestart") && text.contains("no bridge") && text.contains('3'),
            "{text}"
        );
        assert!(!mark.exists());
    }

    #[test]
    fn a_hook_that_hangs_is_killed() {
        let error = run("poststop", &[shell("sleep 600", 1)], b"").unwrap_err();
        assert!(error.to_string().contains("did not end within 1 s"));
    }
}
