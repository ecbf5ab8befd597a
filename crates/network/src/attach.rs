//! Puts a tap beside a link, and takes it away.

use std::fs;
use std::io;
use std::path::Path;

use hypervisor::Device;
use linux::ledger::{Ledger, Undo};
use linux::{link, namespace, tap};

use crate::wire::kernel;
use crate::{Error, Link};

/// What the names of our taps begin with; the index of their link follows.
pub(crate) const TAP_PREFIX: &str = "kata-tap";

/// The kernel's limit for taps: 65535 less the Ethernet header.
const LARGEST_MTU: u32 = 65_521;

const ENXIO: i32 = 6;
const EEXIST: i32 = 17;
const ENODEV: i32 = 19;

/// Makes a tap beside `link` and lets all frames pass between them. `netns` is a path by which a later process can find
/// the calling thread's network namespace.
///
/// In `ledger` goes, before it is made, the link's ingress qdisc: the one thing that outlives us. The tap and its own
/// qdisc go when the last fd of the tap is closed, by whatever hand.
///
/// # Errors
///
/// [`Error`]; nothing then is left behind.
pub fn attach(link: &Link, netns: &Path, ledger: &mut Ledger) -> Result<Device, Error> {
    let (name, mtu) = (link.name(), link.interface.mtu);
    if mtu > LARGEST_MTU {
        return Err(Error::Mtu { name: name.to_owned(), mtu, most: LARGEST_MTU });
    }
    let here = namespace::Network::current()
        .and_then(|here| here.identity())
        .map_err(kernel("find this thread's network namespace"))?;
    is_still_there(link)?;
    let tap_name = tap_name(link);
    let tap = tap::create(&tap_name, false).map_err(kernel(format!("make a tap {tap_name}")))?;
    let tap_index = link::index(&tap_name)
        .and_then(|index| index.ok_or_else(|| io::Error::from_raw_os_error(ENODEV)))
        .map_err(kernel(format!("find the tap {tap_name}")))?;
    link::without_own_address(tap_index)
        .and_then(|()| link::set_up(tap_index, mtu))
        .and_then(|()| link::add_ingress(tap_index))
        .and_then(|()| link::redirect(tap_index, link.index))
        .map_err(|error| failed(link, error))?;

    // An ingress qdisc that is there now is not ours: it must not come into the ledger.
    let entry =
        Undo::DeleteIngress { netns: netns.to_owned(), inode: here.1, name: name.to_owned() };
    refuse_busy(link)?;
    ledger.record(entry).map_err(kernel(format!("record network link {name}")))?;
    let redirected = link::add_ingress(link.index)
        .and_then(|()| link::redirect(link.index, tap_index))
        .and_then(|()| link::bring_up(link.index));
    if let Err(error) = redirected {
        // The first error is the one to tell; the ledger has the entry still.
        drop(link::delete_ingress(name));
        return Err(failed(link, error));
    }
    Ok(Device::Network { id: link.device_id(), mac: link.mac, mtu, tap: vec![tap.into()] })
}

/// The first of the ports from which the namespace's own sockets may ask DNS servers; see [`share_dns`].
const FIRST_OWN_PORT: u16 = 64_512;

/// Lets the namespace's own sockets ask DNS servers behind a link that is attached, as Docker's resolver does, which
/// listens in the namespace for the guest: they get ports that no guest's kernel gives its own, and the answers to those
/// ports are theirs. IPv4.
///
/// # Errors
///
/// [`Error::Kernel`], [`Error::Gone`].
pub fn share_dns(link: &Link) -> Result<(), Error> {
    const PORTS: &str = "/proc/sys/net/ipv4/ip_local_port_range";
    is_still_there(link)?;
    let tap_name = tap_name(link);
    let tap = link::index(&tap_name).map_err(kernel(format!("find the tap {tap_name}")))?;
    let Some(tap) = tap else { return Err(Error::Gone { name: link.name().to_owned() }) };
    fs::write(PORTS, format!("{FIRST_OWN_PORT} {}", u16::MAX))
        .map_err(kernel(format!("write {PORTS}")))?;
    link::keep_dns_answers(link.index, tap, FIRST_OWN_PORT).map_err(|error| failed(link, error))
}

/// Undoes [`attach`], after the hypervisor has let the device go. What is not there any more is a success.
///
/// # Errors
///
/// [`Error::Kernel`].
pub fn detach(link: &Link) -> Result<(), Error> {
    let tap_name = tap_name(link);
    link::delete(&tap_name).map_err(kernel(format!("delete the tap {tap_name}")))?;
    match is_still_there(link) {
        Ok(()) => link::delete_ingress(link.name())
            .map_err(kernel(format!("stop redirecting network link {}", link.name()))),
        Err(Error::Gone { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

fn tap_name(link: &Link) -> String {
    format!("{TAP_PREFIX}{}", link.index)
}

/// Whether the link has still the name and index that it was scanned with.
fn is_still_there(link: &Link) -> Result<(), Error> {
    let name = link.name();
    match link::index(name).map_err(kernel(format!("find network link {name}")))? {
        Some(index) if index == link.index => Ok(()),
        _ => Err(Error::Gone { name: name.to_owned() }),
    }
}

fn refuse_busy(link: &Link) -> Result<(), Error> {
    let name = link.name();
    match link::has_ingress(link.index) {
        Ok(false) => Ok(()),
        Ok(true) => Err(Error::Busy { name: name.to_owned() }),
        Err(error) => Err(failed(link, error)),
    }
}

fn failed(link: &Link, source: io::Error) -> Error {
    let name = link.name().to_owned();
    match source.raw_os_error() {
        Some(ENODEV | ENXIO) => Error::Gone { name },
        Some(EEXIST) => Error::Busy { name },
        _ => kernel(format!("redirect network link {name}"))(source),
    }
}

#[cfg(test)]
mod tests;
