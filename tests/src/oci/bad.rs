//! Bad input: one clear error that names the thing, and nothing left behind.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testkit::{Bundle, Run, Runtime};

use super::Oci;
use crate::case::{Case, case, has, same, skip};

pub(super) const CASES: &[Case<Oci>] = &[
    case("a bundle without config.json is refused", |oci| {
        let bundle = oci.bundle("true")?;
        fs::remove_file(bundle.dir.join("config.json"))?;
        refused(oci, &bundle, &["config.json"])
    }),
    case("a bundle that is not there is refused", |oci| {
        let bundle = oci.bundle("true")?;
        fs::rename(&bundle.dir, bundle.dir.with_extension("moved"))?;
        refused(oci, &bundle, &["no such file or directory"])
    }),
    case("a config.json that is not JSON is refused", |oci| {
        let bundle = oci.bundle("true")?;
        fs::write(bundle.dir.join("config.json"), "{\"ociVersion\": ")?;
        refused(oci, &bundle, &[])
    }),
    case("a member of the wrong type is refused", |oci| {
        changed(oci, &[], |config| config["process"]["args"] = json!("sh"))
    }),
    case("an ociVersion of another major version is refused", |oci| {
        changed(oci, &["2.0.0"], |config| config["ociVersion"] = json!("2.0.0"))
    }),
    case("ociVersion up to 1.3 is accepted", newest_version),
    case("a missing rootfs is refused", |oci| {
        changed(oci, &["nowhere"], |config| config["root"]["path"] = json!("nowhere"))
    }),
    case("no program is refused", |oci| {
        changed(oci, &["args"], |config| config["process"]["args"] = json!([]))
    }),
    case("a program that is not there is refused with runc's words", |oci| {
        changed(oci, &["exec: \"no-such-program\": executable file not found in $PATH"], |config| {
            config["process"]["args"] = json!(["no-such-program"]);
        })
    }),
    case("a program without permission is refused with runc's words", |oci| {
        changed(oci, &["permission denied"], |config| {
            config["process"]["args"] = json!(["/bin/not-executable"]);
        })
    }),
    case("a relative working directory is refused", |oci| {
        changed(oci, &["cwd"], |config| config["process"]["cwd"] = json!("relative"))
    }),
    case("an unknown namespace is refused", |oci| {
        changed(oci, &["nonsense"], |config| {
            config["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "nonsense"}]);
        })
    }),
    case("a network namespace that is not there is refused", |oci| {
        changed(oci, &["/run/netns/no-such-one"], |config| {
            config["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "uts"}, {"type": "network", "path": "/run/netns/no-such-one"}]);
        })
    }),
    case("a mount from a source that is not there is refused", |oci| {
        let bundle = oci.bundle("true")?.mount("bind", "/no/such/source", "/mnt", &["bind"])?;
        refused(oci, &bundle, &["/no/such/source"])
    }),
    case("an unknown rlimit, capability or signal is never taken for another", unknown_names),
    case("a hook that is not there is refused", |oci| {
        changed(oci, &["/no/such/hook"], |config| {
            config["hooks"] = json!({"createRuntime": [{"path": "/no/such/hook"}]});
        })
    }),
    case("ids with slashes, dots or 2 KiB are refused", bad_ids),
    case("a terminal without a console socket is refused, and the reverse", consoles),
    case("a mount through a symlink stays in the rootfs", symlink_escape),
    case("a rootfs that is a symlink out of the bundle is one clear outcome", rootfs_link),
    case("a full disk under the state directory is a clear error", full_disk),
    case("an error is one JSON line in --log as runc writes it", error_log),
    case("a missing kernel, initrd or hypervisor is named", missing_parts),
    case("an annotation that is not known or not allowed is named", annotations),
];

/// Tries to create and run the bundle's container: that must fail and name the thing, and leave no container.
pub(super) fn refused(oci: &Oci, bundle: &Bundle, words: &[&str]) -> Result<()> {
    refused_by(&oci.runtime, bundle, words)
}

fn refused_by(runtime: &Runtime, bundle: &Bundle, words: &[&str]) -> Result<()> {
    let output = runtime.run_bundle(bundle)?;
    ensure!(output.code != 0, "it was accepted: {output}");
    // runc escapes quotes on a terminal's stderr.
    let text = output.stderr.replace('\\', "").to_lowercase();
    ensure!(!text.trim().is_empty(), "it failed without a word: {output}");
    for word in words {
        ensure!(text.contains(&word.to_lowercase()), "the error does not name {word:?}: {output}");
    }
    ensure!(!text.contains("panicked"), "it panicked: {output}");
    let state = runtime.run(&["state", &bundle.id]).output()?;
    ensure!(state.code != 0, "it left a container: {state}");
    Ok(())
}

fn changed(oci: &Oci, words: &[&str], change: impl FnOnce(&mut Value)) -> Result<()> {
    refused(oci, &oci.bundle("true")?.with(change)?, words)
}

fn newest_version(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("true")?.with(|config| config["ociVersion"] = json!("1.3.0"))?;
    oci.runtime.run_bundle(&bundle)?.success().map(drop)
}

fn unknown_names(oci: &Oci) -> Result<()> {
    changed(oci, &["RLIMIT_NONSENSE"], |config| {
        config["process"]["rlimits"] = json!([{"type": "RLIMIT_NONSENSE", "soft": 1, "hard": 1}]);
    })?;
    // An unknown capability is a warning in runc, and so it must not be an error in us; what counts is that none is had.
    let bundle = oci.bundle("grep CapEff /proc/self/status")?.with(|config| {
        let capabilities = json!(["CAP_KILL", "CAP_NONSENSE"]);
        config["process"]["capabilities"] =
            json!({"bounding": capabilities, "effective": capabilities, "permitted": capabilities});
    })?;
    let output = oci.runtime.run_bundle(&bundle)?;
    if output.code == 0 {
        has(&output.text(), "0000000000000020")?;
    } else {
        has(&output.stderr, "CAP_NONSENSE")?;
    }
    Ok(())
}

fn bad_ids(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("true")?;
    let long = "x".repeat(2048);
    for id in ["a/b", "../escape", "..", ".", "", "a b", "a\nb", long.as_str()] {
        let output = oci.runtime.run(&["create", "--bundle"]).arg(&bundle.dir).arg(id).output()?;
        ensure!(output.code != 0, "id {id:?} was accepted: {output}");
        ensure!(!output.stderr.trim().is_empty(), "id {id:?}: no words");
        let state = oci.runtime.run(&["state", id]).output()?;
        ensure!(state.code != 0, "state of {id:?}: {state}");
    }
    Ok(())
}

fn consoles(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("true")?.with(|config| config["process"]["terminal"] = json!(true))?;
    let output =
        oci.runtime.run(&["create", "--bundle"]).arg(&bundle.dir).arg(&bundle.id).output()?;
    ensure!(output.code != 0, "a terminal without a socket: {output}");
    has(&output.stderr.to_lowercase(), "console")?;
    let bundle = oci.bundle("true")?;
    let run = oci.runtime.run(&["create", "--console-socket", "/no/such/socket", "--bundle"]);
    let output = run.arg(&bundle.dir).arg(&bundle.id).output()?;
    ensure!(output.code != 0, "a socket without a terminal: {output}");
    has(&output.stderr.to_lowercase(), "console")
}

fn symlink_escape(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("true")?;
    let target = oci.work.path().join(format!("escape-{}", bundle.id));
    fs::create_dir(&target)?;
    symlink(&target, bundle.rootfs().join("escape"))?;
    symlink(
        Path::new("../../../../../../../..").join(target.strip_prefix("/")?),
        bundle.rootfs().join("up"),
    )?;
    let source = bundle.dir.join("source");
    fs::create_dir(&source)?;
    let source = source.to_string_lossy().into_owned();
    let bundle = bundle.mount("bind", &source, "/escape/made", &["bind"])?;
    let bundle = bundle.mount("bind", &source, "/up/made", &["bind"])?;
    let output = oci.runtime.run_bundle(&bundle)?;
    // Resolved inside the rootfs or refused: both are safe. What counts is that nothing is made outside.
    ensure!(!output.stderr.contains("panicked"), "{output}");
    same("entries outside the rootfs", fs::read_dir(&target)?.count(), 0)
}

fn rootfs_link(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("true")?;
    fs::remove_dir_all(bundle.rootfs())?;
    symlink("/no/such/directory", bundle.rootfs())?;
    refused(oci, &bundle, &["no such file or directory"])
}

/// A tmpfs of 64 KiB, unmounted when dropped.
struct SmallDisk(std::path::PathBuf);

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(Run::new("umount").args(["-l"]).arg(&self.0).output());
    }
}

