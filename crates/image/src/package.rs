//! Debian's stock cloud kernel, fetched by apt and unpacked, but not installed.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::Error;
use crate::error::host;
use crate::manifest::sha256;
use crate::tool::{APT_CACHE, APT_GET, DPKG_DEB};

/// The package that always depends on the newest cloud kernel.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// Which kernel package an image came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Package {
    /// The package's name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// The package file's SHA-256, in hexadecimal.
    pub sha256: String,
}

/// A package, unpacked into a directory that goes with this value.
#[derive(Debug)]
pub(crate) struct Unpacked {
    pub(crate) package: Package,
    pub(crate) kernel: PathBuf,
    /// None where all drivers are built in.
    pub(crate) modules: Option<PathBuf>,
    /// Whether the kernel loads modules whose signature has been cut off.
    pub(crate) takes_unsigned_modules: bool,
    _directory: TempDir,
}

/// Downloads the newest cloud kernel's package into `cache`, unless it is there, and answers its path.
pub(crate) fn download(cache: &Path) -> Result<PathBuf, Error> {
    let name = newest()?;
    let uri = APT_GET.run(&["--print-uris", "download", &name], b"", &format!("find {name}"))?;
    let uri = String::from_utf8_lossy(&uri);
    // 'http://host/pool/name_version_amd64.deb' name_version_amd64.deb 26713492 SHA256:…
    let words: Vec<&str> = uri.split_whitespace().collect();
    let [_, file, _, hash] = words[..] else {
        return Err(Error::Failed {
            program: APT_GET.program,
            task: format!("say where {name} is"),
            words: uri.trim().escape_debug().to_string(),
        });
    };
    fs::create_dir_all(cache).map_err(host("make", cache))?;
    // The name comes from a package index: only its last part may choose a file.
    let path = cache.join(Path::new(file).file_name().unwrap_or_default());
    let intact = |path: &Path| {
        fs::read(path).is_ok_and(|bytes| hash == format!("SHA256:{}", sha256(&bytes)))
    };
    if !intact(&path) {
        // apt downloads into the working directory; as root it would warn that its own user cannot write there.
        let scratch = tempfile::tempdir_in(cache).map_err(host("make a directory in", cache))?;
        let script = "cd \"$1\" && exec apt-get -qq -o APT::Sandbox::User=root download \"$2\"";
        let arguments = [
            "-c".as_ref(),
            script.as_ref(),
            "sh".as_ref(),
            scratch.path().as_os_str(),
            name.as_ref(),
        ];
        SHELL.run(&arguments, b"", &format!("download {name} (apt-get)"))?;
        let fresh = scratch.path().join(path.file_name().unwrap_or_default());
        fs::rename(&fresh, &path).map_err(host("keep", &path))?;
    }
    Ok(path)
}

const SHELL: crate::tool::Tool = crate::tool::Tool { program: "sh", package: "dash" };

fn newest() -> Result<String, Error> {
    let words = APT_CACHE.run(&["depends", META_PACKAGE], b"", &format!("find {META_PACKAGE}"))?;
    String::from_utf8_lossy(&words)
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .map(str::to_owned)
        .ok_or_else(|| Error::Failed {
            program: APT_CACHE.program,
            task: format!("tell what {META_PACKAGE} depends on"),
            words: "run `apt-get update`, or name a package file with --kernel-package".to_owned(),
        })
}

/// Unpacks a kernel package.
pub(crate) fn unpack(file: &Path) -> Result<Unpacked, Error> {
    let bytes = fs::read(file).map_err(host("read", file))?;
    let field = |name: &str| {
        let arguments = ["--field".as_ref(), file.as_os_str(), name.as_ref()];
        let task = format!("read {}", file.display());
        let value = DPKG_DEB.run(&arguments, b"", &task)?;
        Ok(String::from_utf8_lossy(&value).trim().to_owned())
    };
    let package =
        Package { name: field("Package")?, version: field("Version")?, sha256: sha256(&bytes) };
    let directory =
        tempfile::tempdir().map_err(host("make a directory in", std::env::temp_dir()))?;
    let arguments = ["--extract".as_ref(), file.as_os_str(), directory.path().as_os_str()];
    DPKG_DEB.run(&arguments, b"", &format!("unpack {}", file.display()))?;

    let boot = directory.path().join("boot");
    let kernel = starting_with(&boot, "vmlinuz-")
        .ok_or_else(|| Error::Package { path: file.to_owned(), what: "boot/vmlinuz-*" })?;
    let config = starting_with(&boot, "config-").and_then(|path| fs::read_to_string(path).ok());
    let takes_unsigned_modules =
        config.is_some_and(|config| !config.contains("CONFIG_MODULE_SIG_FORCE=y"));
    // Since Debian 13 below /usr only.
    let modules = ["lib/modules", "usr/lib/modules"]
        .iter()
        .find_map(|path| starting_with(&directory.path().join(path), ""));
    Ok(Unpacked { package, kernel, modules, takes_unsigned_modules, _directory: directory })
}

/// The first entry, by name, of a directory whose name starts so.
fn starting_with(directory: &Path, prefix: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(directory).ok()?;
    let matching = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(prefix.as_bytes()))
    };
    entries.filter_map(|entry| Some(entry.ok()?.path())).filter(matching).min()
}

#[cfg(test)]
mod tests {
    use super::unpack;

    #[test]
    fn a_file_that_is_no_package_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel.deb");
        std::fs::write(&path, "hello").unwrap();
        let error = unpack(&path).unwrap_err().to_string();
        if error.contains("install it") {
            println!("SKIPPED: needs dpkg-deb");
            return;
        }
        assert!(error.starts_with("dpkg-deb could not read"), "{error}");
        assert!(error.contains("kernel.deb"), "{error}");
    }
}
