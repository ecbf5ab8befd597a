//! The tmpfs that containers of one sandbox share as their `/dev/shm`.

use std::ffi::CString;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use protocol::oci::{Mount, Spec};
use protocol::paths;
use rustix::mount::MountFlags;

use crate::error::{Doing, Error};

/// Makes the shared tmpfs file systems that `spec` names, unless they are there, and binds of its mounts of them. They
/// stay as long as the guest does.
///
/// # Errors
///
/// When one cannot be mounted.
pub(crate) fn share(spec: &mut Spec) -> Result<(), Error> {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        let source = mount.source().as_ref().filter(|source| is_ours(source));
        if let Some(source) = source.cloned()
            && mount.typ().as_deref() == Some("tmpfs")
        {
            make(&source, mount)?;
            bind(&source, mount);
        }
    }
    spec.set_mounts(Some(mounts));
    Ok(())
}

/// Whether the host's plan has made this path; a user's own could lead anywhere.
fn is_ours(source: &Path) -> bool {
    let name = source.strip_prefix(paths::SHM).ok().and_then(Path::to_str);
    name.is_some_and(|name| name.len() == 16 && name.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

fn make(place: &Path, mount: &Mount) -> Result<(), Error> {
    let doing = || format!("make {}", place.display());
    fs::create_dir_all(paths::SHM).doing(doing)?;
    match fs::create_dir(place) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(()),
        made => made.doing(doing)?,
    }
    let settings: Vec<_> = settings(mount).collect();
    let settings = CString::new(settings.join(","))
        .map_err(|_| Error::Invalid("a mount option with a null byte".to_owned()))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("shm", place, "tmpfs", flags, &*settings)
        .map_err(std::io::Error::from)
        .doing(doing)
}

/// The options of the file system, as against those of the mount.
fn settings(mount: &Mount) -> impl Iterator<Item = String> {
    let options = mount.options().clone().unwrap_or_default();
    options.into_iter().filter(|option| option.contains('='))
}

fn bind(place: &Path, mount: &mut Mount) {
    let mut options = mount.options().clone().unwrap_or_default();
    options.retain(|option| !option.contains('='));
    options.push("bind".to_owned());
    mount.set_source(Some(PathBuf::from(place)));
    mount.set_typ(Some("bind".to_owned()));
    mount.set_options(Some(options));
}

#[cfg(test)]
mod tests {
    use super::{bind, is_ours, settings};
    use protocol::oci::Mount;
    use serde_json::json;

    #[test]
    fn only_the_hosts_own_names_are_shared() {
        assert!(is_ours(protocol::paths::shm(7).as_ref()));
        for other in ["shm", "/run/kata/shm", "/run/kata/shm/../../../etc", "/run/kata/shm/a/b"] {
            assert!(!is_ours(other.as_ref()), "{other}");
        }
    }

    #[test]
    fn size_and_mode_are_the_file_systems_and_the_rest_the_binds() {
        let mut mount: Mount = serde_json::from_value(json!({
            "destination": "/dev/shm", "type": "tmpfs", "source": "/run/kata/shm/1",
            "options": ["nosuid", "mode=1777", "size=65536", "ro"],
        }))
        .unwrap();
        assert_eq!(settings(&mount).collect::<Vec<_>>(), ["mode=1777", "size=65536"]);
        bind("/run/kata/shm/1".as_ref(), &mut mount);
        assert_eq!(mount.typ().as_deref(), Some("bind"));
        assert_eq!(mount.options().as_deref().unwrap(), ["nosuid", "ro", "bind"]);
    }
}
