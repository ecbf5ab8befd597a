//! Container images, made from the tests' own root file system: no registry is needed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{Run, Work};

/// Makes an image archive in `dir`, as `docker save` does; `config` is the image's `config` object (`Cmd`, `Env`,
/// `User`).
///
/// # Errors
///
/// When tar or sha256sum fails.
pub fn archive(work: &Work, dir: &Path, name: &str, config: &Value) -> Result<PathBuf> {
    let short = name.rsplit('/').next().unwrap_or(name).replace(':', "-");
    let parts = dir.join(format!("{short}.parts"));
    fs::create_dir_all(&parts)?;
    let layer = parts.join("layer.tar");
    Run::new("tar").arg("-C").arg(work.rootfs()).arg("-cf").arg(&layer).arg(".").text()?;
    let digest = Run::new("sha256sum").arg(&layer).text()?;
    let digest = digest.split(' ').next().context("sha256sum says nothing")?.to_owned();
    let image = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
        "history": [{"created_by": "testkit"}],
    });
    fs::write(parts.join("config.json"), image.to_string())?;
    let manifest = json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]);
    fs::write(parts.join("manifest.json"), manifest.to_string())?;
    let archive = dir.join(format!("{short}.tar"));
    Run::new("tar").arg("-C").arg(&parts).arg("-cf").arg(&archive).arg(".").text()?;
    fs::remove_dir_all(parts)?;
    Ok(archive)
}
