//! The configuration: one struct, read once at a door and passed down as a value.
//!
//! Later sources win, member by member: built-in values, `/usr/share/kata-containers/config.toml`,
//! `/etc/kata-containers/config.toml`, `/etc/kata-containers/config.d/*.toml` in the order of their names, and then the
//! annotations of a container that `[annotations] allow` names. A member nobody knows is an error, so that a typo never
//! passes for a setting.

use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind as IoKind;
use std::path::{Path, PathBuf};

use image::Image;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::error::Error;

/// The prefix of the annotations that change the configuration of one sandbox.
const ANNOTATION_PREFIX: &str = "io.katacontainers.config.";

/// Everything that can be set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The guest's kernel and initrd.
    pub image: ImageConfig,
    /// The size of a sandbox, and how long its steps may take.
    pub sandbox: SandboxConfig,
    /// The hypervisor.
    pub hypervisor: HypervisorConfig,
    /// Starting sandboxes as copies of a booted machine.
    pub template: TemplateConfig,
    /// Machines that wait for containers.
    pub pool: PoolConfig,
    /// Who may change what by annotations.
    pub annotations: AnnotationConfig,
}

/// The guest's kernel and initrd.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ImageConfig {
    /// The directory that `kata-runtime image build` wrote; none: the user's own, or the system's.
    pub path: Option<PathBuf>,
    /// A kernel to use instead of the image's.
    pub kernel: Option<PathBuf>,
    /// An initrd to use instead of the image's.
    pub initrd: Option<PathBuf>,
    /// Words added to the kernel's command line.
    pub cmdline: String,
}

impl ImageConfig {
    /// The image's directory opened.
    ///
    /// # Errors
    ///
    /// When there is no image, or a part of it is missing.
    pub fn open(&self) -> Result<Image, Error> {
        Ok(match &self.path {
            Some(path) => Image::open(path)?,
            None => Image::find()?,
        })
    }
}

/// The size of a sandbox, and how long its steps may take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SandboxConfig {
    /// vCPUs of a sandbox whose container has no CPU limit.
    pub vcpus: u32,
    /// Guest memory, in MiB, of a sandbox whose container has no memory limit.
    pub memory_mib: u32,
    /// Memory, in MiB, that the guest's kernel and agent need beside the container's limit.
    pub guest_overhead_mib: u32,
    /// Memory, in MiB, that the hypervisor and its device process may take on the host beside the guest's memory.
    pub host_overhead_mib: u32,
    /// Seconds until the agent must have answered after the machine was started. Emulation on a busy host is slow.
    pub boot_timeout: u64,
    /// Seconds that the agent may take for one request.
    pub agent_timeout: u64,
}

impl Default for SandboxConfig {
    fn default() -> Self {
        Self {
            vcpus: 1,
            memory_mib: 2048,
            guest_overhead_mib: 128,
            host_overhead_mib: 256,
            boot_timeout: 120,
            agent_timeout: 60,
        }
    }
}

/// The hypervisor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HypervisorConfig {
    /// The driver's name.
    pub driver: String,
    /// The QEMU driver.
    pub qemu: QemuConfig,
}

impl Default for HypervisorConfig {
    fn default() -> Self {
        Self { driver: "qemu".into(), qemu: QemuConfig::default() }
    }
}

/// The QEMU driver.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QemuConfig {
    /// The program; none: the driver's default, looked up in `PATH`.
    pub path: Option<PathBuf>,
    /// KVM or emulation.
    pub acceleration: AccelerationConfig,
}

/// KVM or emulation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccelerationConfig {
    /// KVM where it works, else emulation with a warning.
    #[default]
    Auto,
    /// KVM, or an error.
    Kvm,
    /// Emulation.
    Tcg,
}

/// Starting sandboxes as copies of a booted machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TemplateConfig {
    /// Whether to.
    pub mode: TemplateMode,
    /// Where templates are kept; none: `/var/lib/kata-containers/templates`, or below `$XDG_DATA_HOME` for a user who is
    /// not root. A template takes some 100 MiB.
    pub directory: Option<PathBuf>,
}

impl TemplateConfig {
    /// Where templates are kept.
    #[must_use]
    pub fn directory(&self) -> PathBuf {
        if let Some(directory) = &self.directory {
            return directory.clone();
        }
        if rustix::process::geteuid().is_root() {
            return "/var/lib/kata-containers/templates".into();
        }
        image::default_directory().join("templates")
    }
}

/// Whether sandboxes start as copies of a booted machine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TemplateMode {
    /// Where it works, else they boot.
    #[default]
    Auto,
    /// They boot.
    Off,
    /// They do not start otherwise.
    Require,
}

/// Machines that wait for containers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PoolConfig {
    /// How many; 0: none. Each takes the memory of an idle sandbox.
    pub size: u32,
    /// Where they are kept; none: `/run/kata-containers/pool`. Not to be shared by hosts, and short: sockets are in it.
    pub directory: Option<PathBuf>,
}

impl PoolConfig {
    /// Where they are kept.
    #[must_use]
    pub fn directory(&self) -> PathBuf {
        self.directory.clone().unwrap_or_else(|| "/run/kata-containers/pool".into())
    }
}

/// Who may change what by annotations.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AnnotationConfig {
    /// The annotations, without their prefix `io.katacontainers.config.`, that a container may carry; `"*"`: all known.
    pub allow: Vec<String>,
}

