//! The containers' cgroups: version 2, below one parent.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use protocol::oci::LinuxResources;
use protocol::paths;
use rustix::fs::{Mode, OFlags};

use crate::error::{Doing, Error};
use crate::resources::{self, Setting};
use crate::{devices, sys};

/// Where the hierarchy is mounted.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";

/// Enables every controller that the kernel has, for the containers.
pub(crate) fn prepare() -> Result<(), Error> {
    let parent = parent();
    fs::create_dir_all(&parent).doing(|| format!("make cgroup {}", parent.display()))?;
    enable_controllers(Path::new(ROOT))?;
    enable_controllers(&parent)
}

/// The cgroup of all containers.
pub(crate) fn parent() -> PathBuf {
    Path::new(ROOT).join(paths::CGROUP.trim_start_matches('/'))
}

fn enable_controllers(directory: &Path) -> Result<(), Error> {
    let action = || format!("enable the controllers of cgroup {}", directory.display());
    let controllers = fs::read_to_string(directory.join("cgroup.controllers")).doing(action)?;
    for controller in controllers.split_whitespace() {
        fs::write(directory.join("cgroup.subtree_control"), format!("+{controller}"))
            .doing(action)?;
    }
    Ok(())
}

/// One container's cgroup.
#[derive(Debug, Clone)]
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes the cgroup of container `id`, with its limits.
    pub(crate) fn create(id: &str, resources: Option<&LinuxResources>) -> Result<Self, Error> {
        let path = parent().join(id);
        fs::create_dir(&path).doing(|| format!("make cgroup {}", path.display()))?;
        let cgroup = Self(path);
        let limited = resources.map_or(Ok(()), |resources| cgroup.limit(resources));
        match limited.and_then(|()| cgroup.guard_devices(resources)) {
            Ok(()) => Ok(cgroup),
            Err(error) => {
                // Nothing is in it yet; the first error is the one to tell.
                drop(fs::remove_dir(&cgroup.0));
                Err(error)
            }
        }
    }

    /// Its directory.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Sets the limits that `resources` names; the others stay.
    pub(crate) fn limit(&self, resources: &LinuxResources) -> Result<(), Error> {
        for setting in resources::settings(resources, |file| self.read(file).ok())? {
            self.set(&setting)?;
        }
        Ok(())
    }

    fn set(&self, setting: &Setting) -> Result<(), Error> {
        let Setting { file, value, optional } = setting;
        let path = self.0.join(file);
        match fs::write(&path, value) {
            Err(_) if *optional => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(Error::Invalid(format!("the guest's kernel has no {file}")))
            }
            result => result.doing(|| format!("set {file} to {value}")),
        }
    }

    fn guard_devices(&self, resources: Option<&LinuxResources>) -> Result<(), Error> {
        let rules = resources.and_then(|resources| resources.devices().as_deref());
        let program = devices::filter(rules.unwrap_or_default());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let action = || "guard the devices of the container".to_owned();
        let directory = rustix::fs::open(&self.0, flags, Mode::empty()).doing(action)?;
        sys::attach_device_filter(directory.as_fd(), &program).doing(action)
    }

    /// The content of one of its files.
    pub(crate) fn read(&self, file: &str) -> io::Result<String> {
        fs::read_to_string(self.0.join(file))
    }

    /// How often the kernel killed a process in it for lack of memory.
    pub(crate) fn oom_kills(&self) -> u64 {
        let events = self.read("memory.events").unwrap_or_default();
        field(&events, "oom_kill").unwrap_or_default()
    }

    /// Stops all of its processes, or lets them go on. The kernel says when all have stopped; that is awaited by
    /// the caller, on `cgroup.events`.
    pub(crate) fn freeze(&self, frozen: bool) -> Result<(), Error> {
        let value = if frozen { "1" } else { "0" };
        fs::write(self.0.join("cgroup.freeze"), value).doing(|| "freeze the container".to_owned())
    }

    /// Whether all of its processes have stopped.
    pub(crate) fn is_frozen(&self) -> bool {
        field(&self.read("cgroup.events").unwrap_or_default(), "frozen") == Some(1)
    }

    /// Whether there is a process in it, or below it.
    pub(crate) fn is_populated(&self) -> bool {
        field(&self.read("cgroup.events").unwrap_or_default(), "populated") == Some(1)
    }

    /// Kills every process in it and below it.
    pub(crate) fn kill(&self) -> Result<(), Error> {
        match fs::write(self.0.join("cgroup.kill"), "1") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.doing(|| "kill the container's processes".to_owned()),
        }
    }

    /// The pids in it and below it.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let mut pids = Vec::new();
        collect(&self.0, &mut pids);
        pids
    }

    /// Removes it and those that the container made below it. No process may be left in it.
    pub(crate) fn remove(&self) -> Result<(), Error> {
        remove(&self.0).doing(|| format!("remove cgroup {}", self.0.display()))
    }
}

fn collect(directory: &Path, pids: &mut Vec<u32>) {
    let procs = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    pids.extend(procs.lines().filter_map(|line| line.parse::<u32>().ok()));
    for below in directories(directory) {
        collect(&below, pids);
    }
}

fn remove(directory: &Path) -> io::Result<()> {
    for below in directories(directory) {
        remove(&below)?;
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn directories(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    below.map(|entry| entry.path()).collect()
}

/// The value of `name` in a file of lines "name value".
pub(crate) fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim_start_matches(' ').parse().ok())
}

#[cfg(test)]
mod tests {
    use super::field;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let events = "low 0\noom 3\noom_kill 2\noom_group_kill 0\n";
        assert_eq!(field(events, "oom_kill"), Some(2));
        assert_eq!(field(events, "oom"), Some(3));
        assert_eq!(field(events, "high"), None);
    }
}
