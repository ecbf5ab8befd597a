//! `do`: a command in a fresh VM whose root is this host's, read-only, with a throw-away layer over it.

use std::fs;
use std::io::{self, IsTerminal};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use rustix::fs::CWD;
use rustix::mount::{MountAttrFlags, MoveMountFlags};
use sandbox::{Bundle, Console, ContainerId};
use serde_json::json;

use super::run::RawTerminal;
use super::{Context, lifecycle};
use crate::{args, runc_json};

pub(super) fn run(context: &Context<'_>, args: &args::Do) -> anyhow::Result<ExitCode> {
    let root = context.root()?;
    let config = context.config()?;
    lifecycle::warn_of_emulation(&config);
    // The layers are mounted where nobody else sees them, so all runs can use the one place; they go with this process
    // and the sandbox's, however these end.
    let scratch = root.path().join("do");
    fs::create_dir_all(&scratch).with_context(|| format!("cannot create {}", scratch.display()))?;
    linux::namespace::unshare_mounts().context("cannot create a mount namespace")?;
    linux::mount::tmpfs(&scratch, 0o755, None).context("cannot mount a tmpfs")?;
    let rootfs = scratch.join("rootfs");
    for name in ["upper", "work", "rootfs"] {
        let path = scratch.join(name);
        fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
    }
    mount_overlay(&scratch, &rootfs).context("cannot mount an overlay of this host's root")?;

    let terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    let mut spec = runc_json::default_spec(false);
    spec["root"] = json!({ "path": rootfs, "readonly": false });
    spec["hostname"] = json!("kata-do");
    spec["process"]["args"] = json!(args.command);
    spec["process"]["terminal"] = json!(terminal);
    spec["process"]["cwd"] = json!(std::env::current_dir().unwrap_or_else(|_| "/".into()));
    spec["process"]["env"] =
        std::env::vars().map(|(name, value)| format!("{name}={value}")).collect();
    let bundle = Bundle::new(scratch, spec)?;

    let id = ContainerId::new(&format!("do-{}", std::process::id()))?;
    let raw = RawTerminal::new(terminal)?;
    let request = sandbox::Create {
        root: &root,
        id: &id,
        bundle: &bundle,
        config,
        systemd_cgroup: false,
        console: Console::Caller,
        foreground: true,
        program: &Context::program(),
    };
    let mut created = sandbox::create(&request)?;
    let code = sandbox::start(&root, &id).and_then(|()| sandbox::attend(&mut created.process));
    drop(raw);
    let deleted = sandbox::delete(&root, &id, true);
    let code = code?;
    deleted?;
    Ok(ExitCode::from(code))
}

/// Mounts `/` under a writable layer of `scratch` on `target`. What is mounted below `/` is not in it.
fn mount_overlay(scratch: &Path, target: &Path) -> io::Result<()> {
    let overlay = rustix::mount::fsopen("overlay", rustix::mount::FsOpenFlags::FSOPEN_CLOEXEC)?;
    let set = |key: &str, path: &Path| {
        rustix::mount::fsconfig_set_string(&overlay, key, path.as_os_str().as_bytes())
    };
    set("lowerdir", Path::new("/"))?;
    set("upperdir", &scratch.join("upper"))?;
    set("workdir", &scratch.join("work"))?;
    rustix::mount::fsconfig_create(&overlay)?;
    let mount = rustix::mount::fsmount(
        &overlay,
        rustix::mount::FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )?;
    rustix::mount::move_mount(&mount, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(())
}
