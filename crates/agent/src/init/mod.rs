//! `kata-agent container-init`: the process that becomes a container's init, or an exec.
//!
//! It has one thread. It joins the cgroup and what namespaces there are already, then forks, with the new
//! namespaces, a child of PID 1's own (`CLONE_PARENT`) and goes. That child builds the container's view of the
//! file system (an init only), waits for the word to start (an init only), drops its privileges and executes the
//! user's program.
//!
//! The primitives (seccomp filters, capabilities, mount options) are libcontainer's; the order of things and the
//! words of errors are ours, since clients parse the latter.

mod become_user;
mod devices;
mod failure;
mod hooks;
mod mounts;
mod namespaces;
mod paths;
mod program;
pub(crate) mod request;
mod rootfs;
mod terminal;

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;

use rustix::net::RecvFlags;
use rustix::process::DumpableBehavior;

use self::failure::{During, Failure};
use self::request::{Report, Request, Role, START};
use crate::launch::{report, wait_for_order};
use crate::marks::Marks;
use crate::sys::{self, Fork};

/// The role's main function. Its argument is the number of the control socket.
pub(crate) fn main(control: &str) -> ExitCode {
    let Ok(control) = inherit(control, "control socket") else { return ExitCode::FAILURE };
    // Else PID 1 ends, or lies.
    let Ok(Some((file, stdio))) = wait_for_order(&control) else { return ExitCode::FAILURE };
    let mut marks = Marks::default();
    marks.mark("init_ordered");
    let result = take_stdio(stdio)
        .and_then(|()| read_request(file))
        .and_then(|request| run(&control, &request, marks));
    let text = match result {
        Ok(code) => return code,
        Err(Failure(text)) => text,
    };
    // PID 1 may have gone on without us; then nobody wants to know.
    drop(report(&control, &Report::Failed(text), None));
    FAILED.into()
}

/// What runc's init exits with where the user's program cannot be run.
const FAILED: u8 = 255;

fn inherit(number: &str, what: &'static str) -> Result<OwnedFd, Failure> {
    let number =
        number.parse().map_err(|_| Failure(format!("the number of the {what} is none")))?;
    sys::inherited(number).during(|| format!("take over the {what}"))
}

fn take_stdio([stdin, stdout, stderr]: [OwnedFd; 3]) -> Result<(), Failure> {
    rustix::stdio::dup2_stdin(stdin)
        .and_then(|()| rustix::stdio::dup2_stdout(stdout))
        .and_then(|()| rustix::stdio::dup2_stderr(stderr))
        .during(|| "take over the standard streams".to_owned())
}

fn read_request(mut file: fs::File) -> Result<Request, Failure> {
    let action = || "read the request".to_owned();
    std::io::Seek::rewind(&mut file).during(action)?;
    let mut json = Vec::new();
    file.read_to_end(&mut json).during(action)?;
    serde_json::from_slice(&json).map_err(|error| Failure(format!("read the request: {error}")))
}

/// In the first process: forks the second and ends. In the second: ends only with a failure.
fn run(control: &OwnedFd, request: &Request, mut marks: Marks) -> Result<ExitCode, Failure> {
    marks.mark("init_request");
    enter_cgroup(request)?;
    if let Some(score) = request.process.oom_score_adj() {
        fs::write("/proc/self/oom_score_adj", score.to_string())
            .during(|| format!("set oom_score_adj to {score}"))?;
    }
    become_user::set_rlimits(&request.process)?;
    let mut sysfs = None;
    if let Role::Init(spec) = &request.role {
        // The network is the whole guest's: its settings need the guest's root, which a user namespace takes.
        rootfs::set_sysctls(spec, |name| name.starts_with("net."))?;
        if rootfs::has_user_namespace(spec) {
            sysfs = Some(mounts::guest_sysfs()?);
        }
    }
    // Who shares a pid namespace with us shall not reach into a process of the guest's root.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .during(|| "make the process undumpable".to_owned())?;
    let new = namespaces::enter(request)?;
    marks.mark("init_prepared");
    let (mut gate, mut opener) = std::io::pipe().during(|| "make a pipe".to_owned())?;
    match sys::fork(new.flags | libc::CLONE_PARENT).during(|| "clone".to_owned())? {
        Fork::Parent(pid) => {
            drop(gate);
            if let Role::Init(spec) = &request.role {
                namespaces::map_ids(spec, pid)?;
            }
            marks.mark("forked");
            report(control, &Report::Forked(pid, marks), None).during(|| "report".to_owned())?;
            // The child goes on only now, so that its reports come after ours.
            opener.write_all(&[0]).during(|| "let the process go on".to_owned())?;
            Ok(ExitCode::SUCCESS)
        }
        Fork::Child => {
            drop(opener);
            gate.read_exact(&mut [0]).during(|| "wait for the parent".to_owned())?;
            drop(gate);
            become_program(control, request, new.user, sysfs)
        }
    }
}

fn enter_cgroup(request: &Request) -> Result<(), Failure> {
    let path = request.cgroup.join("cgroup.procs");
    fs::write(&path, "0").during(|| format!("join cgroup {}", request.cgroup.display()))
}

/// In the process that becomes the user's program.
fn become_program(
    control: &OwnedFd,
    request: &Request,
    user: bool,
    sysfs: Option<OwnedFd>,
) -> Result<ExitCode, Failure> {
    let mut marks = Marks::default();
    marks.mark("process_began");
    if user {
        become_user::become_root()?;
    }
    rustix::process::setsid().during(|| "start a session".to_owned())?;
    let process = &request.process;
    match &request.role {
        Role::Init(spec) => {
            let root = rootfs::build(spec, sysfs.as_ref())?;
            drop(sysfs);
            if let Some(size) = request.terminal {
                terminal::open(control, size, Some(&root))?;
            }
            marks.mark("rootfs_built");
            rootfs::seal(spec, root)?;
            marks.mark("rootfs_entered");
        }
        Role::Exec { .. } => {
            if let Some(size) = request.terminal {
                terminal::open(control, size, None)?;
            }
        }
    }
    // From here on a filter may be in force that was written before close_range(2), faccessat2(2) and statx(2) were: what
    // comes must do without them.
    sys::close_on_exec().during(|| "close files".to_owned())?;
    let seccomp = request.seccomp.as_ref();
    let environment = become_user::become_user(process, seccomp)?;
    let program = program::Program::find(process, environment)?;
    if let Role::Init(spec) = &request.role {
        marks.mark("process_ready");
        report(control, &Report::Ready(marks), None).during(|| "report".to_owned())?;
        if !wait_for_start(control)? {
            // The container was removed before it was started.
            return Ok(ExitCode::SUCCESS);
        }
        hooks::start_container(spec, &request.container, &program)?;
    }
    if process.no_new_privileges() == Some(true)
        && let Some(seccomp) = seccomp
    {
        become_user::load_seccomp(seccomp)?;
    }
    let failure = program.execute();
    if matches!(request.role, Role::Exec { .. }) {
        return Err(failure);
    }
    // As with runc, the container counts as started by now, and its own output says why it ended.
    drop(std::io::stderr().write_all(format!("{}\n", failure.0).as_bytes()));
    Ok(FAILED.into())
}

fn wait_for_start(control: &OwnedFd) -> Result<bool, Failure> {
    let mut word = [0; START.len()];
    let (size, _) = rustix::net::recv(control.as_fd(), &mut word[..], RecvFlags::empty())
        .during(|| "wait for the word to start".to_owned())?;
    Ok(size > 0)
}
