//! Telling a guest what the host has changed in a container's volumes, for the guest's inotify(7).
//!
//! It begins when a process of the guest watches files: until then it costs nothing. From then on each container's
//! volumes are watched on the host, by a thread that the container keeps alive. What is watched is bounded: beyond
//! [`MOST`] directories of a container, changes are not told.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread;

use protocol::agent as wire;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, ReadFlags, WatchFlags};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use tokio::sync::mpsc;
use tokio::task::spawn_local;
use tracing::{debug, info, warn};

use crate::agent::Agent;
use crate::error::Chain;

/// Directories that are watched for one container: each takes about a kilobyte of the kernel's memory.
const MOST: usize = 4096;

/// Changes that are told at once; what comes meanwhile comes with the next.
const BATCH: usize = 256;

/// How long a volume must be quiet before what has changed is told: programs write a file in many steps.
const QUIET: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// Not what is only read, and not what is written but not yet: attributes change with the guest's own echoes.
const WATCHED: WatchFlags =
    WatchFlags::MODIFY.union(WatchFlags::CREATE).union(WatchFlags::DELETE).union(WatchFlags::MOVE);

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Volume {
    /// Its bind below the share.
    pub(crate) bind: PathBuf,
    /// The same, relative to the share.
    pub(crate) name: PathBuf,
}

impl Volume {
    /// The directories that a container has of the host, but for its root.
    pub(crate) fn of(files: &storage::Plan, share: &Path) -> Vec<Self> {
        let directories = files.binds.iter().skip(1).filter(|bind| bind.is_directory);
        directories
            .map(|bind| Self { bind: share.join(&bind.name), name: bind.name.clone() })
            .collect()
    }
}

/// The volumes of a sandbox's containers.
#[derive(Debug, Default)]
pub(crate) struct Volumes(RefCell<All>);

#[derive(Debug, Default)]
struct All {
    /// Whether somebody in the guest watches files.
    wanted: bool,
    of: HashMap<String, (Vec<Volume>, Option<Watching>)>,
}

impl Volumes {
    /// A container that was created has these.
    pub(crate) fn add(&self, agent: &Agent, container: &str, volumes: Vec<Volume>) {
        if volumes.is_empty() {
            return;
        }
        let mut all = self.0.borrow_mut();
        let watching = all.wanted.then(|| watching(agent, container, &volumes)).flatten();
        all.of.insert(container.to_owned(), (volumes, watching));
    }

    /// Somebody in the guest watches files from now on.
    pub(crate) fn watch(&self, agent: &Agent) {
        let mut all = self.0.borrow_mut();
        all.wanted = true;
        for (container, (volumes, slot)) in &mut all.of {
            if slot.is_none() {
                *slot = watching(agent, container, volumes);
            }
        }
    }

    /// A container has gone.
    pub(crate) fn forget(&self, container: &str) {
        self.0.borrow_mut().of.remove(container);
    }
}

fn watching(agent: &Agent, container: &str, volumes: &[Volume]) -> Option<Watching> {
    let started = start(agent.clone(), container, volumes.to_vec());
    started.inspect_err(|error| warn!(%error, container, "volumes cannot be watched")).ok()
}

