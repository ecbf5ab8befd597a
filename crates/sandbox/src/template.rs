//! Templates: a machine booted once, up to its idle agent, and saved; sandboxes of the same shape start as copies of it.
//!
//! The directory of a template is named after its shape and the driver's fingerprint, which covers the kernel, the initial
//! file system, the hypervisor and its command line: a change of any of them is another template. Each machine has a copy
//! of the memory of its own, so no page is shared between sandboxes. What a copy must not share with its template is
//! replaced by the agent's `Resync` before anything else runs in it.
//!
//! A template is made by the first start that finds none, under a lock that others do not wait for: they boot. It is
//! written beside its place and renamed into it, so what is there is whole; what QEMU refuses all the same is removed.

use std::fs::{self, File};
use std::io::ErrorKind as IoKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use hypervisor::{Hypervisor, Port, Vm, VmSpec};
use linux::ledger::{Ledger, Undo};
use serde::Serialize;
use tracing::{info, warn};

use crate::boot;
use crate::config::{Config, TemplateMode};
use crate::error::{Chain, Error};

/// A template that no start has used for so long goes when another is made.
const KEPT: Duration = Duration::from_hours(24 * 14);

/// The file that the driver writes last; its time of change is when the template was last used.
const DESCRIPTION: &str = "template.json";

/// How a machine came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// It boots.
    Boot,
    /// It goes on from a template.
    Template,
    /// It has waited in the pool.
    Pool,
}

/// Makes a machine as `spec` says: of a template where the configuration lets it, else one that boots.
pub(crate) async fn machine(
    driver: &dyn Hypervisor,
    spec: &VmSpec,
    config: &Config,
    dir: &Path,
    ledger: &mut Ledger,
) -> Result<(Box<dyn Vm>, Origin), Error> {
    let required = config.template.mode == TemplateMode::Require;
    if config.template.mode != TemplateMode::Off && driver.capabilities().snapshot {
        let made = of_template(driver, spec, config, dir, ledger).await;
        match made {
            Ok(Some(vm)) => return Ok((vm, Origin::Template)),
            Err(error) if required => return Err(error),
            Ok(None) if required => {
                let what = "another start is making the template, and the configuration requires one; try again".into();
                return Err(Error::Unsupported { what });
            }
            Ok(None) => {}
            Err(error) => warn!(error = %Chain(&error), "no template is used: the machine boots"),
        }
    } else if required {
        let what = format!(
            "the hypervisor {} has no templates, and the configuration requires one",
            driver.name()
        );
        return Err(Error::Unsupported { what });
    }
    Ok((driver.launch(spec, dir, ledger).await?, Origin::Boot))
}

/// A machine of the template for `spec`, which is made where there is none; nothing where somebody else is making it.
async fn of_template(
    driver: &dyn Hypervisor,
    spec: &VmSpec,
    config: &Config,
    dir: &Path,
    ledger: &mut Ledger,
) -> Result<Option<Box<dyn Vm>>, Error> {
    let place = config.template.directory().join(name(driver, spec)?);
    if !place.join(DESCRIPTION).exists() && !make(driver, spec, config, &place, dir, ledger).await?
    {
        return Ok(None);
    }
    match driver.restore(&place, spec, dir, ledger).await {
        Ok(vm) => {
            touch(&place);
            Ok(Some(vm))
        }
        Err(error) => {
            // Not to be met again by the next start.
            drop(linux::remove_tree(&place));
            Err(error.into())
        }
    }
}

pub(crate) fn name(driver: &dyn Hypervisor, spec: &VmSpec) -> Result<String, Error> {
    let fingerprint = driver.fingerprint(spec)?;
    let short = fingerprint.get(..16).unwrap_or(&fingerprint);
    Ok(format!("{}cpu-{}mib-{}-{short}", spec.vcpus, spec.memory_mib, env!("CARGO_PKG_VERSION")))
}

/// Removes the template for `spec`: its copies do not work.
pub(crate) fn forget(driver: &dyn Hypervisor, spec: &VmSpec, config: &Config) {
    let removed = name(driver, spec).map(|name| config.template.directory().join(name));
    if let Ok(place) = removed
        && let Err(error) = linux::remove_tree(&place)
    {
        warn!(template = %place.display(), %error, "a template that does not work was not removed");
    }
}

fn touch(place: &Path) {
    // On a file system that cannot be written a template is as good, only not kept longer for being used.
    drop(File::open(place.join(DESCRIPTION)).and_then(|file| file.set_modified(SystemTime::now())));
}

