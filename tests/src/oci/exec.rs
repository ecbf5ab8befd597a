//! exec. These cases share one running container.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use linux::process::ProcessId;
use rustix::process::Signal;
use serde_json::json;
use testkit::console::{ConsoleSocket, Terminal};
use testkit::eventually;
use testkit::runtime::reap;

use super::Oci;
use crate::case::{Case, case, has, same};

pub(super) const CASES: &[Case<Oci>] = &[
    case("exec ends with the program's exit code, 0 to 255", codes),
    case("exec of a program that a signal ended is 128 and its number", signalled),
    case("exec has user, groups, directory, environment and capabilities", context),
    case("exec --process takes them from a file", process_file),
    case("exec --detach leaves a process with a pid to be reaped", detached),
    case("a signal to the host pid of an exec reaches its process", forwarded),
    case("SIGKILL of the host pid of an exec ends its process", stand_in_killed),
    case("exec --tty on a console socket has a terminal that resizes", console),
    case("exec --tty in the foreground works as a shell", foreground),
    case("exec of a missing program says that it is not found", missing),
    case("exec of a program without permission says so", forbidden),
    case("many execs at once each get their own output", many),
];

fn codes(oci: &Oci) -> Result<()> {
    let container = oci.shared()?;
    for code in [0, 1, 2, 63, 125, 126, 127, 128, 137, 254, 255] {
        container.exec(&["sh", "-c", &format!("exit {code}")]).output()?.ended(code)?;
    }
    Ok(())
}

fn signalled(oci: &Oci) -> Result<()> {
    let container = oci.shared()?;
    container.exec(&["sh", "-c", "kill -TERM $$"]).output()?.ended(143)?;
    container.exec(&["sh", "-c", "kill -KILL $$"]).output()?.ended(137).map(drop)
}

fn context(oci: &Oci) -> Result<()> {
    let container = oci.shared()?;
    let line = "echo $(id -u) $(id -g) $(pwd) $WORD";
    let command = ["exec", "--user", "1000:2000", "--cwd", "/tmp", "--env", "WORD=hello"];
    let run = |words: &[&str], line: &str| container.command(words).args(["sh", "-c", line]).text();
    same("context", run(&command, line)?, "1000 2000 /tmp hello".to_owned())?;
    let command = ["exec", "--additional-gids", "2000"];
    has(&run(&command, "id -G")?, "2000")?;
    let line = "grep CapEff /proc/self/status";
    let with = run(&["exec", "--cap", "CAP_SYS_ADMIN"], line)?;
    let without = run(&["exec"], line)?;
    let number = |text: &str| -> Result<u64> {
        Ok(u64::from_str_radix(text.split_whitespace().last().unwrap_or_default(), 16)?)
    };
    let bit = 1 << 21;
    same("CAP_SYS_ADMIN", (number(&with)? & bit, number(&without)? & bit), (bit, 0))
}

fn process_file(oci: &Oci) -> Result<()> {
    let container = oci.shared()?;
    let process = json!({
        "args": ["sh", "-c", "echo $(id -u) $(pwd) $A; exit 9"],
        "user": {"uid": 1000, "gid": 1000}, "cwd": "/home",
        "env": ["A=b", "PATH=/bin"],
    });
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), process.to_string())?;
    let run = container_exec(oci, &["--process"])?.arg(file.path()).arg(&container.id);
    let output = run.output()?.ended(9)?;
    same("context", output.text(), "1000 /home b".to_owned())
}

fn container_exec(oci: &Oci, flags: &[&str]) -> Result<testkit::Run> {
    oci.shared()?;
    Ok(oci.runtime.run(&["exec"]).args(flags))
}

/// Starts a detached exec of a shell line; answers its host pid.
fn detach(oci: &Oci, line: &str) -> Result<u32> {
    let container = oci.shared()?;
    let dir = tempfile::tempdir()?;
    let pid_file = dir.path().join("pid");
    let run = container_exec(oci, &["--detach", "--pid-file"])?.arg(&pid_file);
    run.arg(&container.id).args(["sh", "-c", line]).text()?;
    fs::read_to_string(pid_file)?.parse().context("the pid file")
}

fn detached(oci: &Oci) -> Result<()> {
    let pid = detach(oci, "sleep 0.2; exit 11")?;
    same("exit code", reap(pid)?, 11)
}

