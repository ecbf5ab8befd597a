//! Mounts that are wrong or unusual: one clear error that names the mount, or what runc does.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use testkit::{Bundle, Run};

use super::Oci;
use super::bad::refused;
use crate::case::{Case, case, has, same};

pub(super) const CASES: &[Case<Oci>] = &[
    case("a mount option that no file system knows is refused", |oci| {
        let bundle = oci.bundle("true")?.mount("tmpfs", "tmpfs", "/mnt", &["nonsense=1"])?;
        refused(oci, &bundle, &["/mnt"])
    }),
    case("a file mounted on a directory, and the reverse, is refused by name", kinds),
    case("rro makes what is mounted below read-only", |oci| below(oci, "rro", "refused")),
    case("ro leaves what is mounted below writable", |oci| below(oci, "ro", "written")),
    case(
        "a root on a read-only file system runs, and a missing mount point in it is refused",
        read_only_disk,
    ),
    case("a root on a full file system runs, and a write says that it is full", full_root),
];

/// A tmpfs of its own, unmounted when dropped.
struct Disk(PathBuf);

impl Disk {
    fn new(path: PathBuf, options: &str) -> Result<Self> {
        fs::create_dir_all(&path)?;
        Run::new("mount").args(["-t", "tmpfs", "-o", options, "disk"]).arg(&path).text()?;
        Ok(Self(path))
    }

    /// Puts the bundle's root on it.
    fn root(&self, bundle: Bundle) -> Result<Bundle> {
        let root = self.0.join("rootfs");
        Run::new("cp").arg("-a").arg(bundle.rootfs()).arg(&root).text()?;
        bundle.with(|config| config["root"]["path"] = root.to_string_lossy().into())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        drop(Run::new("umount").args(["-R", "-l"]).arg(&self.0).output());
    }
}

fn kinds(oci: &Oci) -> Result<()> {
    for (is_file, target) in [(true, "/tmp"), (false, "/etc/passwd")] {
        let bundle = oci.bundle("true")?;
        let source = bundle.dir.join("source");
        if is_file {
            fs::write(&source, "")?;
        } else {
            fs::create_dir(&source)?;
        }
        let bundle = bundle.mount("bind", &source.to_string_lossy(), target, &["bind"])?;
        refused(oci, &bundle, &[target, "not a directory"])?;
    }
    Ok(())
}

/// Binds a mount with one below it, and tries to write to both.
fn below(oci: &Oci, option: &str, expected: &str) -> Result<()> {
    let line = "touch /data/x; if touch /data/below/x; then echo written; else echo refused; fi";
    let bundle = oci.bundle(line)?;
    let outer = Disk::new(bundle.dir.join("outer"), "size=1m")?;
    let inner = Disk::new(outer.0.join("below"), "size=1m")?;
    let source = outer.0.to_string_lossy().into_owned();
    let bundle = bundle.mount("bind", &source, "/data", &["rbind", option])?;
    let output = oci.runtime.run_bundle(&bundle)?.success()?;
    drop(inner);
    has(&output.stderr, "/data/x: Read-only file system")?;
    same("below", output.text().as_str(), expected)
}

fn read_only_disk(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("touch /x; echo runs")?;
    let disk = Disk::new(bundle.dir.join("disk"), "size=16m")?;
    let bundle = disk.root(bundle)?;
    Run::new("mount").args(["-o", "remount,ro"]).arg(&disk.0).text()?;
    let output = oci.runtime.run_bundle(&bundle)?.success()?;
    same("output", output.text().as_str(), "runs")?;
    has(&output.stderr, "Read-only file system")?;
    let source = bundle.dir.join("source");
    fs::create_dir(&source)?;
    let bundle = bundle.mount("bind", &source.to_string_lossy(), "/no/such/place", &["bind"])?;
    refused(oci, &bundle, &["/no/such/place", "read-only file system"])
}

fn full_root(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("echo runs; dd if=/dev/zero of=/x bs=64k count=2 || echo failed")?;
    let disk = Disk::new(bundle.dir.join("disk"), "size=8m")?;
    let bundle = disk.root(bundle)?;
    let fill = format!("head -c 16M /dev/zero >'{}/fill'; true", disk.0.display());
    Run::shell(&fill).text()?;
    let output = oci.runtime.run_bundle(&bundle)?;
    ensure!(output.text().starts_with("runs") && output.text().contains("failed"), "{output}");
    has(&output.stderr, "No space left on device")
}
