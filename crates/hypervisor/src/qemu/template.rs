//! Templates: a machine that has booted, on disk, of which others are made.
//!
//! A template is a directory with the memory that was in use, the state of the devices (without the memory: QEMU's
//! `x-ignore-shared`) and, written last, a description. Each machine made of it gets a copy of the memory of its own, so
//! machines share no page and learn nothing of each other by timing.
//!
//! The devices that a device process serves hold state outside of QEMU. They are taken out before saving and put in
//! after loading.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::NAME;
use super::arguments::{Inherited, Start, arguments, back_end_devices};
use super::vm::QemuVm;
use crate::back_ends::Sockets;
use crate::error::host;
use crate::{Error, VmSpec, memory};

const MEMORY: &str = "memory";
const STATE: &str = "state";
const DESCRIPTION: &str = "template.json";

/// For the devices' state, some 100 KiB, to be written or read.
const MIGRATION: Duration = Duration::from_mins(1);

#[derive(Debug, Serialize, Deserialize)]
struct Description {
    fingerprint: String,
    memory: Stamp,
    state: Stamp,
}

/// A file's size and when it was changed, in seconds and nanoseconds: what was written or cut off since does not fit. A
/// hash would cost each start more than all else that it does.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp(u64, i64, i64);

impl Stamp {
    fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self(metadata.size(), metadata.mtime(), metadata.mtime_nsec()))
    }
}

/// Changed when the templates of before are of no use, whatever they were made of: 2, those whose clock may run too fast.
const VERSION: u8 = 2;

/// The hash of all that a machine must have in common with the one that was saved: the command line, QEMU, the kernel,
/// the initial file system.
pub(super) fn fingerprint(spec: &VmSpec, program: &Path) -> Result<String, Error> {
    let mut hash = Sha256::new();
    hash.update([VERSION]);
    let fds = Inherited { qmp: 0, console: 0, memory: 0 };
    for word in arguments(spec, &Sockets::of(Path::new("/")), fds, Start::Boot) {
        hash.update(word.as_encoded_bytes());
        hash.update([0]);
    }
    for path in [program, &spec.kernel, &spec.initrd] {
        let file = fs::metadata(path).map_err(host("read", path))?;
        // Which file it is and when it was changed: reading 50 MiB at each start would cost more than it tells.
        for number in [file.dev(), file.ino(), file.size()] {
            hash.update(number.to_le_bytes());
        }
        for number in [file.mtime(), file.mtime_nsec()] {
            hash.update(number.to_le_bytes());
        }
    }
    Ok(hex::encode(hash.finalize()))
}

/// A template's files.
#[derive(Debug)]
pub(super) struct Template {
    pub(super) memory: File,
    state: File,
}

impl Template {
    /// Opens the template in `directory`, which must fit.
    pub(super) fn open(directory: &Path, fingerprint: &str) -> Result<Self, Error> {
        let open = |name: &str| {
            let path = directory.join(name);
            File::open(&path).map_err(host("open", path))
        };
        let path = directory.join(DESCRIPTION);
        let text = fs::read(&path).map_err(host("read", &path))?;
        let description: Description = serde_json::from_slice(&text)
            .map_err(|error| host("understand", path)(error.into()))?;
        let refused = |what: &str| Error::Refused {
            driver: NAME,
            operation: "use a template",
            message: format!("{} {what}", directory.display()),
        };
        if description.fingerprint != fingerprint {
            return Err(refused("is of another machine"));
        }
        let (memory, state) = (open(MEMORY)?, open(STATE)?);
        let whole = Stamp::of(&memory).and_then(|stamp| {
            Ok(stamp == description.memory && Stamp::of(&state)? == description.state)
        });
        if !whole.map_err(host("read", directory))? {
            return Err(refused("is damaged: its files are not as they were written"));
        }
        Ok(Self { memory, state })
    }
}

impl QemuVm {
    /// Loads a template's state into a machine whose memory has been filled, and adds its back ends.
    pub(super) async fn load(&mut self, template: &Template, spec: &VmSpec) -> Result<(), Error> {
        const OPERATION: &str = "load a template";
        self.prepare_migration(OPERATION).await?;
        self.give(OPERATION, "state", template.state.as_fd()).await?;
        self.command(OPERATION, "migrate-incoming", json!({ "uri": "fd:state" })).await?;
        self.migrated(OPERATION).await?;
        for (_, device) in back_end_devices(spec) {
            self.command(OPERATION, "device_add", device).await?;
        }
        Ok(())
    }

    /// Saves the machine in `directory`. It stays paused, without its back ends: good for nothing more.
    pub(super) async fn save_in(&mut self, directory: &Path) -> Result<(), Error> {
        const OPERATION: &str = "save a template";
        for id in self.back_ends.clone() {
            self.unplug(OPERATION, id).await?;
        }
        self.command(OPERATION, "stop", json!({})).await?;
        let create = |name: &str| {
            let path = directory.join(name);
            File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&path)
                .map_err(host("create", path))
        };
        let (state, saved) = (create(STATE)?, create(MEMORY)?);
        self.prepare_migration(OPERATION).await?;
        self.give(OPERATION, "state", state.as_fd()).await?;
        self.command(OPERATION, "migrate", json!({ "uri": "fd:state" })).await?;
        self.migrated(OPERATION).await?;
        let path = directory.join(MEMORY);
        memory::save(&self.memory, &saved).map_err(host("write", path))?;
        let stamp = |file: &File| Stamp::of(file).map_err(host("read", directory));
        let description = Description {
            fingerprint: self.fingerprint.clone(),
            memory: stamp(&saved)?,
            state: stamp(&state)?,
        };
        let path = directory.join(DESCRIPTION);
        let text =
            serde_json::to_vec(&description).map_err(|error| host("write", &path)(error.into()))?;
        linux::file::replace(&path, &text).map_err(host("write", path))
    }

    async fn prepare_migration(&mut self, operation: &'static str) -> Result<(), Error> {
        let on = |capability: &str| json!({ "capability": capability, "state": true });
        let capabilities = json!({ "capabilities": [on("x-ignore-shared"), on("events")] });
        self.command(operation, "migrate-set-capabilities", capabilities).await.map(drop)
    }

    /// Waits for the end of a migration.
    async fn migrated(&mut self, operation: &'static str) -> Result<(), Error> {
        let status = |data: &Value| data.get("status").and_then(Value::as_str).map(str::to_owned);
        let over = |name: &str, data: &Value| {
            name == "MIGRATION" && matches!(status(data).as_deref(), Some("completed" | "failed"))
        };
        let event = self.event(operation, MIGRATION, over).await?;
        if status(&event).as_deref() == Some("completed") {
            return Ok(());
        }
        let answer = self.command(operation, "query-migrate", json!({})).await?;
        let words = answer.get("error-desc").and_then(Value::as_str).unwrap_or("it failed");
        let message = crate::log::escaped(words);
        Err(Error::Refused { driver: NAME, operation, message })
    }
}
