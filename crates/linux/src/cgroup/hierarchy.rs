//! The hierarchies that are mounted, and paths in them.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use super::{Directory, Error};
use crate::mount::{self, MountInfo};

/// Where distributions mount cgroups, cgroups(7).
const ROOT: &str = "/sys/fs/cgroup";

/// The named v1 hierarchy that systemd keeps its own accounts in.
const NAMED: &str = "name=";

/// One mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hierarchy {
    /// v1: its controllers. v2: none.
    pub controllers: Vec<String>,
    /// Whether it is v2.
    pub unified: bool,
    /// Where it is mounted.
    pub target: PathBuf,
    /// Which of its directories is mounted there.
    pub root: PathBuf,
}

/// The hierarchies of this host. The freezer is last: undone first, it cannot keep others from being emptied.
pub(super) fn mounted() -> Result<Vec<Hierarchy>, Error> {
    let path = Path::new("/proc/thread-self/mountinfo");
    let hierarchies = of(&mount::list().map_err(Error::host("read", path))?);
    if hierarchies.is_empty() {
        return Err(Error::NoHierarchy { root: ROOT.into() });
    }
    Ok(hierarchies)
}

pub(super) fn of(mounts: &[MountInfo]) -> Vec<Hierarchy> {
    let mut hierarchies: Vec<Hierarchy> = Vec::new();
    for mount in mounts {
        let unified = mount.fstype == "cgroup2";
        if !unified && mount.fstype != "cgroup" {
            continue;
        }
        let controllers = if unified { Vec::new() } else { controllers(&mount.super_options) };
        let known =
            |other: &Hierarchy| other.unified == unified && other.controllers == controllers;
        if hierarchies.iter().any(known) || (!unified && controllers.is_empty()) {
            continue;
        }
        let (target, root) = (mount.target.clone(), mount.root.clone());
        hierarchies.push(Hierarchy { controllers, unified, target, root });
    }
    hierarchies.sort_by_key(|hierarchy| {
        hierarchy.controllers.iter().any(|controller| controller == "freezer")
    });
    hierarchies
}

/// The controllers among a v1 mount's options, see the kernel's `Documentation/admin-guide/cgroup-v1/cgroups.rst`.
fn controllers(options: &str) -> Vec<String> {
    const OTHERS: [&str; 8] =
        ["rw", "ro", "none", "all", "noprefix", "xattr", "clone_children", "cpuset_v2_mode"];
    options
        .split(',')
        .filter(|option| !OTHERS.contains(option))
        .filter(|option| option.starts_with(NAMED) || !option.contains('='))
        .filter(|option| !option.starts_with("favor") && !option.is_empty())
        .map(str::to_owned)
        .collect()
}

/// The path of a `cgroupsPath` below a hierarchy's mount point.
pub(super) fn relative(path: &str) -> Result<PathBuf, Error> {
    let bad = |problem| Error::BadPath { path: path.escape_debug().to_string(), problem };
    if path.contains('\0') {
        return Err(bad("has a NUL in it"));
    }
    if path.len() >= 4096 || path.split('/').any(|name| name.len() > 255) {
        return Err(bad("is too long"));
    }
    let mut relative = PathBuf::new();
    for component in Path::new(path).components() {
        match component {
            Component::Normal(name) => relative.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(bad("must not have `..` in it"));
            }
        }
    }
    Ok(relative)
}

impl Hierarchy {
    pub(super) fn directory(&self, relative: &Path) -> Directory {
        Directory {
            controllers: self.controllers.clone(),
            unified: self.unified,
            path: self.target.join(relative),
        }
    }

    /// The directory that a `/proc/<pid>/cgroup` names: lines of `id:controllers:path`.
    pub(super) fn directory_of(&self, proc_cgroup: &str) -> Option<Directory> {
        let path = proc_cgroup.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            let same = if self.unified {
                controllers.is_empty()
            } else {
                controllers.split(',').any(|controller| self.controllers[0] == controller)
            };
            same.then_some(path)
        })?;
        let path = Path::new(path);
        let below = path.strip_prefix(&self.root).unwrap_or(path);
        Some(self.directory(below.strip_prefix("/").unwrap_or(below)))
    }

    /// Makes the directory and its parents, so that processes can be put in it.
    pub(super) fn make(&self, directory: &Directory) -> Result<(), Error> {
        let below = directory.path.strip_prefix(&self.target).unwrap_or(Path::new(""));
        let mut parent = self.target.clone();
        for name in below {
            let child = parent.join(name);
            if self.unified {
                delegate_controllers(&parent);
            }
            match fs::create_dir(&child) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(Error::host("create cgroup", &child)(error));
                }
                _ => {}
            }
            if self.controllers.iter().any(|controller| controller == "cpuset") {
                inherit_cpuset(&parent, &child)?;
            }
            parent = child;
        }
        Ok(())
    }
}

