//! Running a program to its end, with a deadline.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::wait::readable;

/// What a program may take, unless told otherwise. Generous, since a deadline only ends a test that hangs: a guest that
/// is emulated on a busy machine boots in tens of seconds.
pub const DEADLINE: Duration = Duration::from_mins(3);

/// A program to be run to its end.
///
/// Its output goes to files, not pipes: a container that lives on with the program's stdio does not keep us waiting.
#[derive(Debug)]
pub struct Run {
    command: Command,
    words: Vec<OsString>,
    stdin: Vec<u8>,
    deadline: Duration,
}

/// How a program ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command, for messages.
    pub command: String,
    /// Its exit code, or 128 + the signal that ended it.
    pub code: i32,
    /// What it wrote.
    pub stdout: Vec<u8>,
    /// What it wrote, as text.
    pub stderr: String,
}

impl Run {
    /// `program`, without arguments or input.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let words = vec![program.as_ref().to_owned()];
        Self { command: Command::new(program), words, stdin: Vec::new(), deadline: DEADLINE }
    }

    /// A line for bash, with `pipefail`, run in the environment and directory given later.
    pub fn shell(line: &str) -> Self {
        Self::new("bash").args(["-o", "pipefail", "-c", line])
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(self, arg: impl AsRef<OsStr>) -> Self {
        self.args([arg])
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        for arg in args {
            self.words.push(arg.as_ref().to_owned());
            self.command.arg(arg);
        }
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn directory(mut self, path: &Path) -> Self {
        self.command.current_dir(path);
        self
    }

    /// Gives it `bytes` as its standard input; without this it reads end of file.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Sets how long it may take.
    #[must_use]
    pub fn within(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Runs it.
    ///
    /// # Errors
    ///
    /// When it cannot be started, or is killed at its deadline. A failing exit code is no error here.
    pub fn output(mut self) -> Result<Output> {
        let command = display(&self.words);
        let mut stdin = tempfile::tempfile()?;
        stdin.write_all(&self.stdin)?;
        stdin.rewind()?;
        let (mut stdout, mut stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
        self.command.stdin(stdin).stdout(Stdio::from(stdout.try_clone()?));
        self.command.stderr(Stdio::from(stderr.try_clone()?));
        let mut child = self.command.spawn().with_context(|| format!("cannot start {command}"))?;
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        let ended = readable(&pidfd, self.deadline)?;
        if !ended {
            child.kill()?;
        }
        let status = child.wait()?;
        let output = Output {
            command,
            code: code(status),
            stdout: whole(&mut stdout)?,
            stderr: String::from_utf8_lossy(&whole(&mut stderr)?).into_owned(),
        };
        if !ended {
            bail!("killed after {:?}: {output}", self.deadline);
        }
        Ok(output)
    }

    /// Runs it and takes what it wrote to stdout as text, without white space at the ends.
    ///
    /// # Errors
    ///
    /// Also when its exit code is not 0.
    pub fn text(self) -> Result<String> {
        Ok(self.output()?.success()?.text())
    }
}

impl Output {
    /// Its stdout as text, without white space at the ends.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }

    /// Itself, where its exit code is 0.
    ///
    /// # Errors
    ///
    /// Where it is not.
    pub fn success(self) -> Result<Self> {
        self.ended(0)
    }

    /// Itself, where its exit code is `code`.
    ///
    /// # Errors
    ///
    /// Where it is not.
    pub fn ended(self, code: i32) -> Result<Self> {
        if self.code != code {
            bail!("not exit code {code}: {self}");
        }
        Ok(self)
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` ended with {}", self.command, self.code)?;
        for (name, text) in [("stdout", self.text()), ("stderr", self.stderr.trim().to_owned())] {
            if !text.is_empty() {
                write!(f, "; {name}: {}", text.chars().take(600).collect::<String>())?;
            }
        }
        Ok(())
    }
}

/// The exit code, or 128 + the signal that ended it.
pub fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn whole(file: &mut File) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn display(words: &[OsString]) -> String {
    let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
    words.join(" ").chars().take(300).collect()
}

#[cfg(test)]
mod tests {
    use super::Run;
    use std::time::Duration;

    #[test]
    fn input_output_and_code_go_through() {
        let output = Run::shell("cat; echo words >&2; exit 7").stdin("hello").output().unwrap();
        assert_eq!((output.text().as_str(), output.stderr.as_str()), ("hello", "words\n"));
        assert!(output.clone().ended(7).is_ok());
        assert!(output.success().is_err());
    }

    #[test]
    fn a_program_that_hangs_is_killed_at_its_deadline() {
        let error =
            Run::shell("exec sleep 600").within(Duration::from_millis(50)).output().unwrap_err();
        assert!(error.to_string().starts_with("killed after"), "{error}");
    }

    #[test]
    fn a_background_child_with_our_stdout_does_not_hold_us() {
        let output = Run::shell("sleep 600 & echo $!").output().unwrap().success().unwrap();
        Run::new("kill").arg(output.text()).text().unwrap();
    }
}
