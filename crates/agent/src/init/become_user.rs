//! From root to what the spec's process may be.

use std::collections::HashSet;
use std::fs;

use libcontainer::capabilities;
use libcontainer::syscall::syscall::create_syscall;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use protocol::oci::{LinuxCapabilities, LinuxSeccomp, PosixRlimitType, Process};
use rustix::fs::{FileType, Mode};
use rustix::process::{Resource, Rlimit};

use super::failure::{During, Failure};
use crate::error::words;

/// Becomes root of the user namespace that the process is in.
pub(super) fn become_root() -> Result<(), Failure> {
    let action = || "become root of the user namespace".to_owned();
    let (root, group) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(group, group, group).during(action)?;
    setresuid(root, root, root).during(action)?;
    setgroups(&[]).during(action)
}

/// Sets the resource limits; needs the guest's root for those above the agent's own.
pub(super) fn set_rlimits(process: &Process) -> Result<(), Failure> {
    for limit in process.rlimits().iter().flatten() {
        let finite = |value: u64| (value != u64::MAX).then_some(value);
        let values = Rlimit { current: finite(limit.soft()), maximum: finite(limit.hard()) };
        rustix::process::setrlimit(resource(limit.typ()), values)
            .during(|| format!("set rlimit {:?} to {}", limit.typ(), limit.hard()))?;
    }
    Ok(())
}

fn resource(kind: PosixRlimitType) -> Resource {
    match kind {
        PosixRlimitType::RlimitCpu => Resource::Cpu,
        PosixRlimitType::RlimitFsize => Resource::Fsize,
        PosixRlimitType::RlimitData => Resource::Data,
        PosixRlimitType::RlimitStack => Resource::Stack,
        PosixRlimitType::RlimitCore => Resource::Core,
        PosixRlimitType::RlimitRss => Resource::Rss,
        PosixRlimitType::RlimitNproc => Resource::Nproc,
        PosixRlimitType::RlimitNofile => Resource::Nofile,
        PosixRlimitType::RlimitMemlock => Resource::Memlock,
        PosixRlimitType::RlimitAs => Resource::As,
        PosixRlimitType::RlimitLocks => Resource::Locks,
        PosixRlimitType::RlimitSigpending => Resource::Sigpending,
        PosixRlimitType::RlimitMsgqueue => Resource::Msgqueue,
        PosixRlimitType::RlimitNice => Resource::Nice,
        PosixRlimitType::RlimitRtprio => Resource::Rtprio,
        PosixRlimitType::RlimitRttime => Resource::Rttime,
    }
}

/// Changes into the process's directory, becomes its user with its capabilities, and returns its environment.
pub(super) fn become_user(
    process: &Process,
    seccomp: Option<&LinuxSeccomp>,
) -> Result<Vec<String>, Failure> {
    let user = process.user();
    let late = change_directory(process)?;
    own_stdio(user.uid())?;
    let no_new_privileges = process.no_new_privileges() == Some(true);
    if no_new_privileges {
        rustix::thread::set_no_new_privs(true).during(|| "set no_new_privs".to_owned())?;
    } else if let Some(seccomp) = seccomp {
        // Without no_new_privs a filter needs the capabilities that are about to go, seccomp(2).
        load_seccomp(seccomp)?;
    }
    let syscall = create_syscall();
    let capability = |error| Failure(format!("set the capabilities: {error}"));
    let set = process.capabilities().clone().unwrap_or_else(no_capabilities);
    rustix::thread::set_keep_capabilities(true).during(|| "keep capabilities".to_owned())?;
    let groups: Vec<Gid> =
        user.additional_gids().iter().flatten().map(|&gid| Gid::from_raw(gid)).collect();
    setgroups(&groups).during(|| "set the additional groups".to_owned())?;
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    setresgid(gid, gid, gid).during(|| format!("set the group {gid}"))?;
    setresuid(uid, uid, uid).during(|| format!("set the user {uid}"))?;
    capabilities::reset_effective(syscall.as_ref()).map_err(capability)?;
    capabilities::drop_privileges(&set, syscall.as_ref()).map_err(capability)?;
    rustix::thread::set_keep_capabilities(false).during(|| "keep no capabilities".to_owned())?;
    if late {
        change_directory(process)?;
    }
    rustix::process::umask(Mode::from_raw_mode(user.umask().unwrap_or(0o022)));
    Ok(environment(process))
}

