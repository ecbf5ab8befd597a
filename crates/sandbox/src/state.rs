//! What is on disk of sandboxes and containers, and where. Every path of the runtime's state comes from this module.
//!
//! ```text
//! <root>/containers/<cid>          → ../vms/<vmid>/containers/<cid>   found by id; symlink(2)'s EEXIST keeps ids unique
//! <root>/vms/<vmid>/lock           flock: one creator or deleter at a time
//! <root>/vms/<vmid>/ledger         what to give back to the host
//! <root>/vms/<vmid>/sandbox.json   the sandbox process, its network namespace
//! <root>/vms/<vmid>/sandbox.log    what the sandbox process has to say
//! <root>/vms/<vmid>/control.sock   the sandbox process's door
//! <root>/vms/<vmid>/vm/            the hypervisor driver's own: sockets, logs
//! <root>/vms/<vmid>/share/         the directory that the guest sees by virtio-fs
//! <root>/vms/<vmid>/containers/<cid>/container.json   its status, its process on the host
//! <root>/vms/<vmid>/containers/<cid>/ledger           what it has taken for itself: its cgroup
//! ```

use std::collections::HashMap;
use std::fs;
use std::io::{self, ErrorKind as IoKind};
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use linux::process::ProcessId;
use protocol::oci::Hooks;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::status::Status;

/// The version of the state files. Another version is refused with words: state does not outlive an upgrade.
const VERSION: u32 = 1;

/// The longest id: it becomes a file name, and part of one in the guest.
const LONGEST_ID: usize = 200;

/// A container's id that is fit to be a file name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ContainerId(String);

impl ContainerId {
    /// Checks an id as runc does: letters, digits and `_ + - .`, not `.` or `..`; and its length.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidId`].
    pub fn new(id: &str) -> Result<Self, Error> {
        let why = if id.is_empty() {
            "it is empty".into()
        } else if id.len() > LONGEST_ID {
            format!("it has {} bytes and may have {LONGEST_ID}", id.len())
        } else if id == "." || id == ".." {
            format!("{id:?} names a directory")
        } else if let Some(bad) =
            id.chars().find(|&c| !(c.is_ascii_alphanumeric() || "_+-.".contains(c)))
        {
            format!("{id:?} has {bad:?}; letters, digits and _ + - . are allowed")
        } else {
            return Ok(Self(id.to_owned()));
        };
        Err(Error::InvalidId { why })
    }

    /// The id.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What `container.json` holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ContainerRecord {
    version: u32,
    /// The container's id.
    pub id: String,
    /// Where it is in its life, as its sandbox process last knew.
    pub status: Status,
    /// The host process that stands for it.
    pub process: Option<ProcessId>,
    /// The cgroup directories, one a hierarchy, that its host processes are in.
    pub cgroups: Vec<PathBuf>,
    /// The bundle's absolute path.
    pub bundle: PathBuf,
    /// The root file system's absolute path on the host.
    pub rootfs: PathBuf,
    /// RFC 3339.
    pub created: String,
    /// The spec's annotations.
    pub annotations: HashMap<String, String>,
    /// How its init exited; 128 + the signal where one ended it.
    pub exit_code: Option<u8>,
    /// The spec's hooks, for `start` and `delete` to run.
    pub hooks: Option<Hooks>,
}

impl ContainerRecord {
    /// A record of a container that is being created.
    #[must_use]
    pub fn new(id: &ContainerId, bundle: PathBuf, rootfs: PathBuf, created: String) -> Self {
        Self {
            version: VERSION,
            id: id.0.clone(),
            status: Status::Creating,
            process: None,
            cgroups: Vec::new(),
            bundle,
            rootfs,
            created,
            annotations: HashMap::new(),
            exit_code: None,
            hooks: None,
        }
    }
}

/// What `sandbox.json` holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SandboxRecord {
    version: u32,
    /// The sandbox process.
    pub process: ProcessId,
    /// The network namespace that the sandbox's interfaces are in: device and inode of its file, namespaces(7).
    pub netns: (u64, u64),
}

impl SandboxRecord {
    /// A record of the sandbox that `process` owns.
    #[must_use]
    pub fn new(process: ProcessId, netns: (u64, u64)) -> Self {
        Self { version: VERSION, process, netns }
    }
}

/// The directory under which all state of one caller is: `--root`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root(PathBuf);

