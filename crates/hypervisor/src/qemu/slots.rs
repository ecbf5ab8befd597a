//! Which root port holds which device.

use crate::Error;
use crate::log::escaped;
use crate::qemu::{NAME, SLOTS};

/// The places for devices that are added to a running machine.
#[derive(Debug, Default)]
pub(super) struct Slots {
    /// The caller's name for the device in each.
    taken: [Option<Occupant>; SLOTS],
}

/// What is in a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Occupant {
    /// What the caller calls it. Never shown to QEMU, which has rules for names.
    pub(super) id: String,
    /// What kind of back end it has.
    pub(super) kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Disk,
    Network,
}

impl Slots {
    /// A slot for one more device.
    pub(super) fn free(&self, id: &str) -> Result<usize, Error> {
        let refused =
            |message: String| Error::Refused { driver: NAME, operation: "add a device", message };
        if self.find(id).is_some() {
            return Err(refused(format!("there is a device `{}` already", escaped(id))));
        }
        let free = self.taken.iter().position(Option::is_none);
        free.ok_or_else(|| refused(format!("all {SLOTS} slots of the machine are taken")))
    }

    pub(super) fn put(&mut self, slot: usize, id: String, kind: Kind) {
        self.taken[slot] = Some(Occupant { id, kind });
    }

    pub(super) fn find(&self, id: &str) -> Option<(usize, Kind)> {
        self.taken.iter().enumerate().find_map(|(slot, occupant)| {
            occupant.as_ref().filter(|occupant| occupant.id == id).map(|found| (slot, found.kind))
        })
    }

    pub(super) fn clear(&mut self, slot: usize) {
        self.taken[slot] = None;
    }
}

#[cfg(test)]
mod tests {
    use super::{Kind, Slots};
    use crate::qemu::SLOTS;

    #[test]
    fn a_slot_is_free_again_after_its_device_has_gone() {
        let mut slots = Slots::default();
        for number in 0..SLOTS {
            let id = format!("eth{number}");
            let slot = slots.free(&id).unwrap();
            slots.put(slot, id, Kind::Network);
        }
        assert!(slots.free("one-more").unwrap_err().to_string().contains("slots"));
        let (slot, kind) = slots.find("eth3").unwrap();
        assert_eq!((slot, kind), (3, Kind::Network));
        slots.clear(slot);
        assert_eq!(slots.find("eth3"), None);
        assert_eq!(slots.free("one-more").unwrap(), 3);
    }

    #[test]
    fn a_name_is_taken_once() {
        let mut slots = Slots::default();
        slots.put(0, "eth0".into(), Kind::Network);
        assert!(slots.free("eth0").unwrap_err().to_string().contains("already"));
    }
}