/// The directory that only root can enter is entered as root; the one that only the user can, later, as the user:
/// then the answer is `true`.
fn change_directory(process: &Process) -> Result<bool, Failure> {
    let cwd = process.cwd();
    match std::env::set_current_dir(cwd) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => return Ok(true),
        Err(error) => {
            return Err(Failure(format!(
                "chdir to cwd (\"{}\") set in config.json failed: {}",
                cwd.display(),
                words(&error)
            )));
        }
    }
    // A link below /proc could lead out of the container; then the kernel has no path for where we are.
    match std::env::current_dir() {
        Ok(path) if path.is_absolute() => Ok(false),
        _ => Err(Failure("current working directory is outside of container mount namespace root -- possible container breakout detected".to_owned())),
    }
}

/// Gives the standard streams to the user, who may want to open them again by name, as `/dev/stdout`.
fn own_stdio(uid: u32) -> Result<(), Failure> {
    let null = rustix::fs::stat("/dev/null").map(|stat| stat.st_rdev).ok();
    for fd in [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()] {
        let stat = rustix::fs::fstat(fd).during(|| "stat a standard stream".to_owned())?;
        let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
        if stat.st_uid == uid || (is_device && Some(stat.st_rdev) == null) {
            continue;
        }
        let owner = rustix::fs::Uid::from_raw(uid);
        match rustix::fs::fchown(fd, Some(owner), None) {
            // Of another user namespace, or a read-only file system: as good as it was.
            Ok(())
            | Err(rustix::io::Errno::INVAL | rustix::io::Errno::PERM | rustix::io::Errno::ROFS) => {
            }
            Err(error) => return Err(error).during(|| "chown a standard stream".to_owned()),
        }
    }
    Ok(())
}

/// Loads the filter for the process and all that it will become.
pub(super) fn load_seccomp(seccomp: &LinuxSeccomp) -> Result<(), Failure> {
    match libcontainer::seccomp::initialize_seccomp(seccomp) {
        Ok(None) => Ok(()),
        Ok(Some(_)) => Err(Failure("seccomp notification is not supported".to_owned())),
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            Err(Failure(format!("seccomp: {error}{}", cause.unwrap_or_default())))
        }
    }
}

fn no_capabilities() -> LinuxCapabilities {
    let mut none = LinuxCapabilities::default();
    none.set_bounding(Some(HashSet::default()))
        .set_effective(Some(HashSet::default()))
        .set_permitted(Some(HashSet::default()))
        .set_inheritable(Some(HashSet::default()))
        .set_ambient(Some(HashSet::default()));
    none
}

fn environment(process: &Process) -> Vec<String> {
    let mut lines = process.env().clone().unwrap_or_default();
    let has_home =
        lines.iter().any(|line| line.strip_prefix("HOME=").is_some_and(|v| !v.is_empty()));
    if !has_home {
        lines.retain(|line| !line.starts_with("HOME="));
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let home = home_of(process.user().uid(), &passwd).unwrap_or("/");
        lines.push(format!("HOME={home}"));
    }
    lines
}

/// The home directory of user `uid` in a passwd(5) file.
fn home_of(uid: u32, passwd: &str) -> Option<&str> {
    let uid = uid.to_string();
    passwd.lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        (fields.get(2) == Some(&uid.as_str())).then(|| fields.get(5).copied())?
    })
}

#[cfg(test)]
mod tests {
    use super::home_of;

    #[test]
    fn the_home_is_that_of_the_users_line() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbin:x:10:1::/bin:/bin/false\n";
        assert_eq!(home_of(0, passwd), Some("/root"));
        assert_eq!(home_of(10, passwd), Some("/bin"));
        assert_eq!(home_of(1, passwd), None);
    }
}
