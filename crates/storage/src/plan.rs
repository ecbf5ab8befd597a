//! Decides what is shared, and how the guest's mounts read. Pure, but for the probe.

use std::ffi::OsStr;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use linux::mount::Propagation;
use protocol::{oci, paths};

use crate::{Bind, Error, Input, Kind, Plan, ReadOnly, Socket, Source};

/// File systems that a guest's kernel makes itself, out of nothing of the host's.
const GUEST_FILE_SYSTEMS: [&str; 16] = [
    "proc",
    "sysfs",
    "tmpfs",
    "ramfs",
    "devpts",
    "mqueue",
    "cgroup",
    "cgroup2",
    "hugetlbfs",
    "securityfs",
    "debugfs",
    "tracefs",
    "configfs",
    "bpf",
    "binfmt_misc",
    "devtmpfs",
];

/// Device files that are the same everywhere: the guest's own stand in for the host's.
const COMMON_DEVICES: [&str; 6] =
    ["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"];

const SHM: &str = "/dev/shm";

/// Bound by engines that mount it themselves; each container has its own part of the guest's.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Decides how the container's files get into the guest. Pure, but for `probe`.
///
/// # Errors
///
/// [`Error::Root`] or [`Error::Mount`], naming the first that is wrong; what `probe` says.
pub fn plan(
    input: &Input<'_>,
    probe: impl Fn(&Path) -> Result<Source, Error>,
) -> Result<Plan, Error> {
    let id = input.container_id;
    if id.is_empty() || id.len() > 255 || id == "." || id == ".." || id.contains(['/', '\0']) {
        return Err(Error::ContainerId { id: shown(Path::new(id)) });
    }
    let root = root(input, &probe)?;
    let guest_root = guest_path(&root.name);
    let mut plan = Plan {
        container_id: id.to_owned(),
        binds: vec![root],
        mount_points: Vec::new(),
        guest_root,
        guest_mounts: Vec::new(),
        sockets: Vec::new(),
        disks: Vec::new(),
        warnings: Vec::new(),
    };
    let mounts = input.spec.mounts().as_deref().unwrap_or_default();
    for (index, mount) in mounts.iter().enumerate() {
        let destination = destination(mount)?;
        let mount = Mount { input, index, mount, destination };
        mount.plan(&probe, &mut plan)?;
    }
    if plan.binds[0].read_only != ReadOnly::No {
        plan.mount_points = mount_points(&plan);
    }
    Ok(plan)
}

fn root(input: &Input<'_>, probe: &impl Fn(&Path) -> Result<Source, Error>) -> Result<Bind, Error> {
    let wrong = |problem| Error::Root { problem };
    let root = input.spec.root().as_ref();
    let root = root.ok_or_else(|| wrong("the spec has none".to_owned()))?;
    check(root.path()).map_err(wrong)?;
    if root.path().as_os_str().is_empty() {
        return Err(wrong("root.path is empty".to_owned()));
    }
    let source = probe(&input.bundle.join(root.path()))?;
    match source.kind {
        Kind::Directory => {}
        Kind::Missing => return Err(wrong(format!("{} does not exist", shown(&source.path)))),
        kind => {
            return Err(wrong(format!(
                "{} is {}, not a directory",
                shown(&source.path),
                kind.words()
            )));
        }
    }
    // Without a mount on /dev the guest makes device files in the root itself; then only the guest can make it
    // read-only, afterwards.
    let mounts = input.spec.mounts().as_deref().unwrap_or_default();
    let has_dev = mounts.iter().any(|mount| clean(mount.destination()) == Path::new("/dev"));
    let read_only = root.readonly().unwrap_or(false) && has_dev;
    Ok(Bind {
        source: source.path,
        name: Path::new(input.container_id).join("rootfs"),
        read_only: if read_only { ReadOnly::Top } else { ReadOnly::No },
        // Engines mount things below the root too.
        recursive: true,
        is_directory: true,
        propagation: Propagation::Slave,
    })
}

/// One mount of the spec.
struct Mount<'a> {
    input: &'a Input<'a>,
    index: usize,
    mount: &'a oci::Mount,
    /// Clean and absolute.
    destination: PathBuf,
}

