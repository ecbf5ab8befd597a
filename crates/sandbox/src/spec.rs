//! A bundle's `config.json`: reading it, refusing what cannot be run, and what of it the guest is told.
//!
//! The OCI runtime spec, <https://github.com/opencontainers/runtime-spec/blob/v1.2.0/config.md>.

use std::fs;
use std::io::ErrorKind as IoKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use protocol::oci::{LinuxDeviceType, LinuxNamespaceType, LinuxResources, Process, Spec};
use serde_json::Value;

use crate::error::Error;

/// The newest minor version of the spec that is known to bring nothing that we would overlook.
const NEWEST: (u32, u32) = (1, 3);

/// The character devices by major and minor number that a guest's kernel makes as the host's does: null, zero, full,
/// random, urandom, kmsg, tty, console, ptmx, tun, cuse, fuse, btrfs-control, mapper/control, loop-control, vhost-net,
/// vhost-vsock.
const GUEST_HAS: [(i64, i64); 17] = [
    (1, 3),
    (1, 5),
    (1, 7),
    (1, 8),
    (1, 9),
    (1, 11),
    (5, 0),
    (5, 1),
    (5, 2),
    (10, 200),
    (10, 203),
    (10, 229),
    (10, 234),
    (10, 236),
    (10, 237),
    (10, 238),
    (10, 241),
];

/// A namespace that a container shares with another one of its sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SharedNamespace {
    /// Its type, never the network's: that one all containers of a sandbox share.
    pub(crate) kind: LinuxNamespaceType,
    /// The other container.
    pub(crate) container: String,
}

/// A bundle: its directory and its spec, as typed and as its JSON.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// The directory, absolute.
    pub path: PathBuf,
    /// The spec.
    pub spec: Spec,
    json: Value,
}

