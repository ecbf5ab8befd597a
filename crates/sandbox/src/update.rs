//! Changing limits while containers run, in three places: the size of the machine, the host's cgroup around it, and the
//! container's cgroup in the guest.
//!
//! What is given must be there before it may be used, and what is taken must have been let go: a machine grows before the
//! limits rise, and shrinks after they have fallen.

use std::time::Duration;

use linux::cgroup::{Cgroup, Limits};
use protocol::oci::LinuxResources;
use tokio::task::spawn_local;
use tracing::{info, warn};

use crate::container::Container;
use crate::error::{Chain, Error};
use crate::resize::{self, Size};
use crate::resources::{host_limits, merged};
use crate::sandbox::{Sandbox, VmRequest};
use crate::status::Operation;

/// What a limit of the host leaves above what is in use, in bytes: the machine goes on, and a limit that it meets in that
/// moment would kill it.
const MARGIN: u64 = 64 << 20;

/// When to look again whether a limit of the host's can be lowered. The guest reports the memory that it has freed some
/// seconds later, and nothing tells when it has.
const LOOKS: [Duration; 6] = [
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(8),
    Duration::from_secs(16),
    Duration::from_secs(32),
];

impl Sandbox {
    /// Changes a container's limits to those that `resources`, the OCI spec's `linux.resources` as JSON, names.
    pub(crate) async fn update(
        &self,
        container: &Container,
        resources: String,
    ) -> Result<(), Error> {
        container.check(Operation::Update)?;
        let parsed: LinuxResources = serde_json::from_str(&resources)
            .map_err(|error| Error::invalid(format!("resources: {error}")))?;
        let before = self.size();
        let mut all = self.limits_of_others(container.id());
        all.push(merged(container.resources().as_ref(), &parsed));
        let wanted = resize::size(&all, &self.config, resize::host());
        self.resize_machine(wanted.or_larger(before)).await?;
        let limited = self.limit(container, &parsed, resources).await;
        self.shrink_machine(if limited.is_ok() { wanted } else { before }).await;
        if let Some(lowering) = limited? {
            lowering.begin();
        }
        self.limit_host();
        Ok(())
    }

    async fn limit(
        &self,
        container: &Container,
        parsed: &LinuxResources,
        resources: String,
    ) -> Result<Option<Lowering>, Error> {
        let lowering = match container.cgroup() {
            Some(cgroup) => raise(cgroup, host_limits(Some(parsed), &self.config))?,
            None => None,
        };
        self.agent.update(container.id(), resources).await?;
        container.update_resources(parsed);
        Ok(lowering)
    }

    /// Has the machine grow until there is room for one more container with these limits.
    pub(crate) async fn make_room(
        &self,
        id: &str,
        resources: Option<&LinuxResources>,
    ) -> Result<(), Error> {
        let mut all = self.limits_of_others(id);
        all.push(resources.cloned());
        let wanted = resize::size(&all, &self.config, resize::host());
        self.resize_machine(wanted.or_larger(self.size())).await
    }

    /// Has the machine shrink to what its containers need.
    pub(crate) async fn give_room_back(&self) {
        let all = self.limits_of_others("");
        self.shrink_machine(resize::size(&all, &self.config, resize::host())).await;
    }

    async fn shrink_machine(&self, size: Size) {
        if let Err(error) = self.resize_machine(size).await {
            warn!(error = %Chain(&error), "the machine stays larger than it need be");
        }
    }

    async fn resize_machine(&self, size: Size) -> Result<(), Error> {
        if size != self.size() {
            self.ask_vm(|answer| VmRequest::Resize(size, answer)).await?;
            self.set_size(size);
        }
        Ok(())
    }
}

/// A limit of memory that is to become lower, on a cgroup of the host.
#[derive(Debug)]
pub(crate) struct Lowering {
    cgroup: Cgroup,
    /// What it is now, and what it shall be, in bytes.
    from: Option<u64>,
    to: u64,
    limits: Limits,
}

/// Sets limits on a cgroup of the host, but for one of memory that would become lower: that is answered, for when the
/// guest may have let go of what it does not need any more.
pub(crate) fn raise(cgroup: &Cgroup, mut limits: Limits) -> Result<Option<Lowering>, Error> {
    let from = cgroup.usage().memory_limit;
    let lower = limits.memory.and_then(|bytes| u64::try_from(bytes).ok());
    // Less than no limit is any number.
    let lower = lower.filter(|&bytes| bytes > 0 && from.is_none_or(|from| bytes < from));
    let lowering = lower.map(|to| {
        let (memory, memory_swap) = (limits.memory.take(), limits.memory_swap.take());
        let limits = Limits { memory, memory_swap, ..Limits::default() };
        Lowering { cgroup: cgroup.clone(), from, to, limits }
    });
    cgroup.apply(&limits)?;
    Ok(lowering)
}

impl Lowering {
    /// Lowers the limit as soon as less than that is in use, with some margin; meanwhile the caller goes on.
    pub(crate) fn begin(self) {
        spawn_local(self.run());
    }

    async fn run(self) {
        for pause in LOOKS {
            let usage = self.cgroup.usage();
            if usage.memory_limit != self.from {
                // It has been changed again.
                return;
            }
            // Files that the kernel can drop are no use of it. v1 tells them twice: last with those of the cgroups below.
            let stat = &usage.memory_stat;
            let cache = stat.iter().rev().find(|(name, _)| name.ends_with("inactive_file"));
            let used = usage.memory.saturating_sub(cache.map_or(0, |&(_, bytes)| bytes));
            if used.saturating_add(MARGIN) <= self.to {
                match self.cgroup.apply(&self.limits) {
                    Ok(()) => return info!(bytes = self.to, "the host's memory limit is lowered"),
                    Err(error) => warn!(error = %Chain(&error), "the host's memory limit stays"),
                }
            }
            tokio::time::sleep(pause).await;
        }
        warn!(bytes = self.to, "the host's memory limit stays: the machine uses more");
    }
}
