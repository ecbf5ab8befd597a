//! The PCI Express slot of an interface.

use std::fs;
use std::path::{Path, PathBuf};

use crate::console;
use crate::error::words;

/// Switches off the power of the slot that an interface is plugged into: so the host gets it back at once. Asked by the
/// host to let a device go, the kernel would first give whoever pressed the slot's button five seconds to think again.
///
/// An interface in no such slot stays, and one that will not go is the host's to wait for.
pub(super) async fn power_off(interface: &str) {
    let Some(slot) = find(Path::new("/sys"), interface) else { return };
    let power = slot.join("power");
    // The write returns when the device has gone.
    let written = tokio::task::spawn_blocking(move || fs::write(&power, "0")).await;
    if let Ok(Err(error)) = written {
        let (slot, why) = (slot.display(), words(&error));
        console::err(&format!("kata-agent: cannot switch off {slot}: {why}"));
    }
}

/// The directory of the slot, in a sysfs at `sys`.
fn find(sys: &Path, interface: &str) -> Option<PathBuf> {
    let device = fs::canonicalize(sys.join("class/net").join(interface).join("device")).ok()?;
    let slots: Vec<_> = fs::read_dir(sys.join("bus/pci/slots")).ok()?.flatten().collect();
    // The nearest PCI function above the virtio device: `0000:05:00.0`, whose slot's address lacks the function.
    device.ancestors().find_map(|function| {
        let name = function.file_name()?.to_str()?;
        let (address, _) = name.rsplit_once('.')?;
        let slot = slots.iter().map(fs::DirEntry::path).find(|slot| {
            fs::read_to_string(slot.join("address")).is_ok_and(|text| text.trim() == address)
        })?;
        slot.join("power").exists().then_some(slot)
    })
}

#[cfg(test)]
mod tests {
    use super::find;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn the_slot_of_an_interface_is_found_by_the_address_of_its_function() {
        let sys = tempfile::tempdir().unwrap();
        let sys = sys.path();
        let device = sys.join("devices/pci0000:00/0000:00:03.0/0000:05:00.0/virtio4");
        fs::create_dir_all(device.join("net/eth1")).unwrap();
        fs::create_dir_all(sys.join("class/net")).unwrap();
        symlink(&device, device.join("net/eth1/device")).unwrap();
        symlink(device.join("net/eth1"), sys.join("class/net/eth1")).unwrap();
        for (slot, address) in [("3", "0000:00:03"), ("7", "0000:05:00"), ("8", "0000:06:00")] {
            let slot = sys.join("bus/pci/slots").join(slot);
            fs::create_dir_all(&slot).unwrap();
            fs::write(slot.join("address"), format!("{address}\n")).unwrap();
            fs::write(slot.join("power"), "1\n").unwrap();
        }
        assert_eq!(find(sys, "eth1"), Some(sys.join("bus/pci/slots/7")));
        assert_eq!(find(sys, "eth0"), None);
    }
}
