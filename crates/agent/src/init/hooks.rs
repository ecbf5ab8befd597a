//! The `startContainer` hooks: the only ones that run in the guest.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use protocol::oci::{Hook, Spec};
use serde_json::json;

use super::failure::{During, Failure};
use super::program::Program;

/// Runs them in the container, one after the other, just before the user's program.
pub(super) fn start_container(spec: &Spec, id: &str, program: &Program) -> Result<(), Failure> {
    let hooks = spec.hooks().as_ref().and_then(|hooks| hooks.start_container().as_ref());
    for (number, hook) in hooks.into_iter().flatten().enumerate() {
        run(hook, spec, id, program).map_err(|failure| {
            Failure(format!("error running startContainer hook #{number}: {}", failure.0))
        })?;
    }
    Ok(())
}

fn run(hook: &Hook, spec: &Spec, id: &str, program: &Program) -> Result<(), Failure> {
    let state = json!({
        "ociVersion": spec.version(),
        "id": id,
        "status": "created",
        "pid": std::process::id(),
        "bundle": "",
        "annotations": spec.annotations().clone().unwrap_or_default(),
    });
    let mut command = Command::new(hook.path());
    if let Some((name, arguments)) = hook.args().as_deref().and_then(<[_]>::split_first) {
        command.arg0(name).args(arguments);
    }
    let environment = hook.env().as_ref().unwrap_or(&program.environment);
    let pairs = environment.iter().filter_map(|line| line.split_once('='));
    command.env_clear().envs(pairs).stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = command.spawn().during(|| format!("exec {}", hook.path().display()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook need not read it.
        drop(stdin.write_all(state.to_string().as_bytes()));
    }
    let status = wait(&mut child, hook.timeout())?;
    if status.success() { Ok(()) } else { Err(Failure(status.to_string())) }
}

fn wait(
    child: &mut std::process::Child,
    timeout: Option<i64>,
) -> Result<std::process::ExitStatus, Failure> {
    let action = || "wait for it".to_owned();
    if let Some(seconds) = timeout.filter(|&seconds| seconds > 0) {
        let pid = rustix::process::Pid::from_child(child);
        let fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
            .during(action)?;
        let mut polled = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec { tv_sec: seconds, tv_nsec: 0 };
        if rustix::event::poll(&mut polled, Some(&limit)).during(action)? == 0 {
            child.kill().during(|| "kill it".to_owned())?;
            child.wait().during(action)?;
            return Err(Failure(format!("took longer than {seconds} s")));
        }
    }
    child.wait().during(action)
}
