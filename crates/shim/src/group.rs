//! Which sandbox a container belongs to: one shim, and one VM, for each.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::error::Error;

/// Where shims' sockets are, as for containerd's own shims. Short: a socket's path has 107 bytes at most.
const SOCKETS: &str = "/run/containerd/s";

/// The annotations that say what a container is and which sandbox it belongs to, by containerd's CRI plugin and by CRI-O.
const ANNOTATIONS: [[&str; 2]; 2] = [
    ["io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"],
    ["io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"],
];

/// A container's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// It is a sandbox of its own, or the first container of one.
    Sandbox,
    /// It joins the sandbox with this id.
    In(String),
}

#[derive(Deserialize)]
struct Spec {
    #[serde(default)]
    annotations: HashMap<String, String>,
}

impl Place {
    /// Reads the place of the container whose bundle this is.
    ///
    /// # Errors
    ///
    /// When there is no `config.json`, or it says nonsense.
    pub(crate) fn of(bundle: &Path) -> Result<Self, Error> {
        let path = bundle.join("config.json");
        let text = fs::read(&path).map_err(Error::host("read", &path))?;
        let spec: Spec = serde_json::from_slice(&text)
            .map_err(|error| Error::invalid(format!("{}: {error}", path.display())))?;
        Self::by_annotations(&spec.annotations)
    }

    fn by_annotations(annotations: &HashMap<String, String>) -> Result<Self, Error> {
        for [kind, sandbox] in ANNOTATIONS {
            match annotations.get(kind).map(String::as_str) {
                None => {}
                Some("sandbox") => return Ok(Self::Sandbox),
                Some("container") => {
                    let id = annotations.get(sandbox).ok_or_else(|| {
                        Error::invalid(format!("annotation {kind} is there, {sandbox} is not"))
                    })?;
                    sandbox::ContainerId::new(id)?;
                    return Ok(Self::In(id.clone()));
                }
                Some(other) => {
                    return Err(Error::invalid(format!(
                        "annotation {kind} is {other:?}, neither sandbox nor container"
                    )));
                }
            }
        }
        Ok(Self::Sandbox)
    }
}

/// The socket of the shim of a sandbox: the same for whoever asks, and another one for each containerd.
pub(crate) fn socket(
    dir: Option<&Path>,
    containerd: &str,
    namespace: &str,
    sandbox: &str,
) -> PathBuf {
    let digest = Sha256::digest(format!("{containerd}\0{namespace}\0{sandbox}"));
    dir.unwrap_or(Path::new(SOCKETS)).join(hex::encode(digest))
}

#[cfg(test)]
mod tests {
    use super::{Place, socket};
    use std::collections::HashMap;
    use std::path::Path;

    fn place(pairs: &[(&str, &str)]) -> Result<Place, String> {
        let annotations: HashMap<_, _> =
            pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
        Place::by_annotations(&annotations).map_err(|error| error.to_string())
    }

    #[test]
    fn a_container_joins_the_sandbox_that_containerd_or_cri_o_names() {
        assert_eq!(place(&[]), Ok(Place::Sandbox));
        let kind = "io.kubernetes.cri.container-type";
        assert_eq!(place(&[(kind, "sandbox")]), Ok(Place::Sandbox));
        let member = [(kind, "container"), ("io.kubernetes.cri.sandbox-id", "s1")];
        assert_eq!(place(&member), Ok(Place::In("s1".into())));
        let member = [
            ("io.kubernetes.cri-o.ContainerType", "container"),
            ("io.kubernetes.cri-o.SandboxID", "s2"),
        ];
        assert_eq!(place(&member), Ok(Place::In("s2".into())));
    }

    #[test]
    fn annotations_that_make_no_sense_are_refused() {
        let kind = "io.kubernetes.cri.container-type";
        assert!(place(&[(kind, "container")]).unwrap_err().contains("sandbox-id"));
        assert!(place(&[(kind, "pod")]).unwrap_err().contains("neither"));
        let bad = [(kind, "container"), ("io.kubernetes.cri.sandbox-id", "../s")];
        assert!(place(&bad).unwrap_err().contains("invalid container ID"));
    }

    #[test]
    fn each_containerd_namespace_and_sandbox_has_a_socket_of_its_own() {
        let one = socket(None, "/run/a.sock", "n", "s");
        assert!(one.as_os_str().len() < 100);
        assert_eq!(one, socket(None, "/run/a.sock", "n", "s"));
        assert_ne!(one, socket(None, "/run/b.sock", "n", "s"));
        assert_ne!(one, socket(None, "/run/a.sock", "m", "s"));
        assert_ne!(one, socket(None, "/run/a.sock", "n", "t"));
        assert!(socket(Some(Path::new("/x")), "", "", "").starts_with("/x"));
    }
}
