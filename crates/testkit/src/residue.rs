//! The check that nothing is left behind on the host.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};

use crate::runtime::reap_orphans;
use crate::{Run, Work};

/// How long what a runtime has ended may take to vanish.
const SETTLE: Duration = Duration::from_secs(15);

/// What to look at.
#[derive(Debug, Clone)]
pub struct Host {
    /// Directories of the test run: mounts, processes and files that name them are the run's.
    pub places: Vec<PathBuf>,
    /// A word in the name of everything else that the run makes: cgroups, network namespaces.
    pub mark: String,
    /// Directories below which no file may be left. Empty directories may.
    pub roots: Vec<PathBuf>,
    /// Whether others use this machine too. If not, every process named after a hypervisor or a runtime counts, every
    /// mount and every link.
    pub shared: bool,
}

/// What is on the host that a runtime could have left.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Snapshot {
    kinds: [BTreeSet<String>; 5],
}

const KINDS: [&str; 5] = ["mount", "link", "cgroup", "process", "file"];
const NAMES: [&str; 7] =
    ["qemu", "kata", "runc", "containerd-shim", "virtiofsd", "vhost-device", "cloud-hypervisor"];

impl Host {
    /// What a run with this work directory looks at.
    pub fn of(work: &Work, shared: bool) -> Self {
        Self {
            places: vec![work.path().to_owned()],
            mark: work.mark().to_owned(),
            roots: vec![work.path().join("state")],
            shared,
        }
    }

    /// Looks.
    ///
    /// # Errors
    ///
    /// When `/proc` cannot be read.
    pub fn snapshot(&self) -> Result<Snapshot> {
        reap_orphans();
        let mut files = BTreeSet::new();
        for root in &self.roots {
            list_files(root, &mut files)?;
        }
        let mut cgroups = BTreeSet::new();
        list_cgroups(Path::new("/sys/fs/cgroup"), &self.mark, 0, &mut cgroups);
        let kinds = [self.mounts()?, self.links()?, cgroups, self.processes()?, files];
        Ok(Snapshot { kinds })
    }

    /// Looks until the host is as it was `before`.
    ///
    /// # Errors
    ///
    /// When it is not within 15 seconds: what is there that was not.
    pub fn expect(&self, before: &Snapshot) -> Result<()> {
        let mut difference = String::new();
        let outcome = crate::eventually(SETTLE, "the host is as it was before", || {
            difference = before.left_in(&self.snapshot()?);
            Ok(difference.is_empty().then_some(()))
        });
        if outcome.is_err() && !difference.is_empty() {
            bail!("left behind on the host:\n{difference}");
        }
        outcome
    }

    fn ours(&self, text: &str) -> bool {
        text.contains(&self.mark)
            || self.places.iter().any(|place| text.contains(&*place.to_string_lossy()))
    }

    fn mounts(&self) -> Result<BTreeSet<String>> {
        let table = fs::read_to_string("/proc/self/mountinfo")?;
        let mounts = table.lines().filter(|line| !self.shared || self.ours(line));
        // Mount point, type and source: proc(5), fields 5 and those behind the dash.
        let describe = |line: &str| {
            let point = line.split(' ').nth(4)?;
            let (_, tail) = line.split_once(" - ")?;
            Some(format!("{point} ({tail})"))
        };
        Ok(mounts.filter_map(describe).collect())
    }

    fn links(&self) -> Result<BTreeSet<String>> {
        let mut links = BTreeSet::new();
        if !self.shared {
            links.extend(link_names(&fs::read_to_string("/proc/net/dev")?, "the host"));
        }
        for name in netns_names().filter(|name| self.ours(name)) {
            let netns = format!("--net=/run/netns/{name}");
            // A namespace that vanishes meanwhile has no links.
            let table = Run::new("nsenter").arg(netns).args(["cat", "/proc/self/net/dev"]).text();
            links.extend(link_names(&table.unwrap_or_default(), &name));
            links.insert(format!("network namespace {name}"));
        }
        Ok(links)
    }

