//! Pods, as a kubelet asks containerd's CRI plugin for them: ours beside runc's.

mod containers;
mod faults;
mod figures;
mod pods;
mod streams;

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use anyhow::Result;
use testkit::cri::PATIENCE;
use testkit::cri::api::{
    Container as ContainerId, ContainerStatus, ContainerStatusResponse, Pod as PodId,
    PodSandboxConfig, PodSandboxStatus, PodSandboxStatusResponse,
};
use testkit::pods::{Node, Pod};
use testkit::{Work, eventually};

use crate::Bench;
use crate::case::Case;
use crate::containerd::shims;
use crate::report::{Report, Verdict};

const SUITE: &str = "cri";

/// `ContainerStatus::state` of a container that has exited.
pub(crate) const EXITED: i32 = 2;

/// What a case is given.
pub(crate) struct Pods {
    pub(crate) node: Rc<Node>,
    work: Rc<Work>,
    config: Option<PathBuf>,
    /// The runtime handler under test.
    handler: &'static str,
    /// Whether it starts virtual machines.
    pub(crate) is_kata: bool,
}

impl Pods {
    /// The same on a new node, which ends with what is answered.
    pub(crate) fn on_own_node(&self) -> Result<Self> {
        let shims = Some(self.work.path().join("shims"));
        let node = Node::start(&self.work, "o", shims, self.config.as_deref())?;
        Ok(Self {
            node: Rc::new(node),
            work: Rc::clone(&self.work),
            config: self.config.clone(),
            handler: self.handler,
            is_kata: self.is_kata,
        })
    }

    /// A pod's configuration, with a name of its own.
    pub(crate) fn config(&self) -> PodSandboxConfig {
        self.node.pod_config(&self.work.id())
    }

    /// Runs a pod.
    pub(crate) fn run(&self, config: PodSandboxConfig) -> Result<Pod<'_>> {
        self.node.run_pod(self.handler, config)
    }

    /// Runs a pod as it is by default.
    pub(crate) fn pod(&self) -> Result<Pod<'_>> {
        self.run(self.config())
    }

    /// A new directory.
    pub(crate) fn directory(&self) -> Result<PathBuf> {
        let path = self.work.path().join(self.work.id());
        std::fs::create_dir_all(&path)?;
        Ok(path)
    }

    pub(crate) fn pod_status(&self, pod: &Pod<'_>) -> Result<PodSandboxStatus> {
        let request = PodId { pod_sandbox_id: pod.id.clone(), ..Default::default() };
        let answer: PodSandboxStatusResponse = self.node.cri.call("PodSandboxStatus", &request)?;
        Ok(answer.status.unwrap_or_default())
    }

    pub(crate) fn status(&self, id: &str) -> Result<ContainerStatus> {
        let request = ContainerId { container_id: id.to_owned(), ..Default::default() };
        let answer: ContainerStatusResponse = self.node.cri.call("ContainerStatus", &request)?;
        Ok(answer.status.unwrap_or_default())
    }

    /// Waits for a container's end.
    pub(crate) fn exited(&self, id: &str) -> Result<ContainerStatus> {
        eventually(PATIENCE, "the container exits", || {
            Ok(Some(self.status(id)?).filter(|status| status.state == EXITED))
        })
    }
}

/// A node, and what a case is given for each of the runtimes.
fn node(bench: &Bench) -> Result<(Rc<Node>, Vec<Pods>)> {
    let kata = bench.runtimes.iter().find(|runtime| runtime.is_kata());
    let shims = kata.map(|runtime| shims(&bench.work, runtime)).transpose()?;
    let config = kata.and_then(|runtime| runtime.config.clone());
    let node = Rc::new(Node::start(&bench.work, "k", shims, config.as_deref())?);
    let pods = bench.runtimes.iter().map(|runtime| Pods {
        node: Rc::clone(&node),
        work: Rc::clone(&bench.work),
        config: config.clone(),
        handler: if runtime.is_kata() { "kata" } else { "runc" },
        is_kata: runtime.is_kata(),
    });
    let pods = pods.collect();
    Ok((node, pods))
}

/// Says what a pod costs with each runtime.
pub(crate) fn figures(bench: &Bench, report: &mut Report) -> Result<()> {
    let (node, all_pods) = node(bench)?;
    for (runtime, pods) in bench.runtimes.iter().zip(all_pods) {
        figures::measure(&pods, &runtime.name, &bench.host, report)?;
    }
    drop(node);
    testkit::residue::remove_cgroups(bench.work.mark());
    Ok(())
}

/// Runs the suite.
pub(crate) fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let all: [&[Case<Pods>]; 4] = [pods::CASES, containers::CASES, streams::CASES, faults::CASES];
    if bench.list || !all.iter().any(|cases| bench.wants(cases)) {
        for cases in all {
            bench.list_cases(SUITE, cases, report);
        }
        return Ok(());
    }
    if !Path::new("/usr/lib/cni/bridge").exists() {
        for runtime in &bench.runtimes {
            let verdict = Verdict::Skipped("needs containernetworking-plugins".to_owned());
            report.add(SUITE, "the node starts", &runtime.name, verdict, Duration::ZERO);
        }
        return Ok(());
    }
    let before = bench.host.snapshot()?;
    let (node, all_pods) = node(bench)?;
    for (runtime, pods) in bench.runtimes.iter().zip(all_pods) {
        for cases in all {
            bench.cases(SUITE, &runtime.name, &pods, cases, report);
        }
    }
    let log = node.daemon().last_words();
    drop(node);
    testkit::residue::remove_cgroups(bench.work.mark());
    let left = bench.host.expect(&before);
    let verdict = left.map_or_else(
        |error| Verdict::Failed(format!("{error:#}\nthe daemon's last words:\n{log}")),
        |()| Verdict::Passed,
    );
    report.add(SUITE, "the node's end leaves nothing behind", "all", verdict, Duration::ZERO);
    Ok(())
}