impl Config {
    /// Reads the files of this host.
    ///
    /// # Errors
    ///
    /// When a file that is there cannot be read or understood.
    pub fn load() -> Result<Self, Error> {
        let mut files = vec![
            PathBuf::from("/usr/share/kata-containers/config.toml"),
            "/etc/kata-containers/config.toml".into(),
        ];
        if let Ok(entries) = fs::read_dir("/etc/kata-containers/config.d") {
            let mut more: Vec<_> = entries
                .filter_map(|entry| Some(entry.ok()?.path()))
                .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
                .collect();
            more.sort();
            files.append(&mut more);
        }
        Self::load_files(files.iter().filter(|path| path.exists()))
    }

    /// Reads these files, and no others; all must be there.
    ///
    /// # Errors
    ///
    /// When one cannot be read or understood.
    pub fn load_files(paths: impl IntoIterator<Item = impl AsRef<Path>>) -> Result<Self, Error> {
        let mut merged = Table::new();
        for path in paths {
            let path = path.as_ref();
            let text = match fs::read_to_string(path) {
                Ok(text) => text,
                Err(source) if source.kind() == IoKind::InvalidData => {
                    let source = "it is not UTF-8".into();
                    return Err(Error::Syntax { path: path.to_owned(), source });
                }
                Err(source) => {
                    return Err(Error::Host { action: "read", path: path.to_owned(), source });
                }
            };
            let syntax = |source: toml::de::Error| Error::Syntax {
                path: path.to_owned(),
                source: source.to_string().trim().to_owned().into(),
            };
            // Alone first, so that a mistake is told with its file and line.
            toml::from_str::<Self>(&text).map_err(syntax)?;
            merge(&mut merged, toml::from_str(&text).map_err(syntax)?);
        }
        Value::Table(merged).try_into().map_err(|source: toml::de::Error| Error::Syntax {
            path: "the configuration".into(),
            source: source.into(),
        })
    }

    /// This configuration as the annotations of one container change it.
    ///
    /// # Errors
    ///
    /// When a configuration annotation is unknown, not allowed, or has a value that does not fit.
    pub fn with_annotations(
        mut self,
        annotations: &HashMap<String, String>,
    ) -> Result<Self, Error> {
        for (name, value) in annotations {
            let Some(key) = name.strip_prefix(ANNOTATION_PREFIX) else { continue };
            let setting = match key {
                "hypervisor.default_vcpus" => &mut self.sandbox.vcpus,
                "hypervisor.default_memory" => &mut self.sandbox.memory_mib,
                _ => {
                    return Err(Error::invalid(format!(
                        "annotation {name} is not known; known are {ANNOTATION_PREFIX}hypervisor.default_vcpus and \
                         {ANNOTATION_PREFIX}hypervisor.default_memory"
                    )));
                }
            };
            if !self.annotations.allow.iter().any(|allowed| allowed == key || allowed == "*") {
                return Err(Error::invalid(format!(
                    "annotation {name} is not allowed; add {key:?} to `allow` under [annotations] in \
                     /etc/kata-containers/config.toml"
                )));
            }
            *setting = value.parse().ok().filter(|&number| number > 0).ok_or_else(|| {
                Error::invalid(format!("annotation {name}: {value:?} is not a number above 0"))
            })?;
        }
        Ok(self)
    }
}

fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(inner)), Value::Table(more)) => merge(inner, more),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{AccelerationConfig, Config};
    use crate::error::Chain;
    use std::collections::HashMap;

    fn load(texts: &[&str]) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<_> =
            (0..texts.len()).map(|n| dir.path().join(format!("{n}.toml"))).collect();
        for (path, text) in paths.iter().zip(texts) {
            std::fs::write(path, text).unwrap();
        }
        Config::load_files(&paths).map_err(|error| Chain(&error).to_string())
    }

    #[test]
    fn a_later_file_wins_member_by_member() {
        let config = load(&[
            "[sandbox]\nvcpus = 2\nmemory_mib = 512",
            "[sandbox]\nvcpus = 4\n[hypervisor.qemu]\nacceleration = \"tcg\"",
        ])
        .unwrap();
        assert_eq!((config.sandbox.vcpus, config.sandbox.memory_mib), (4, 512));
        assert_eq!(config.hypervisor.qemu.acceleration, AccelerationConfig::Tcg);
        assert_eq!(config.sandbox.agent_timeout, Config::default().sandbox.agent_timeout);
    }

    #[test]
    fn an_unknown_member_is_told_with_its_file_and_line() {
        let error = load(&["[sandbox]\nvcpu = 2"]).unwrap_err();
        assert!(
            error.contains("0.toml") && error.contains("vcpu") && error.contains('2'),
            "{error}"
        );
    }

    #[test]
    fn annotations_must_be_known_and_allowed_and_fit() {
        let with = |config: &str, key: &str, value: &str| {
            let annotations =
                HashMap::from([(format!("io.katacontainers.config.{key}"), value.to_owned())]);
            load(&[config]).unwrap().with_annotations(&annotations).map_err(|e| e.to_string())
        };
        let allow = "[annotations]\nallow = [\"hypervisor.default_vcpus\"]";
        assert_eq!(with(allow, "hypervisor.default_vcpus", "3").unwrap().sandbox.vcpus, 3);
        assert!(with(allow, "hypervisor.default_vcpus", "0").unwrap_err().contains("above 0"));
        assert!(
            with(allow, "hypervisor.default_memory", "64").unwrap_err().contains("not allowed")
        );
        assert!(with(allow, "hypervisor.path", "/evil").unwrap_err().contains("not known"));
        let other = HashMap::from([("org.example".to_owned(), "x".to_owned())]);
        assert!(load(&[""]).unwrap().with_annotations(&other).is_ok());
    }
}
