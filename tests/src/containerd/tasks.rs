//! What `ctr` does with a task.

use anyhow::{Result, ensure};
use testkit::Run;
use testkit::console::Terminal;

use super::{Ctr, IMAGE};
use crate::case::{Case, case, has, same};

pub(super) const CASES: &[Case<Ctr>] = &[
    case("ctr run prints the kernel of the container and ends with its exit code", kernel),
    case("ctr run passes input to its end, and output and error apart", stdio),
    case("ctr run -t is a terminal", terminal),
    case("ctr run of a program that is not there says so", missing),
    case("ctr task exec has input, output and exit code of its own", exec),
    case("ctr task exec -t is a terminal whose size follows", exec_terminal),
    case("ctr task kill sends a signal, and its exit code is told", kill),
    case("ctr task pause stops a container and resume continues it", pause),
    case("ctr task metrics tells of the container's memory and processor time", metrics),
    case("ctr task ps tells of the task's process", ps),
    case("a container is created apart from its task, and removed with it", created),
    case("a megabyte of output arrives whole", large),
    case("output goes to a file where containerd asks for it", log_file),
    case("a read-only mount of the host is there and cannot be written", mounts),
];

fn kernel(ctr: &Ctr) -> Result<()> {
    let output = ctr.once_run(&[], "uname -r; exit 3").output()?.ended(3)?;
    let outside = Run::new("uname").arg("-r").text()?;
    same("an own kernel", output.text() != outside, ctr.is_kata)
}

fn stdio(ctr: &Ctr) -> Result<()> {
    // ctr does not pass on the end of an input that ends before the task is there.
    let out = ctr.work.path().join(format!("{}.out", ctr.id()));
    let id = ctr.id();
    let words = ctr.words(&["--rm", IMAGE, &id], &id).join(" ");
    let (out, address) = (out.display(), ctr.daemon().address.display().to_string());
    let line = format!(
        "{{ until grep -qs ready {out}; do sleep 0.1; done; printf 'one\\ntwo\\n'; }} | \
         ctr --address {address} --namespace {} {words} sh -c 'echo ready; cat; echo end; echo err >&2' >{out}; \
         code=$?; cat {out}; exit $code",
        ctr.namespace
    );
    let output = Run::shell(&line).output()?.success()?;
    same("stdout", output.text().as_str(), "ready\none\ntwo\nend")?;
    same("stderr", output.stderr.trim(), "err")
}

/// Starts `ctr` on a terminal of ours.
fn on_terminal(ctr: &Ctr, words: &[String]) -> Result<Terminal> {
    let address = ctr.daemon().address.display().to_string();
    let start = ["ctr", "--address", &address, "--namespace", &ctr.namespace];
    let words: Vec<_> = start.into_iter().chain(words.iter().map(String::as_str)).collect();
    Terminal::start(&words, &[("TERM", "xterm")])
}

fn terminal(ctr: &Ctr) -> Result<()> {
    let id = ctr.id();
    let mut words = ctr.words(&["--rm", "-t", IMAGE, &id, "sh"], &id);
    words.retain(|word| !word.is_empty());
    let mut terminal = on_terminal(ctr, &words)?;
    terminal.send("tty && echo be''gin\n")?;
    has(&terminal.expect("begin")?, "/dev/")?;
    terminal.send("exit 5\n")?;
    same("exit code", terminal.finish()?.1, 5)
}

fn missing(ctr: &Ctr) -> Result<()> {
    let id = ctr.id();
    let run = ctr.run(&[]).args(ctr.words(&["--rm", IMAGE, &id, "no-such-program"], &id));
    let output = run.output()?;
    ensure!(output.code != 0, "it ran: {output}");
    has(&output.stderr, "executable file not found")?;
    same("status", ctr.status(&id)?.as_str(), "")
}

fn exec(ctr: &Ctr) -> Result<()> {
    let task = ctr.sleeper()?;
    let run = task.exec(&[], "cat; echo err >&2; exit 7").stdin("hello\n");
    let output = run.output()?.ended(7)?;
    same("stdout", output.text().as_str(), "hello")?;
    same("stderr", output.stderr.trim(), "err")?;
    let output = task.exec(&["--cwd", "/tmp", "--user", "1:2"], "pwd; id -u; id -g").text()?;
    same("directory and user", output.as_str(), "/tmp\n1\n2")?;
    let missing = ctr.run(&["task", "exec", "--exec-id", "x", &task.id, "no-such-program"]);
    has(&missing.output()?.stderr, "executable file not found")
}