impl Bundle {
    /// Reads the bundle at `path` and checks what can be checked without a guest.
    ///
    /// # Errors
    ///
    /// One that names the member that cannot be run.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let path = fs::canonicalize(path).map_err(Error::host("open bundle", path))?;
        let file = path.join("config.json");
        let text = match fs::read(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == IoKind::NotFound => {
                // runc's words.
                return Err(Error::invalid(format!(
                    "JSON specification file {} not found",
                    file.display()
                )));
            }
            Err(source) => return Err(Error::Host { action: "read", path: file, source }),
        };
        let syntax =
            |source: serde_json::Error| Error::Syntax { path: file.clone(), source: source.into() };
        let json: Value = serde_json::from_slice(&text).map_err(syntax)?;
        check_version(&json)?;
        // From the text, not from the value: errors then have line and column.
        let spec: Spec = serde_json::from_slice(&text).map_err(syntax)?;
        let bundle = Self { path, spec, json };
        bundle.check()?;
        Ok(bundle)
    }

    /// A bundle made in memory, for `kata-runtime do`.
    ///
    /// # Errors
    ///
    /// As [`Self::load`].
    pub fn new(path: PathBuf, json: Value) -> Result<Self, Error> {
        let spec = Spec::deserialize_from(&json, &path)?;
        let bundle = Self { path, spec, json };
        bundle.check()?;
        Ok(bundle)
    }

    /// The spec's JSON.
    #[must_use]
    pub fn json(&self) -> &Value {
        &self.json
    }

    /// The process of the spec; [`Self::load`] has checked that there is one.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidSpec`] where there is none.
    pub fn process(&self) -> Result<&Process, Error> {
        self.spec.process().as_ref().ok_or_else(|| Error::invalid("config.json has no `process`"))
    }

    /// The root file system's absolute path.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidSpec`] where the spec has no root.
    pub fn rootfs(&self) -> Result<PathBuf, Error> {
        let root =
            self.spec.root().as_ref().ok_or_else(|| Error::invalid("config.json has no `root`"))?;
        Ok(self.path.join(root.path()))
    }

    /// The container's limits.
    pub(crate) fn resources(&self) -> Option<&LinuxResources> {
        self.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref())
    }

    fn check(&self) -> Result<(), Error> {
        check_process(self.process()?, "process")?;
        let rootfs = self.rootfs()?;
        match fs::metadata(&rootfs) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => {
                return Err(Error::invalid(format!(
                    "root.path {} is not a directory",
                    rootfs.display()
                )));
            }
            Err(source) => {
                return Err(Error::Host { action: "open root.path", path: rootfs, source });
            }
        }
        if let Some(mount) =
            self.spec.mounts().iter().flatten().find(|mount| !mount.destination().is_absolute())
        {
            // The spec wants absolute paths; runc takes others with a warning, relative to `/`.
            tracing::warn!(destination = %mount.destination().display(), "mount destination is not absolute");
        }
        self.check_linux()
    }

    fn check_linux(&self) -> Result<(), Error> {
        let Some(linux) = self.spec.linux() else {
            return Err(Error::invalid("config.json has no `linux`"));
        };
        let namespaces = linux.namespaces().iter().flatten();
        let mut seen = Vec::new();
        for namespace in namespaces.clone() {
            if seen.contains(&namespace.typ()) {
                return Err(Error::invalid(format!(
                    "namespace {} is there twice",
                    namespace.typ()
                )));
            }
            seen.push(namespace.typ());
            if let Some(path) = namespace.path()
                && namespace.typ() == LinuxNamespaceType::Network
                && let Err(error) = fs::metadata(path)
            {
                if error.kind() != IoKind::NotFound {
                    return Err(Error::host("open network namespace", path)(error));
                }
                return Err(Error::invalid(format!(
                    "network namespace {} does not exist",
                    path.display()
                )));
            }
            if let Some(path) = namespace.path()
                && namespace.typ() == LinuxNamespaceType::Network
                && is_hosts(path)
            {
                return Err(host_network(&format!("{} is the host's own", path.display())));
            }
        }
        if !seen.contains(&LinuxNamespaceType::Network) {
            return Err(host_network("config.json has no `network` in linux.namespaces"));
        }
        if !seen.contains(&LinuxNamespaceType::Mount) {
            return Err(Error::invalid(
                "unable to run without a `mount` namespace in linux.namespaces",
            ));
        }
        if self.gives_all_devices() {
            return Ok(());
        }
        for device in linux.devices().iter().flatten() {
            let known = match device.typ() {
                LinuxDeviceType::P | LinuxDeviceType::B => true,
                _ => GUEST_HAS.contains(&(device.major(), device.minor())),
            };
            if !known {
                return Err(Error::Unsupported {
                    what: format!(
                        "device {} ({}:{}) of the host cannot be given to a VM; block devices can, and those that a \
                         guest's kernel makes itself, like /dev/fuse and /dev/net/tun",
                        device.path().display(),
                        device.major(),
                        device.minor()
                    ),
                });
            }
        }
        Ok(())
    }

    /// Whether the spec lets the container use every device, as `docker run --privileged` does. Such a container gets
    /// the guest's devices, and none of the host's.
    pub(crate) fn gives_all_devices(&self) -> bool {
        let rules = self.json.pointer("/linux/resources/devices").and_then(Value::as_array);
        rules.is_some_and(|rules| {
            rules.iter().any(|rule| {
                rule["allow"] == Value::Bool(true)
                    && rule.get("major").is_none_or(|major| major.as_i64() == Some(-1))
                    && rule.get("minor").is_none_or(|minor| minor.as_i64() == Some(-1))
                    && rule.get("type").and_then(Value::as_str).is_none_or(|kind| kind == "a")
            })
        })
    }

    /// What the guest's agent is told: the spec's JSON with its root and mounts where the guest has them, and without
    /// what only the host can honour. Pure.
    #[must_use]
    pub(crate) fn for_guest(
        &self,
        root: &str,
        mounts: &[protocol::oci::Mount],
        shared: &[SharedNamespace],
    ) -> Value {
        let mut spec = self.json.clone();
        spec["root"]["path"] = root.into();
        spec["mounts"] = serde_json::to_value(mounts).unwrap_or_default();
        if let Some(hooks) = spec.get_mut("hooks").and_then(Value::as_object_mut) {
            // All others run in the runtime's namespaces, which are the host's.
            hooks.retain(|when, _| when == "startContainer");
        }
        // Security modules of the host, whose names mean nothing to the guest's kernel.
        remove(&mut spec, "/process", &["apparmorProfile", "selinuxLabel"]);
        remove(&mut spec, "/linux", &["mountLabel", "cgroupsPath", "intelRdt", "netDevices"]);
        // Host numbers: which of the host's CPUs, which of its network classes. The host's cgroup honours them.
        remove(&mut spec, "/linux/resources", &["network", "rdma"]);
        remove(
            &mut spec,
            "/linux/resources/cpu",
            &["cpus", "mems", "realtimeRuntime", "realtimePeriod"],
        );
        if let Some(namespaces) =
            spec.pointer_mut("/linux/namespaces").and_then(Value::as_array_mut)
        {
            // The guest's own network namespace is the sandbox's. A path is of the host; where it is another container's
            // of the sandbox, the agent knows that one's namespace.
            namespaces.retain_mut(|namespace| {
                let kind = namespace["type"].as_str().unwrap_or_default();
                let of = shared.iter().find(|shared| shared.kind.to_string() == kind);
                if let Some(SharedNamespace { container, .. }) = of {
                    namespace["path"] = protocol::paths::namespace_of(container).into();
                    return true;
                }
                kind != "network"
                    && namespace.get("path").and_then(Value::as_str).unwrap_or_default().is_empty()
            });
        }
        let all = self.gives_all_devices();
        if let Some(devices) = spec.pointer_mut("/linux/devices").and_then(Value::as_array_mut) {
            devices.retain(|device| {
                let number = (device["major"].as_i64(), device["minor"].as_i64());
                let guests = |&(major, minor)| number == (Some(major), Some(minor));
                // The agent adds the guest's own.
                !all || (device["type"] != "b" && GUEST_HAS.iter().any(guests))
            });
        }
        spec
    }
}

