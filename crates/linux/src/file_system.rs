//! Mounting a file system as mount(8)'s words say: what containerd's snapshotters describe a container's root by.

use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};
use std::{panic, thread};

use rustix::mount::MountFlags;

use crate::mount::{self, Attributes};
use crate::namespace::unshare_working_directory;

/// mount(2) takes one page of data, with its final zero byte.
const LONGEST_DATA: usize = 4095;

/// A file system to be mounted.
#[derive(Debug, Clone, Copy)]
pub struct FileSystem<'a> {
    /// `overlay`, `ext4`; `bind` for a directory that is there.
    pub fstype: &'a str,
    /// The device or directory.
    pub source: &'a str,
    /// Where: a directory that is there.
    pub target: &'a Path,
    /// mount(8)'s words: `ro`, `rbind`, `lowerdir=/a:/b`.
    pub options: &'a [String],
}

/// What the words mean.
#[derive(Debug, PartialEq)]
struct Words<'a> {
    flags: MountFlags,
    bind: bool,
    recursive: bool,
    data: Vec<&'a str>,
}

impl<'a> Words<'a> {
    fn parse(fstype: &str, options: &'a [String]) -> Self {
        let bind = fstype == "bind";
        let mut words =
            Self { flags: MountFlags::empty(), bind, recursive: false, data: Vec::new() };
        for option in options {
            let (flag, on) = match option.as_str() {
                "ro" => (MountFlags::RDONLY, true),
                "rw" => (MountFlags::RDONLY, false),
                "nosuid" => (MountFlags::NOSUID, true),
                "suid" => (MountFlags::NOSUID, false),
                "nodev" => (MountFlags::NODEV, true),
                "dev" => (MountFlags::NODEV, false),
                "noexec" => (MountFlags::NOEXEC, true),
                "exec" => (MountFlags::NOEXEC, false),
                "noatime" => (MountFlags::NOATIME, true),
                "nodiratime" => (MountFlags::NODIRATIME, true),
                "relatime" => (MountFlags::RELATIME, true),
                "strictatime" => (MountFlags::STRICTATIME, true),
                "sync" => (MountFlags::SYNCHRONOUS, true),
                "dirsync" => (MountFlags::DIRSYNC, true),
                "bind" | "rbind" => {
                    words.bind = true;
                    words.recursive |= option == "rbind";
                    continue;
                }
                "" | "defaults" | "async" | "loop" => continue,
                data => {
                    words.data.push(data);
                    continue;
                }
            };
            words.flags.set(flag, on);
        }
        words
    }
}

/// Mounts it.
///
/// # Errors
///
/// What mount(2) says; E2BIG where the options are longer than the kernel takes.
pub fn mount(wanted: &FileSystem<'_>) -> io::Result<()> {
    let words = Words::parse(wanted.fstype, wanted.options);
    if words.bind {
        mount::bind(Path::new(wanted.source), wanted.target, words.recursive)?;
        let attributes = Attributes {
            read_only: words.flags.contains(MountFlags::RDONLY),
            no_suid: words.flags.contains(MountFlags::NOSUID),
            no_dev: words.flags.contains(MountFlags::NODEV),
            no_exec: words.flags.contains(MountFlags::NOEXEC),
        };
        if attributes == Attributes::default() {
            return Ok(());
        }
        return mount::set_attributes(wanted.target, attributes, false);
    }
    let (directory, data) = shorten(&words.data);
    if data.len() > LONGEST_DATA {
        return Err(io::Error::from_raw_os_error(libc::E2BIG));
    }
    let data = CString::new(data)?;
    // The working directory is the whole process's: another one needs a thread that has its own.
    on_own_thread(|| {
        if let Some(directory) = directory {
            unshare_working_directory()?;
            std::env::set_current_dir(directory)?;
        }
        let data = (!data.is_empty()).then_some(data.as_c_str());
        Ok(rustix::mount::mount(wanted.source, wanted.target, wanted.fstype, words.flags, data)?)
    })
}

