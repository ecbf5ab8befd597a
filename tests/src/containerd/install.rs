//! The manifests and the installer for the nodes of a cluster.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use testkit::Run;
use yaml_rust2::{Yaml, YamlLoader};

use super::Ctr;
use crate::case::{Case, case, has, same};

pub(super) const CASES: &[Case<Ctr>] = &[
    case("the installer registers the runtime with containerd, and takes it away again", install),
    case("the installer refuses what it does not understand", refuse),
    case("the manifests are objects that belong together", manifests),
];

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// A node's root, and what is to be installed.
fn node(ctr: &Ctr) -> Result<(PathBuf, PathBuf)> {
    let dir = ctr.work.path().join(ctr.id());
    let (root, from) = (dir.join("root"), dir.join("from"));
    fs::create_dir_all(root.join("etc/containerd"))?;
    fs::create_dir_all(root.join("etc/crio"))?;
    fs::create_dir_all(from.join("bin"))?;
    fs::create_dir_all(from.join("share/kata-containers"))?;
    fs::write(from.join("bin/kata"), "#!/bin/sh\n")?;
    Run::new("chmod").arg("755").arg(from.join("bin/kata")).text()?;
    fs::write(from.join("share/kata-containers/manifest.json"), "{}")?;
    Ok((root, from))
}

fn installer(action: &str, root: &Path, from: &Path) -> Run {
    let run = Run::new(deploy().join("install.sh")).arg(action).arg("--host").arg(root);
    run.arg("--from").arg(from).arg("--no-restart")
}

/// The configuration as containerd itself understands it.
fn understood(root: &Path) -> Result<String> {
    let config = root.join("etc/containerd/config.toml");
    Run::new("containerd").arg("--config").arg(config).args(["config", "dump"]).text()
}

fn install(ctr: &Ctr) -> Result<()> {
    let (root, from) = node(ctr)?;
    let config = root.join("etc/containerd/config.toml");
    let before = "version = 2\n[plugins.'io.containerd.grpc.v1.cri']\n  sandbox_image = 'mine:1'\n";
    fs::write(&config, before)?;
    for _ in 0..2 {
        installer("install", &root, &from).text()?;
        let dump = understood(&root)?;
        has(&dump, "io.containerd.kata.v2")?;
        has(&dump, "mine:1")?;
        same("blocks", fs::read_to_string(&config)?.matches("# BEGIN kata").count(), 1)?;
    }
    for name in ["kata-runtime", "containerd-shim-kata-v2"] {
        Run::new(root.join("usr/local/bin").join(name)).text()?;
    }
    has(&fs::read_to_string(root.join("etc/crio/crio.conf.d/99-kata-containers.conf"))?, "kata")?;
    for _ in 0..2 {
        installer("uninstall", &root, &from).text()?;
        same("the configuration", fs::read_to_string(&config)?.as_str(), before)?;
    }
    let left = Run::new("find").arg(&root).args(["-name", "*kata*"]).text()?;
    same("what is left", left.as_str(), "")
}

fn refuse(ctr: &Ctr) -> Result<()> {
    let (root, from) = node(ctr)?;
    fs::write(root.join("etc/containerd/config.toml"), "[plugins]\n")?;
    has(&installer("install", &root, &from).output()?.ended(1)?.stderr, "version 1")?;
    has(&installer("upgrade", &root, &from).output()?.ended(1)?.stderr, "install or uninstall")?;
    fs::remove_file(from.join("bin/kata"))?;
    has(&installer("install", &root, &from).output()?.ended(1)?.stderr, "no program")
}

fn manifests(_: &Ctr) -> Result<()> {
    let text = fs::read_to_string(deploy().join("kata-deploy.yaml"))?;
    let objects = YamlLoader::load_from_str(&text)?;
    let find = |kind: &str| -> Result<&Yaml> {
        let found = objects.iter().find(|object| object["kind"].as_str() == Some(kind));
        found.with_context(|| format!("no {kind}"))
    };
    for object in &objects {
        ensure!(object["apiVersion"].as_str().is_some(), "an object without apiVersion");
        ensure!(object["metadata"]["name"].as_str().is_some(), "an object without a name");
    }
    let class = find("RuntimeClass")?;
    same("handler", class["handler"].as_str(), Some("kata"))?;
    let label = "katacontainers.io/kata-runtime";
    same("selector", class["scheduling"]["nodeSelector"][label].as_str(), Some("true"))?;
    has(&fs::read_to_string(deploy().join("install.sh"))?, label)?;
    let set = find("DaemonSet")?;
    let (spec, template) = (&set["spec"], &set["spec"]["template"]);
    same("labels", &spec["selector"]["matchLabels"], &template["metadata"]["labels"])?;
    let account = find("ServiceAccount")?;
    let pod = &template["spec"];
    same("account", pod["serviceAccountName"].as_str(), account["metadata"]["name"].as_str())?;
    same("namespace", &set["metadata"]["namespace"], &account["metadata"]["namespace"])?;
    let container = &pod["containers"][0];
    let script = container["command"][2].as_str().context("no script")?;
    Run::new("bash").args(["-n", "-c", script]).text()?;
    same("volume", &container["volumeMounts"][0]["name"], &pod["volumes"][0]["name"])
}
