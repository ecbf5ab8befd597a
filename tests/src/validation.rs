//! The OCI validation suite, opencontainers/runtime-tools, on runc and on ours.
//!
//! Its programs write TAP. runc is the measure: an assertion that ours fails and runc passes must have a reason in
//! [`REASONS`], else it is a failure. The results are written to `docs/oci-validation.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use testkit::{Run, Runtime};

use crate::Bench;
use crate::report::{Report, Verdict};

const SUITE: &str = "validation";
const MODULE: &str = "github.com/opencontainers/runtime-tools";

/// Why ours differs from runc in a program of the suite.
const REASONS: &[(&str, &str)] = &[
    (
        "mounts",
        "it looks for a bind mount by its path on the host; the guest's mountinfo has the path in the share",
    ),
    (
        "killsig",
        "the program sends its signal as soon as the container is running; an emulated guest's shell has not set its trap by then, and a namespace's init ignores what it has no handler for",
    ),
    (
        "linux_cgroups_memory",
        "it reads the host's cgroup, which holds the machine with room for its kernel and QEMU; the container's own numbers are in the guest's cgroup",
    ),
    (
        "linux_cgroups_relative_memory",
        "it reads the host's cgroup, which holds the machine with room for its kernel and QEMU; the container's own numbers are in the guest's cgroup",
    ),
    (
        "linux_cgroups_network",
        "it reads the host's net_cls and net_prio, which see a tap's frames, not the container's sockets; not set",
    ),
    (
        "linux_cgroups_relative_network",
        "it reads the host's net_cls and net_prio, which see a tap's frames, not the container's sockets; not set",
    ),
    (
        "linux_cgroups_hugetlb",
        "it reads the host's hugetlb cgroup; the guest's pages are the guest's own",
    ),
    (
        "linux_cgroups_relative_hugetlb",
        "it reads the host's hugetlb cgroup; the guest's pages are the guest's own",
    ),
    (
        "linux_cgroups_pids",
        "it reads the host's pids cgroup; a guest's processes are counted in the guest, where the limit is",
    ),
    (
        "linux_cgroups_relative_pids",
        "it reads the host's pids cgroup; a guest's processes are counted in the guest, where the limit is",
    ),
    (
        "linux_devices",
        "it asks for devices by numbers that no guest has; a host's device cannot be given to a virtual machine, and the error says so",
    ),
    (
        "linux_ns_itype",
        "it wants the host's namespaces shared, among them the network; a guest has a kernel of its own",
    ),
    (
        "linux_ns_nopath",
        "it compares the namespaces of the pid on the host, which are the sandbox process's; the container's are in the guest",
    ),
    (
        "linux_ns_path",
        "namespaces of the host's kernel other than the network cannot be joined from a guest",
    ),
    (
        "linux_ns_path_type",
        "namespaces of the host's kernel other than the network cannot be joined from a guest",
    ),
];

/// What a program found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Outcome {
    passed: usize,
    skipped: usize,
    failed: BTreeSet<String>,
}