/// Joins the data. An overlay of many layers has more than the kernel takes: then its lower directories are named from
/// their common parent, which is answered too.
fn shorten(data: &[&str]) -> (Option<PathBuf>, String) {
    let joined = data.join(",");
    if joined.len() <= LONGEST_DATA {
        return (None, joined);
    }
    let Some(lower) = data.iter().find_map(|word| word.strip_prefix("lowerdir=")) else {
        return (None, joined);
    };
    let layers: Vec<&str> = lower.split(':').collect();
    let Some(common) = common_parent(&layers) else { return (None, joined) };
    let short: Vec<_> = layers
        .iter()
        .map(|layer| layer[common.len()..].trim_start_matches('/').to_owned())
        .collect();
    let short = format!("lowerdir={}", short.join(":"));
    let data: Vec<_> = data
        .iter()
        .map(|word| if word.starts_with("lowerdir=") { short.as_str() } else { word })
        .collect();
    (Some(common.into()), data.join(","))
}

/// The longest directory that all of `paths` are below.
fn common_parent<'a>(paths: &[&'a str]) -> Option<&'a str> {
    let first = paths.first().filter(|path| path.starts_with('/'))?;
    let parents =
        first.match_indices('/').map(|(at, _)| &first[..at]).filter(|dir| !dir.is_empty());
    parents
        .filter(|dir| paths.iter().all(|path| path.starts_with(&format!("{dir}/"))))
        .max_by_key(|dir| dir.len())
}

fn on_own_thread(action: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("mount".into()).spawn_scoped(scope, action)?;
        thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use super::{FileSystem, Words, common_parent, mount, shorten};
    use crate::namespace::unshare_mounts;
    use rustix::mount::MountFlags;
    use std::fs;

    fn owned(words: &[&str]) -> Vec<String> {
        words.iter().map(|&word| word.to_owned()).collect()
    }

    #[test]
    fn words_are_flags_or_the_file_systems_own() {
        let options = owned(&["ro", "nosuid", "suid", "index=off", "lowerdir=/a:/b"]);
        let words = Words::parse("overlay", &options);
        assert_eq!(words.flags, MountFlags::RDONLY);
        assert_eq!(words.data, ["index=off", "lowerdir=/a:/b"]);
        assert!(!words.bind);
        let options = owned(&["rbind", "rw"]);
        let words = Words::parse("none", &options);
        assert!(words.bind && words.recursive && words.data.is_empty());
    }

    #[test]
    fn layers_that_are_too_many_are_named_from_their_parent() {
        assert_eq!(common_parent(&["/a/b/c", "/a/b/d"]), Some("/a/b"));
        assert_eq!(common_parent(&["/a/b/c", "/d"]), None);
        assert_eq!(common_parent(&["a", "/d"]), None);
        let (directory, data) = shorten(&["lowerdir=/a/1:/a/2", "index=off"]);
        assert_eq!((directory, data.as_str()), (None, "lowerdir=/a/1:/a/2,index=off"));
        let layers: Vec<_> =
            (0..120).map(|n| format!("/var/lib/containerd/snapshots/{n}/fs")).collect();
        let lower = format!("lowerdir={}", layers.join(":"));
        let (directory, data) = shorten(&[&lower, "index=off"]);
        assert_eq!(directory.unwrap().to_str(), Some("/var/lib/containerd/snapshots"));
        assert!(data.starts_with("lowerdir=0/fs:1/fs:") && data.ends_with(":119/fs,index=off"));
    }

    #[test]
    fn an_overlay_of_a_hundred_layers_can_be_mounted() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                unshare_mounts().unwrap();
                // An overlay cannot be the upper directory of another one.
                mount::tmpfs(dir.path(), 0o755, None).unwrap();
                let layers: Vec<_> = (0..100)
                    .map(|n| dir.path().join(format!("snapshots/layer-{n}/files")))
                    .collect();
                for (number, layer) in layers.iter().enumerate() {
                    fs::create_dir_all(layer).unwrap();
                    fs::write(layer.join(format!("{number}")), "").unwrap();
                }
                let names: Vec<_> = layers.iter().map(|layer| layer.to_str().unwrap()).collect();
                let target = dir.path().join("root");
                fs::create_dir(&target).unwrap();
                let options = [format!("lowerdir={}", names.join(":")), "ro".to_owned()];
                let here = std::env::current_dir().unwrap();
                mount(&FileSystem {
                    fstype: "overlay",
                    source: "overlay",
                    target: &target,
                    options: &options,
                })
                .unwrap();
                assert_eq!(fs::read_dir(&target).unwrap().count(), 100);
                assert_eq!(std::env::current_dir().unwrap(), here);
                mount::unmount_all(&target).unwrap();
                mount::unmount_all(dir.path()).unwrap();
            });
        });
    }
}
