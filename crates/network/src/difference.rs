//! What has changed between two scans.

use crate::{Link, Network};

/// Which links a guest that has the old network must get and lose to have the new one.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Difference {
    /// Links to be attached.
    pub added: Vec<Link>,
    /// Links to be detached.
    pub removed: Vec<Link>,
}

/// What has changed between two scans. Pure.
///
/// A link with another index or MAC is another link, whatever its name.
#[must_use]
pub fn difference(old: &Network, new: &Network) -> Difference {
    let missing_in = |there: &[Link], here: &[Link]| -> Vec<Link> {
        here.iter()
            .filter(|link| !there.iter().any(|other| is_same(other, link)))
            .cloned()
            .collect()
    };
    Difference {
        added: missing_in(&old.links, &new.links),
        removed: missing_in(&new.links, &old.links),
    }
}

impl Network {
    /// What is left of it without these links: their routes and neighbours go with them.
    #[must_use]
    pub fn without(&self, removed: &[Link]) -> Self {
        let mut left = self.clone();
        left.links.retain(|link| !removed.iter().any(|gone| is_same(gone, link)));
        let has = |device: &str| left.links.iter().any(|link| link.name() == device);
        left.routes.retain(|route| has(&route.device));
        left.neighbors.retain(|neighbor| has(&neighbor.device));
        left
    }
}

fn is_same(one: &Link, other: &Link) -> bool {
    (one.index, one.mac) == (other.index, other.mac)
}

#[cfg(test)]
mod tests {
    use super::difference;
    use crate::{Link, Network};
    use protocol::agent::{Interface, Neighbor, Route};

    fn link(index: u32, name: &str) -> Link {
        let interface = Interface { name: name.to_owned(), ..Interface::default() };
        Link { index, kind: "veth".to_owned(), mac: [2, 0, 0, 0, 0, 1], queues: 1, interface }
    }

    fn network(links: impl IntoIterator<Item = Link>) -> Network {
        Network { links: links.into_iter().collect(), ..Network::default() }
    }

    #[test]
    fn a_link_that_comes_is_added_and_one_that_goes_is_removed() {
        let (eth0, eth1) = (link(5, "eth0"), link(7, "eth1"));
        let found = difference(&network([]), &network([eth0.clone()]));
        assert_eq!((found.added.len(), found.removed.len()), (1, 0));
        let found = difference(&network([eth0.clone()]), &network([eth1.clone()]));
        assert_eq!((found.added, found.removed), (vec![eth1], vec![eth0]));
    }

    #[test]
    fn a_link_goes_with_its_routes_and_neighbours() {
        let route = |device: &str| Route { device: device.to_owned(), ..Route::default() };
        let neighbor = |device: &str| Neighbor { device: device.to_owned(), ..Neighbor::default() };
        let mut both = network([link(5, "eth0"), link(7, "eth1")]);
        both.links[1].mac = [2; 6];
        both.routes = vec![route("eth0"), route("eth1")];
        both.neighbors = vec![neighbor("eth1")];
        let left = both.without(&both.links[1..]);
        assert_eq!((left.links, left.routes), (vec![link(5, "eth0")], vec![route("eth0")]));
        assert!(left.neighbors.is_empty());
    }
}
