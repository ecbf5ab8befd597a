//! The pool: machines whose agent already answers, waiting for a container.
//!
//! ```text
//! <directory>/machines/<name>/   a machine: being made, waiting or some sandbox's
//! <directory>/ready/<name>       it can be had: whoever renames this file has it
//! <directory>/claimed/<name>     some sandbox has it, and this in its ledger
//! ```
//!
//! Each machine has a *keeper*, a process of the role [`keep`], which is its sandbox process once it is claimed. `<name>`
//! is the keeper's pid and start time, so that one look tells whether an entry is alive. Who renames an entry connects
//! to its keeper and sends it the launch that it would send to a new sandbox process.
//!
//! No daemon fills the pool: who has claimed a machine starts the keeper of the next. A pool that is empty, or has only
//! machines of another shape, costs a start nothing but its advantage.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind as IoKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use linux::ThisHost;
use linux::ledger::Ledger;
use linux::process::{Command, ProcessId};
use protocol::oci::LinuxResources;
use rustix::process::Signal;
use rustix::time::ClockId;
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::error::{Error, ErrorKind};
use crate::launch::Channel;
use crate::{boot, template};

mod claim;
mod keeper;
mod rehearsal;

pub(crate) use claim::claim;
pub use keeper::keep;

/// The keeper's door, in its entry.
const DOOR: &str = "claim.sock";

/// In a machine's directory: its shape, as its template's name has it.
const SHAPE: &str = "shape";

/// In a claimed machine's directory: who has claimed it has connected.
const TAKEN: &str = "taken";

/// How long after it was claimed an entry may be without that. Then who has claimed it was killed before it could.
const UNTAKEN: Duration = Duration::from_mins(1);

/// What a keeper needs to know.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    config: Config,
    /// The program that runs the `device` role, with its first arguments.
    device_program: (PathBuf, Vec<String>),
}

/// What a keeper says when its machine can be had, and at no other time.
const READY: &str = "ready\n";

/// The directories of the pool.
#[derive(Debug, Clone)]
struct Place(PathBuf);

impl Place {
    fn of(config: &Config) -> Self {
        Self(config.pool.directory())
    }

    fn machines(&self) -> PathBuf {
        self.0.join("machines")
    }

    fn ready(&self) -> PathBuf {
        self.0.join("ready")
    }

    fn claimed(&self) -> PathBuf {
        self.0.join("claimed")
    }

    /// Makes the directories; nobody but their owner may enter.
    fn create(&self) -> Result<(), Error> {
        for path in [self.machines(), self.ready(), self.claimed()] {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.map_err(Error::host("create", path))?;
        }
        Ok(())
    }

    /// Held by who adds to the pool or takes what is dead out of it.
    fn lock(&self) -> Result<File, Error> {
        let path = self.0.join("lock");
        linux::file::lock(&path).map_err(Error::host("lock", path))
    }
}

/// A machine of the pool.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    name: String,
    shape: String,
    keeper: ProcessId,
}

impl Entry {
    /// Short, as it is in the paths of sockets.
    fn name(keeper: ProcessId) -> String {
        format!("{}.{}", keeper.pid, keeper.start_time)
    }

    fn parse(name: &str) -> Option<ProcessId> {
        let (pid, start_time) = name.split_once('.')?;
        Some(ProcessId { pid: pid.parse().ok()?, start_time: start_time.parse().ok()? })
    }

    /// All of them, by name.
    fn all(place: &Place) -> Vec<Self> {
        let entries = fs::read_dir(place.machines()).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let entries = names.filter_map(|name| {
            let keeper = Self::parse(&name)?;
            // Without one it has just been begun, or is about to be gone.
            let shape = fs::read_to_string(place.machines().join(&name).join(SHAPE));
            Some(Self { name, shape: shape.unwrap_or_default(), keeper })
        });
        let mut entries: Vec<_> = entries.collect();
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        entries
    }

    fn is_ready(&self, place: &Place) -> bool {
        place.ready().join(&self.name).exists()
    }

    /// Whether it waits, or will.
    fn is_pooled(&self, place: &Place) -> bool {
        self.keeper.is_alive() && !place.claimed().join(&self.name).exists()
    }

    /// Whether it waits for a claimer who must have ended.
    fn is_forgotten(&self, place: &Place) -> bool {
        // Renaming changes it.
        let claimed = fs::metadata(place.claimed().join(&self.name)).map(|file| file.ctime());
        let age = |at: i64| rustix::time::clock_gettime(ClockId::Realtime).tv_sec - at;
        claimed.is_ok_and(|at| age(at) > UNTAKEN.as_secs().cast_signed())
            && !place.machines().join(&self.name).join(TAKEN).exists()
    }

    /// Ends the machine, its keeper first, and removes what is left of it.
    fn end(&self, place: &Place) -> Result<(), Error> {
        let directory = place.machines().join(&self.name);
        self.keeper.signal(Signal::KILL).map_err(Error::host("end", &directory))?;
        let ledger = directory.join("ledger");
        if ledger.exists() {
            Ledger::open(&ledger)
                .and_then(|ledger| ledger.settle(&ThisHost))
                .map_err(Error::host("give back all that is in", ledger))?;
        }
        for path in [place.ready().join(&self.name), directory, place.claimed().join(&self.name)] {
            linux::remove_tree(&path).map_err(Error::host("remove", path))?;
        }
        Ok(())
    }
}