fn exec_terminal(ctr: &Ctr) -> Result<()> {
    let task = ctr.sleeper()?;
    let words = ["task", "exec", "-t", "--exec-id", "t1", &task.id, "sh"];
    let mut terminal = on_terminal(ctr, &words.map(str::to_owned))?;
    terminal.send("tty && echo be''gin\n")?;
    has(&terminal.expect("begin")?, "/dev/")?;
    terminal.resize(33, 77)?;
    terminal.send("until stty size | grep -q '33 77'; do sleep 0.1; done; echo resi''zed\n")?;
    terminal.expect("resized")?;
    terminal.send("exit 4\n")?;
    same("exit code", terminal.finish()?.1, 4)
}

fn kill(ctr: &Ctr) -> Result<()> {
    let task = ctr.sleeper()?;
    // Until the trap is set a signal has no effect on the first process of a container.
    task.exec(&[], "until grep -q 'SigCgt:.*[4-7c-f]...$' /proc/1/status; do sleep 0.1; done")
        .text()?;
    task.kill("SIGTERM").text()?;
    task.wait_for("STOPPED")?;
    same("exit code", task.delete()?, 9)?;
    let again = task.kill("SIGTERM").output()?;
    ensure!(again.code != 0, "a task that is not there was signalled: {again}");
    let other = ctr.sleeper()?;
    other.kill("SIGKILL").text()?;
    other.wait_for("STOPPED")?;
    has(&other.kill("SIGKILL").output()?.stderr, "process already finished")?;
    same("exit code", other.delete()?, 137)
}

fn pause(ctr: &Ctr) -> Result<()> {
    let task = ctr.sleeper()?;
    ctr.run(&["task", "pause", &task.id]).text()?;
    task.wait_for("PAUSED")?;
    ctr.run(&["task", "resume", &task.id]).text()?;
    task.wait_for("RUNNING")?;
    same("an exec", task.exec(&[], "echo alive").text()?.as_str(), "alive")
}

fn metrics(ctr: &Ctr) -> Result<()> {
    let task = ctr.start(&[], "while :; do :; done")?;
    let figures = ctr.run(&["task", "metrics", "--format", "json", &task.id]).text()?;
    let figures: serde_json::Value = serde_json::from_str(&figures)?;
    let of = |names: [&str; 3]| {
        let mut value = &figures;
        for name in names.iter().filter(|name| !name.is_empty()) {
            value = &value[*name];
        }
        value.as_f64().or_else(|| value.as_str()?.parse().ok()).unwrap_or_default()
    };
    let memory = of(["memory", "usage", "usage"]).max(of(["memory", "usage", ""]));
    ensure!(memory > 0.0, "no memory in {figures}");
    let time = of(["cpu", "usage", "total"]).max(of(["cpu", "usage_usec", ""]));
    ensure!(time > 0.0, "no processor time in {figures}");
    Ok(())
}

fn ps(ctr: &Ctr) -> Result<()> {
    let task = ctr.sleeper()?;
    let table = ctr.run(&["task", "ps", &task.id]).text()?;
    has(&table, &task.pid()?.to_string())
}

fn created(ctr: &Ctr) -> Result<()> {
    let id = ctr.id();
    let run = ctr.run(&["container", "create"]).args(&ctr.runtime);
    run.args([IMAGE, &id, "sleep", "1000"]).text()?;
    let task = super::Task { ctr, id };
    ctr.run(&["task", "start", "--null-io", "-d", &task.id]).text()?;
    task.wait_for("RUNNING")
}

fn large(ctr: &Ctr) -> Result<()> {
    let output = ctr.once_run(&[], "dd if=/dev/zero bs=1024 count=1024 2>/dev/null").output()?;
    same("bytes", output.success()?.stdout.len(), 1 << 20)
}

fn log_file(ctr: &Ctr) -> Result<()> {
    let file = ctr.work.path().join(format!("{}.log", ctr.id()));
    let id = ctr.id();
    let uri = format!("file://{}", file.display());
    let run = ctr.run(&[]).args(ctr.words(&["-d", "--log-uri", &uri, IMAGE, &id], &id));
    run.args(["sh", "-c", "echo to the log"]).text()?;
    let task = super::Task { ctr, id };
    task.wait_for("STOPPED")?;
    same("exit code", task.delete()?, 0)?;
    same("the log", std::fs::read_to_string(&file)?.trim(), "to the log")
}

fn mounts(ctr: &Ctr) -> Result<()> {
    let dir = ctr.work.path().join(ctr.id());
    std::fs::create_dir(&dir)?;
    std::fs::write(dir.join("file"), "of the host")?;
    let mount = format!("type=bind,src={},dst=/data,options=rbind:ro", dir.display());
    let line = "cat /data/file; ! touch /data/new 2>/dev/null && echo ' read-only'";
    let text = ctr.once_run(&["--mount", &mount], line).text()?;
    same("what is there", text.as_str(), "of the host read-only")?;
    has(&ctr.once("echo plain")?, "plain")
}