fn full_disk(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("true")?;
    let disk = SmallDisk(bundle.dir.join("disk"));
    fs::create_dir(&disk.0)?;
    Run::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"]).arg(&disk.0).text()?;
    let fill = format!("head -c 1M /dev/zero >'{}/fill'; true", disk.0.display());
    Run::shell(&fill).text()?;
    let runtime = Runtime { root: disk.0.join("root"), ..oci.runtime.clone() };
    refused_by(&runtime, &bundle, &["no space left"])
}

fn error_log(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("true")?;
    fs::remove_file(bundle.dir.join("config.json"))?;
    let log = bundle.dir.join("log.json");
    let run = oci.runtime.run(&["--log-format", "json", "--log"]).arg(&log);
    let output = run.args(["create", "--bundle"]).arg(&bundle.dir).arg(&bundle.id).output()?;
    ensure!(output.code != 0, "{output}");
    let text = fs::read_to_string(&log).context("no log")?;
    let last = text.lines().last().context("an empty log")?;
    let line: Value = serde_json::from_str(last).with_context(|| format!("not JSON: {last}"))?;
    same("level", &line["level"], &json!("error"))?;
    has(line["msg"].as_str().unwrap_or_default(), "config.json")?;
    let time = line["time"].as_str().unwrap_or_default();
    let date = Run::new("date").args(["--date", time, "+%s"]).text();
    date.with_context(|| format!("a time that nobody can read: {time:?}"))?;
    has(&output.stderr, "config.json")
}