/// Takes out what is dead, and answers how many live machines of this shape wait, or will. The lock is held.
fn tidy(place: &Place, shape: &str) -> usize {
    let mut count = 0;
    for entry in Entry::all(place) {
        if entry.keeper.is_alive() && !entry.is_forgotten(place) {
            count += usize::from(entry.is_pooled(place) && entry.shape == shape);
        } else if let Err(error) = entry.end(place) {
            // `delete` may be at it; whoever comes next tries again.
            tracing::debug!(%error, entry = entry.name, "not removed");
        }
    }
    count
}

/// The name of the machines that containers with these limits get.
fn fitting(
    config: &Config,
    resources: Option<&LinuxResources>,
    program: &Path,
) -> Result<String, Error> {
    let spec = boot::machine_spec(config, resources, PathBuf::new(), devices(program))?;
    let driver = hypervisor::driver(&config.hypervisor.driver)?;
    template::name(driver.as_ref(), &spec)
}

fn devices(program: &Path) -> (PathBuf, Vec<String>) {
    (program.to_owned(), vec!["device".to_owned()])
}

/// A machine in the pool.
#[derive(Debug, Clone, Serialize)]
pub struct Pooled {
    /// Its shape, as its template's name has it.
    pub shape: String,
    /// The pid of its keeper.
    pub keeper: u32,
    /// Whether it can be had.
    pub ready: bool,
}

/// The machines in the pool.
#[must_use]
pub fn list(config: &Config) -> Vec<Pooled> {
    let place = Place::of(config);
    let mut entries = Entry::all(&place);
    entries.retain(|entry| entry.is_pooled(&place));
    let pooled = |entry: Entry| Pooled {
        ready: entry.is_ready(&place),
        shape: entry.shape,
        keeper: entry.keeper.pid,
    };
    entries.into_iter().map(pooled).collect()
}

/// Starts as many keepers as the pool lacks machines, and does not wait for them. `program` is the `kata` binary.
///
/// # Errors
///
/// When no process can be started.
pub(crate) fn refill(config: &Config, program: &Path) -> Result<Vec<UnixStream>, Error> {
    let wanted = usize::try_from(config.pool.size).unwrap_or(usize::MAX);
    let place = Place::of(config);
    let shape = fitting(config, None, program)?;
    let here = Entry::all(&place).into_iter();
    let have = here.filter(|entry| entry.shape == shape && entry.is_pooled(&place)).count();
    let order = Order { config: config.clone(), device_program: devices(program) };
    (have..wanted).map(|_| start(&order, program)).collect()
}

fn start(order: &Order, program: &Path) -> Result<UnixStream, Error> {
    let (mut channel, theirs) = Channel::pair().map_err(Error::host("create", "a socket pair"))?;
    let mut command = Command::new(program);
    let number = command.pass(theirs);
    command.name("kata").args(["keeper".to_owned(), number.to_string()]).new_session();
    command.directory(Path::new("/"));
    // It outlives us; whoever reaps our orphans reaps it.
    drop(command.spawn().map_err(Error::host("start a keeper from", program))?);
    channel.tell(order).map_err(Error::host("talk to", "a keeper"))?;
    Ok(channel.into_socket())
}

/// Fills the pool and waits until it is full; answers how many machines were added.
///
/// # Errors
///
/// When the configuration has no pool, or a machine could not be made.
pub fn fill(config: &Config, program: &Path) -> Result<usize, Error> {
    if config.pool.size == 0 {
        let what = "the configuration has no pool; set `size` under [pool]".into();
        return Err(Error::Unsupported { what });
    }
    let place = Place::of(config);
    place.create()?;
    let shape = fitting(config, None, program)?;
    {
        let _lock = place.lock()?;
        tidy(&place, &shape);
    }
    let mut added = 0;
    for keeper in refill(config, program)? {
        let mut said = String::new();
        // An error is its end.
        drop(BufReader::new(keeper).read_line(&mut said));
        if said == READY {
            added += 1;
        } else if !said.is_empty() {
            let text = format!("a machine for the pool was not made: {}", said.trim_end());
            return Err(Error::Told { text, kind: ErrorKind::Unavailable });
        }
    }
    Ok(added)
}

/// Ends the machines of the pool; answers how many.
///
/// # Errors
///
/// When something would not go.
pub fn drain(config: &Config) -> Result<usize, Error> {
    let place = Place::of(config);
    match fs::metadata(&place.0) {
        Err(error) if error.kind() == IoKind::NotFound => return Ok(0),
        _ => place.create()?,
    }
    let _lock = place.lock()?;
    let mut ended = 0;
    for entry in Entry::all(&place) {
        // As who claims it: so nobody gets one that is about to end.
        let taken = fs::rename(place.ready().join(&entry.name), place.claimed().join(&entry.name));
        match taken {
            Ok(()) => {}
            Err(error) if error.kind() == IoKind::NotFound => {
                if place.claimed().join(&entry.name).exists() {
                    continue;
                }
            }
            Err(source) => {
                return Err(Error::Host { action: "claim", path: place.ready(), source });
            }
        }
        entry.end(&place)?;
        ended += 1;
    }
    Ok(ended)
}

#[cfg(test)]
mod tests {
    use super::Entry;
    use linux::process::ProcessId;

    #[test]
    fn an_entrys_name_is_its_keeper() {
        let keeper = ProcessId { pid: 12, start_time: 345 };
        assert_eq!(Entry::parse(&Entry::name(keeper)), Some(keeper));
        assert_eq!(Entry::parse("lock"), None);
    }
}