fn forwarded(oci: &Oci) -> Result<()> {
    let container = oci.shared()?;
    let line = "trap 'exit 12' TERM; touch /tmp/trapped; while :; do sleep 0.05; done";
    let pid = detach(oci, line)?;
    eventually(Duration::from_secs(30), "the trap is set", || {
        Ok((container.exec(&["rm", "/tmp/trapped"]).output()?.code == 0).then_some(()))
    })?;
    ProcessId::of(pid).context("it has ended")?.signal(Signal::TERM)?;
    same("exit code", reap(pid)?, 12)
}

fn stand_in_killed(oci: &Oci) -> Result<()> {
    let container = oci.shared()?;
    let pid = detach(oci, "exec sleep 4321")?;
    let find = || container.shell("ps -o args | grep -c '[s]leep 4321' || true");
    eventually(Duration::from_secs(30), "the process is there", || {
        Ok((find()? == "1").then_some(()))
    })?;
    ProcessId::of(pid).context("it has ended")?.signal(Signal::KILL)?;
    same("exit code", reap(pid)?, 137)?;
    eventually(Duration::from_secs(30), "the process in the container ends too", || {
        Ok((find()? == "0").then_some(()))
    })
}

fn console(oci: &Oci) -> Result<()> {
    let container = oci.shared()?;
    let dir = tempfile::tempdir()?;
    let socket = ConsoleSocket::listen(&dir.path().join("tty"))?;
    let pid_file = dir.path().join("pid");
    let run = container_exec(oci, &["--tty", "--detach", "--console-socket"])?.arg(socket.path());
    let run = run.arg("--pid-file").arg(&pid_file).arg(&container.id);
    run.args([
        "sh",
        "-c",
        "stty -echo; echo ready; while read word; do stty size; echo $word-; done",
    ])
    .text()?;
    let pid = fs::read_to_string(pid_file)?.parse()?;
    let mut terminal = socket.receive()?;
    terminal.expect("ready")?;
    terminal.resize(33, 77)?;
    // The size travels by a signal: ask until it is there.
    eventually(Duration::from_secs(30), "the new size is seen inside", || {
        terminal.send("word\n")?;
        Ok(terminal.expect("word-")?.contains("33 77").then_some(()))
    })?;
    terminal.send("\u{4}")?;
    same("exit code", reap(pid)?, 0)
}

fn foreground(oci: &Oci) -> Result<()> {
    let container = oci.shared()?;
    let words = oci.runtime.words(&["exec", "--tty", &container.id, "sh"]);
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let mut terminal = Terminal::start(&words, &[("TERM", "xterm")])?;
    terminal.send("tty && stty size && echo fin''ished\n")?;
    let seen = terminal.expect("finished")?;
    has(&seen, "/dev/pts/")?;
    has(&seen, "24 80")?;
    terminal.send("exit 23\n")?;
    let (_, code) = terminal.finish()?;
    same("exit code", code, 23)
}

fn missing(oci: &Oci) -> Result<()> {
    let output = oci.shared()?.exec(&["no-such-program"]).output()?;
    ensure!(output.code != 0, "{output}");
    has(
        &output.stderr.replace('\\', ""),
        "exec: \"no-such-program\": executable file not found in $PATH",
    )?;
    let output = oci.shared()?.exec(&["/no/such/program"]).output()?;
    ensure!(output.code != 0, "{output}");
    has(&output.stderr, "no such file or directory")
}

fn forbidden(oci: &Oci) -> Result<()> {
    let output = oci.shared()?.exec(&["/bin/not-executable"]).output()?;
    ensure!(output.code != 0, "{output}");
    has(&output.stderr.to_lowercase(), "permission denied")
}

fn many(oci: &Oci) -> Result<()> {
    let container = oci.shared()?;
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..8)
            .map(|number| {
                let line = format!("for i in 1 2 3; do echo {number}; done; exit {number}");
                let run = container.exec(&["sh", "-c", &line]);
                scope.spawn(move || (number, run.output()))
            })
            .collect();
        for run in runs {
            let (number, output) = run.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
            let output = output?.ended(number)?;
            same("output", output.text(), format!("{number}\n{number}\n{number}"))?;
        }
        Ok(())
    })
}
