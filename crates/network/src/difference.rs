//! What has changed between two scans.

use crate::{Link, Network};

/// What to do so that a guest that has the old network has the new one.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Difference {
    /// Links to be attached.
    pub added: Vec<Link>,
    /// Links to be detached.
    pub removed: Vec<Link>,
    /// Whether the agent must be told anew: a link came or went, or addresses, routes or neighbours changed.
    pub configuration: bool,
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
        configuration: old.request() != new.request(),
    }
}

fn is_same(one: &Link, other: &Link) -> bool {
    (one.index, one.mac) == (other.index, other.mac)
}

#[cfg(test)]
mod tests {
    use super::difference;
    use crate::{Link, Network};
    use protocol::agent::Interface;

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
        assert!(found.configuration);
        let found = difference(&network([eth0.clone()]), &network([eth1.clone()]));
        assert_eq!((found.added, found.removed), (vec![eth1], vec![eth0]));
    }

    #[test]
    fn a_new_address_is_a_matter_of_configuration_alone() {
        let old = network([link(5, "eth0")]);
        let mut new = old.clone();
        assert_eq!(difference(&old, &new), super::Difference::default());
        new.links[0].interface.addresses.push("10.0.0.2/24".to_owned());
        let found = difference(&old, &new);
        assert!(found.added.is_empty() && found.removed.is_empty() && found.configuration);
    }
}
