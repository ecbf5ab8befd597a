//! Which disks of the machine are which container's.

use std::cell::RefCell;

/// The disks that were plugged in for containers.
#[derive(Debug, Default)]
pub(crate) struct Disks(RefCell<Table>);

#[derive(Debug, Default)]
struct Table {
    last: u64,
    /// Containers, and serial numbers of disks.
    given: Vec<(String, String)>,
}

impl Disks {
    /// The serial number of a new disk of `container`; no other disk of the machine ever has it.
    pub(crate) fn name(&self, container: &str) -> String {
        let mut table = self.0.borrow_mut();
        table.last += 1;
        // virtio-blk takes 20 bytes.
        let serial = format!("kata-{}", table.last);
        table.given.push((container.to_owned(), serial.clone()));
        serial
    }

    /// The serial numbers of a container's disks, which are nobody's from now on.
    pub(crate) fn take(&self, container: &str) -> Vec<String> {
        let given = &mut self.0.borrow_mut().given;
        given.extract_if(.., |(of, _)| of == container).map(|(_, serial)| serial).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::Disks;

    #[test]
    fn a_container_gives_back_its_disks_and_no_others() {
        let disks = Disks::default();
        let names = [disks.name("a"), disks.name("b"), disks.name("a")];
        assert_eq!(disks.take("a"), [names[0].clone(), names[2].clone()]);
        assert!(disks.take("a").is_empty());
        assert_eq!(disks.take("b"), [names[1].clone()]);
    }
}