impl Mount<'_> {
    fn plan(
        &self,
        probe: &impl Fn(&Path) -> Result<Source, Error>,
        plan: &mut Plan,
    ) -> Result<(), Error> {
        let wants_ids = [self.mount.uid_mappings(), self.mount.gid_mappings()]
            .iter()
            .any(|ids| ids.as_ref().is_some_and(|ids| !ids.is_empty()));
        if wants_ids || self.has(&["idmap", "ridmap"]) {
            return Err(self.wrong(
                "ID-mapped mounts cannot be shared with a guest; leave out idmap and the mappings",
            ));
        }
        if !self.is_bind() {
            return self.plan_file_system(plan);
        }
        let source = self.mount.source().as_deref().unwrap_or(Path::new(""));
        if source.as_os_str().is_empty() {
            return Err(self.wrong("a bind mount needs a source"));
        }
        check(source).map_err(|problem| self.wrong(problem))?;
        let source = probe(&self.input.bundle.join(source))?;
        self.plan_bind(&source, plan)
    }

    fn plan_file_system(&self, plan: &mut Plan) -> Result<(), Error> {
        let kind = self.mount.typ().as_deref().unwrap_or("none");
        if !GUEST_FILE_SYSTEMS.contains(&kind) {
            return Err(self.wrong(format!(
                "a file system of type `{}` cannot be mounted in a guest; mount it on the host and bind it",
                kind.escape_debug()
            )));
        }
        plan.guest_mounts.push(self.mount.clone());
        Ok(())
    }

    fn plan_bind(&self, source: &Source, plan: &mut Plan) -> Result<(), Error> {
        let path = shown(&source.path);
        if source.kind == Kind::Missing {
            return Err(self.wrong(format!("source {path} does not exist")));
        }
        if self.destination == Path::new(SHM) && source.tmpfs_size.is_some() {
            plan.guest_mounts.push(self.shm(&source.path, source.tmpfs_size.unwrap_or(0)));
            return Ok(());
        }
        // Before what is the guest's own, since /dev/log is not.
        if source.kind == Kind::Socket {
            let guest_path =
                format!("{}/{}/{}", paths::SOCKETS, self.input.container_id, self.index);
            plan.guest_mounts.push(self.bind_of(&guest_path));
            plan.sockets.push(Socket { source: source.path.clone(), guest_path });
            return Ok(());
        }
        if is_guests_own(source) {
            if !COMMON_DEVICES.iter().chain(&[CGROUPS]).any(|quiet| source.path.starts_with(quiet))
            {
                let words =
                    format!("mount {}: {path} is the guest's own, not the host's", self.name());
                plan.warnings.push(words);
            }
            plan.guest_mounts.push(self.bind_of(&source.path.to_string_lossy()));
            return Ok(());
        }
        match source.kind {
            Kind::Block | Kind::Character => {
                return Err(self.wrong(format!(
                    "source {path} is {}; a guest has devices of its own, give it to the container as a device \
                     instead",
                    source.kind.words()
                )));
            }
            Kind::Fifo => plan.warnings.push(format!(
                "mount {}: {path} is a named pipe; bytes do not pass between host and container",
                self.name()
            )),
            _ => {}
        }
        let bind = self.bind(source);
        plan.guest_mounts.push(self.bind_of(&guest_path(&bind.name)));
        plan.binds.push(bind);
        Ok(())
    }

    fn bind(&self, source: &Source) -> Bind {
        let read_only = match self.last_of(&["ro", "rw", "rro", "rrw"]) {
            Some("ro") => ReadOnly::Top,
            Some("rro") => ReadOnly::All,
            _ => ReadOnly::No,
        };
        let hears = self.last_of(&[
            "shared",
            "rshared",
            "slave",
            "rslave",
            "private",
            "rprivate",
            "unbindable",
            "runbindable",
        ]);
        let propagation = match hears {
            Some("shared" | "rshared" | "slave" | "rslave") => Propagation::Slave,
            _ => Propagation::Private,
        };
        let name = Path::new(self.input.container_id).join("mounts").join(self.index.to_string());
        Bind {
            source: source.path.clone(),
            name,
            read_only,
            recursive: self.has(&["rbind"]),
            is_directory: source.kind == Kind::Directory,
            propagation,
        }
    }

    /// The guest's mount: this one, with a source that is there in the guest.
    fn bind_of(&self, source: &str) -> oci::Mount {
        let mut mount = self.mount.clone();
        let mut options = mount.options().clone().unwrap_or_default();
        if !options.iter().any(|option| option == "bind" || option == "rbind") {
            options.insert(0, "bind".to_owned());
        }
        mount.set_source(Some(source.into())).set_typ(Some("bind".to_owned()));
        mount.set_options(Some(options));
        mount
    }

    /// The host's tmpfs on /dev/shm is a few pages of the host's memory; the guest's own is as large and faster.
    /// A tmpfs of the guest's: memory that is shared by mapping it must be of one kernel. Containers of one sandbox that
    /// bind the same directory of the host, as those of a pod do, share one tmpfs.
    fn shm(&self, source: &Path, size: u64) -> oci::Mount {
        let mut name = DefaultHasher::new();
        source.hash(&mut name);
        let mut options: Vec<_> =
            ["nosuid", "noexec", "nodev", "mode=1777"].map(str::to_owned).to_vec();
        options.push(format!("size={size}"));
        if matches!(self.last_of(&["ro", "rw", "rro", "rrw"]), Some("ro" | "rro")) {
            options.push("ro".to_owned());
        }
        let mut mount = self.mount.clone();
        mount.set_source(Some(paths::shm(name.finish()).into())).set_typ(Some("tmpfs".to_owned()));
        mount.set_options(Some(options));
        mount
    }

    fn is_bind(&self) -> bool {
        self.mount.typ().as_deref() == Some("bind") || self.has(&["bind", "rbind"])
    }

    fn options(&self) -> &[String] {
        self.mount.options().as_deref().unwrap_or_default()
    }

    fn has(&self, words: &[&str]) -> bool {
        self.last_of(words).is_some()
    }

    /// The last of the options that is one of `words`: it is the one that counts.
    fn last_of(&self, words: &[&str]) -> Option<&str> {
        self.options().iter().rev().map(String::as_str).find(|option| words.contains(option))
    }

    fn name(&self) -> String {
        shown(&self.destination)
    }

    fn wrong(&self, problem: impl Into<String>) -> Error {
        Error::Mount { destination: self.name(), problem: problem.into() }
    }
}