/// Runs the suite.
pub(crate) fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    if Run::shell("command -v go").output()?.code != 0 {
        for runtime in &bench.runtimes {
            let verdict = Verdict::Skipped("needs go, to build runtime-tools".into());
            report.add(SUITE, "the suite is built", &runtime.name, verdict, Duration::ZERO);
        }
        return Ok(());
    }
    let dir = std::path::absolute("build/oci-validation")?;
    let names = build(&dir)?;
    let chosen: Vec<&'static str> = names
        .into_iter()
        .filter(|name| bench.filter.as_deref().is_none_or(|word| name.contains(word)))
        .map(|name| &*name.leak())
        .collect();
    let mut results: BTreeMap<&str, Vec<Outcome>> = BTreeMap::new();
    for runtime in &bench.runtimes {
        let script = script(&bench.work.path().join("bin"), runtime)?;
        for name in &chosen {
            if bench.list {
                report.list(SUITE, name);
                continue;
            }
            let began = Instant::now();
            let before = bench.host.snapshot()?;
            let outcome = program(bench, &dir, name, &script)?;
            remove_containers(runtime)?;
            let left = bench.host.expect(&before);
            let base = results.get(name).and_then(|outcomes| outcomes.first());
            let is_measure = !runtime.is_kata();
            let verdict = left.map_or_else(
                |error| Verdict::Failed(format!("{error:#}")),
                |()| judge(name, &outcome, base, is_measure),
            );
            report.add(SUITE, name, &runtime.name, verdict, began.elapsed());
            results.entry(name).or_default().push(outcome);
        }
    }
    let measured = bench.runtimes.iter().any(|runtime| !runtime.is_kata());
    if bench.filter.is_none() && !bench.list && measured {
        let path = Path::new("docs/oci-validation.md");
        fs::write(path, document(&bench.runtimes, &results)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// Builds the suite's programs into `dir`; answers their names.
fn build(dir: &Path) -> Result<Vec<String>> {
    fs::create_dir_all(dir)?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("oci-validation");
    let go = |args: &[&str]| {
        Run::new("go").args(args).directory(&source).within(Duration::from_mins(15))
    };
    let list = go(&["list", "-mod=mod", &format!("{MODULE}/validation/...")]).text()?;
    let packages: Vec<_> = list.lines().filter(|line| !line.ends_with("/util")).collect();
    let out = format!("{}/", dir.display());
    go(&["build", "-mod=mod", "-o", &out]).args(&packages).text()?;
    // It runs inside the containers: static.
    let runtimetest = format!("{MODULE}/cmd/runtimetest");
    go(&["build", "-mod=mod", "-o", &out, &runtimetest]).env("CGO_ENABLED", "0").text()?;
    let module = go(&["list", "-mod=mod", "-m", "-f", "{{.Dir}}", MODULE]).text()?;
    let archive = "rootfs-amd64.tar.gz";
    fs::copy(Path::new(&module).join(archive), dir.join(archive))?;
    Ok(packages.iter().filter_map(|name| name.rsplit('/').next()).map(str::to_owned).collect())
}

/// The runtime as one program without arguments, which is all that the suite can name.
fn script(dir: &Path, runtime: &Runtime) -> Result<PathBuf> {
    fs::create_dir_all(dir)?;
    let path = dir.join(format!("{}-validated", runtime.name));
    let words = runtime.words(&[]).join("' '");
    fs::write(&path, format!("#!/bin/sh\nexec '{words}' \"$@\"\n"))?;
    fs::set_permissions(&path, Permissions::from_mode(0o755))?;
    Ok(path)
}

fn program(bench: &Bench, dir: &Path, name: &str, script: &Path) -> Result<Outcome> {
    let temporary = bench.work.path().join("tmp");
    fs::create_dir_all(&temporary)?;
    // Some of its bundles have no mount namespace: what runc then mounts shall not stay on the host.
    let run = Run::new("unshare").arg("--mount").arg(dir.join(name)).directory(dir);
    let run = run.env("RUNTIME", script);
    let output = run.env("TMPDIR", &temporary).within(Duration::from_mins(5)).output();
    let outcome = match output {
        Ok(output) => {
            let mut outcome = parse(&String::from_utf8_lossy(&output.stdout));
            if output.code != 0 && outcome.failed.is_empty() {
                outcome.failed.insert(format!("the program ended with {}", output.code));
            }
            outcome
        }
        Err(_) => {
            Outcome { failed: ["the program did not end".into()].into(), ..Outcome::default() }
        }
    };
    // Some programs leave files that are immutable, or mounted; the run's end removes what it can.
    drop(fs::remove_dir_all(&temporary));
    Ok(outcome)
}

/// Reads TAP: `ok N - words`, `not ok N - words`, `ok N # SKIP words`. What a container wrote is in indented blocks.
fn parse(tap: &str) -> Outcome {
    let mut outcome = Outcome::default();
    for line in tap.lines() {
        let words = line.split_once(" - ").map_or("", |(_, words)| words).trim();
        if line.starts_with("not ok") {
            outcome.failed.insert(if words.is_empty() {
                line.to_owned()
            } else {
                words.to_owned()
            });
        } else if line.starts_with("ok") && line.contains("# SKIP") {
            outcome.skipped += 1;
        } else if line.starts_with("ok") {
            outcome.passed += 1;
        }
    }
    outcome
}

fn remove_containers(runtime: &Runtime) -> Result<()> {
    for id in runtime.run(&["list", "--quiet"]).text()?.lines() {
        runtime.run(&["delete", "--force", id]).output()?;
    }
    Ok(())
}

/// Holds an outcome against runc's, the `base`. Without one, a failure of ours is one.
fn judge(name: &str, outcome: &Outcome, base: Option<&Outcome>, is_measure: bool) -> Verdict {
    if is_measure && !outcome.failed.is_empty() {
        return Verdict::Known("runc itself fails it here: the measure for the others");
    }
    let none = Outcome::default();
    let base = base.unwrap_or(&none);
    let new: Vec<_> = outcome.failed.difference(&base.failed).map(String::as_str).collect();
    match (new.is_empty(), reason(name)) {
        (true, _) => Verdict::Passed,
        (false, Some(reason)) => Verdict::Known(reason),
        (false, None) => Verdict::Failed(new.join("\n")),
    }
}

fn reason(name: &str) -> Option<&'static str> {
    REASONS.iter().find(|(of, _)| *of == name).map(|(_, reason)| *reason)
}

/// `docs/oci-validation.md`.
fn document(runtimes: &[Runtime], results: &BTreeMap<&str, Vec<Outcome>>) -> Result<String> {
    let mut text = String::from(
        "# OCI validation\n\n\
         `make validate` writes this file: the programs of opencontainers/runtime-tools 0.9.0, each cell with the\n\
         assertions that passed and failed. runc is the measure; each difference from it has its reason.\n\n",
    );
    let names: Vec<_> = runtimes.iter().map(|runtime| runtime.name.as_str()).collect();
    writeln!(text, "| program | {} | difference |", names.join(" | "))?;
    writeln!(text, "| --- |{} --- |", " --- |".repeat(names.len()))?;
    for (name, outcomes) in results {
        let cells: Vec<_> = outcomes
            .iter()
            .map(|outcome| match outcome.failed.len() {
                0 => format!("{} ok", outcome.passed),
                failed => format!("{} ok, {failed} not", outcome.passed),
            })
            .collect();
        let differs =
            outcomes.get(1).is_some_and(|ours| !ours.failed.is_subset(&outcomes[0].failed));
        let reason = if differs { reason(name).unwrap_or("unknown") } else { "" };
        writeln!(text, "| {name} | {} | {reason} |", cells.join(" | "))?;
    }
    text.push_str("\n## What fails\n\n");
    for (name, outcomes) in results {
        for (runtime, outcome) in names.iter().zip(outcomes) {
            for failed in &outcome.failed {
                writeln!(text, "- {name}, {runtime}: {failed}")?;
            }
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::{Outcome, judge, parse};
    use crate::report::Verdict;

    #[test]
    fn tap_is_counted_and_blocks_are_left_out() {
        let tap = "TAP version 13\nok 1 - a\n  ---\n  not ok 9 - inside\n  ...\nnot ok 2 - b\nok 3 # SKIP c\n1..3\n";
        let outcome = parse(tap);
        assert_eq!((outcome.passed, outcome.skipped), (1, 1));
        assert_eq!(outcome.failed, ["b".to_owned()].into());
    }

    #[test]
    fn only_what_the_measure_passes_must_be_passed() {
        let failing = |words: &[&str]| Outcome {
            failed: words.iter().map(|&word| word.to_owned()).collect(),
            ..Outcome::default()
        };
        let (a, b, c) = (failing(&["a"]), failing(&["a", "b"]), failing(&["c"]));
        assert_eq!(judge("x", &a, Some(&b), false), Verdict::Passed);
        assert_eq!(judge("x", &c, Some(&a), false), Verdict::Failed("c".into()));
        assert_eq!(judge("x", &c, None, false), Verdict::Failed("c".into()), "not measured");
        assert!(matches!(judge("x", &c, None, true), Verdict::Known(_)));
    }
}
