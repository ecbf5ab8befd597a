//! Against the real kernel, as root.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;

use super::hierarchy::Hierarchy;
use super::{Cgroup, Driver, Error, Limits, remove_directory};
use crate::ThisHost;
use crate::ledger::Ledger;
use crate::process::{Child, Command};

/// A sleeping process in a new cgroup of its own. All goes by `end`.
struct Fixture {
    cgroup: Cgroup,
    sleeper: Child,
    ledger: PathBuf,
    _dir: tempfile::TempDir,
}

impl Fixture {
    fn new(name: &str) -> Option<Self> {
        Self::in_those(name, |_| true)
    }

    /// In those hierarchies only that `wanted` picks.
    fn in_those(name: &str, wanted: impl Fn(&Hierarchy) -> bool) -> Option<Self> {
        let mut hierarchies = super::hierarchy::mounted().unwrap_or_default();
        hierarchies.retain(wanted);
        if !rustix::process::geteuid().is_root() || hierarchies.is_empty() {
            println!("SKIPPED: needs root and such a cgroup hierarchy");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let ledger = dir.path().join("ledger");
        let sleeper = sleeper();
        let path = format!("/kata-test-{name}-{}", std::process::id());
        let mut open = Ledger::open(&ledger).unwrap();
        let driver = Driver::Cgroupfs;
        let made = Cgroup::create_in(&hierarchies, &path, driver, sleeper.pid(), &mut open);
        match made {
            Ok(cgroup) => Some(Self { cgroup, sleeper, ledger, _dir: dir }),
            Err(Error::Host { source, .. })
                if source.kind() == std::io::ErrorKind::ReadOnlyFilesystem =>
            {
                println!("SKIPPED: needs a writable cgroup hierarchy");
                None
            }
            Err(error) => panic!("{error}: {:?}", std::error::Error::source(&error)),
        }
    }

    fn end(mut self) {
        Ledger::open(&self.ledger).unwrap().settle(&ThisHost).unwrap();
        assert!(!self.sleeper.wait().unwrap().success());
        for directory in self.cgroup.directories() {
            assert!(!directory.path.exists(), "{}", directory.path.display());
        }
    }
}

/// Whatever a failed test has left.
impl Drop for Fixture {
    fn drop(&mut self) {
        self.cgroup.remove().unwrap();
    }
}

fn sleeper() -> Child {
    let mut command = Command::new("/bin/sleep");
    command.args(["600"]).stdio(Stdio::null(), Stdio::null(), Stdio::null());
    command.spawn().unwrap()
}

#[test]
fn a_process_is_in_the_cgroup_of_every_hierarchy_and_killed_with_it() {
    let Some(fixture) = Fixture::new("join") else { return };
    let pid = fixture.sleeper.pid();
    assert_eq!(fixture.cgroup.pids().unwrap(), [pid]);
    let found = Cgroup::of_process(pid).unwrap();
    assert_eq!(found.directories(), fixture.cgroup.directories());
    fixture.end();
}

#[test]
fn limits_are_set_and_changed_later() {
    let Some(fixture) = Fixture::new("limits") else { return };
    let Some(memory) = fixture.cgroup.controller("memory").cloned() else {
        println!("SKIPPED: needs the memory controller");
        return fixture.end();
    };
    let file =
        memory.path.join(if memory.unified { "memory.max" } else { "memory.limit_in_bytes" });
    for mib in [512_i64, 1024, 256] {
        let limits = Limits { memory: Some(mib << 20), ..Limits::default() };
        fixture.cgroup.apply(&limits).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap().trim(), (mib << 20).to_string());
        assert_eq!(fixture.cgroup.usage().memory_limit, u64::try_from(mib << 20).ok());
    }
    let cpu = Limits { cpu_quota: Some(50_000), cpu_period: Some(100_000), ..Limits::default() };
    if fixture.cgroup.controller("cpu").is_some() {
        fixture.cgroup.apply(&cpu).unwrap();
        let more = Limits { cpu_quota: Some(-1), cpu_shares: Some(512), ..Limits::default() };
        fixture.cgroup.apply(&more).unwrap();
    }
    fixture.end();
}

#[test]
fn a_limit_that_the_kernel_refuses_is_named() {
    let Some(fixture) = Fixture::new("refused") else { return };
    if fixture.cgroup.controller("cpuset").is_some() {
        let limits = Limits { cpuset_cpus: Some("4000".to_owned()), ..Limits::default() };
        let error = fixture.cgroup.apply(&limits).unwrap_err();
        assert!(error.to_string().ends_with("cpuset.cpus to `4000`"), "{error}");
    }
    fixture.end();
}

#[test]
fn a_frozen_cgroup_thaws_and_can_be_removed_while_frozen() {
    let Some(fixture) = Fixture::new("freeze") else { return };
    fixture.cgroup.freeze().unwrap();
    fixture.cgroup.thaw().unwrap();
    fixture.cgroup.freeze().unwrap();
    fixture.end();
}

