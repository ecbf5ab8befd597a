//! The events that containerd gets, in their order.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testkit::eventually;

use super::Ctr;
use crate::case::{Case, case, has, same};

pub(super) const CASES: &[Case<Ctr>] = &[
    case("containerd is told of a task's life in order", life),
    case("a program that ends at once is told to have started before", short),
    case("containerd is told of an exec's life, and of pause and resume", exec),
    case("containerd is told that a container's memory ran out", out_of_memory),
];

/// `ctr events` in the background; ended when dropped.
struct Watch {
    child: Child,
    file: std::path::PathBuf,
}

impl Watch {
    fn start(ctr: &Ctr) -> Result<Self> {
        let file = ctr.work.path().join(format!("{}.events", ctr.id()));
        let mut command = Command::new("ctr");
        command.arg("--address").arg(&ctr.daemon().address);
        command.args(["--namespace", &ctr.namespace, "events"]);
        let child = command.stdin(Stdio::null()).stdout(File::create(&file)?).spawn()?;
        let watch = Self { child, file };
        // There is no sign that it listens but an event.
        let label = format!("probe={}", ctr.id());
        eventually(Duration::from_mins(1), "ctr events tells of something", || {
            ctr.run(&["images", "label", super::IMAGE, &label]).text()?;
            Ok(fs::read_to_string(&watch.file)?.contains("/images/update").then_some(()))
        })?;
        Ok(watch)
    }

    /// The topics of the events that name `id`, in order, without what is not about tasks.
    fn topics(&self, id: &str) -> Result<Vec<String>> {
        let text = fs::read_to_string(Path::new(&self.file))?;
        let lines = text.lines().filter(|line| line.contains(id));
        let topics =
            lines.filter_map(|line| line.split(' ').find(|word| word.starts_with("/tasks/")));
        Ok(topics.map(str::to_owned).collect())
    }

    /// Waits for the last of `topics` and expects just these.
    fn expect(&self, id: &str, topics: &[&str]) -> Result<()> {
        let last = *topics.last().context("no topics")?;
        eventually(Duration::from_secs(20), &format!("an event {last}"), || {
            Ok(self.topics(id)?.iter().any(|topic| topic == last).then_some(()))
        })
        .with_context(|| format!("events: {:?}", self.topics(id)))?;
        same("events", self.topics(id)?, topics.iter().map(|&topic| topic.to_owned()).collect())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn life(ctr: &Ctr) -> Result<()> {
    let watch = Watch::start(ctr)?;
    let task = ctr.sleeper()?;
    let id = task.id.clone();
    task.kill("SIGKILL").text()?;
    task.wait_for("STOPPED")?;
    drop(task);
    watch.expect(&id, &["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"])
}

fn short(ctr: &Ctr) -> Result<()> {
    let watch = Watch::start(ctr)?;
    let task = ctr.start(&[], "true")?;
    let id = task.id.clone();
    task.wait_for("STOPPED")?;
    drop(task);
    watch.expect(&id, &["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"])
}

fn exec(ctr: &Ctr) -> Result<()> {
    let watch = Watch::start(ctr)?;
    let task = ctr.sleeper()?;
    task.exec(&[], "exit 6").output()?.ended(6)?;
    ctr.run(&["task", "pause", &task.id]).text()?;
    ctr.run(&["task", "resume", &task.id]).text()?;
    let topics = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/paused",
        "/tasks/resumed",
    ];
    watch.expect(&task.id, &topics)?;
    let text = fs::read_to_string(&watch.file)?;
    let exit = text.lines().find(|line| line.contains("/tasks/exit")).unwrap_or_default();
    has(exit, "\"exit_status\":6").map_err(|error| error.context("the exec's exit"))
}

fn out_of_memory(ctr: &Ctr) -> Result<()> {
    let watch = Watch::start(ctr)?;
    let limit = (64_u32 << 20).to_string();
    // The shell lives on: what is told is that memory ran out, not that a task ended.
    let task = ctr.start(&["--memory-limit", &limit], "tail /dev/zero; sleep 1000")?;
    let waited = eventually(Duration::from_mins(1), "an event /tasks/oom", || {
        Ok(watch.topics(&task.id)?.iter().any(|topic| topic == "/tasks/oom").then_some(()))
    });
    ensure!(waited.is_ok(), "{waited:?}: {:?}", watch.topics(&task.id));
    Ok(())
}