/// Whether a source is part of a kernel interface that the guest has its own of.
fn is_guests_own(source: &Source) -> bool {
    let path = &source.path;
    // What people keep on the host's /dev/shm are plain files; other device files are explained by the caller.
    let is_device = matches!(source.kind, Kind::Block | Kind::Character);
    let in_shm = path.starts_with(SHM) && path != Path::new(SHM);
    COMMON_DEVICES.iter().any(|device| path == Path::new(device))
        || path.starts_with("/proc")
        || path.starts_with("/sys")
        || (path.starts_with("/dev") && !is_device && !in_shm)
}

/// What the guest will mount on in the root itself: destinations that are not below another mount's.
fn mount_points(plan: &Plan) -> Vec<(PathBuf, bool)> {
    let mut found: Vec<(PathBuf, bool)> = Vec::new();
    for mount in &plan.guest_mounts {
        let path = clean(mount.destination());
        if path == Path::new("/") || found.iter().any(|(other, _)| path.starts_with(other)) {
            continue;
        }
        let source = mount.source().as_deref().unwrap_or(Path::new(""));
        let bind = plan.binds.iter().find(|bind| Path::new(&guest_path(&bind.name)) == source);
        let is_file = bind.is_some_and(|bind| !bind.is_directory)
            || plan.sockets.iter().any(|socket| Path::new(&socket.guest_path) == source)
            || COMMON_DEVICES.iter().any(|device| source == Path::new(device));
        found.push((path, !is_file));
    }
    found
}

fn destination(mount: &oci::Mount) -> Result<PathBuf, Error> {
    let path = mount.destination();
    let wrong = |problem| Error::Mount { destination: shown(path), problem };
    if path.as_os_str().is_empty() {
        return Err(wrong("a mount needs a destination".to_owned()));
    }
    check(path).map_err(wrong)?;
    Ok(clean(path))
}

/// An absolute path without `.` and `..`; the latter stop at the root.
fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            _ => {}
        }
    }
    clean
}

/// Whether the kernel could take it as a path at all: path_resolution(7).
fn check(path: &Path) -> Result<(), String> {
    const PATH_MAX: usize = 4096;
    const NAME_MAX: usize = 255;
    let bytes = path.as_os_str().as_bytes();
    let wrong = if bytes.contains(&0) {
        "has a NUL in it"
    } else if bytes.len() >= PATH_MAX {
        "is longer than 4095 bytes"
    } else if path.iter().any(|name| OsStr::len(name) > NAME_MAX) {
        "has a name longer than 255 bytes in it"
    } else {
        return Ok(());
    };
    Err(format!("path {} {wrong}", shown(path)))
}

/// A path of somebody else's for an error's text: no control characters, no screenful.
fn shown(path: &Path) -> String {
    const MOST: usize = 200;
    let text = path.to_string_lossy();
    let mut shown: String = text.chars().take(MOST).flat_map(char::escape_debug).collect();
    if text.chars().nth(MOST).is_some() {
        shown.push('…');
    }
    shown
}

fn guest_path(name: &Path) -> String {
    // Made of an id that is a str, and of words of ours.
    format!("{}/{}", paths::SHARE, name.to_string_lossy())
}

impl Kind {
    fn words(self) -> &'static str {
        match self {
            Self::Directory => "a directory",
            Self::File => "a file",
            Self::Socket => "a socket",
            Self::Fifo => "a named pipe",
            Self::Block => "a block device",
            Self::Character => "a character device",
            Self::Missing => "missing",
        }
    }
}

#[cfg(test)]
mod tests;