/// Whether a network namespace is that of this host, or of this process: moving its traffic would cut the host off.
fn is_hosts(path: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    let hosts =
        ["/proc/thread-self/ns/net", "/proc/1/ns/net"].map(|path| identity(Path::new(path)));
    identity(path).is_some_and(|given| hosts.contains(&Some(given)))
}

fn host_network(found: &str) -> Error {
    let what = format!(
        "a container in a VM cannot share the host's network, as `--network host` asks: {found}; use a bridge network, \
         with published ports (`-p`) for what the host shall reach, or `--network none`"
    );
    Error::Unsupported { what }
}

/// A `process` object that a program can be run from: `process.json` of an exec, or the spec's.
///
/// # Errors
///
/// One that names the member, as `<name>.args`.
pub(crate) fn check_process(process: &Process, name: &str) -> Result<(), Error> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Error::invalid(format!("{name}.args must not be empty")));
    }
    if !process.cwd().is_absolute() {
        // runc's words.
        return Err(Error::invalid(format!("Cwd must be an absolute path ({name}.cwd)")));
    }
    Ok(())
}

fn remove(spec: &mut Value, pointer: &str, keys: &[&str]) {
    if let Some(object) = spec.pointer_mut(pointer).and_then(Value::as_object_mut) {
        for key in keys {
            object.remove(*key);
        }
    }
}

fn check_version(json: &Value) -> Result<(), Error> {
    let version = json.get("ociVersion").and_then(Value::as_str).unwrap_or_default();
    let mut numbers = version.split(['.', '-', '+']).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return Err(Error::invalid(format!("ociVersion {version:?} is not a version like 1.2.0")));
    };
    if major != NEWEST.0 {
        return Err(Error::invalid(format!(
            "ociVersion {version} is not supported; supported are 1.0.0 to {}.{}.x",
            NEWEST.0, NEWEST.1
        )));
    }
    if minor > NEWEST.1 {
        tracing::warn!(version, "ociVersion is newer than this runtime; what it adds is ignored");
    }
    Ok(())
}

/// Typed parsing of a JSON value, with our error.
trait DeserializeFrom: Sized {
    fn deserialize_from(json: &Value, path: &Path) -> Result<Self, Error>;
}

