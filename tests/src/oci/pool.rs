//! Machines that wait in a pool, and templates that are no good.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use linux::process::ProcessId;
use rustix::process::Signal;
use serde_json::Value;
use testkit::runtime::reap_orphans;
use testkit::{Bundle, Container, Runtime, eventually};

use super::Oci;
use crate::case::{Case, case, has, same, skip};

/// For a machine to be made on a busy host.
const MADE: Duration = Duration::from_mins(2);

pub(super) const CASES: &[Case<Oci>] = &[
    case("a container takes a machine out of the pool, which is then filled again", taken),
    case("two machines of the pool share no random numbers", differ),
    case("a pool with dead machines, or machines of another shape, costs a start nothing", unfit),
    case("a killed sandbox process takes its machine of the pool along", killed),
    case("a template that was written to or cut off is not used again", damaged),
];

/// The runtime with a pool of its own, which is drained in the end.
struct Pool {
    runtime: Runtime,
    directory: PathBuf,
}

impl Pool {
    fn new(oci: &Oci, size: u32) -> Result<Self> {
        if !oci.runtime.is_kata() {
            return Err(skip("a runtime that starts virtual machines"));
        }
        let (directory, mut runtime) = configured(oci, |directory| {
            let place = directory.join("pool");
            format!("[pool]\nsize = {size}\ndirectory = \"{}\"\n", place.display())
        })?;
        runtime.config = Some(directory.join("config.toml"));
        let pool = Self { runtime, directory: directory.join("pool") };
        pool.runtime.run(&["pool", "fill"]).within(MADE).text()?;
        same("machines", pool.ready()?.len(), usize::try_from(size)?)?;
        Ok(pool)
    }

    /// The pids of those that wait.
    fn ready(&self) -> Result<Vec<u32>> {
        let text = self.runtime.run(&["pool", "list", "--format", "json"]).text()?;
        let list: Vec<Value> = serde_json::from_str(&text)?;
        let ready = list.iter().filter(|one| one["ready"] == true);
        let pids = ready.filter_map(|one| one["keeper"].as_u64()?.try_into().ok());
        Ok(pids.collect())
    }

    /// Waits until a machine waits that did not wait before.
    fn refilled(&self, before: &[u32]) -> Result<()> {
        eventually(MADE, "the pool is filled again", || {
            Ok(self.ready()?.iter().any(|pid| !before.contains(pid)).then_some(()))
        })
    }

    fn sleeper(&self, oci: &Oci) -> Result<Container> {
        self.runtime.start(&oci.bundle("exec sleep 1000")?)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let drained = self.runtime.run(&["pool", "drain"]).text();
        reap_orphans();
        if !std::thread::panicking() {
            drained.expect("the pool is drained");
        }
    }
}

/// A directory with a configuration that has more in it.
fn configured(oci: &Oci, more: impl FnOnce(&Path) -> String) -> Result<(PathBuf, Runtime)> {
    let directory = oci.work.path().join(oci.work.id());
    fs::create_dir_all(&directory)?;
    let base = oci.runtime.config.as_ref().map(fs::read_to_string).transpose()?;
    let text = format!("{}\n{}", base.unwrap_or_default(), more(&directory));
    fs::write(directory.join("config.toml"), text)?;
    Ok((directory, oci.runtime.clone()))
}

/// The sandbox process of the only sandbox below the runtime's root that has it.
fn sandbox_process(runtime: &Runtime, container: &Container) -> Result<ProcessId> {
    let link = fs::read_link(runtime.root.join("containers").join(&container.id))?;
    let vm = runtime.root.join("containers").join(link);
    let vm = vm.parent().and_then(Path::parent).context("a container is in a sandbox")?;
    let record: Value = serde_json::from_slice(&fs::read(vm.join("sandbox.json"))?)?;
    Ok(serde_json::from_value(record["process"].clone())?)
}

fn taken(oci: &Oci) -> Result<()> {
    let pool = Pool::new(oci, 1)?;
    let before = pool.ready()?;
    let container = pool.sleeper(oci)?;
    let process = sandbox_process(&pool.runtime, &container)?;
    same("its sandbox process", vec![process.pid], before.clone())?;
    has(&container.shell("echo here; hostname")?, "here")?;
    let table = fs::read_to_string(format!("/proc/{}/cgroup", process.pid))?;
    has(&table, &container.id)?;
    pool.refilled(&before)?;
    let others = pool.ready()?;
    // What was taken is not the pool's any more.
    pool.runtime.run(&["pool", "drain"]).text()?;
    ensure!(ProcessId::of(process.pid).is_some(), "the pool's end was the container's");
    ensure!(!others.contains(&process.pid), "{} is in the pool again", process.pid);
    container.kill("KILL")?;
    same("its exit code", container.wait()?, 137)?;
    container.delete()
}

