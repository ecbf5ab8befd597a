//! The disks that the host plugs in for a container: which device file of the guest's each is.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use protocol::agent::Disk;
use protocol::oci::{LinuxDeviceType, Spec};

use crate::error::{Doing, Error};
use crate::uevent::Events;

/// How long a disk may take to appear after the host has plugged it in.
const DEADLINE: Duration = Duration::from_secs(20);

/// A device's major and minor number.
type Number = (i64, i64);

/// Puts the guest's numbers in the place of the host's, in the devices of `spec` that are `disks` and in the rules for
/// them.
///
/// # Errors
///
/// When a disk does not appear.
pub(crate) async fn place(spec: &mut Spec, disks: &[Disk]) -> Result<(), Error> {
    if disks.is_empty() {
        return Ok(());
    }
    let Some(mut linux) = spec.linux().clone() else { return Ok(()) };
    let mut devices = linux.devices().clone().unwrap_or_default();
    let mut moved: HashMap<Number, Number> = HashMap::new();
    for disk in disks {
        let (major, minor) = appeared(&disk.serial).await?;
        for device in devices.iter_mut().filter(|device| device.path() == Path::new(&disk.path)) {
            moved.insert((device.major(), device.minor()), (major, minor));
            device.set_major(major).set_minor(minor);
        }
    }
    linux.set_devices(Some(devices));
    if let Some(mut resources) = linux.resources().clone() {
        let mut rules = resources.devices().clone().unwrap_or_default();
        for rule in rules.iter_mut().filter(|rule| rule.typ() == Some(LinuxDeviceType::B)) {
            let Some(number) = rule.major().zip(rule.minor()) else { continue };
            if let Some(&(major, minor)) = moved.get(&number) {
                rule.set_major(Some(major)).set_minor(Some(minor));
            }
        }
        resources.set_devices(Some(rules));
        linux.set_resources(Some(resources));
    }
    spec.set_linux(Some(linux));
    Ok(())
}

/// Waits until the disk with this serial number is there.
async fn appeared(serial: &str) -> Result<Number, Error> {
    // Listening starts before the first look, so that no event falls between the two.
    let events = Events::open()?;
    let deadline = tokio::time::Instant::now() + DEADLINE;
    loop {
        if let Some(number) = find(Path::new("/sys/block"), serial) {
            return Ok(number);
        }
        let event = tokio::time::timeout_at(deadline, events.next()).await;
        let late =
            |_| Error::Deadline { what: "the disk's appearance", seconds: DEADLINE.as_secs() };
        event.map_err(late)?.doing(|| format!("wait for the disk {serial}"))?;
    }
}

fn find(disks: &Path, serial: &str) -> Option<Number> {
    let read = |path: &Path| fs::read_to_string(path).ok();
    let ours = fs::read_dir(disks)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|disk| read(&disk.join("serial")).is_some_and(|text| text.trim() == serial))?;
    let text = read(&ours.join("dev"))?;
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::find;
    use std::fs;

    #[test]
    fn a_disk_is_found_by_its_serial_number() {
        let dir = tempfile::tempdir().unwrap();
        for (name, serial, number) in [("vda", "other", "254:0\n"), ("vdb", "kata-7", "254:16\n")] {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("serial"), serial).unwrap();
            fs::write(dir.path().join(name).join("dev"), number).unwrap();
        }
        assert_eq!(find(dir.path(), "kata-7"), Some((254, 16)));
        assert_eq!(find(dir.path(), "kata"), None);
    }
}
