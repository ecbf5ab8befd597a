//! File systems that the host mounts in the guest, outside any container.

use std::path::Path;
use std::time::Duration;

use libcontainer::rootfs::utils::parse_mount;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, umount2};
use protocol::agent::MountRequest;
use protocol::{oci, paths};

use crate::error::{Doing, Error};
use crate::uevent::Events;

/// How long the device of a file system may take to appear after the host has plugged it in.
const DEADLINE: Duration = Duration::from_secs(10);

/// Mounts what is asked for. Its device may still be on its way: then it is waited for.
pub(crate) async fn mount(request: MountRequest) -> Result<(), Error> {
    let target = Path::new(&request.target);
    if !target.is_absolute() {
        return Err(Error::Invalid(format!("mount target {:?} is not absolute", request.target)));
    }
    std::fs::create_dir_all(target).doing(|| format!("make {}", target.display()))?;
    let mut words = oci::Mount::default();
    words.set_options(Some(request.options.clone()));
    let options = parse_mount(&words).map_err(|error| Error::Invalid(error.to_string()))?;
    let flags = MsFlags::from_bits_retain(options.flags.bits());
    let data = options.data.join(",");
    let attempt = || {
        nix::mount::mount(
            Some(request.source.as_str()),
            target,
            Some(request.fstype.as_str()),
            flags,
            Some(data.as_str()).filter(|data| !data.is_empty()),
        )
    };
    let action = || format!("mount {} ({}) on {}", request.source, request.fstype, request.target);
    // Listening starts before the first attempt, so that no event falls between the two.
    let events = Events::open()?;
    let deadline = tokio::time::Instant::now() + DEADLINE;
    loop {
        // A virtio-fs without its device, and a block device without its node.
        match attempt() {
            Err(Errno::EINVAL | Errno::ENOENT | Errno::ENXIO | Errno::ENODEV)
                if is_device(&request) =>
            {
                let waited = tokio::time::timeout_at(deadline, events.next()).await;
                let Ok(event) = waited else {
                    return attempt().doing(action);
                };
                event.doing(action)?;
            }
            result => return result.doing(action),
        }
    }
}

fn is_device(request: &MountRequest) -> bool {
    request.fstype == "virtiofs" || request.source.starts_with("/dev/")
}

/// Takes a mount off, once all who use it have let it go.
pub(crate) fn unmount(target: &str) -> Result<(), Error> {
    match umount2(target, MntFlags::MNT_DETACH) {
        // Nothing is mounted there.
        Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        result => result.doing(|| format!("unmount {target}")),
    }
}

/// Has all that was written be on the host before the power goes.
pub(crate) async fn release() {
    let released = tokio::task::spawn_blocking(|| {
        rustix::fs::sync();
        // The power goes, whether it can be unmounted or not.
        drop(unmount(paths::SHARE));
    });
    drop(tokio::time::timeout(DEADLINE, released).await);
}