impl DeserializeFrom for Spec {
    fn deserialize_from(json: &Value, path: &Path) -> Result<Self, Error> {
        serde_json::from_value(json.clone())
            .map_err(|source| Error::Syntax { path: path.to_owned(), source: source.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::Bundle;
    use crate::error::Chain;
    use serde_json::{Value, json};

    fn spec() -> Value {
        json!({
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/", "apparmorProfile": "docker-default"},
            "root": {"path": "rootfs"},
            "hooks": {"prestart": [{"path": "/h"}], "startContainer": [{"path": "/c"}]},
            "linux": {
                "cgroupsPath": "/docker/x",
                "namespaces": [{"type": "mount"}, {"type": "network"}, {"type": "ipc", "path": "/proc/1/ns/ipc"}],
                "resources": {"cpu": {"cpus": "0", "shares": 512}, "memory": {"limit": 1}},
            },
        })
    }

    fn load(json: &Value) -> Result<Bundle, String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("rootfs")).unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        std::fs::write(dir.path().join("config.json"), json.to_string()).unwrap();
        Bundle::load(dir.path()).map_err(|error| Chain(&error).to_string())
    }

    #[test]
    fn each_bad_spec_is_refused_by_the_name_of_what_is_bad() {
        let cases: [(&str, Value, &str); 12] = [
            ("/ociVersion", json!("2.0.0"), "ociVersion 2.0.0 is not supported"),
            ("/ociVersion", json!("one"), "is not a version"),
            ("/process", Value::Null, "no `process`"),
            ("/process/args", json!([]), "process.args"),
            ("/process/args", json!("sh"), "config.json"),
            ("/process/cwd", json!("tmp"), "Cwd must be an absolute path"),
            ("/root/path", json!("missing"), "root.path"),
            ("/root/path", json!("file"), "not a directory"),
            ("/linux", Value::Null, "no `linux`"),
            ("/linux/namespaces", json!([{"type": "mount"}]), "host's network"),
            ("/linux/namespaces", json!([{"type": "moon"}]), "moon"),
            (
                "/linux/namespaces",
                json!([{"type": "mount"}, {"type": "network"}, {"type": "mount"}]),
                "twice",
            ),
        ];
        for (pointer, value, words) in cases {
            let mut json = spec();
            *json.pointer_mut(pointer).unwrap() = value.clone();
            let error = load(&json).unwrap_err();
            assert!(error.contains(words), "{pointer} = {value}: {error}");
        }
        assert!(load(&spec()).is_ok());
    }

    #[test]
    fn the_hosts_own_network_namespace_is_refused() {
        let mut json = spec();
        json["linux"]["namespaces"][1]["path"] = "/proc/self/ns/net".into();
        let error = load(&json).unwrap_err();
        assert!(error.contains("--network host") && error.contains("/proc/self/ns/net"), "{error}");
    }

    #[test]
    fn versions_up_to_the_newest_are_taken() {
        for version in ["1.0.0", "1.0.2-dev", "1.1.0+dev", "1.2.1", "1.3.0"] {
            let mut json = spec();
            json["ociVersion"] = version.into();
            assert!(load(&json).is_ok(), "{version}");
        }
    }

    #[test]
    fn the_guest_is_told_nothing_that_only_the_host_can_honour() {
        let guest = load(&spec()).unwrap().for_guest("/run/kata/share/x/rootfs", &[], &[]);
        assert_eq!(guest["root"]["path"], "/run/kata/share/x/rootfs");
        assert_eq!(guest["hooks"], json!({"startContainer": [{"path": "/c"}]}));
        assert_eq!(guest["linux"]["namespaces"], json!([{"type": "mount"}]));
        assert_eq!(guest["linux"]["resources"]["cpu"], json!({"shares": 512}));
        assert_eq!(guest["linux"]["resources"]["memory"]["limit"], 1);
        assert!(guest["linux"].get("cgroupsPath").is_none());
        assert!(guest["process"].get("apparmorProfile").is_none());
    }

    #[test]
    fn a_host_device_is_refused_unless_the_container_is_privileged() {
        let mut json = spec();
        json["linux"]["devices"] = json!([
            {"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232},
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
        ]);
        assert!(load(&json).unwrap_err().contains("/dev/kvm (10:232)"));
        json["linux"]["resources"]["devices"] = json!([{"allow": true, "access": "rwm"}]);
        let guest = load(&json).unwrap().for_guest("/r", &[], &[]);
        assert_eq!(guest["linux"]["devices"].as_array().unwrap().len(), 1);
    }
}