/// As long as this is there, a container's volumes are watched.
#[derive(Debug)]
struct Watching(#[expect(dead_code, reason = "its end tells the thread")] io::PipeWriter);

/// Watches a container's volumes and tells the agent.
///
/// # Errors
///
/// When no more can be watched on this host, or no thread made.
fn start(agent: Agent, container: &str, volumes: Vec<Volume>) -> io::Result<Watching> {
    let (lifeline, watching) = io::pipe()?;
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    let events = inotify::init(flags)?;
    let (batches, mut told) = mpsc::channel(1);
    let name = container.to_owned();
    let watch = move || {
        if let Err(error) =
            Watch::new(events, volumes).and_then(|watch| watch.run(&lifeline, &batches))
        {
            warn!(%error, container = name, "volumes are not watched any more");
        }
    };
    thread::Builder::new().name("volumes".into()).stack_size(256 << 10).spawn(watch)?;
    spawn_local(async move {
        while let Some(changes) = told.recv().await {
            if let Err(error) = agent.changed(changes).await {
                debug!(error = %Chain(&error), "the guest's watchers were not told");
            }
        }
    });
    Ok(Watching(watching))
}

/// Volumes, with what is watched of them.
struct Watch {
    events: OwnedFd,
    volumes: Vec<(OwnedFd, Volume)>,
    /// By watch: the volume, and the directory in it.
    directories: HashMap<i32, (usize, PathBuf)>,
    full: bool,
}

/// A path below the share, and whether something has gone from the directory there.
type Changes = BTreeSet<(PathBuf, bool)>;

impl Watch {
    fn new(events: OwnedFd, volumes: Vec<Volume>) -> io::Result<Self> {
        let open = |volume: Volume| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            Ok((rustix::fs::openat(CWD, &volume.bind, flags, Mode::empty())?, volume))
        };
        let volumes = volumes.into_iter().map(open).collect::<io::Result<Vec<_>>>()?;
        let mut watch = Self { events, volumes, directories: HashMap::new(), full: false };
        watch.add((0..watch.volumes.len()).map(|volume| (volume, PathBuf::new())).collect());
        info!(directories = watch.directories.len(), "volumes are watched for the guest");
        Ok(watch)
    }

    /// Watches directories of volumes and those below them, the upper ones of all volumes first. One that cannot be watched
    /// is not.
    fn add(&mut self, mut todo: VecDeque<(usize, PathBuf)>) {
        while let Some((volume, directory)) = todo.pop_front() {
            if self.directories.len() >= MOST {
                if !self.full {
                    warn!(
                        most = MOST,
                        "a container's volumes have more directories than are watched"
                    );
                }
                self.full = true;
                return;
            }
            let found = self.add_one(volume, directory).unwrap_or_default();
            todo.extend(found.into_iter().map(|directory| (volume, directory)));
        }
    }

    /// Watches one; answers those in it.
    fn add_one(&mut self, volume: usize, directory: PathBuf) -> io::Result<Vec<PathBuf>> {
        // The guest may replace any part of the path by a symlink while we look.
        let below = if directory.as_os_str().is_empty() { Path::new(".") } else { &directory };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOATIME;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let opened = openat2(&self.volumes[volume].0, below, flags, Mode::empty(), resolve)?;
        let path = format!("/proc/self/fd/{}", opened.as_raw_fd());
        let watch = inotify::add_watch(&self.events, &path, WATCHED | WatchFlags::ONLYDIR)?;
        let entries = fs::read_dir(&path)?.filter_map(Result::ok);
        let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let found = directories.map(|entry| directory.join(entry.file_name())).collect();
        self.directories.insert(watch, (volume, directory));
        Ok(found)
    }

    /// Tells of changes until the other end of `lifeline`, or the receiver, has gone.
    fn run(
        mut self,
        lifeline: &io::PipeReader,
        batches: &mpsc::Sender<Vec<wire::Change>>,
    ) -> io::Result<()> {
        loop {
            let mut both =
                [PollFd::new(&self.events, PollFlags::IN), PollFd::new(lifeline, PollFlags::IN)];
            poll(&mut both, None)?;
            if !both[1].revents().is_empty() {
                return Ok(());
            }
            let mut changes = Changes::new();
            loop {
                self.read(&mut changes)?;
                let mut events = [PollFd::new(&self.events, PollFlags::IN)];
                if changes.len() >= BATCH || poll(&mut events, Some(&QUIET))? == 0 {
                    break;
                }
            }
            let batch: Vec<_> = changes.into_iter().map(told).collect();
            if !batch.is_empty() && batches.blocking_send(batch).is_err() {
                return Ok(());
            }
        }
    }

    /// Takes in what the kernel has to tell.
    fn read(&mut self, changes: &mut Changes) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut new = VecDeque::new();
        {
            let mut events = inotify::Reader::new(self.events.as_fd(), &mut space);
            loop {
                let event = match events.next() {
                    Ok(event) => event,
                    Err(rustix::io::Errno::AGAIN) => break,
                    Err(error) => return Err(error.into()),
                };
                if event.events().contains(ReadFlags::IGNORED) {
                    self.directories.remove(&event.wd());
                    continue;
                }
                let Some((volume, directory)) = self.directories.get(&event.wd()) else { continue };
                let Some(name) = event.file_name() else { continue };
                let name = directory.join(OsStr::from_bytes(name.to_bytes()));
                let gone = event.events().intersects(ReadFlags::DELETE | ReadFlags::MOVED_FROM);
                let root = &self.volumes[*volume].1.name;
                let path = if gone { root.join(directory) } else { root.join(&name) };
                changes.insert((path, gone));
                let made = event.events().intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO);
                if made && event.events().contains(ReadFlags::ISDIR) {
                    new.push_back((*volume, name));
                }
                if changes.len() >= BATCH {
                    break;
                }
            }
        }
        self.add(new);
        Ok(())
    }
}

fn told((path, lost): (PathBuf, bool)) -> wire::Change {
    let path = path.into_os_string().into_encoded_bytes();
    wire::Change { path, lost, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::{Changes, Volume, Watch};
    use rustix::fs::inotify;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    fn watch(directory: &Path) -> Watch {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let volume = Volume { bind: directory.to_owned(), name: "c/mounts/0".into() };
        Watch::new(inotify::init(flags).unwrap(), vec![volume]).unwrap()
    }

    fn changes(watch: &mut Watch) -> Vec<(String, bool)> {
        let mut changes = Changes::new();
        watch.read(&mut changes).unwrap();
        changes.into_iter().map(|(path, gone)| (path.to_str().unwrap().to_owned(), gone)).collect()
    }

    #[test]
    fn changes_below_a_volume_are_told() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        let mut watch = watch(dir.path());
        fs::write(dir.path().join("a/b/file"), "x").unwrap();
        assert_eq!(changes(&mut watch), [("c/mounts/0/a/b/file".to_owned(), false)]);
        fs::remove_file(dir.path().join("a/b/file")).unwrap();
        assert_eq!(changes(&mut watch), [("c/mounts/0/a/b".to_owned(), true)]);
    }

    #[test]
    fn a_directory_made_later_is_watched_too_and_a_symlink_is_not_followed() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        symlink(outside.path(), dir.path().join("link")).unwrap();
        let mut watch = watch(dir.path());
        fs::create_dir(dir.path().join("new")).unwrap();
        changes(&mut watch);
        fs::write(dir.path().join("new/file"), "x").unwrap();
        fs::write(outside.path().join("secret"), "x").unwrap();
        assert_eq!(changes(&mut watch), [("c/mounts/0/new/file".to_owned(), false)]);
    }
}