/// kata-runtime with a configuration of its own.
fn configured(oci: &Oci, bundle: &Bundle, extra: &str) -> Result<Runtime> {
    if !oci.runtime.is_kata() {
        return Err(skip("a runtime that starts virtual machines"));
    }
    let base = match &oci.runtime.config {
        Some(path) => fs::read_to_string(path)?,
        None => "[image]\n".to_owned(),
    };
    let config = bundle.dir.join("kata.toml");
    fs::write(&config, format!("{base}\n{extra}\n"))?;
    Ok(Runtime { config: Some(config), ..oci.runtime.clone() })
}

fn missing_parts(oci: &Oci) -> Result<()> {
    for (extra, word) in [
        ("kernel = \"/no/such/kernel\"", "/no/such/kernel"),
        ("initrd = \"/no/such/initrd\"", "/no/such/initrd"),
        ("[hypervisor.qemu]\npath = \"/no/such/qemu\"", "/no/such/qemu"),
        ("[hypervisor]\ndriver = \"nonsense\"", "nonsense"),
        ("[sandbox]\nvcpu = 1", "vcpu"),
    ] {
        let bundle = oci.bundle("true")?;
        refused_by(&configured(oci, &bundle, extra)?, &bundle, &[word])?;
    }
    Ok(())
}

fn annotations(oci: &Oci) -> Result<()> {
    for name in ["hypervisor.path", "hypervisor.default_memory"] {
        let bundle = oci.bundle("true")?;
        let runtime = configured(oci, &bundle, "")?;
        let name = format!("io.katacontainers.config.{name}");
        let bundle = bundle.with(|config| config["annotations"] = json!({ &name: "1" }))?;
        refused_by(&runtime, &bundle, &[&name])?;
    }
    Ok(())
}
