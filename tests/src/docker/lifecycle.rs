//! run, exec, logs, stop, kill, wait, rm, ps, pause, restart, exit codes, terminals.

use anyhow::{Result, ensure};
use testkit::Run;
use testkit::console::Terminal;

use super::{Docker, IMAGE, refused};
use crate::case::{Case, case, has, same, skip};

pub(super) const CASES: &[Case<Docker>] = &[
    case("docker run prints the kernel of the container", kernel),
    case("docker run ends with 0, the program's code, 125, 126 and 127", exit_codes),
    case("docker run -i passes stdin to its end", interactive),
    case("docker run -it is a terminal", terminal),
    case("docker run -d, ps, logs, inspect and wait tell of a container", detached),
    case("docker exec has user, directory, environment and exit code", exec),
    case("docker exec -it is a terminal", exec_terminal),
    case("docker stop sends SIGTERM, then kills", stop),
    case("docker kill sends any signal", kill),
    case("docker pause stops a container and unpause continues it", pause),
    case("docker restart runs the program again", restart),
    case("docker rm refuses a running container, rm -f removes it", remove),
    case("a container that was created but never started is removed", created),
    case("five containers run at once", five),
];

fn kernel(docker: &Docker) -> Result<()> {
    let inside = docker.once(&[], "uname -r")?;
    let outside = Run::new("uname").arg("-r").text()?;
    same("an own kernel", inside != outside, docker.is_kata)
}

fn exit_codes(docker: &Docker) -> Result<()> {
    docker.once_run(&[], "exit 42").output()?.ended(42)?;
    let words = ["run", "--rm", "--runtime", &docker.runtime, IMAGE];
    refused(docker.run(&words).arg("no-such-program"), 127, "executable file not found")?;
    refused(docker.run(&words).arg("/bin/not-executable"), 126, "permission denied")?;
    docker.run(&["run", "--rm", "--runtime", "no-such-runtime", IMAGE]).output()?.ended(125)?;
    docker.once_run(&[], "kill -9 $$; exit 3").output().map(drop)
}

fn interactive(docker: &Docker) -> Result<()> {
    let run = docker.once_run(&["-i"], "cat; echo end").stdin("one\ntwo\n");
    same("output", run.text()?.as_str(), "one\ntwo\nend")?;
    let output = docker.once_run(&[], "echo out; echo err >&2").output()?.success()?;
    same("stdout and stderr", (output.text().as_str(), output.stderr.as_str()), ("out", "err\n"))
}

/// Starts the client on a terminal of ours.
pub(super) fn on_terminal(docker: &Docker, words: &[&str]) -> Result<Terminal> {
    let client = docker.daemon.client().to_string_lossy().into_owned();
    let words: Vec<_> = [client.as_str()].into_iter().chain(words.iter().copied()).collect();
    Terminal::start(&words, &[("DOCKER_HOST", &docker.daemon.address()), ("TERM", "xterm")])
}

fn terminal(docker: &Docker) -> Result<()> {
    let words = ["run", "--rm", "-it", "--runtime", &docker.runtime, IMAGE, "sh"];
    let mut terminal = on_terminal(docker, &words)?;
    terminal.send("tty && echo be''gin\n")?;
    has(&terminal.expect("begin")?, "/dev/pts/")?;
    terminal.resize(31, 91)?;
    resized(&mut terminal)?;
    terminal.send("exit 5\n")?;
    same("exit code", terminal.finish()?.1, 5)
}

/// Makes the size 31 by 91, and asks for it until it is: it travels by a signal, which Docker's client hears only some
/// time after it has started, and two requests.
fn resized(terminal: &mut Terminal) -> Result<()> {
    for _ in 0..100 {
        terminal.resize(31, 90)?;
        terminal.resize(31, 91)?;
        terminal.send("stty size; sleep 0.1; echo as''ked\n")?;
        if terminal.expect("asked")?.contains("31 91") {
            return Ok(());
        }
    }
    anyhow::bail!("the new size never came")
}

fn detached(docker: &Docker) -> Result<()> {
    let name = docker.name("detached");
    let flags = ["--name", &name, "--label", "a=b", "-e", "WORD=hello"];
    let container = docker.start(&flags, "echo out $WORD; echo err >&2; sleep 1; exit 6")?;
    has(&docker.run(&["ps", "--no-trunc", "--format", "{{.ID}} {{.Names}}"]).text()?, &name)?;
    same("running", container.inspect("{{.State.Running}}")?.as_str(), "true")?;
    ensure!(container.inspect("{{.State.Pid}}")?.parse::<u32>()? > 1, "no pid");
    same("wait", container.run(&["wait"]).text()?.as_str(), "6")?;
    let logs = container.run(&["logs"]).output()?.success()?;
    same("logs", (logs.text().as_str(), logs.stderr.as_str()), ("out hello", "err\n"))?;
    same("exit code", container.inspect("{{.State.ExitCode}}")?.as_str(), "6")?;
    container.remove()
}