impl Root {
    /// `path`, made absolute.
    ///
    /// # Errors
    ///
    /// When there is no working directory.
    pub fn new(path: &Path) -> Result<Self, Error> {
        std::path::absolute(path).map(Self).map_err(Error::host("find", path))
    }

    /// The root where none is given: `/run/kata-containers`, or below `$XDG_RUNTIME_DIR` for a user who is not root.
    #[must_use]
    pub fn default_path() -> PathBuf {
        let user = rustix::process::geteuid();
        // In a user namespace, as of rootless podman, root is somebody else outside: user_namespaces(7).
        let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        let map: Vec<_> = map.split_whitespace().collect();
        let is_root = user.is_root() && (map.is_empty() || map == ["0", "0", "4294967295"]);
        match std::env::var_os("XDG_RUNTIME_DIR").filter(|_| !is_root) {
            Some(dir) => PathBuf::from(dir).join("kata-containers"),
            None if is_root => "/run/kata-containers".into(),
            None => format!("/tmp/kata-containers-{}", user.as_raw()).into(),
        }
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Claims `id` and makes the directories of a new VM for it.
    ///
    /// # Errors
    ///
    /// [`Error::IdTaken`], or what the host says; nothing is then left.
    pub fn claim(&self, id: &ContainerId) -> Result<ContainerDir, Error> {
        let name = random_name().map_err(Error::host("read", "/dev/urandom"))?;
        self.claim_in(id, &VmDir(self.0.join("vms").join(name)))
    }

    /// Claims `id` and makes its directory in that of a VM.
    ///
    /// # Errors
    ///
    /// As for [`Self::claim`].
    pub fn claim_in(&self, id: &ContainerId, vm: &VmDir) -> Result<ContainerDir, Error> {
        for name in ["vms", "containers"] {
            let path = self.0.join(name);
            make_directories(&path).map_err(Error::host("create", path))?;
        }
        let name = vm.0.file_name().unwrap_or_default();
        let link = self.link(id);
        symlink(Path::new("../vms").join(name).join("containers").join(&id.0), &link).map_err(
            |source| match source.kind() {
                IoKind::AlreadyExists => Error::IdTaken { id: id.0.clone() },
                _ => Error::Host { action: "create", path: link.clone(), source },
            },
        )?;
        let dir = ContainerDir { vm: vm.clone(), id: id.clone(), link };
        make_directories(&dir.path()).map_err(|source| {
            let path = dir.path();
            // The first error is the one to tell.
            drop(dir.remove());
            Error::Host { action: "create", path, source }
        })?;
        Ok(dir)
    }

    /// Finds a container's directory.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchContainer`].
    pub fn find(&self, id: &ContainerId) -> Result<ContainerDir, Error> {
        let link = self.link(id);
        let missing = || Error::NoSuchContainer { id: id.0.clone() };
        let target = fs::read_link(&link).map_err(|_| missing())?;
        // ../vms/<vmid>/containers/<cid>
        let vm = target.iter().nth(2).ok_or_else(missing)?;
        Ok(ContainerDir { vm: VmDir(self.0.join("vms").join(vm)), id: id.clone(), link })
    }

    /// The ids of all containers, sorted.
    ///
    /// # Errors
    ///
    /// When the root is there and cannot be read.
    pub fn list(&self) -> Result<Vec<ContainerId>, Error> {
        let path = self.0.join("containers");
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == IoKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(Error::Host { action: "read", path, source }),
        };
        let mut ids: Vec<_> = entries
            .filter_map(|entry| ContainerId::new(entry.ok()?.file_name().to_str()?).ok())
            .collect();
        ids.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(ids)
    }

    /// The VM of the sandbox whose interfaces are in the network namespace `netns`, where one runs.
    #[must_use]
    pub fn sandbox_in(&self, netns: (u64, u64)) -> Option<VmDir> {
        let entries = fs::read_dir(self.0.join("vms")).into_iter().flatten().flatten();
        entries.map(|entry| VmDir(entry.path())).find(|vm| {
            let record = vm.read().ok().flatten();
            record.is_some_and(|record| record.netns == netns && record.process.is_alive())
        })
    }

    fn link(&self, id: &ContainerId) -> PathBuf {
        self.0.join("containers").join(&id.0)
    }
}

/// The directory of one VM.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmDir(PathBuf);

