//! Standard input, output and terminals of containers.

use std::fs::{self, File};
use std::io::Write;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use testkit::console::ConsoleSocket;
use testkit::{Run, eventually};

use super::Oci;
use crate::case::{Case, case, has, same};

pub(super) const CASES: &[Case<Oci>] = &[
    case("a large file through cat has the same checksum at the other end", large),
    case("the last line of short programs is never lost", last_line),
    case("stdin's end reaches run and exec", stdin_end),
    case("stdout and stderr stay apart", apart),
    case("a grandchild that keeps stdout open does not delay the exit", grandchild),
    case("a container on a console socket has a terminal that resizes", terminal),
    case("a reader that goes away ends the writer", broken_pipe),
];

/// How much goes through `cat`, in MiB: less than on a user's machine, since CI's guests are emulated.
fn large_mib() -> u64 {
    let given = std::env::var("KATA_TEST_LARGE_MIB").ok().and_then(|text| text.parse().ok());
    given.unwrap_or(256)
}

fn large(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("exec cat")?;
    let file = bundle.dir.join("large");
    let mut pattern = Vec::with_capacity(1 << 20);
    for number in 0_u32..1 << 18 {
        pattern.extend_from_slice(&number.wrapping_mul(2_654_435_761).to_le_bytes());
    }
    let mut out = File::create(&file)?;
    for _ in 0..large_mib() {
        out.write_all(&pattern)?;
    }
    drop(out);
    let words = oci.runtime.words(&["run", "--bundle", &bundle.dir.to_string_lossy(), &bundle.id]);
    let line = format!("{} <'{}' | sha256sum", shell_words(&words), file.display());
    let through = Run::shell(&line).within(Duration::from_mins(10)).text()?;
    let direct = Run::shell(&format!("sha256sum <'{}'", file.display())).text()?;
    fs::remove_file(file)?;
    same("checksum", through, direct)
}

fn shell_words(words: &[String]) -> String {
    format!("'{}'", words.join("' '"))
}

fn last_line(oci: &Oci) -> Result<()> {
    let container = oci.sleeper()?;
    for number in 0..30 {
        let output =
            container.exec(&["sh", "-c", "seq 1 500; echo last; exit 3"]).output()?.ended(3)?;
        ensure!(output.text().ends_with("500\nlast"), "exec {number}: {}", tail(&output.text()));
    }
    drop(container);
    for number in 0..3 {
        let output = oci.run("seq 1 500; echo last")?.success()?;
        ensure!(output.text().ends_with("500\nlast"), "run {number}: {}", tail(&output.text()));
    }
    Ok(())
}

fn tail(text: &str) -> String {
    format!("{} bytes, ending in {:?}", text.len(), text.lines().last().unwrap_or_default())
}

fn stdin_end(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("cat; echo end")?;
    let run = oci.runtime.run(&["run", "--bundle"]).arg(&bundle.dir).arg(&bundle.id);
    same("run", run.stdin("one\n").text()?, "one\nend".to_owned())?;
    let container = oci.sleeper()?;
    let exec = container.exec(&["sh", "-c", "cat; echo end"]).stdin("two\n");
    same("exec", exec.text()?, "two\nend".to_owned())?;
    container.command(&["delete", "--force"]).text().map(drop)
}

fn apart(oci: &Oci) -> Result<()> {
    let output = oci.run("echo out; echo err >&2")?.success()?;
    same("stdout", output.text(), "out".to_owned())?;
    ensure!(output.stderr.lines().any(|line| line == "err"), "stderr: {}", output.stderr);
    Ok(())
}

fn grandchild(oci: &Oci) -> Result<()> {
    let container = oci.sleeper()?;
    let line = "sleep 1000 & echo parent";
    let output = container.exec(&["sh", "-c", line]).within(Duration::from_secs(20)).output()?;
    same("output", output.success()?.text(), "parent".to_owned())?;
    container.command(&["delete", "--force"]).text().map(drop)
}

fn terminal(oci: &Oci) -> Result<()> {
    let line =
        "stty -echo; stty size; tty; while read word; do stty size; echo $word-; done; exit 4";
    let bundle = oci.bundle(line)?.with(|config| {
        config["process"]["terminal"] = json!(true);
        config["process"]["consoleSize"] = json!({"height": 20, "width": 60});
    })?;
    let socket = ConsoleSocket::listen(&bundle.dir.join("tty"))?;
    let path = socket.path().to_string_lossy().into_owned();
    let container =
        oci.runtime.create_with(&bundle, &["--console-socket", &path], Stdio::null())?;
    let mut terminal = socket.receive()?;
    container.command(&["start"]).text()?;
    has(&terminal.expect("/dev/")?, "20 60")?;
    terminal.resize(33, 77)?;
    eventually(Duration::from_secs(30), "the new size is seen inside", || {
        terminal.send("word\n")?;
        Ok(terminal.expect("word-")?.contains("33 77").then_some(()))
    })?;
    terminal.send("\u{4}")?;
    same("exit code", container.wait()?, 4)?;
    container.delete()
}

fn broken_pipe(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("yes")?;
    let words = oci.runtime.words(&["run", "--bundle", &bundle.dir.to_string_lossy(), &bundle.id]);
    let line = format!("set +o pipefail; {} | head -n 3", shell_words(&words));
    same("output", Run::shell(&line).text()?, "y\ny\ny".to_owned())?;
    oci.runtime.run(&["delete", "--force", &bundle.id]).text().map(drop)
}
