//! state, list, ps, events, spec, features, version, checkpoint.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::Oci;
use crate::case::{Case, case, has, same, skip};

pub(super) const CASES: &[Case<Oci>] = &[
    case("--version tells name and version", version),
    case("spec writes a config.json and never overwrites one", spec),
    case("features is JSON with the fields that Docker reads", features),
    case("list and ps tell of a container as tables and as JSON", list_and_ps),
    case("events --stats is one JSON object with usage", events),
    case("checkpoint says that it is not supported", checkpoint),
    case("an unknown command or flag is an error with usage words", usage),
];

fn version(oci: &Oci) -> Result<()> {
    let text = oci.runtime.run(&["--version"]).text()?;
    let first = text.lines().next().unwrap_or_default();
    ensure!(first.contains(" version "), "the first line is {first:?}");
    let spec = text.lines().find_map(|line| line.strip_prefix("spec: "));
    ensure!(spec.is_some_and(|version| version.starts_with("1.")), "no spec version in {text}");
    Ok(())
}

fn spec(oci: &Oci) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let spec = || oci.runtime.run(&["spec", "--bundle"]).arg(dir.path());
    spec().text()?;
    let text = std::fs::read_to_string(dir.path().join("config.json"))?;
    let config: Value = serde_json::from_str(&text)?;
    same("args", &config["process"]["args"], &json!(["sh"]))?;
    same("root", &config["root"]["path"], &json!("rootfs"))?;
    ensure!(
        config["ociVersion"].as_str().is_some_and(|version| version.starts_with("1.")),
        "{text}"
    );
    let again = spec().output()?;
    ensure!(again.code != 0, "it overwrote a config.json: {again}");
    has(&again.stderr, "exist")
}

fn features(oci: &Oci) -> Result<()> {
    let features: Value = serde_json::from_str(&oci.runtime.run(&["features"]).text()?)?;
    for member in ["ociVersionMin", "ociVersionMax"] {
        ensure!(features[member].is_string(), "no {member}: {features}");
    }
    for member in ["/hooks", "/mountOptions", "/linux/namespaces", "/linux/capabilities"] {
        let list = features.pointer(member).and_then(Value::as_array);
        ensure!(list.is_some_and(|list| !list.is_empty()), "no {member}: {features}");
    }
    let seccomp = features.pointer("/linux/seccomp/enabled");
    same("seccomp", seccomp, Some(&json!(true)))
}

fn list_and_ps(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("sleep 1000; true")?;
    let container = oci.runtime.start(&bundle)?;
    let table = oci.runtime.run(&["list"]).text()?;
    let heads: Vec<_> = table.lines().next().unwrap_or_default().split_whitespace().collect();
    same("heads", heads, vec!["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"])?;
    let line =
        table.lines().find(|line| line.starts_with(&bundle.id)).context("it is not listed")?;
    has(line, "running")?;
    has(&oci.runtime.run(&["list", "--quiet"]).text()?, &bundle.id)?;
    let list: Value =
        serde_json::from_str(&oci.runtime.run(&["list", "--format", "json"]).text()?)?;
    let entries = list.as_array().context("not a list")?;
    let entry =
        entries.iter().find(|entry| entry["id"] == json!(bundle.id)).context("not in JSON")?;
    same("pid", &entry["pid"], &json!(container.pid))?;
    same("bundle", &entry["bundle"], &json!(bundle.dir))?;
    ensure!(entry["created"].is_string() && entry["owner"].is_string(), "{entry}");
    let pids: Vec<u32> =
        serde_json::from_str(&container.command(&["ps", "--format", "json"]).text()?)?;
    ensure!(pids.contains(&container.pid), "{pids:?} lacks the container's pid");
    let table = container.command(&["ps"]).text()?;
    has(table.lines().next().unwrap_or_default(), "PID")?;
    container.command(&["delete", "--force"]).text().map(drop)
}

fn events(oci: &Oci) -> Result<()> {
    let container = oci.sleeper()?;
    let event: Value = serde_json::from_str(&container.command(&["events", "--stats"]).text()?)?;
    same("type", &event["type"], &json!("stats"))?;
    same("id", &event["id"], &json!(container.id))?;
    for member in ["/data/cpu/usage/total", "/data/memory/usage/usage", "/data/pids/current"] {
        let number = event.pointer(member).and_then(Value::as_u64);
        ensure!(number.is_some_and(|number| number > 0), "no {member}: {event}");
    }
    container.command(&["delete", "--force"]).text().map(drop)
}

fn checkpoint(oci: &Oci) -> Result<()> {
    if !oci.runtime.is_kata() {
        return Err(skip("a runtime without checkpoints"));
    }
    for command in ["checkpoint", "restore"] {
        let output = oci.runtime.run(&[command, "kt-nobody"]).output()?;
        ensure!(output.code != 0, "{output}");
        has(&output.stderr, "not supported")?;
    }
    Ok(())
}

fn usage(oci: &Oci) -> Result<()> {
    for args in [&["nonsense"] as &[&str], &["state"], &["state", "--nonsense", "x"], &["kill"]] {
        let output = oci.runtime.run(args).output()?;
        ensure!(output.code != 0, "{output}");
        ensure!(!output.stderr.is_empty() || !output.stdout.is_empty(), "no words: {output}");
    }
    Ok(())
}