impl VmDir {
    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The lock of whoever creates or deletes.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }

    /// The ledger.
    #[must_use]
    pub fn ledger(&self) -> PathBuf {
        self.0.join("ledger")
    }

    /// The sandbox process's door.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.0.join("control.sock")
    }

    /// The sandbox process's log.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.0.join("sandbox.log")
    }

    /// The hypervisor driver's own directory.
    #[must_use]
    pub fn machine(&self) -> PathBuf {
        self.0.join("vm")
    }

    /// The directory that the guest sees.
    #[must_use]
    pub fn share(&self) -> PathBuf {
        self.0.join("share")
    }

    fn record(&self) -> PathBuf {
        self.0.join("sandbox.json")
    }

    /// The directory of a container in this VM.
    #[must_use]
    pub fn container(&self, id: &ContainerId) -> ContainerDir {
        // <root>/vms/<vmid>
        let root = self.0.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
        ContainerDir { vm: self.clone(), id: id.clone(), link: root.join("containers").join(&id.0) }
    }

    /// The containers in this VM, ended ones too.
    #[must_use]
    pub fn containers(&self) -> Vec<ContainerDir> {
        let entries = fs::read_dir(self.0.join("containers")).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| ContainerId::new(entry.file_name().to_str()?).ok())
            .map(|id| self.container(&id))
            .collect()
    }

    /// Reads `sandbox.json`; nothing where the sandbox process has not come so far.
    ///
    /// # Errors
    ///
    /// When it is there and cannot be understood.
    pub fn read(&self) -> Result<Option<SandboxRecord>, Error> {
        let record: Option<SandboxRecord> = read_json(&self.record())?;
        record.map(|record| known(record.version, &self.record(), record)).transpose()
    }

    /// Writes `sandbox.json`.
    ///
    /// # Errors
    ///
    /// When the disk is full, for one.
    pub fn write(&self, record: &SandboxRecord) -> Result<(), Error> {
        write_json(&self.record(), record)
    }
}

/// The directory of one container.
#[derive(Debug, Clone)]
pub struct ContainerDir {
    vm: VmDir,
    id: ContainerId,
    link: PathBuf,
}

impl ContainerDir {
    /// The VM's directory.
    #[must_use]
    pub fn vm(&self) -> &VmDir {
        &self.vm
    }

    /// The container's id.
    #[must_use]
    pub fn id(&self) -> &ContainerId {
        &self.id
    }

    fn path(&self) -> PathBuf {
        self.vm.0.join("containers").join(&self.id.0)
    }

    fn record(&self) -> PathBuf {
        self.path().join("container.json")
    }

    /// Reads `container.json` as it was written; nothing where creation has not come so far.
    ///
    /// # Errors
    ///
    /// When it is there and cannot be understood.
    pub fn read(&self) -> Result<Option<ContainerRecord>, Error> {
        let record: Option<ContainerRecord> = read_json(&self.record())?;
        record.map(|record| known(record.version, &self.record(), record)).transpose()
    }

