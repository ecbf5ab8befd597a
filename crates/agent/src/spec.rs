//! Reading what the host asks for, and checking it before anything is done.

use std::path::Path;

use protocol::oci::{Linux, LinuxNamespace, LinuxNamespaceType, LinuxResources, Process, Spec};

use crate::error::Error;

/// Whether `id` can name a container: runc's rule, and never a path.
pub(crate) fn check_id(id: &str) -> Result<(), Error> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte);
    if id.is_empty() || id.len() > 255 || id == "." || id == ".." || !id.bytes().all(allowed) {
        return Err(Error::Invalid(format!("invalid container ID format: {id:?}")));
    }
    Ok(())
}

/// Reads a container's spec, and makes it one for this guest.
pub(crate) fn container(json: &[u8]) -> Result<Spec, Error> {
    let mut spec: Spec = serde_json::from_slice(json)
        .map_err(|error| Error::Invalid(format!("the spec cannot be read: {error}")))?;
    if !spec.version().starts_with("1.") {
        let version = spec.version();
        return Err(Error::Invalid(format!("spec version {version} is not supported")));
    }
    let Some(process) = spec.process() else {
        return Err(Error::Invalid("the spec has no process".to_owned()));
    };
    check_process(process)?;
    let Some(root) = spec.root() else {
        return Err(Error::Invalid("the spec has no root".to_owned()));
    };
    if !root.path().is_absolute() {
        let path = root.path().display();
        return Err(Error::Invalid(format!("root.path {path} is not absolute")));
    }
    for mount in spec.mounts().iter().flatten() {
        if !mount.destination().is_absolute() {
            let path = mount.destination().display();
            return Err(Error::Invalid(format!("mount destination {path} is not absolute")));
        }
    }
    let mut linux = spec.linux().clone().unwrap_or_default();
    let namespaces = namespaces(&linux)?;
    linux.set_namespaces(Some(namespaces));
    spec.set_linux(Some(linux));
    Ok(spec)
}

/// The namespaces that a container gets: those asked for, but its own mount and cgroup namespace always, since the
/// guest's are the agent's, and never one of the network, which belongs to the whole guest.
fn namespaces(linux: &Linux) -> Result<Vec<LinuxNamespace>, Error> {
    let asked = linux.namespaces().clone().unwrap_or_default();
    let mut namespaces: Vec<_> = asked
        .into_iter()
        .filter(|namespace| namespace.typ() != LinuxNamespaceType::Network)
        .collect();
    for (number, namespace) in namespaces.iter().enumerate() {
        if namespaces[..number].iter().any(|other| other.typ() == namespace.typ()) {
            let kind = namespace.typ();
            return Err(Error::Invalid(format!("the spec has two namespaces of type {kind}")));
        }
    }
    for kind in [LinuxNamespaceType::Mount, LinuxNamespaceType::Cgroup] {
        if !namespaces.iter().any(|namespace| namespace.typ() == kind) {
            let mut namespace = LinuxNamespace::default();
            namespace.set_typ(kind).set_path(None);
            namespaces.push(namespace);
        }
    }
    Ok(namespaces)
}

/// Reads the process of an exec.
pub(crate) fn exec(json: &[u8]) -> Result<Process, Error> {
    let process: Process = serde_json::from_slice(json)
        .map_err(|error| Error::Invalid(format!("the process cannot be read: {error}")))?;
    check_process(&process)?;
    Ok(process)
}

fn check_process(process: &Process) -> Result<(), Error> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Error::Invalid("process.args is empty".to_owned()));
    }
    if !Path::new(process.cwd()).is_absolute() {
        let path = process.cwd().display();
        return Err(Error::Invalid(format!("Cwd must be an absolute path: {path:?}")));
    }
    Ok(())
}

/// Reads the resources of an update.
pub(crate) fn resources(json: &[u8]) -> Result<LinuxResources, Error> {
    serde_json::from_slice(json)
        .map_err(|error| Error::Invalid(format!("the resources cannot be read: {error}")))
}

#[cfg(test)]
mod tests {
    use super::{check_id, container};
    use protocol::oci::{LinuxNamespace, LinuxNamespaceType as Type};
    use serde_json::json;

    #[test]
    fn the_network_namespace_is_the_guests() {
        let spec = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "/x"},
            "process": {"cwd": "/", "args": ["sh"], "user": {"uid": 0, "gid": 0}},
            "linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": "/n"}]},
        });
        let spec = container(spec.to_string().as_bytes()).unwrap();
        let linux = spec.linux().as_ref().unwrap();
        let kinds: Vec<_> = linux.namespaces().iter().flatten().map(LinuxNamespace::typ).collect();
        assert_eq!(kinds, [Type::Pid, Type::Mount, Type::Cgroup]);
    }

    #[test]
    fn a_spec_without_a_program_is_refused() {
        let error = container(b"{\"ociVersion\": \"1.0.2\"}").unwrap_err();
        assert_eq!(error.to_string(), "the spec has no process");
    }

    #[test]
    fn an_id_is_never_a_path() {
        assert!(check_id("a_b+c-d.e").is_ok());
        for id in ["", ".", "..", "a/b", "a b"] {
            assert!(check_id(id).is_err(), "{id}");
        }
    }
}
