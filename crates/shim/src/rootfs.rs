//! A container's root file system, which containerd describes as mounts and leaves to the shim to make.

use std::path::{Path, PathBuf};

use containerd_shim_protos::api::Mount;
use linux::file_system::FileSystem;
use sandbox::{Chain, Sandbox};
use tracing::warn;

use crate::error::Error;

/// Mounts `mounts` in the namespace in which the process began, where also others can see them.
///
/// # Errors
///
/// As [`mount_here`].
pub(crate) async fn mount(
    mounts: &[Mount],
    bundle: &Path,
    sandbox: Option<&Sandbox>,
) -> Result<(), Error> {
    let Some(sandbox) = sandbox else { return mount_here(mounts, bundle) };
    let (mounts, bundle) = (mounts.to_owned(), bundle.to_owned());
    sandbox.outside(move || mount_here(&mounts, &bundle)).await?
}

/// Takes off what [`mount`] has mounted. Nothing there is a success.
pub(crate) async fn unmount(bundle: &Path, sandbox: Option<&Sandbox>) {
    let Some(sandbox) = sandbox else { return unmount_here(bundle) };
    let bundle = bundle.to_owned();
    if let Err(error) = sandbox.outside(move || unmount_here(&bundle)).await {
        warn!(error = %Chain(&error), "left to containerd");
    }
}

/// Mounts `mounts`, one on the other, on the bundle's root. None: what the root shall be is there already.
///
/// # Errors
///
/// When one cannot be mounted; those before it are then undone.
fn mount_here(mounts: &[Mount], bundle: &Path) -> Result<(), Error> {
    let target = root(bundle);
    if mounts.is_empty() {
        return Ok(());
    }
    std::fs::create_dir_all(&target).map_err(Error::host("create", &target))?;
    for mount in mounts {
        let wanted = FileSystem {
            fstype: &mount.type_,
            source: &mount.source,
            target: &target.join(mount.target.trim_start_matches('/')),
            options: &mount.options,
        };
        if let Err(source) = linux::file_system::mount(&wanted) {
            unmount_here(bundle);
            let path = PathBuf::from(&mount.source);
            return Err(Error::Host { action: "mount the root file system", path, source });
        }
    }
    Ok(())
}

/// As [`unmount`], in the calling thread's namespace.
pub(crate) fn unmount_here(bundle: &Path) {
    let target = root(bundle);
    if let Err(source) = linux::mount::unmount_all(&target) {
        let error = Error::Host { action: "unmount", path: target, source };
        warn!(error = %Chain(&error), "left to containerd");
    }
}

fn root(bundle: &Path) -> PathBuf {
    bundle.join("rootfs")
}
