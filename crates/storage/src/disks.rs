//! The host's block devices that a container is given: disks of the machine.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use protocol::oci::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};
use serde::{Deserialize, Serialize};

use crate::Error;

/// A block device of the host for a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The host's device file.
    pub source: PathBuf,
    /// Where the container has it: the path in the spec's `linux.devices`.
    pub path: PathBuf,
    /// Whether the spec's rules let the container only read it.
    pub read_only: bool,
}

/// The disks of a container: the block devices of its spec.
///
/// # Errors
///
/// [`Error::Host`] for a device that this host does not have.
pub fn disks(spec: &Spec) -> Result<Vec<Disk>, Error> {
    let Some(linux) = spec.linux() else { return Ok(Vec::new()) };
    let resources = linux.resources().as_ref();
    let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    let blocks = linux.devices().iter().flatten();
    blocks
        .filter(|device| device.typ() == LinuxDeviceType::B)
        .map(|device| {
            Ok(Disk {
                source: find(device)?,
                path: device.path().clone(),
                read_only: !rules.iter().any(|rule| lets_write(rule, device)),
            })
        })
        .collect()
}

/// Whether a rule lets the container write to this block device.
fn lets_write(rule: &LinuxDeviceCgroup, device: &LinuxDevice) -> bool {
    let any_or = |number: Option<i64>, ours| number.is_none_or(|it| it == -1 || it == ours);
    let kind = rule.typ().unwrap_or(LinuxDeviceType::A);
    rule.allow()
        && matches!(kind, LinuxDeviceType::A | LinuxDeviceType::B)
        && any_or(rule.major(), device.major())
        && any_or(rule.minor(), device.minor())
        && rule.access().as_deref().unwrap_or("rwm").contains('w')
}

/// The kernel knows a device by its numbers, and what devtmpfs calls it.
fn find(device: &LinuxDevice) -> Result<PathBuf, Error> {
    let (major, minor) = (device.major(), device.minor());
    let about = format!("/sys/dev/block/{major}:{minor}/uevent");
    let text =
        fs::read_to_string(&about).map_err(Error::host("find block device", Path::new(&about)))?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let path = Path::new("/dev").join(name.unwrap_or_default());
    let metadata = fs::symlink_metadata(&path).map_err(Error::host("look at", &path))?;
    let number = metadata.rdev();
    let same = i64::from(rustix::fs::major(number)) == major
        && i64::from(rustix::fs::minor(number)) == minor;
    if metadata.file_type().is_block_device() && same {
        return Ok(path);
    }
    let text = format!("it is not block device {major}:{minor}");
    Err(Error::host("use", &path)(io::Error::other(text)))
}

#[cfg(test)]
mod tests {
    use super::disks;
    use protocol::oci::Spec;
    use serde_json::json;

    fn spec(device: &serde_json::Value, access: &str) -> Spec {
        let rule = json!({"allow": true, "type": "b", "major": 7, "minor": 0, "access": access});
        serde_json::from_value(json!({
            "ociVersion": "1.0.2",
            "linux": {"devices": [device], "resources": {"devices": [{"allow": false, "access": "rwm"}, rule]}},
        }))
        .unwrap()
    }

    #[test]
    fn a_character_device_is_no_disk_and_a_missing_block_device_is_named() {
        let null = json!({"path": "/dev/null", "type": "c", "major": 1, "minor": 3});
        assert!(disks(&spec(&null, "rwm")).unwrap().is_empty());
        let missing = json!({"path": "/dev/x", "type": "b", "major": 4000, "minor": 9});
        let error = disks(&spec(&missing, "rwm")).unwrap_err().to_string();
        assert_eq!(error, "cannot find block device /sys/dev/block/4000:9/uevent");
    }

    #[test]
    fn a_rule_without_write_makes_a_disk_read_only() {
        if !std::path::Path::new("/sys/dev/block/7:0").exists() {
            println!("SKIPPED: needs /dev/loop0");
            return;
        }
        let device = json!({"path": "/dev/x", "type": "b", "major": 7, "minor": 0});
        for (access, read_only) in [("rwm", false), ("r", true)] {
            let found = disks(&spec(&device, access)).unwrap();
            assert_eq!(found[0].source, std::path::Path::new("/dev/loop0"));
            assert_eq!(found[0].read_only, read_only, "{access}");
        }
    }
}
