//! The kernel modules that a guest loads, each behind those that it needs.
//!
//! Packages come without modules.dep (depmod(8) makes it at installation), but every module carries what that file
//! would say.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::elf::Elf;
use crate::error::host;
use crate::{Error, tool};

/// Without these there is no way into a guest, and no container in it. In the order of loading: the agent reaches its
/// host as soon as the vsock transport is in.
pub(crate) const REQUIRED: &[&str] = &[
    "virtio_pci",
    "vmw_vsock_virtio_transport",
    "virtiofs",
    "overlay",
    "virtio_net",
    "virtio_blk",
    "ext4",
];

/// Loaded as well, where the kernel has them.
pub(crate) const OPTIONAL: &[&str] = &["virtio_rng", "virtio_balloon", "virtio_mem"];

/// A module, ready for the initial file system.
#[derive(Debug)]
pub(crate) struct Module {
    /// Its name, with underscores.
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
}

/// A directory of modules: `/lib/modules/<release>` or the like of it.
#[derive(Debug)]
pub(crate) struct ModuleTree {
    directory: PathBuf,
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl ModuleTree {
    /// Finds all modules below `directory`, at any depth.
    pub(crate) fn open(directory: &Path) -> Result<Self, Error> {
        let mut files = BTreeMap::new();
        find(directory, &mut files)?;
        let list = match fs::read_to_string(directory.join("modules.builtin")) {
            Ok(list) => list,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(host("read", directory.join("modules.builtin"))(error)),
        };
        let builtin = list.lines().filter_map(|line| module_name(Path::new(line))).collect();
        Ok(Self { directory: directory.to_owned(), files, builtin })
    }

    /// The modules of `required` and `optional`, in the order in which they are loaded, dependencies first.
    pub(crate) fn select(
        &self,
        required: &[&str],
        optional: &[&str],
        release: &str,
    ) -> Result<Vec<Module>, Error> {
        let mut selected = Vec::new();
        let mut seen = BTreeSet::new();
        for &name in required {
            self.add(name, release, &mut seen, &mut selected)?;
        }
        for &name in optional {
            if self.files.contains_key(name) {
                self.add(name, release, &mut seen, &mut selected)?;
            }
        }
        Ok(selected)
    }

    /// Where a module is; nothing where it is built in, or missing.
    pub(crate) fn path(&self, name: &str) -> Option<&Path> {
        self.files.get(name).filter(|_| !self.builtin.contains(name)).map(PathBuf::as_path)
    }

    /// The names of the modules below a directory, or of the one module that a path without suffix is of.
    pub(crate) fn below(&self, place: &Path) -> Vec<String> {
        let place = self.directory.join(place);
        let within = |path: &Path| path.starts_with(&place) || path == place.with_extension("ko");
        let plain = |path: &Path| path.with_file_name(path.file_stem().unwrap_or_default());
        self.files
            .iter()
            // Those that are compressed have two suffixes.
            .filter(|(_, path)| within(path) || within(&plain(path)))
            .map(|(name, _)| name.clone())
            .collect()
    }

    fn add(
        &self,
        name: &str,
        release: &str,
        seen: &mut BTreeSet<String>,
        selected: &mut Vec<Module>,
    ) -> Result<(), Error> {
        if self.builtin.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let path = self.files.get(name).ok_or_else(|| Error::MissingModule {
            name: name.to_owned(),
            directory: self.directory.clone(),
        })?;
        let bytes = read(path)?;
        for needed in needs(&bytes, path, release)? {
            self.add(&needed, release, seen, selected)?;
        }
        selected.push(Module { name: name.to_owned(), bytes });
        Ok(())
    }
}

fn find(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), Error> {
    for entry in fs::read_dir(directory).map_err(host("read", directory))? {
        let entry = entry.map_err(host("read", directory))?;
        let path = entry.path();
        // `build` and `source` are symlinks to elsewhere: not followed.
        if entry.file_type().map_err(host("read", &path))?.is_dir() {
            find(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// `kernel/drivers/char/hw_random/virtio-rng.ko.xz` is `virtio_rng`.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let (stem, suffix) = file.split_once(".ko")?;
    matches!(suffix, "" | ".xz" | ".zst" | ".gz").then(|| stem.replace('-', "_"))
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let bytes = fs::read(path).map_err(host("read", path))?;
    match tool::compression(&bytes) {
        Some((tool, args)) => tool.run(args, &bytes, &format!("decompress {}", path.display())),
        None => Ok(bytes),
    }
}

/// What a module says under `key` in its `.modinfo`: strings `key=value`, each ended by a zero.
pub(crate) fn values<'a>(bytes: &'a [u8], key: &str) -> Vec<&'a str> {
    let info = Elf::parse(bytes).and_then(|elf| elf.section(".modinfo"));
    let fields = info.map_or(&[][..], |info| &bytes[info.contents]).split(|&byte| byte == 0);
    fields
        .filter_map(|field| std::str::from_utf8(field).ok()?.split_once('='))
        .filter_map(|(name, value)| (name == key).then_some(value))
        .collect()
}

/// The modules that a module says it needs.
pub(crate) fn needs(bytes: &[u8], path: &Path, release: &str) -> Result<Vec<String>, Error> {
    let bad = |reason: String| Error::Module { path: path.to_owned(), reason };
    Elf::parse(bytes)
        .and_then(|elf| elf.section(".modinfo"))
        .ok_or_else(|| bad("it is not an ELF file with a .modinfo section".to_owned()))?;
    for theirs in values(bytes, "vermagic") {
        let theirs = theirs.split(' ').next().unwrap_or_default();
        if theirs != release {
            return Err(bad(format!("it is for {theirs}, the kernel is {release}")));
        }
    }
    let needed = values(bytes, "depends").into_iter().flat_map(|value| value.split(','));
    Ok(needed.filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect())
}

/// Takes from a module what costs time at each boot and serves nobody in a guest: the signature (the image is verified as a
/// whole, on the host) and the type information for BPF.
pub(crate) fn slim(mut bytes: Vec<u8>) -> Vec<u8> {
    const MAGIC: &[u8] = b"~Module signature appended~\n";
    // `struct module_signature` (the kernel's include/linux/module_signature.h) ends in the signature's size.
    if let Some((size, rest)) = bytes
        .strip_suffix(MAGIC)
        .and_then(|signed| signed.split_last_chunk::<4>())
        .map(|(rest, size)| (u32::from_be_bytes(*size) as usize, rest))
        && let Some(length) = rest.len().checked_sub(8 + size)
    {
        bytes.truncate(length);
    }
    if let Some(types) = Elf::parse(&bytes).and_then(|elf| elf.section(".BTF")) {
        // A header of zeros is that of an unused section.
        bytes[types.contents].fill(0);
        bytes[types.header].fill(0);
    }
    bytes
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{ModuleTree, slim};
    use std::fs;
    use std::path::Path;

    /// A module file with nothing in it but a `.modinfo`.
    fn module(info: &str) -> Vec<u8> {
        let names = b"\0.modinfo\0.shstrtab\0";
        let info = format!("{info}\0");
        let mut bytes = vec![0; 64];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18] = 62;
        let table = 64 + info.len() + names.len();
        bytes[40..48].copy_from_slice(&(table as u64).to_le_bytes());
        bytes[60] = 3;
        bytes[62] = 2;
        bytes.extend_from_slice(info.as_bytes());
        bytes.extend_from_slice(names);
        for (name, start, size) in
            [(0, 0, 0), (1, 64, info.len()), (10, 64 + info.len(), names.len())]
        {
            let mut header = [0; 64];
            header[0] = name;
            header[24..32].copy_from_slice(&(start as u64).to_le_bytes());
            header[32..40].copy_from_slice(&(size as u64).to_le_bytes());
            bytes.extend_from_slice(&header);
        }
        bytes
    }

    fn put(dir: &Path, path: &str, depends: &str) {
        put_info(dir, path, &format!("depends={depends}"));
    }

    /// A module of Linux 6.1.0 that says `info` of itself.
    pub(crate) fn put_info(dir: &Path, path: &str, info: &str) {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, module(&format!("{info}\0vermagic=6.1.0"))).unwrap();
    }

