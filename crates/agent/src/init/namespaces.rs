//! Joining namespaces that are there, and telling which new ones to make.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use protocol::oci::{LinuxIdMapping, LinuxNamespaceType as Type, Spec};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::ThreadNameSpaceType;

use super::failure::{During, Failure};
use super::request::{Request, Role};

/// The new namespaces that the process shall have.
#[derive(Debug, Clone, Copy)]
pub(super) struct New {
    /// `CLONE_NEW*`.
    pub(super) flags: i32,
    /// Whether the process will be in a user namespace other than the guest's.
    pub(super) user: bool,
}

/// Enters what is there already.
pub(super) fn enter(request: &Request) -> Result<New, Failure> {
    match &request.role {
        Role::Init(spec) => enter_for_init(spec),
        Role::Exec { member, user_namespace } => {
            enter_those_of(*member, *user_namespace)?;
            Ok(New { flags: 0, user: *user_namespace })
        }
    }
}

fn flag(kind: Type) -> i32 {
    match kind {
        Type::Mount => libc::CLONE_NEWNS,
        Type::Cgroup => libc::CLONE_NEWCGROUP,
        Type::Uts => libc::CLONE_NEWUTS,
        Type::Ipc => libc::CLONE_NEWIPC,
        Type::User => libc::CLONE_NEWUSER,
        Type::Pid => libc::CLONE_NEWPID,
        Type::Network => libc::CLONE_NEWNET,
        Type::Time => CLONE_NEWTIME,
    }
}

/// Not in the libc crate for every libc.
const CLONE_NEWTIME: i32 = 0x80;

fn enter_for_init(spec: &Spec) -> Result<New, Failure> {
    let mut new = New { flags: 0, user: false };
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let mut joined = Vec::new();
    for namespace in namespaces.into_iter().flatten() {
        let kind = namespace.typ();
        new.user |= kind == Type::User;
        match namespace.path() {
            Some(path) if !path.as_os_str().is_empty() => joined.push((kind, path)),
            _ => new.flags |= flag(kind),
        }
    }
    // The user namespace comes last: entering it gives up the right to enter the others.
    joined.sort_by_key(|(kind, _)| *kind == Type::User);
    for (kind, path) in joined {
        let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .during(|| format!("open namespace {}", path.display()))?;
        join(fd.as_fd(), flag(kind), path)?;
    }
    Ok(new)
}

fn join(namespace: BorrowedFd<'_>, flag: i32, path: &Path) -> Result<(), Failure> {
    let kind = ThreadNameSpaceType::from_bits_retain(flag.cast_unsigned());
    rustix::thread::move_into_thread_name_spaces(namespace, kind)
        .during(|| format!("join namespace {}", path.display()))
}

fn enter_those_of(member: u32, user: bool) -> Result<(), Failure> {
    let action = || format!("join the namespaces of process {member}");
    let pid = i32::try_from(member).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| Failure(format!("{member} is no pid")))?;
    let process = pidfd_open(pid, PidfdFlags::empty()).during(action)?;
    // In one call, so that the kernel checks the rights to all before it enters any, setns(2). All containers
    // share the guest's network.
    let mut flags = libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWPID;
    if user {
        flags |= libc::CLONE_NEWUSER;
    }
    let kinds = ThreadNameSpaceType::from_bits_retain(flags.cast_unsigned());
    rustix::thread::move_into_thread_name_spaces(process.as_fd(), kinds).during(action)
}

/// Writes the id maps of a new user namespace, that of process `pid`.
pub(super) fn map_ids(spec: &Spec, pid: u32) -> Result<(), Failure> {
    let Some(linux) = spec.linux() else { return Ok(()) };
    let is_new = linux.namespaces().iter().flatten().any(|namespace| {
        namespace.typ() == Type::User
            && namespace.path().as_ref().is_none_or(|path| path.as_os_str().is_empty())
    });
    if !is_new {
        return Ok(());
    }
    for (file, mappings) in [("uid_map", linux.uid_mappings()), ("gid_map", linux.gid_mappings())] {
        let lines = id_map(mappings.as_deref().unwrap_or_default());
        // The kernel takes the whole map in one write, user_namespaces(7).
        fs::write(format!("/proc/{pid}/{file}"), &lines)
            .during(|| format!("write the {file} of the user namespace"))?;
    }
    Ok(())
}

fn id_map(mappings: &[LinuxIdMapping]) -> String {
    let line =
        |one: &LinuxIdMapping| format!("{} {} {}\n", one.container_id(), one.host_id(), one.size());
    mappings.iter().map(line).collect()
}