    /// Reads `container.json`, with a status that is true now: nobody could write down that a sandbox process was
    /// killed.
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchContainer`] where creation never came so far, or when the file cannot be understood.
    pub fn current(&self) -> Result<ContainerRecord, Error> {
        let mut record =
            self.read()?.ok_or_else(|| Error::NoSuchContainer { id: self.id.0.clone() })?;
        if !record.process.is_some_and(ProcessId::is_alive) {
            record.status = Status::Stopped;
        }
        Ok(record)
    }

    /// Writes `container.json`.
    ///
    /// # Errors
    ///
    /// When the disk is full, for one.
    pub fn write(&self, record: &ContainerRecord) -> Result<(), Error> {
        write_json(&self.record(), record)
    }

    /// The ledger of what the container itself has taken: what its VM has taken is in [`VmDir::ledger`].
    #[must_use]
    pub fn ledger(&self) -> PathBuf {
        self.path().join("ledger")
    }

    /// Whether its VM has other containers, ended ones too.
    #[must_use]
    pub fn has_siblings(&self) -> bool {
        self.vm.containers().iter().any(|other| other.id != self.id)
    }

    /// Forgets the container, and with the last one its VM's directory; link last: while the link is there, `delete` can
    /// be tried again.
    ///
    /// What is bound below the share is the user's and is never descended into.
    ///
    /// # Errors
    ///
    /// When something would not go.
    pub fn remove(&self) -> Result<(), Error> {
        if self.has_siblings() {
            linux::remove_tree(&self.path()).map_err(Error::host("remove", self.path()))?;
            return linux::remove_tree(&self.link).map_err(Error::host("remove", &self.link));
        }
        // Only the sandbox process itself sees mounts there; for everybody else they went with it.
        linux::mount::unmount_all(&self.vm.share())
            .map_err(Error::host("unmount", self.vm.share()))?;
        linux::remove_tree(&self.vm.0).map_err(Error::host("remove", &self.vm.0))?;
        linux::remove_tree(&self.link).map_err(Error::host("remove", &self.link))
    }
}

fn make_directories(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn random_name() -> io::Result<String> {
    let mut bytes = [0_u8; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(format!("{:016x}", u64::from_ne_bytes(bytes)))
}

fn known<T>(version: u32, path: &Path, record: T) -> Result<T, Error> {
    if version == VERSION {
        return Ok(record);
    }
    let source = format!("version {version} of the state; this program writes {VERSION}").into();
    Err(Error::Syntax { path: path.to_owned(), source })
}

fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>, Error> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == IoKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::Host { action: "read", path: path.to_owned(), source }),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|source| Error::Syntax { path: path.to_owned(), source: source.into() })
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let bytes = serde_json::to_vec_pretty(value).map_err(io::Error::from);
    bytes.and_then(|bytes| linux::file::replace(path, &bytes)).map_err(Error::host("write", path))
}

#[cfg(test)]
mod tests {
    use super::{ContainerId, ContainerRecord, Root};
    use crate::error::Error;
    use crate::status::Status;

    fn id(text: &str) -> ContainerId {
        ContainerId::new(text).unwrap()
    }

    #[test]
    fn ids_that_are_no_file_names_are_refused() {
        for bad in ["", ".", "..", "a/b", "a b", "ä", "a\0", &"x".repeat(2048)] {
            let error = ContainerId::new(bad).unwrap_err();
            assert!(matches!(error, Error::InvalidId { .. }), "{bad:?}");
            assert!(error.to_string().starts_with("invalid container ID format"), "{bad:?}");
        }
        for good in ["a", "A-b_c.d+e", &"f".repeat(64)] {
            assert_eq!(id(good).as_str(), good);
        }
    }

    #[test]
    fn an_id_is_claimed_once_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path()).unwrap();
        let container = root.claim(&id("one")).unwrap();
        assert!(matches!(root.claim(&id("one")), Err(Error::IdTaken { .. })));
        assert_eq!(root.list().unwrap(), [id("one")]);
        assert_eq!(root.find(&id("one")).unwrap().vm().path(), container.vm().path());

        container.remove().unwrap();
        assert!(root.list().unwrap().is_empty());
        assert!(matches!(root.find(&id("one")), Err(Error::NoSuchContainer { .. })));
        assert_eq!(std::fs::read_dir(dir.path().join("vms")).unwrap().count(), 0);
    }

    #[test]
    fn removing_leaves_what_is_bound_below_the_share_alone() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let users = tempfile::tempdir().unwrap();
        std::fs::write(users.path().join("precious"), "data").unwrap();
        let container = Root::new(dir.path()).unwrap().claim(&id("one")).unwrap();
        let share = container.vm().share();
        std::fs::create_dir(&share).unwrap();
        linux::mount::share(&share).unwrap();
        let rootfs = share.join("rootfs");
        std::fs::create_dir(&rootfs).unwrap();
        linux::mount::bind(users.path(), &rootfs, true).unwrap();

        container.remove().unwrap();

        assert_eq!(std::fs::read(users.path().join("precious")).unwrap(), b"data");
        assert!(!container.vm().path().exists());
    }

    #[test]
    fn a_container_whose_process_has_gone_is_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let container = Root::new(dir.path()).unwrap().claim(&id("one")).unwrap();
        let mut record =
            ContainerRecord::new(&id("one"), "/b".into(), "/b/rootfs".into(), "2026".into());
        record.status = Status::Running;
        record.process = Some(linux::process::ProcessId::own().unwrap());
        container.write(&record).unwrap();
        assert_eq!(container.current().unwrap().status, Status::Running);

        let own = linux::process::ProcessId::own().unwrap();
        let stranger = linux::process::ProcessId { start_time: own.start_time + 1, ..own };
        record.process = Some(stranger);
        container.write(&record).unwrap();
        assert_eq!(container.current().unwrap().status, Status::Stopped);
    }
}
