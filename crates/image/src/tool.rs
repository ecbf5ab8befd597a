//! Runs the programs that a build needs, and says which package has a missing one.

use std::ffi::OsStr;
use std::io::Write;
use std::process::{Command, Stdio};
use std::thread;

use crate::Error;

/// A program, and Debian's package of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tool {
    pub(crate) program: &'static str,
    pub(crate) package: &'static str,
}

pub(crate) const APT_GET: Tool = Tool { program: "apt-get", package: "apt" };
pub(crate) const APT_CACHE: Tool = Tool { program: "apt-cache", package: "apt" };
pub(crate) const DPKG_DEB: Tool = Tool { program: "dpkg-deb", package: "dpkg" };
pub(crate) const GZIP: Tool = Tool { program: "gzip", package: "gzip" };
pub(crate) const XZ: Tool = Tool { program: "xz", package: "xz-utils" };
pub(crate) const ZSTD: Tool = Tool { program: "zstd", package: "zstd" };
pub(crate) const BZIP2: Tool = Tool { program: "bzip2", package: "bzip2" };

impl Tool {
    /// Runs it with `input` on its standard input and answers its standard output.
    ///
    /// `task` is what it is for, in words that fit after "could not".
    pub(crate) fn run<S: AsRef<OsStr>>(
        self,
        args: &[S],
        input: &[u8],
        task: &str,
    ) -> Result<Vec<u8>, Error> {
        let Self { program, package } = self;
        let failed = |words: String| Error::Failed { program, task: task.to_owned(), words };
        let mut child = Command::new(program)
            .args(args)
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| Error::Program { program, package, source })?;
        let mut stdin = child.stdin.take();
        let output = thread::scope(|scope| {
            // Beside the reading, as neither pipe holds all of it. A program that stops reading early says why itself.
            scope.spawn(move || stdin.take().map(|mut stdin| stdin.write_all(input)));
            child.wait_with_output()
        })
        .map_err(|error| failed(error.to_string()))?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let stderr = String::from_utf8_lossy(&output.stderr);
        let last = stderr.lines().rfind(|line| !line.trim().is_empty());
        Err(failed(match last {
            Some(line) => line.trim().escape_debug().to_string(),
            None => output.status.to_string(),
        }))
    }
}

/// How a file is compressed, by its first bytes.
pub(crate) fn compression(bytes: &[u8]) -> Option<(Tool, &'static [&'static str])> {
    let known: [(&[u8], Tool, &'static [&'static str]); 5] = [
        (b"\x1f\x8b", GZIP, &["-dc"]),
        (b"\xfd7zXZ\0", XZ, &["-dc"]),
        (b"\x28\xb5\x2f\xfd", ZSTD, &["-dcq"]),
        (b"BZh", BZIP2, &["-dc"]),
        (b"\x5d\0\0", XZ, &["--format=lzma", "-dc"]),
    ];
    known
        .into_iter()
        .find(|(magic, ..)| bytes.starts_with(magic))
        .map(|(_, tool, args)| (tool, args))
}

#[cfg(test)]
mod tests {
    use super::{GZIP, Tool};
    use crate::Error;

    #[test]
    fn a_missing_program_is_named_with_its_package() {
        let tool = Tool { program: "no-such-program", package: "no-such-package" };
        let error = tool.run(&["-x"], b"", "do anything").unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot run no-such-program; install it (Debian: no-such-package)"
        );
    }

    #[test]
    fn a_failing_program_has_the_last_word() {
        let error = GZIP.run(&["-dc"], b"not compressed", "decompress x").unwrap_err();
        assert!(
            matches!(&error, Error::Failed { words, .. } if words.contains("not in gzip format"))
        );
    }

    #[test]
    fn more_than_a_pipe_holds_goes_through() {
        let bytes = vec![42; 1 << 20];
        let packed = GZIP.run(&["-c"], &bytes, "compress").unwrap();
        assert_eq!(GZIP.run(&["-dc"], &packed, "decompress").unwrap(), bytes);
    }
}
