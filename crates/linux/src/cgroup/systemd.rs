//! Cgroups that systemd makes: a transient scope for each sandbox, asked for over D-Bus by busctl(1).
//!
//! The unit is made with `Delegate=yes`: limits are then ours to write, systemd leaves them alone. It ends, and its
//! cgroups go, with its last process.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::Error;
use super::removal::pause;
use crate::process::{Command, read_bounded};

/// How long systemd may take to start a scope.
const DEADLINE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(5);

/// A transient unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unit {
    /// The slice it is in: `machine.slice`.
    slice: String,
    /// Its full name: `libpod-abc.scope`.
    name: String,
}

impl Unit {
    /// The unit that a `slice:prefix:name` names, as runc reads it. An empty slice is `system.slice`.
    pub(super) fn parse(path: &str) -> Result<Self, Error> {
        let bad = |problem| Error::BadPath { path: path.escape_debug().to_string(), problem };
        let [slice, prefix, name] = path.split(':').collect::<Vec<_>>()[..] else {
            return Err(bad("is not of the form `slice:prefix:name` that --systemd-cgroup wants"));
        };
        let is_word = |text: &str| {
            text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.@\\".contains(&byte))
        };
        if name.is_empty() || ![slice, prefix, name].into_iter().all(is_word) {
            return Err(bad("has characters that systemd does not take in a unit's name"));
        }
        let slice = if slice.is_empty() { "system.slice" } else { slice };
        let stem = slice.strip_suffix(".slice").ok_or_else(|| bad("names no `.slice`"))?;
        if stem != "-" && stem.split('-').any(str::is_empty) {
            return Err(bad("names a slice with an empty part"));
        }
        let name = match (prefix, Path::new(name).extension()) {
            (_, Some(extension)) if extension == "slice" => {
                return Err(bad("names a slice, not a unit in one"));
            }
            ("", _) => format!("{name}.scope"),
            _ => format!("{prefix}-{name}.scope"),
        };
        Ok(Self { slice: slice.to_owned(), name })
    }

    /// Its path below a hierarchy's root: slices nest by the dashes in their names, systemd.slice(5).
    pub(super) fn relative(&self) -> PathBuf {
        let stem = self.slice.strip_suffix(".slice").unwrap_or(&self.slice);
        let mut path = PathBuf::new();
        if stem != "-" {
            for (dash, _) in stem.match_indices('-') {
                path.push(format!("{}.slice", &stem[..dash]));
            }
            path.push(&self.slice);
        }
        path.join(&self.name)
    }

    /// Has systemd make the scope with `first` in it, and waits until that process is there.
    pub(super) fn start(&self, first: u32) -> Result<(), Error> {
        // sd_booted(3).
        if !Path::new("/run/systemd/system").is_dir() {
            return Err(Error::Systemd {
                problem: "systemd does not run on this host; call us without --systemd-cgroup \
                          (Docker: native.cgroupdriver=cgroupfs)"
                    .to_owned(),
            });
        }
        busctl(&self.arguments(first))?;
        let deadline = Instant::now() + DEADLINE;
        let proc_cgroup = PathBuf::from(format!("/proc/{first}/cgroup"));
        loop {
            let text =
                fs::read_to_string(&proc_cgroup).map_err(Error::host("read", &proc_cgroup))?;
            if text.lines().any(|line| line.ends_with(&self.name)) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                let seconds = DEADLINE.as_secs();
                let problem = format!("it did not start {} within {seconds} s", self.name);
                return Err(Error::Systemd { problem });
            }
            pause(PAUSE);
        }
    }

    fn arguments(&self, first: u32) -> Vec<String> {
        let pid = first.to_string();
        let description = format!("kata sandbox {}", self.name);
        [
            "call",
            "--quiet",
            "org.freedesktop.systemd1",
            "/org/freedesktop/systemd1",
            "org.freedesktop.systemd1.Manager",
            "StartTransientUnit",
            "ssa(sv)a(sa(sv))",
            &self.name,
            "fail",
            "5",
            "Description",
            "s",
            &description,
            "Slice",
            "s",
            &self.slice,
            "PIDs",
            "au",
            "1",
            &pid,
            "Delegate",
            "b",
            "true",
            "DefaultDependencies",
            "b",
            "false",
            "0",
        ]
        .map(str::to_owned)
        .to_vec()
    }
}

fn busctl(arguments: &[String]) -> Result<(), Error> {
    let problem = |problem: String| Error::Systemd { problem };
    let failed = |error: io::Error| problem(format!("cannot run busctl: {error}"));
    let (read, write) = io::pipe().map_err(failed)?;
    let mut command = Command::new("busctl");
    command.args(arguments).stdio(Stdio::null(), Stdio::null(), write.into());
    let mut child = command.spawn().map_err(failed)?;
    let mut read = fs::File::from(std::os::fd::OwnedFd::from(read));
    let words = read_bounded(&mut read, 64 * 1024).map_err(failed)?;
    if child.wait().map_err(failed)?.success() {
        return Ok(());
    }
    Err(problem(String::from_utf8_lossy(&words).trim().escape_debug().to_string()))
}

#[cfg(test)]
mod tests {
    use super::Unit;
    use std::path::PathBuf;

    #[test]
    fn a_path_of_three_parts_names_a_scope_in_nested_slices() {
        let table = [
            ("machine.slice:libpod:abc", "machine.slice/libpod-abc.scope"),
            (":cri-containerd:abc", "system.slice/cri-containerd-abc.scope"),
            ("a-b-c.slice:x:y", "a.slice/a-b.slice/a-b-c.slice/x-y.scope"),
            ("-.slice:x:y", "x-y.scope"),
            ("user.slice::y", "user.slice/y.scope"),
        ];
        for (text, path) in table {
            assert_eq!(Unit::parse(text).unwrap().relative(), PathBuf::from(path), "{text}");
        }
    }

    #[test]
    fn a_path_of_another_form_is_refused() {
        for text in
            ["/docker/abc", "a.slice:b", "a:b:c", "a.slice:b:", "../x.slice:b:c", "a--b.slice:x:y"]
        {
            assert!(Unit::parse(text).is_err(), "{text}");
        }
    }
}
