//! Paths in the guest that both sides must agree on.

/// Where the agent keeps everything that it makes at run time.
pub const RUN: &str = "/run/kata";

/// The mount point of the virtio-fs share.
pub const SHARE: &str = "/run/kata/share";

/// The tag of the virtio-fs share.
pub const SHARE_TAG: &str = "kata";

/// The host's file of kernel modules, in the share; see the `image` crate. No container's id has an `@` in it.
pub const MODULES: &str = "/run/kata/share/@modules";

/// Below this the agent keeps one directory for each container.
pub const CONTAINERS: &str = "/run/kata/containers";

/// Below this the agent listens in the stead of the host's sockets.
pub const SOCKETS: &str = "/run/kata/sockets";

/// The parent of the containers' cgroups, relative to the cgroup root.
pub const CGROUP: &str = "/kata";

/// What comes before a container's id in a namespace's path that means "the one this other container of the guest is in".
pub const NAMESPACE_OF: &str = "container:";

/// The path of a namespace in a guest's spec that `container` is in already.
#[must_use]
pub fn namespace_of(container: &str) -> String {
    format!("{NAMESPACE_OF}{container}")
}

/// Below this the agent keeps the tmpfs file systems that containers share as their `/dev/shm`.
pub const SHM: &str = "/run/kata/shm";

/// The source of a tmpfs mount in a guest's spec that all containers which name it share.
#[must_use]
pub fn shm(name: u64) -> String {
    format!("{SHM}/{name:016x}")
}