    fn processes(&self) -> Result<BTreeSet<String>> {
        let own = std::process::id().to_string();
        let mut found = BTreeSet::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let pid = entry.file_name().to_string_lossy().into_owned();
            if pid == own || !pid.bytes().all(|byte| byte.is_ascii_digit()) {
                continue;
            }
            let read = |name| {
                let bytes = fs::read(entry.path().join(name)).unwrap_or_default();
                String::from_utf8_lossy(&bytes).replace('\0', " ")
            };
            let (line, name) = (read("cmdline"), read("comm"));
            // Neither a kernel thread nor a zombie has a command line.
            if line.is_empty() {
                continue;
            }
            let named = NAMES.iter().any(|known| name.starts_with(known));
            let marked = self.ours(&line) || self.ours(&read("cgroup"));
            // The run's own daemon, which a case may start again.
            let pid = if name.trim_end() == "dockerd" { "" } else { &pid };
            if marked || (named && !self.shared) {
                found.insert(format!("{pid} {}", line.chars().take(160).collect::<String>()));
            }
        }
        Ok(found)
    }
}

impl Snapshot {
    /// What `after` has that this has not, one line each; empty when there is nothing.
    pub fn left_in(&self, after: &Self) -> String {
        let mut text = String::new();
        for (kind, (before, after)) in KINDS.iter().zip(self.kinds.iter().zip(&after.kinds)) {
            for thing in after.difference(before) {
                writeln!(text, "  {kind}: {thing}").expect("writing to a String cannot fail");
            }
        }
        text
    }
}

/// The names in a `/proc/net/dev`.
fn link_names(table: &str, netns: &str) -> Vec<String> {
    let names = table.lines().skip(2).filter_map(|line| line.split_once(':'));
    names.map(|(name, _)| format!("{} in {netns}", name.trim())).collect()
}

fn netns_names() -> impl Iterator<Item = String> {
    let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned())
}

fn list_files(dir: &Path, found: &mut BTreeSet<String>) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            list_files(&entry.path(), found)?;
        } else {
            found.insert(entry.path().display().to_string());
        }
    }
    Ok(())
}

/// The topmost cgroups with `mark` in their name.
fn list_cgroups(dir: &Path, mark: &str, depth: usize, found: &mut BTreeSet<String>) {
    // A cgroup may vanish while we look.
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let path = entry.path();
        let below = !entry.file_name().to_string_lossy().contains(mark);
        if below && depth < 6 {
            list_cgroups(&path, mark, depth + 1, found);
        } else if !below && holds_more_than_parents(&path) {
            found.insert(path.display().to_string());
        }
    }
}

/// Whether a cgroup is more than an empty parent of the containers' cgroups, which runc leaves as it found it: made.
fn holds_more_than_parents(path: &Path) -> bool {
    let is_parent = path.file_name().is_some_and(|name| !name.to_string_lossy().contains('-'));
    let has_child = fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let procs = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    !is_parent || has_child || !procs.trim().is_empty()
}

/// Removes the empty cgroups that are left of a run: the parents of its containers' cgroups.
pub fn remove_cgroups(mark: &str) {
    remove_tree(&Path::new("/sys/fs/cgroup").join(mark));
    for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        remove_tree(&hierarchy.path().join(mark));
    }
}

fn remove_tree(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    // One that is not there, or not empty, stays.
    drop(fs::remove_dir(cgroup));
}

#[cfg(test)]
mod tests {
    use super::Host;
    use std::fs;

    #[test]
    fn a_file_below_the_root_is_told_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("state");
        fs::create_dir(&root).unwrap();
        let host = Host {
            places: vec![dir.path().to_owned()],
            mark: "no-such-mark".into(),
            roots: vec![root.clone()],
            shared: true,
        };
        let before = host.snapshot().unwrap();
        fs::create_dir(root.join("empty")).unwrap();
        assert_eq!(before.left_in(&host.snapshot().unwrap()), "");
        fs::write(root.join("left"), "").unwrap();
        let text = before.left_in(&host.snapshot().unwrap());
        assert_eq!(text, format!("  file: {}\n", root.join("left").display()));
    }

    #[test]
    fn a_process_that_names_a_place_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let host = Host {
            places: vec![dir.path().to_owned()],
            mark: "no-such-mark".into(),
            roots: Vec::new(),
            shared: true,
        };
        let before = host.snapshot().unwrap();
        let mut child = std::process::Command::new("tail")
            .arg("-f")
            .arg("/dev/null")
            .arg(dir.path().join("x"))
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // `spawn` returns once the child has a new address space, which is a moment before the
        // kernel has laid out the arguments in it (exec's `begin_new_exec`, Linux 6.1).
        let arguments = format!("/proc/{}/cmdline", child.id());
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while fs::read(&arguments).unwrap().is_empty() && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        let text = before.left_in(&host.snapshot().unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(text.starts_with("  process: ") && text.contains("tail"), "{text}");
    }
}