fn exec(docker: &Docker) -> Result<()> {
    let container = docker.sleeper(&["-e", "BASE=x"])?;
    let flags = ["-u", "1000:2000", "-w", "/tmp", "-e", "WORD=a b"];
    let text = container.exec(&flags, "echo $(id -u):$(id -g) $(pwd) $WORD $BASE")?;
    same("context", text.as_str(), "1000:2000 /tmp a b x")?;
    container.exec_run(&[], "exit 17").output()?.ended(17)?;
    let run = container.exec_run(&["-i"], "cat").stdin("through");
    same("stdin", run.text()?.as_str(), "through")?;
    let missing = docker.run(&["exec", &container.id, "no-such-program"]);
    let output = missing.output()?;
    ensure!([126, 127].contains(&output.code), "{output}");
    has(&format!("{}{}", output.text(), output.stderr), "executable file not found")?;
    container.exec(&["-d"], "touch /tmp/detached; sleep 1000")?;
    testkit::eventually(testkit::run::DEADLINE, "the detached exec runs", || {
        Ok((container.exec_run(&[], "test -e /tmp/detached").output()?.code == 0).then_some(()))
    })?;
    container.remove()
}

fn exec_terminal(docker: &Docker) -> Result<()> {
    let container = docker.sleeper(&[])?;
    let mut terminal = on_terminal(docker, &["exec", "-it", &container.id, "sh"])?;
    terminal.send("tty && echo be''gin\n")?;
    has(&terminal.expect("begin")?, "/dev/pts/")?;
    terminal.resize(31, 91)?;
    resized(&mut terminal)?;
    terminal.send("exit 8\n")?;
    same("exit code", terminal.finish()?.1, 8)?;
    container.remove()
}

fn stop(docker: &Docker) -> Result<()> {
    let line = "trap 'echo stopped; exit 9' TERM; echo ready; while :; do sleep 0.1; done";
    let container = docker.start(&[], line)?;
    container.wait_for_log("ready")?;
    container.run(&["stop", "-t", "60"]).text()?;
    same("exit code", container.inspect("{{.State.ExitCode}}")?.as_str(), "9")?;
    has(&container.run(&["logs"]).text()?, "stopped")?;
    container.remove()?;
    let stubborn = docker.start(&[], "trap '' TERM; echo ready; while :; do sleep 0.1; done")?;
    stubborn.wait_for_log("ready")?;
    stubborn.run(&["stop", "-t", "1"]).text()?;
    same("exit code", stubborn.inspect("{{.State.ExitCode}}")?.as_str(), "137")?;
    stubborn.remove()
}

fn kill(docker: &Docker) -> Result<()> {
    let line = "trap 'echo usr1' USR1; echo ready; while :; do sleep 0.1; done";
    let container = docker.start(&[], line)?;
    container.wait_for_log("ready")?;
    container.run(&["kill", "-s", "USR1"]).text()?;
    container.wait_for_log("usr1")?;
    container.run(&["kill"]).text()?;
    same("wait", container.run(&["wait"]).text()?.as_str(), "137")?;
    container.remove()
}

fn pause(docker: &Docker) -> Result<()> {
    let container = docker.sleeper(&[])?;
    container.run(&["pause"]).text()?;
    same("status", container.inspect("{{.State.Status}}")?.as_str(), "paused")?;
    ensure!(container.exec_run(&[], "true").output()?.code != 0, "exec in a paused container");
    container.run(&["unpause"]).text()?;
    same("exec", container.exec(&[], "echo alive")?.as_str(), "alive")?;
    container.remove()
}

fn restart(docker: &Docker) -> Result<()> {
    let container = docker.start(&[], "echo began; trap 'exit 0' TERM; sleep 1000 & wait")?;
    container.wait_for_log("began")?;
    container.exec(&[], "echo kept >/kept")?;
    container.run(&["restart", "-t", "30"]).text()?;
    container.wait_for_log("began\nbegan")?;
    same("the file", container.exec(&[], "cat /kept")?.as_str(), "kept")?;
    container.remove()
}

fn remove(docker: &Docker) -> Result<()> {
    let container = docker.sleeper(&[])?;
    let output = container.run(&["rm"]).output()?;
    ensure!(output.code != 0, "{output}");
    container.remove()
}

fn created(docker: &Docker) -> Result<()> {
    let run = docker.run(&["create", "--runtime", &docker.runtime, IMAGE, "true"]);
    let id = run.text()?;
    docker.run(&["rm", &id]).text().map(drop)
}

fn five(docker: &Docker) -> Result<()> {
    if testkit::wait::memory_mib()? < 6000 {
        return Err(skip("6 GB of memory"));
    }
    let daemon = docker;
    let containers: Vec<_> = (0..5)
        .map(|number| daemon.start(&[], &format!("echo number {number}; sleep 1000")))
        .collect::<Result<_>>()?;
    for (number, container) in containers.iter().enumerate() {
        container.wait_for_log(&format!("number {number}"))?;
        same("exec", container.exec(&[], "echo here")?.as_str(), "here")?;
    }
    containers.into_iter().try_for_each(super::Running::remove)
}