#[test]
fn a_v1_frozen_cgroup_is_removed_with_what_is_in_it_and_below_it() {
    let Some(fixture) = Fixture::new("v1-freeze") else { return };
    if let Some(freezer) = fixture.cgroup.controller("freezer").filter(|found| !found.unified) {
        let below = freezer.path.join("below");
        fs::create_dir(&below).unwrap();
        fs::write(below.join("cgroup.procs"), fixture.sleeper.pid().to_string()).unwrap();
        fs::write(freezer.path.join("freezer.state"), "FROZEN").unwrap();
    }
    fixture.end();
}

#[test]
fn removing_what_is_not_there_is_a_success() {
    remove_directory("/sys/fs/cgroup/no/such/cgroup".as_ref()).unwrap();
}

#[test]
fn systemd_is_asked_for_in_vain_where_it_does_not_run() {
    if super::hierarchy::mounted().is_err() || std::path::Path::new("/run/systemd/system").exists()
    {
        println!("SKIPPED: needs a host without systemd");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut ledger = Ledger::open(&dir.path().join("ledger")).unwrap();
    let path = "machine.slice:kata:no-such";
    let error = Cgroup::create(path, Driver::Systemd, 1, &mut ledger).unwrap_err();
    assert!(error.to_string().contains("without --systemd-cgroup"), "{error}");
}

#[test]
fn the_unified_hierarchy_alone_freezes_counts_and_kills() {
    let name = "unified";
    let Some(fixture) = Fixture::in_those(name, |hierarchy| hierarchy.unified) else { return };
    assert_eq!(fixture.cgroup.directories().len(), 1);
    let below = fixture.cgroup.directories()[0].path.join("below");
    fs::create_dir(&below).unwrap();
    fs::write(below.join("cgroup.procs"), fixture.sleeper.pid().to_string()).unwrap();
    assert_eq!(fixture.cgroup.pids().unwrap(), [fixture.sleeper.pid()]);
    fixture.cgroup.freeze().unwrap();
    fixture.cgroup.thaw().unwrap();
    fixture.cgroup.freeze().unwrap();
    fixture.end();
}

#[test]
fn v1_hierarchies_alone_freeze_count_and_kill() {
    let Some(fixture) = Fixture::in_those("v1", |hierarchy| !hierarchy.unified) else { return };
    fixture.cgroup.freeze().unwrap();
    fixture.cgroup.thaw().unwrap();
    assert_eq!(fixture.cgroup.usage().pids, u64::from(fixture.cgroup.controller("pids").is_some()));
    fixture.cgroup.freeze().unwrap();
    fixture.end();
}

#[test]
fn a_cgroup_with_somebodys_processes_is_joined_and_left() {
    let Some(mut fixture) = Fixture::new("shared") else { return };
    let theirs = fixture.cgroup.clone();
    let path = format!("/kata-test-shared-{}", std::process::id());
    let dir = tempfile::tempdir().unwrap();
    let mut ours = Ledger::open(&dir.path().join("ledger")).unwrap();
    let mut second = sleeper();
    Cgroup::create(&path, Driver::Cgroupfs, second.pid(), &mut ours).unwrap();
    assert_eq!(theirs.pids().unwrap().len(), 2);
    ours.settle(&ThisHost).unwrap();
    assert_eq!(theirs.pids().unwrap().len(), 2);
    theirs.remove().unwrap();
    assert!(!second.wait().unwrap().success());
    fixture.sleeper.wait().unwrap();
}

#[test]
fn a_process_can_remove_the_cgroup_that_it_is_in_itself() {
    if !rustix::process::geteuid().is_root() || super::hierarchy::mounted().is_err() {
        println!("SKIPPED: needs root and a cgroup hierarchy");
        return;
    }
    // In a process of its own: all that the tests beside this one start would be killed too.
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "--ignored", "cgroup::tests::removes_its_own_cgroup"]);
    assert!(command.spawn().unwrap().wait().unwrap().success());
}

#[test]
#[ignore = "the test above runs it"]
fn removes_its_own_cgroup() {
    let dir = tempfile::tempdir().unwrap();
    let mut ledger = Ledger::open(&dir.path().join("ledger")).unwrap();
    let path = format!("/kata-test-own-{}", std::process::id());
    let own = std::process::id();
    let cgroup = Cgroup::create(&path, Driver::Cgroupfs, own, &mut ledger).unwrap();
    let mut sleeper = sleeper();
    assert_eq!(cgroup.pids().unwrap().len(), 2);
    ledger.settle(&ThisHost).unwrap();
    assert!(!sleeper.wait().unwrap().success());
    assert!(cgroup.directories().iter().all(|directory| !directory.path.exists()));
}
