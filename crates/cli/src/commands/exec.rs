//! `exec`.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use protocol::oci::Process;
use sandbox::{Console, ContainerId, Root};
use serde_json::{Value, json};

use super::run::RawTerminal;
use super::{Context, lifecycle};
use crate::args;

pub(super) fn exec(context: &Context<'_>, args: &args::Exec) -> anyhow::Result<ExitCode> {
    let root = context.root()?;
    let id = ContainerId::new(&args.id)?;
    if args.preserve_fds > 0 {
        bail!(
            "--preserve-fds {}: file descriptors of the host cannot be passed into a VM",
            args.preserve_fds
        );
    }
    let process = match &args.process {
        Some(path) => read_process(path)?,
        None => process_of_flags(&root, &id, args)?,
    };
    let terminal = process.terminal().unwrap_or_default();
    let console = match &args.console_socket {
        Some(socket) => Console::Socket(socket.clone()),
        None => Console::Caller,
    };
    let program = Context::program();
    let request =
        sandbox::Exec { root: &root, id: &id, process: &process, console, program: &program };
    if args.detach {
        if terminal && args.console_socket.is_none() {
            // runc's words.
            bail!("cannot allocate tty if runc will detach without setting console socket");
        }
        let mut child = sandbox::exec_detached(&request)?;
        if let Err(error) = lifecycle::write_pid_file(args.pid_file.as_deref(), child.pid()) {
            drop(child.signal(rustix::process::Signal::KILL));
            drop(child.wait());
            return Err(error);
        }
        return Ok(ExitCode::SUCCESS);
    }
    if args.console_socket.is_some() {
        // conmon's way to a process with a terminal that it waits for.
        let mut child = sandbox::exec_detached(&request)?;
        lifecycle::write_pid_file(args.pid_file.as_deref(), child.pid())?;
        return Ok(ExitCode::from(sandbox::attend(&mut child)?));
    }
    lifecycle::write_pid_file(args.pid_file.as_deref(), std::process::id())?;
    let raw = RawTerminal::new(terminal)?;
    let code = sandbox::exec_here(&request)?;
    drop(raw);
    Ok(ExitCode::from(code))
}

fn read_process(path: &Path) -> anyhow::Result<Process> {
    let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("cannot understand {}", path.display()))
}

/// The container's own process, as the flags change it.
fn process_of_flags(root: &Root, id: &ContainerId, args: &args::Exec) -> anyhow::Result<Process> {
    if args.args.is_empty() {
        bail!("process args cannot be empty: name a program, or a file with --process");
    }
    let mut process = serde_json::to_value(sandbox::exec_defaults(root, id)?)?;
    process["args"] = json!(args.args);
    process["terminal"] = json!(args.tty);
    if let Some(cwd) = &args.cwd {
        process["cwd"] = json!(cwd);
    }
    if args.no_new_privs {
        process["noNewPrivileges"] = json!(true);
    }
    if let Some(user) = &args.user {
        let (uid, gid) = user.split_once(':').unwrap_or((user, "0"));
        let number = |text: &str| {
            text.parse::<u32>().with_context(|| format!("--user {user}: {text:?} is not a number"))
        };
        process["user"] = json!({ "uid": number(uid)?, "gid": number(gid)? });
    }
    if !args.additional_gids.is_empty() {
        process["user"]["additionalGids"] = json!(args.additional_gids);
    }
    add(&mut process["env"], &args.env);
    for cap in &args.cap {
        for set in ["bounding", "effective", "permitted"] {
            add(&mut process["capabilities"][set], std::slice::from_ref(cap));
        }
    }
    serde_json::from_value(process).context("cannot make a process of these flags")
}

/// Adds strings to a list that may not be there; of variables with the same name the last counts.
fn add(list: &mut Value, more: &[String]) {
    if more.is_empty() {
        return;
    }
    let old = list.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned);
    let mut seen = HashMap::new();
    let all: Vec<String> = old.chain(more.iter().cloned()).collect();
    for (place, entry) in all.iter().enumerate() {
        seen.insert(entry.split('=').next().unwrap_or_default().to_owned(), place);
    }
    let kept = all.iter().enumerate().filter(|(place, entry)| {
        seen.get(entry.split('=').next().unwrap_or_default()) == Some(place)
    });
    *list = kept.map(|(_, entry)| Value::from(entry.as_str())).collect();
}

#[cfg(test)]
mod tests {
    use super::add;
    use serde_json::{Value, json};

    #[test]
    fn a_later_variable_replaces_an_earlier_one() {
        let mut list = json!(["A=1", "B=2"]);
        add(&mut list, &["A=3".into(), "C=4".into()]);
        assert_eq!(list, json!(["B=2", "A=3", "C=4"]));
        let mut none = Value::Null;
        add(&mut none, &["CAP_CHOWN".into()]);
        assert_eq!(none, json!(["CAP_CHOWN"]));
    }
}
