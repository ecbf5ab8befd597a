//! Taking a machine out of the pool.

use std::fs;
use std::io::{self, ErrorKind as IoKind};
use std::path::Path;
use std::time::Duration;

use protocol::oci::LinuxResources;
use tracing::{debug, warn};

use super::{DOOR, Entry, Place, fitting};
use crate::config::Config;
use crate::launch::{Channel, Report};

/// For a keeper to say that its machine runs; it has nothing else to do.
const ANSWER: Duration = Duration::from_secs(5);

/// The sandbox process of a machine out of the pool, which waits for its launch; nothing where there is none to be had
/// for a container with these limits. It ends when the channel does.
pub(crate) fn claim(
    config: &Config,
    resources: Option<&LinuxResources>,
    program: &Path,
) -> Option<Channel> {
    if config.pool.size == 0 {
        return None;
    }
    let place = Place::of(config);
    let mut ready = Entry::all(&place);
    ready.retain(|entry| entry.is_ready(&place));
    if ready.is_empty() {
        return None;
    }
    let shape = fitting(config, resources, program).ok()?;
    for entry in ready.into_iter().filter(|entry| entry.shape == shape) {
        match take(&place, &entry) {
            Ok(channel) => return Some(channel),
            Err(error) if error.kind() == IoKind::NotFound => debug!("somebody else was faster"),
            Err(error) => {
                warn!(%error, machine = entry.name, "a machine of the pool is not used");
                // What would not go is taken for dead by who fills the pool.
                drop(entry.end(&place));
            }
        }
    }
    None
}

fn take(place: &Place, entry: &Entry) -> io::Result<Channel> {
    fs::rename(place.ready().join(&entry.name), place.claimed().join(&entry.name))?;
    // From here on it ends as soon as we do.
    let refused = |error: io::Error| match error.kind() {
        // Not to be taken for an entry that is gone.
        IoKind::NotFound => io::Error::other("it has no door"),
        _ => error,
    };
    let door = place.machines().join(&entry.name).join(DOOR);
    let mut channel = Channel::connect(&door, ANSWER).map_err(refused)?;
    match channel.hear()? {
        Report::Claimed => {
            channel.socket().set_read_timeout(None)?;
            Ok(channel)
        }
        _ => Err(IoKind::InvalidData.into()),
    }
}