    fn names(tree: &ModuleTree, required: &[&str], optional: &[&str]) -> Vec<String> {
        let modules = tree.select(required, optional, "6.1.0").unwrap();
        modules.into_iter().map(|module| module.name).collect()
    }

    #[test]
    fn a_module_comes_after_all_that_it_needs_and_only_once() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "kernel/virtio/virtio.ko", "virtio_ring");
        put(dir.path(), "kernel/virtio/virtio_ring.ko", "");
        put(dir.path(), "kernel/virtio/virtio-pci.ko", "virtio,virtio_ring");
        put(dir.path(), "kernel/net/virtio_net.ko", "net-failover,virtio");
        put(dir.path(), "kernel/net/net_failover.ko", "");
        let tree = ModuleTree::open(dir.path()).unwrap();
        assert_eq!(
            names(&tree, &["virtio_pci", "virtio_net"], &["no_such_module"]),
            ["virtio_ring", "virtio", "virtio_pci", "net_failover", "virtio_net"]
        );
    }

    #[test]
    fn a_module_that_the_kernel_has_built_in_is_not_missing() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
        let tree = ModuleTree::open(dir.path()).unwrap();
        assert!(names(&tree, &["ext4"], &[]).is_empty());
        let error = tree.select(&["vsock"], &[], "6.1.0").unwrap_err().to_string();
        assert!(error.starts_with("the kernel module `vsock` is neither below"), "{error}");
    }

    #[test]
    fn a_module_of_another_kernel_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "vsock.ko", "");
        let tree = ModuleTree::open(dir.path()).unwrap();
        let error = tree.select(&["vsock"], &[], "6.12.0").unwrap_err().to_string();
        assert!(error.ends_with("it is for 6.1.0, the kernel is 6.12.0"), "{error}");
    }

    #[test]
    fn a_file_that_is_no_module_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("vsock.ko"), "hello").unwrap();
        let tree = ModuleTree::open(dir.path()).unwrap();
        let error = tree.select(&["vsock"], &[], "6.1.0").unwrap_err().to_string();
        assert!(error.contains("vsock.ko is not a module of this kernel"), "{error}");
    }

    #[test]
    fn a_signature_is_cut_off_to_the_byte() {
        let plain = module("depends=");
        let mut signed = plain.clone();
        signed.extend_from_slice(&[9; 300]);
        signed.extend_from_slice(&[0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 44]);
        signed.extend_from_slice(b"~Module signature appended~\n");
        assert_eq!(slim(signed), plain);
        assert_eq!(slim(plain.clone()), plain);
    }
}
