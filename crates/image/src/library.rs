//! The modules that a guest's kernel asks for only now and then, in one file that guests read and none copies.
//!
//! The file starts with lines of text: a heading, then for each module its name, where its bytes are, how many there
//! are, the modules that it needs and all other names by which the kernel asks for it, with spaces between. An empty line
//! ends them, and the modules' bytes follow. Offsets count from there.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use crate::Error;
use crate::modules::{ModuleTree, needs, read, slim, values};

/// The first line; another form gets another number.
const HEADING: &str = "kata modules 1";

/// What a container of a privileged user may want: networks, file systems, and the devices that a kernel makes itself.
/// Below the directory of modules; a directory stands for all below it.
const WANTED: &[&str] = &[
    "kernel/arch",
    "kernel/crypto",
    "kernel/drivers/block/loop",
    "kernel/drivers/block/nbd",
    "kernel/drivers/block/zram",
    "kernel/drivers/md",
    "kernel/drivers/net/bonding",
    "kernel/drivers/net/dummy",
    "kernel/drivers/net/geneve",
    "kernel/drivers/net/ifb",
    "kernel/drivers/net/ipvlan",
    "kernel/drivers/net/macvlan",
    "kernel/drivers/net/macvtap",
    "kernel/drivers/net/nlmon",
    "kernel/drivers/net/tap",
    "kernel/drivers/net/team",
    "kernel/drivers/net/tun",
    "kernel/drivers/net/veth",
    "kernel/drivers/net/vrf",
    "kernel/drivers/net/vxlan",
    "kernel/drivers/net/wireguard",
    "kernel/drivers/vhost",
    "kernel/fs",
    "kernel/lib",
    "kernel/mm",
    "kernel/net",
];

/// Names by which a bus asks for a device's driver: a guest's devices have theirs already.
const BUSES: [&str; 9] =
    ["acpi", "cpu:", "dmi:", "hid:", "of:", "pci:", "usb:", "virtio:", "vmbus:"];

/// Puts the file together; the same modules give the same bytes. `unsigned`: the kernel takes modules without their
/// signature.
pub(crate) fn library(tree: &ModuleTree, release: &str, unsigned: bool) -> Result<Vec<u8>, Error> {
    let mut modules = BTreeMap::new();
    let mut wanted: Vec<String> =
        WANTED.iter().flat_map(|place| tree.below(Path::new(place))).collect();
    while let Some(name) = wanted.pop() {
        let Some(path) = tree.path(&name).filter(|_| !modules.contains_key(&name)) else {
            continue;
        };
        let bytes = read(path)?;
        let mut needed = needs(&bytes, path, release)?;
        needed.extend(softly_needed(&bytes).into_iter().filter(|one| tree.path(one).is_some()));
        wanted.extend(needed.iter().cloned());
        let names = other_names(&bytes);
        let bytes = if unsigned { slim(bytes) } else { bytes };
        modules.insert(name, (needed, names, bytes));
    }
    let mut text = format!("{HEADING}\n");
    let mut contents = Vec::new();
    for (name, (needed, names, bytes)) in modules {
        let needed = if needed.is_empty() { "-".to_owned() } else { needed.join(",") };
        write!(text, "{name} {} {} {needed}", contents.len(), bytes.len())
            .expect("a string takes everything");
        for name in names {
            text.extend([" ", &name]);
        }
        text.push('\n');
        contents.extend(bytes);
    }
    text.push('\n');
    let mut file = text.into_bytes();
    file.append(&mut contents);
    Ok(file)
}

/// Modules that it does with, but asks to have before it.
fn softly_needed(bytes: &[u8]) -> Vec<String> {
    let mut needed = Vec::new();
    for value in values(bytes, "softdep") {
        let mut before = false;
        for word in value.split_whitespace() {
            match word {
                "pre:" => before = true,
                "post:" => before = false,
                _ if before => needed.push(word.replace('-', "_")),
                _ => {}
            }
        }
    }
    needed
}

fn other_names(bytes: &[u8]) -> Vec<String> {
    values(bytes, "alias")
        .into_iter()
        // A pattern is a bus's, or one that no kernel of ours asks by.
        .filter(|name| !name.contains(['*', ' ']) && !BUSES.iter().any(|bus| name.starts_with(bus)))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::library;
    use crate::modules::ModuleTree;
    use crate::modules::tests::put_info;

    #[test]
    fn a_module_is_told_with_its_other_names_and_what_it_needs() {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str, info: &str| put_info(dir.path(), path, info);
        put(
            "kernel/drivers/net/tun.ko",
            "depends=\0alias=devname:net/tun\0alias=char-major-10-200",
        );
        put("kernel/net/bridge/br-netfilter.ko", "depends=bridge\0softdep=pre: absent tun");
        put("kernel/net/bridge/bridge.ko", "depends=stp\0alias=rtnl-link-bridge\0alias=pci:v0*");
        put("kernel/net/802/stp.ko", "depends=");
        put("kernel/sound/core/snd.ko", "depends=");
        let tree = ModuleTree::open(dir.path()).unwrap();
        let file = library(&tree, "6.1.0", false).unwrap();
        let end = file.windows(2).position(|two| two == b"\n\n").unwrap();
        let text = std::str::from_utf8(&file[..end]).unwrap();
        let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split(' ').collect()).collect();
        assert_eq!(lines[0], ["kata", "modules", "1"]);
        let told: Vec<_> = lines[1..].iter().map(|line| (line[0], line[3], &line[4..])).collect();
        assert_eq!(
            told,
            [
                ("br_netfilter", "bridge,tun", &[][..]),
                ("bridge", "stp", &["rtnl-link-bridge"][..]),
                ("stp", "-", &[][..]),
                ("tun", "-", &["devname:net/tun", "char-major-10-200"][..]),
            ]
        );
        let last = &lines[4];
        let (offset, size): (usize, usize) = (last[1].parse().unwrap(), last[2].parse().unwrap());
        assert_eq!(end + 2 + offset + size, file.len());
        assert!(file[end + 2 + offset..].starts_with(b"\x7fELF"));
    }
}
