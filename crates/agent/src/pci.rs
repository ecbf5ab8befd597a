//! Finding devices that the host has plugged in sooner than the kernel does.
//!
//! Of a device in a PCIe slot the kernel's driver hears at once. It switches the slot's power on, and then waits 0.12 s as
//! PCI Express asks for of real links, section 6.6.1. A virtual link is up at once: who asks the kernel to look for
//! devices as soon as the power is on finds them then. The driver finds them there later, and is content.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::console;

/// A file for each slot, named by its number, with a file that tells whether its power is on.
const SLOTS: &str = "/sys/bus/pci/slots";

/// Between two looks at a slot whose power the kernel is about to switch on.
pub(crate) const PATIENCE: Duration = Duration::from_millis(2);

/// What the kernel's driver takes, and more: then it has found the device itself.
pub(crate) const DRIVERS_TIME: Duration = Duration::from_millis(250);

/// Has the kernel look for devices now.
pub(crate) fn look() {
    // Without it they are found all the same, only later.
    drop(fs::write("/sys/bus/pci/rescan", "1"));
}

/// The slots that are in use.
#[derive(Debug, Clone, Default)]
pub(crate) struct Slots(Vec<PathBuf>);

impl Slots {
    /// Those whose power is on now.
    pub(crate) fn in_use() -> Self {
        let slots = fs::read_dir(SLOTS).into_iter().flatten().flatten();
        Self(slots.map(|slot| slot.path().join("power")).filter(is_on).collect())
    }

    fn count_on(&self) -> usize {
        self.0.iter().filter(|slot| is_on(slot)).count()
    }

    /// Follows these slots from the moment that one of them is emptied: until all are empty, which is when the guest
    /// is about to be saved; and then, in each copy of it, until all hold a device again.
    pub(crate) async fn refill(self) {
        /// For the guest to be saved in; it takes ten seconds, more where the host is busy.
        const SAVING: Duration = Duration::from_mins(5);
        let emptied = async {
            while self.count_on() > 0 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(SAVING, emptied).await.is_err() {
            console::err("kata-agent: a device that was to be removed is still there");
            return;
        }
        let filled = async {
            let mut known = 0;
            while known < self.0.len() {
                let on = self.count_on();
                if on > known {
                    look();
                    known = on;
                } else {
                    tokio::time::sleep(PATIENCE).await;
                }
            }
        };
        drop(tokio::time::timeout(SAVING, filled).await);
    }
}

fn is_on(power: &PathBuf) -> bool {
    fs::read(power).is_ok_and(|text| text.first() == Some(&b'1'))
}
