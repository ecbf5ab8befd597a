//! Finding the user's program as runc does, with the errors that its clients know.

use std::convert::Infallible;
use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};

use nix::unistd::AccessFlags;
use protocol::oci::Process;
use rustix::fs::FileType;

use super::failure::Failure;
use crate::error::words;

/// The program to execute.
#[derive(Debug)]
pub(super) struct Program {
    /// Where it was found.
    pub(super) path: PathBuf,
    arguments: Vec<CString>,
    /// `NAME=value`.
    pub(super) environment: Vec<String>,
}

impl Program {
    /// Looks the program of `process` up, in the container and as its user.
    pub(super) fn find(process: &Process, environment: Vec<String>) -> Result<Self, Failure> {
        let arguments = process.args().as_deref().unwrap_or_default();
        let Some(name) = arguments.first() else {
            return Err(Failure("the process has no arguments".to_owned()));
        };
        let search = environment.iter().find_map(|line| line.strip_prefix("PATH="));
        let path = look_up(name, search.unwrap_or_default())?;
        let arguments = arguments.iter().map(|word| text(word)).collect::<Result<_, _>>()?;
        Ok(Self { path, arguments, environment })
    }

    /// Becomes the program; returns only where that fails.
    pub(super) fn execute(&self) -> Failure {
        match self.try_execute() {
            Ok(never) => match never {},
            Err(failure) => failure,
        }
    }

    fn try_execute(&self) -> Result<Infallible, Failure> {
        let path = text(&self.path.to_string_lossy())?;
        let environment: Vec<CString> =
            self.environment.iter().map(|line| text(line)).collect::<Result<_, _>>()?;
        nix::unistd::execve(&path, &self.arguments, &environment).map_err(|error| {
            Failure(format!("exec {}: {}", self.path.display(), words(&error.into())))
        })
    }
}

fn text(word: &str) -> Result<CString, Failure> {
    CString::new(word).map_err(|_| Failure(format!("{word:?} has a zero byte in it")))
}

/// What Go's exec.LookPath does, and says.
fn look_up(name: &str, search: &str) -> Result<PathBuf, Failure> {
    if name.contains('/') {
        let path = PathBuf::from(name);
        return match check(&path) {
            Ok(()) => Ok(path),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                Err(Failure(format!("exec: \"{name}\": permission denied")))
            }
            Err(error) if error.raw_os_error() == Some(libc::EISDIR) => {
                Err(Failure(format!("exec: \"{name}\": is a directory")))
            }
            Err(error) => Err(Failure(format!("exec: \"{name}\": stat {name}: {}", words(&error)))),
        };
    }
    let found = search.split(':').find_map(|directory| {
        let path = Path::new(if directory.is_empty() { "." } else { directory }).join(name);
        check(&path).is_ok().then_some(path)
    });
    found.ok_or_else(|| Failure(format!("exec: \"{name}\": executable file not found in $PATH")))
}

/// Whether `path` is a file that the process may execute.
fn check(path: &Path) -> io::Result<()> {
    let stat = nix::sys::stat::stat(path)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    // The oldest of its kind, which every filter knows. It asks for the real user, who is the effective one by now.
    nix::unistd::access(path, AccessFlags::X_OK)?;
    // Root may do anything, but a file without any x is not executed for it either.
    if stat.st_mode & 0o111 == 0 {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::look_up;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn errors_are_the_ones_that_clients_of_runc_parse() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("plain");
        fs::write(&file, "").unwrap();
        let file = file.to_str().unwrap();
        let say = |name: &str, search: &str| look_up(name, search).unwrap_err().0;
        assert_eq!(
            say("foo", dir.path().to_str().unwrap()),
            "exec: \"foo\": executable file not found in $PATH"
        );
        assert_eq!(
            say("/no/foo", ""),
            "exec: \"/no/foo\": stat /no/foo: no such file or directory"
        );
        assert_eq!(say(file, ""), format!("exec: \"{file}\": permission denied"));
        assert_eq!(say("/tmp", ""), "exec: \"/tmp\": is a directory");
        fs::set_permissions(file, fs::Permissions::from_mode(0o755)).unwrap();
        let found = look_up("plain", &format!("/no:{}", dir.path().display())).unwrap();
        assert_eq!(found.to_str().unwrap(), file);
    }
}
