//! What is a pod's rather than one container's: its size.

use std::collections::HashMap;

use linux::cgroup::Limits;
use protocol::oci::LinuxResources;
use serde_json::json;

use crate::config::SandboxConfig;
use crate::resources;
use crate::spec::Bundle;

/// What tells a pod's first container, by containerd's CRI plugin and by CRI-O.
const KINDS: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];

/// The sums of a pod's limits, by containerd's CRI plugin from 1.6 on.
const QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// A sandbox that is a Kubernetes pod, or is not.
#[derive(Debug, Default)]
pub(crate) struct Pod {
    is_pod: bool,
    /// Its limits, where it has some.
    limits: Option<LinuxResources>,
}

impl Pod {
    /// What the annotations of a sandbox's first container say.
    pub(crate) fn of(annotations: &HashMap<String, String>) -> Self {
        let is_pod = KINDS.iter().any(|kind| annotations.contains_key(*kind));
        let number = |name: &str| -> Option<i64> {
            annotations.get(name)?.parse().ok().filter(|&number| number > 0)
        };
        let mut limits = json!({});
        if let Some(quota) = number(QUOTA) {
            limits["cpu"] = json!({"quota": quota, "period": number(PERIOD).unwrap_or(100_000)});
        }
        if let Some(limit) = number(MEMORY) {
            limits["memory"] = json!({"limit": limit});
        }
        Self { is_pod, limits: serde_json::from_value(limits).ok() }
    }

    /// The limits that the machine is made for: the pod's, or those of the only container.
    pub(crate) fn resources(&self, bundle: &Bundle) -> Option<LinuxResources> {
        if self.is_pod { self.limits.clone() } else { bundle.resources().cloned() }
    }

    /// The limits of the machine's cgroup on the host. A pod's first container has those of a program that does nothing; what
    /// holds the pod is the cgroup around it.
    pub(crate) fn host_limits(&self, bundle: &Bundle, config: &SandboxConfig) -> Limits {
        resources::host_limits(bundle.resources().filter(|_| !self.is_pod), config)
    }
}

#[cfg(test)]
mod tests {
    use super::Pod;
    use std::collections::HashMap;

    fn pod(pairs: &[(&str, &str)]) -> Pod {
        let pairs = pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned()));
        Pod::of(&pairs.collect::<HashMap<_, _>>())
    }

    #[test]
    fn a_pod_has_the_size_that_its_annotations_say() {
        let pod = pod(&[
            ("io.kubernetes.cri.container-type", "sandbox"),
            ("io.kubernetes.cri.sandbox-cpu-quota", "150000"),
            ("io.kubernetes.cri.sandbox-cpu-period", "100000"),
            ("io.kubernetes.cri.sandbox-memory", "268435456"),
        ]);
        let limits = pod.limits.unwrap();
        assert_eq!(limits.cpu().as_ref().unwrap().quota(), Some(150_000));
        assert_eq!(limits.memory().as_ref().unwrap().limit(), Some(268_435_456));
    }

    #[test]
    fn zero_and_nonsense_are_no_limit() {
        for value in ["0", "-1", "many", ""] {
            let pod = pod(&[
                ("io.kubernetes.cri.container-type", "sandbox"),
                ("io.kubernetes.cri.sandbox-memory", value),
            ]);
            assert!(pod.limits.unwrap().memory().is_none(), "{value}");
        }
        assert!(!pod(&[]).is_pod);
    }
}