/// Lets the children of a v2 cgroup have its controllers. What does not go (a parent with processes in it, EBUSY; a
/// controller that is not free) is missed, and told, when a limit needs it.
fn delegate_controllers(parent: &Path) {
    let Ok(controllers) = fs::read_to_string(parent.join("cgroup.controllers")) else { return };
    for controller in controllers.split_whitespace() {
        drop(fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}")));
    }
}

/// A new v1 cpuset is empty, and no process can be put in it until it has CPUs and memory nodes: cpuset(7).
fn inherit_cpuset(parent: &Path, child: &Path) -> Result<(), Error> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let path = child.join(name);
        let now = fs::read_to_string(&path).map_err(Error::host("read", &path))?;
        if now.trim().is_empty() {
            let from = parent.join(name);
            let value = fs::read_to_string(&from).map_err(Error::host("read", &from))?;
            fs::write(&path, value.trim()).map_err(Error::host("write", &path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{controllers, of, relative};
    use crate::mount::parse;
    use std::path::{Path, PathBuf};

    #[test]
    fn a_hybrid_host_has_its_v1_hierarchies_and_the_unified_one() {
        let mounts = parse(
            b"25 30 0:22 / /sys/fs/cgroup ro,nosuid shared:4 - tmpfs tmpfs ro,mode=755\n\
              26 25 0:23 / /sys/fs/cgroup/unified rw shared:5 - cgroup2 cgroup2 rw,nsdelegate\n\
              27 25 0:24 / /sys/fs/cgroup/systemd rw shared:6 - cgroup cgroup rw,xattr,name=systemd\n\
              28 25 0:25 / /sys/fs/cgroup/freezer rw shared:7 - cgroup cgroup rw,freezer\n\
              29 25 0:26 / /sys/fs/cgroup/cpu,cpuacct rw shared:8 - cgroup cgroup rw,cpu,cpuacct\n\
              31 25 0:26 / /mnt/again rw shared:8 - cgroup cgroup rw,cpu,cpuacct\n",
        );
        let found = of(&mounts);
        let names: Vec<_> = found.iter().map(|found| found.controllers.join(",")).collect();
        assert_eq!(names, ["", "name=systemd", "cpu,cpuacct", "freezer"]);
        assert!(found[0].unified);
        assert_eq!(found[2].target, Path::new("/sys/fs/cgroup/cpu,cpuacct"));
    }

    #[test]
    fn options_of_a_v1_mount_that_are_no_controllers_are_left_out() {
        let options = "rw,memory,release_agent=/x,name=a,clone_children";
        assert_eq!(controllers(options), ["memory", "name=a"]);
    }

    #[test]
    fn a_path_stays_below_the_mount_point() {
        assert_eq!(relative("/docker/abc").unwrap(), PathBuf::from("docker/abc"));
        assert_eq!(relative("a//./b/").unwrap(), PathBuf::from("a/b"));
        assert_eq!(
            relative("/docker/../../etc").unwrap_err().to_string(),
            "cgroupsPath `/docker/../../etc` must not have `..` in it"
        );
        assert!(relative("/a\0b").is_err());
        assert!(relative(&"a".repeat(300)).is_err());
    }

    #[test]
    fn the_directory_of_a_process_is_found_in_its_own_hierarchy() {
        let mounts = parse(
            b"28 25 0:25 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n\
              26 25 0:23 /outer /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
        );
        let found = of(&mounts);
        let text = "7:freezer:/docker/a\n0::/outer/b:c\n";
        let paths: Vec<_> =
            found.iter().map(|found| found.directory_of(text).unwrap().path).collect();
        assert_eq!(
            paths,
            [Path::new("/sys/fs/cgroup/unified/b:c"), Path::new("/sys/fs/cgroup/freezer/docker/a")]
        );
    }
}