fn differ(oci: &Oci) -> Result<()> {
    let pool = Pool::new(oci, 2)?;
    let script = "cd /proc/sys/kernel/random; cat boot_id uuid; head -c 16 /dev/urandom | od -An -tx1; date +%s";
    let tell = || -> Result<Vec<String>> {
        let ready = pool.ready()?.len();
        let output = pool.runtime.run_bundle(&oci.bundle(script)?)?.success()?;
        ensure!(ready > 0, "the pool was empty");
        Ok(output.text().lines().map(str::to_owned).collect())
    };
    let (one, other) = (tell()?, tell()?);
    ensure!(one.len() == 4 && other.len() == 4, "not four lines: {one:?}, {other:?}");
    for (mine, others) in one.iter().zip(&other).take(3) {
        ensure!(mine != others, "both sandboxes say {mine}");
    }
    let now = testkit::Run::new("date").arg("+%s").text()?.parse::<i64>()?;
    let then = other[3].parse::<i64>()?;
    ensure!((now - then).abs() < 30, "the guest's clock says {then}, the host's {now}");
    Ok(())
}

fn unfit(oci: &Oci) -> Result<()> {
    let pool = Pool::new(oci, 1)?;
    let before = pool.ready()?;
    for machine in fs::read_dir(pool.directory.join("machines"))? {
        fs::write(machine?.path().join("shape"), "another")?;
    }
    let bundle = oci.bundle("echo one")?;
    same("output", pool.runtime.run_bundle(&bundle)?.success()?.text(), "one".to_owned())?;
    pool.refilled(&before)?;
    let before = pool.ready()?;
    same("the other machine and a new one", before.len(), 2)?;
    for keeper in before.iter().filter_map(|&pid| ProcessId::of(pid)) {
        ensure!(keeper.signal(Signal::KILL)?, "a keeper was gone");
    }
    let bundle = oci.bundle("echo two")?;
    same("output", pool.runtime.run_bundle(&bundle)?.success()?.text(), "two".to_owned())?;
    pool.refilled(&before)
}

fn killed(oci: &Oci) -> Result<()> {
    let pool = Pool::new(oci, 1)?;
    let container = pool.sleeper(oci)?;
    let process = sandbox_process(&pool.runtime, &container)?;
    ensure!(process.signal(Signal::KILL)?, "there is no sandbox process");
    ensure!(container.wait()? != 0, "the container's exit code is 0");
    container.wait_for("stopped")?;
    // Its machine's processes are gone too: the residue check says if not.
    container.delete()
}

fn damaged(oci: &Oci) -> Result<()> {
    if !oci.runtime.is_kata() {
        return Err(skip("a runtime that starts virtual machines"));
    }
    // It is there, or is made now.
    oci.runtime.run(&["template", "create"]).within(MADE).text()?;
    let made = oci.runtime.run(&["template", "create"]).text()?;
    let original = Path::new(made.trim());
    let name = original.file_name().context("a template has a name")?;
    let (directory, mut runtime) = configured(oci, |_| String::new())?;
    let templates = directory.join("templates");
    fs::create_dir(&templates)?;
    testkit::Run::new("cp").args(["-a", "--sparse=always"]).arg(original).arg(&templates).text()?;
    let base = fs::read_to_string(directory.join("config.toml"))?;
    let kept: Vec<_> = base.lines().filter(|line| !line.starts_with("directory = ")).collect();
    let table = "[template]";
    let mut text = kept.join("\n");
    if !text.contains(table) {
        text.push_str("\n[template]\n");
    }
    let text = text.replace(table, &format!("{table}\ndirectory = \"{}\"", templates.display()));
    fs::write(directory.join("config.toml"), text)?;
    runtime.config = Some(directory.join("config.toml"));
    let copy = templates.join(name);
    let memory = fs::File::options().write(true).open(copy.join("memory"))?;
    memory.set_len(memory.metadata()?.len() / 2)?;
    let bundle: Bundle = oci.bundle("echo here")?;
    same("output", runtime.run_bundle(&bundle)?.success()?.text(), "here".to_owned())?;
    ensure!(!copy.exists(), "it is still there");
    Ok(())
}