/// Boots a machine, saves it as the template at `place`; `false` where somebody else is about it.
async fn make(
    driver: &dyn Hypervisor,
    spec: &VmSpec,
    config: &Config,
    place: &Path,
    dir: &Path,
    ledger: &mut Ledger,
) -> Result<bool, Error> {
    let parent = config.template.directory();
    fs::create_dir_all(&parent).map_err(Error::host("create", &parent))?;
    let lock = parent.join("lock");
    let Some(_lock) = linux::file::try_lock(&lock).map_err(Error::host("lock", &lock))? else {
        return Ok(false);
    };
    if place.join(DESCRIPTION).exists() {
        return Ok(true);
    }
    let began = std::time::Instant::now();
    remove_unused(&parent);
    let unfinished = parent.join(format!(".{}", std::process::id()));
    let undo = Undo::RemoveTree { path: unfinished.clone() };
    ledger.record(undo).map_err(Error::host("write", dir))?;
    let scratch = dir.join("template");
    for path in [&unfinished, &scratch] {
        fs::create_dir_all(path).map_err(Error::host("create", path))?;
    }
    let saved = boot_and_save(driver, spec, config, &unfinished, &scratch, ledger).await;
    let placed = saved.and_then(|()| {
        fs::rename(&unfinished, place).map_err(Error::host("create template", place))
    });
    if placed.is_err() {
        // The first error is the one to tell; the ledger has it too.
        drop(linux::remove_tree(&unfinished));
    }
    placed?;
    info!(template = %place.display(), ms = began.elapsed().as_millis(), "template made");
    Ok(true)
}

async fn boot_and_save(
    driver: &dyn Hypervisor,
    spec: &VmSpec,
    config: &Config,
    to: &Path,
    dir: &Path,
    ledger: &mut Ledger,
) -> Result<(), Error> {
    let mut vm = driver.launch(spec, dir, ledger).await?;
    let mut ready = vm.listen(Port(protocol::READY_PORT)).await?;
    vm.boot().await?;
    boot::agent_ready(vm.as_ref(), &mut ready, config, dir).await?;
    vm.save(to).await?;
    Ok(())
}

fn remove_unused(parent: &Path) {
    for template in list_in(parent) {
        let unused = template.used.and_then(|used| used.elapsed().ok());
        if unused.is_some_and(|unused| unused > KEPT)
            && let Err(error) = linux::remove_tree(&parent.join(&template.name))
        {
            warn!(template = template.name, %error, "an old template was not removed");
        }
    }
}

/// A template on this host.
#[derive(Debug, Clone, Serialize)]
pub struct Template {
    /// Its directory's name: shape, version and fingerprint.
    pub name: String,
    /// What it takes on disk, in bytes.
    pub size: u64,
    /// When it was last used.
    pub used: Option<SystemTime>,
}

/// The templates of this host, by name.
#[must_use]
pub fn list(config: &Config) -> Vec<Template> {
    list_in(&config.template.directory())
}

fn list_in(parent: &Path) -> Vec<Template> {
    let mut templates: Vec<_> = fs::read_dir(parent)
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let description = fs::metadata(entry.path().join(DESCRIPTION)).ok()?;
            let files = fs::read_dir(entry.path()).ok()?;
            let blocks = |file: fs::Metadata| std::os::unix::fs::MetadataExt::blocks(&file) * 512;
            let size = files.filter_map(|file| file.ok()?.metadata().ok()).map(blocks).sum();
            let name = entry.file_name().into_string().ok()?;
            Some(Template { name, size, used: description.modified().ok() })
        })
        .collect();
    templates.sort_by(|a, b| a.name.cmp(&b.name));
    templates
}

/// Removes a template; the sandboxes that were made of it have copies of their own.
///
/// # Errors
///
/// When there is none of that name, or it would not go.
pub fn remove(config: &Config, name: &str) -> Result<(), Error> {
    if !list(config).iter().any(|template| template.name == name) {
        return Err(Error::invalid(format!("there is no template {name}")));
    }
    let path = config.template.directory().join(name);
    linux::remove_tree(&path).map_err(Error::host("remove", path))
}

/// Makes the template for sandboxes without limits, unless it is there; answers its directory.
///
/// # Errors
///
/// What the host or the guest refuses.
pub fn create(config: &Config, program: &Path) -> Result<PathBuf, Error> {
    let parent = config.template.directory();
    fs::create_dir_all(&parent).map_err(Error::host("create", &parent))?;
    let scratch = parent.join(format!(".create-{}", std::process::id()));
    fs::create_dir_all(scratch.join("share")).map_err(Error::host("create", &scratch))?;
    let made = create_in(config, program, &scratch);
    let removed = linux::remove_tree(&scratch).map_err(Error::host("remove", &scratch));
    made.and_then(|place| removed.map(|()| place))
}

fn create_in(config: &Config, program: &Path, scratch: &Path) -> Result<PathBuf, Error> {
    let device_program = (program.to_owned(), vec!["device".to_owned()]);
    let spec = boot::machine_spec(config, None, scratch.join("share"), device_program)?;
    let driver = hypervisor::driver(&config.hypervisor.driver)?;
    let place = config.template.directory().join(name(driver.as_ref(), &spec)?);
    if place.join(DESCRIPTION).exists() {
        return Ok(place);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(Error::host("start", "the event loop"))?;
    let path = scratch.join("ledger");
    let mut ledger = Ledger::open(&path).map_err(Error::host("open", &path))?;
    let local = tokio::task::LocalSet::new();
    let made = local
        .block_on(&runtime, make(driver.as_ref(), &spec, config, &place, scratch, &mut ledger));
    ledger.settle(&linux::ThisHost).map_err(Error::host("settle", path))?;
    if made? {
        return Ok(place);
    }
    Err(Error::Host { action: "create template", path: place, source: IoKind::WouldBlock.into() })
}
