//! Finds out who can run a guest's instructions on this host.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::path::Path;

use crate::Acceleration;

/// What was found, and why it is not better.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Detection {
    /// The best that works.
    pub acceleration: Acceleration,
    /// Why it is not KVM. None where it is.
    pub obstacle: Option<Obstacle>,
}

/// A reason why KVM cannot be used. Its text says what to do, where something can be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Obstacle {
    /// The CPU has neither VT-x nor AMD-V, or a hypervisor around this host hides it.
    NoCpuFlag,
    /// `/dev/kvm` is PVM, a virtualisation without help from the CPU. It runs only guest kernels made for it; others
    /// crawl as if they hung.
    Pvm,
    /// There is no `/dev/kvm`.
    NoDevice,
    /// `/dev/kvm` cannot be opened for reading and writing.
    Closed(String),
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCpuFlag => f.write_str(
                "this host's CPU shows no hardware virtualisation (vmx or svm); in a cloud machine, choose a type \
                 with nested virtualisation",
            ),
            Self::Pvm => f.write_str(
                "this host's /dev/kvm is PVM, which runs only kernels made for it",
            ),
            Self::NoDevice => f.write_str(
                "there is no /dev/kvm; load the module kvm_intel or kvm_amd, and pass the device into the container \
                 if this is one",
            ),
            Self::Closed(reason) => write!(f, "/dev/kvm cannot be opened: {reason}"),
        }
    }
}

/// Looks at this host. Costs a few system calls.
#[must_use]
pub fn detect() -> Detection {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let pvm = Path::new("/sys/module/kvm_pvm").exists();
    let device = Path::new("/dev/kvm");
    let open = || OpenOptions::new().read(true).write(true).open(device).map(drop);
    let obstacle = obstacle(&cpus, pvm, || {
        if !device.exists() {
            return Some(Obstacle::NoDevice);
        }
        open().err().map(|error| Obstacle::Closed(error.to_string()))
    });
    let acceleration = if obstacle.is_none() { Acceleration::Kvm } else { Acceleration::Tcg };
    Detection { acceleration, obstacle }
}

/// PVM comes first: it is there just where the CPU has no flag, and says more.
fn obstacle(
    cpuinfo: &str,
    pvm: bool,
    device: impl FnOnce() -> Option<Obstacle>,
) -> Option<Obstacle> {
    let virtualises = cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .flat_map(str::split_whitespace)
        .any(|flag| matches!(flag, "vmx" | "svm"));
    match (virtualises, pvm) {
        (false, true) => Some(Obstacle::Pvm),
        (false, false) => Some(Obstacle::NoCpuFlag),
        (true, _) => device(),
    }
}

#[cfg(test)]
mod tests {
    use super::{Obstacle, obstacle};

    const WITH: &str = "processor\t: 0\nflags\t\t: fpu vme vmx sse\n";
    const WITHOUT: &str = "processor\t: 0\nflags\t\t: fpu vme sse\nbugs: vmx\n";

    #[test]
    fn kvm_needs_the_cpu_the_module_and_the_device() {
        assert_eq!(obstacle(WITH, false, || None), None);
        assert_eq!(obstacle(WITHOUT, false, || None), Some(Obstacle::NoCpuFlag));
        assert_eq!(obstacle(WITHOUT, true, || None), Some(Obstacle::Pvm));
        assert_eq!(obstacle(WITH, false, || Some(Obstacle::NoDevice)), Some(Obstacle::NoDevice));
    }

    #[test]
    fn the_answer_for_this_host_is_consistent() {
        let found = super::detect();
        assert_eq!(found.obstacle.is_none(), found.acceleration == crate::Acceleration::Kvm);
    }
}
