//! Puts an image together.

use std::env;
use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::cpio::Tree;
use crate::elf::Elf;
use crate::error::host;
use crate::kernel::Kernel;
use crate::library::library;
use crate::manifest::{self, Manifest, Part, sha256};
use crate::modules::{self, Module, ModuleTree};
use crate::package::{self, Package};
use crate::{Error, Image, MANIFEST, MODULE_LIST};

/// Where kernel and modules come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KernelSource {
    /// The newest cloud kernel that the host's apt knows; its package is kept in the cache directory.
    Apt {
        /// The cache directory.
        cache: PathBuf,
    },
    /// A kernel package of Debian.
    Package(PathBuf),
    /// A kernel file: a bzImage, or an ELF kernel with a PVH entry.
    File {
        /// The kernel.
        kernel: PathBuf,
        /// Its directory of modules; `None`: it has all drivers built in.
        modules: Option<PathBuf>,
    },
}

/// What an image is to be built from, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// Kernel and modules.
    pub kernel: KernelSource,
    /// The agent, a static program; `None`: looked for beside this program, see [`build`].
    pub agent: Option<PathBuf>,
    /// Directories whose contents are added to the initial file system, a later one's over an earlier one's.
    pub overlays: Vec<PathBuf>,
    /// The directory of the image; made where it is missing.
    pub output: PathBuf,
}

/// Directories of the initial file system: mount points and places that programs take for granted.
const DIRECTORIES: &[(&str, u32)] = &[
    ("dev", 0o755),
    ("etc", 0o755),
    ("mnt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("var", 0o755),
];

/// Builds an image, replacing the one in the recipe's output directory.
///
/// An agent that is not named is looked for in the directory of the running program and in `../libexec/kata-containers`
/// of it.
///
/// # Errors
///
/// When a program that the build runs is missing or fails, an input is not what it should be, or the output cannot be
/// written. The old image is then as it was.
pub fn build(recipe: &Recipe) -> Result<Image, Error> {
    let agent = match &recipe.agent {
        Some(path) => path.clone(),
        None => find_agent()?,
    };
    let agent = read_agent(&agent)?;
    let Obtained { kernel, modules, library, package } = obtain(&recipe.kernel)?;
    let agent_sha256 = sha256(&agent);
    let initrd = initrd(agent, &modules, &recipe.overlays)?;

    let manifest = Manifest {
        version: manifest::VERSION,
        kernel_release: kernel.release,
        kernel_format: kernel.format,
        kernel: Part::of("vmlinux", &kernel.bytes),
        initrd: Part::of("initrd", &initrd),
        agent_sha256,
        modules: modules.into_iter().map(|module| module.name).collect(),
        library: library.as_ref().map(|bytes| Part::of("modules", bytes)),
        package,
    };
    let directory = &recipe.output;
    fs::create_dir_all(directory).map_err(host("make", directory))?;
    let mut json = serde_json::to_vec_pretty(&manifest)
        .map_err(|error| host("write", directory.join(MANIFEST))(error.into()))?;
    json.push(b'\n');
    put(directory, &manifest.kernel.file, &kernel.bytes)?;
    put(directory, &manifest.initrd.file, &initrd)?;
    if let (Some(part), Some(bytes)) = (&manifest.library, &library) {
        put(directory, &part.file, bytes)?;
    }
    put(directory, MANIFEST, &json)?;
    remove_others(directory, &manifest)?;
    Image::open(directory)
}

/// What a kernel's source has.
struct Obtained {
    kernel: Kernel,
    /// For the initial file system.
    modules: Vec<Module>,
    library: Option<Vec<u8>>,
    package: Option<Package>,
}

fn obtain(source: &KernelSource) -> Result<Obtained, Error> {
    let file = match source {
        KernelSource::Apt { cache } => package::download(cache)?,
        KernelSource::Package(file) => file.clone(),
        KernelSource::File { kernel, modules } => {
            let kernel = Kernel::read(kernel)?;
            let (modules, library) = select(modules.as_deref(), &kernel.release, false)?;
            return Ok(Obtained { kernel, modules, library, package: None });
        }
    };
    let unpacked = package::unpack(&file)?;
    let kernel = Kernel::read(&unpacked.kernel)?;
    let unsigned = unpacked.takes_unsigned_modules;
    let (modules, library) = select(unpacked.modules.as_deref(), &kernel.release, unsigned)?;
    Ok(Obtained { kernel, modules, library, package: Some(unpacked.package) })
}

/// The modules for the initial file system, and the library of the others.
fn select(
    directory: Option<&Path>,
    release: &str,
    unsigned: bool,
) -> Result<(Vec<Module>, Option<Vec<u8>>), Error> {
    let Some(directory) = directory else { return Ok((Vec::new(), None)) };
    let tree = ModuleTree::open(directory)?;
    let mut modules = tree.select(modules::REQUIRED, modules::OPTIONAL, release)?;
    if unsigned {
        for module in &mut modules {
            module.bytes = modules::slim(std::mem::take(&mut module.bytes));
        }
    }
    Ok((modules, Some(library(&tree, release, unsigned)?)))
}

fn find_agent() -> Result<PathBuf, Error> {
    let program = env::current_exe().map_err(host("read", "/proc/self/exe"))?;
    let beside = program.parent().unwrap_or(Path::new("/"));
    let places = [beside.join("kata-agent"), beside.join("../libexec/kata-containers/kata-agent")];
    places.iter().find(|place| place.is_file()).cloned().ok_or_else(|| Error::NoAgent {
        places: places.map(|place| place.display().to_string()).join(", "),
    })
}

fn read_agent(path: &Path) -> Result<Vec<u8>, Error> {
    let bytes = fs::read(path).map_err(host("read", path))?;
    let bad = |reason| Error::Agent { path: path.to_owned(), reason };
    match Elf::parse(&bytes).and_then(Elf::is_dynamic) {
        Some(false) => Ok(bytes),
        Some(true) => {
            Err(bad("it is linked dynamically, and a guest has no libraries (build it with \
             `-C target-feature=+crt-static` and an explicit --target)"))
        }
        None => Err(bad("it is not an ELF program for x86-64")),
    }
}

fn initrd(agent: Vec<u8>, modules: &[Module], overlays: &[PathBuf]) -> Result<Vec<u8>, Error> {
    let mut tree = Tree::default();
    for &(path, permissions) in DIRECTORIES {
        tree.directory(path, permissions);
    }
    tree.file("init", 0o755, agent);
    let mut list = String::new();
    for module in modules {
        let path = format!("/lib/modules/{}.ko", module.name);
        list.extend([&*path, "\n"]);
        tree.file(&path, 0o644, module.bytes.clone());
    }
    tree.file(MODULE_LIST, 0o644, list.into_bytes());
    for overlay in overlays {
        add(&mut tree, overlay, "")?;
    }
    let mut bytes = Vec::new();
    tree.write(&mut bytes).map_err(host("write", "the initial file system"))?;
    Ok(bytes)
}

/// Adds what is in `directory` below `prefix`.
fn add(tree: &mut Tree, directory: &Path, prefix: &str) -> Result<(), Error> {
    for entry in fs::read_dir(directory).map_err(host("read", directory))? {
        let entry = entry.map_err(host("read", directory))?;
        let path = entry.path();
        let metadata = entry.metadata().map_err(host("read", &path))?;
        let unusable = |what| host("add", &path)(io::Error::new(io::ErrorKind::InvalidInput, what));
        let name = entry.file_name();
        let name = name.to_str().ok_or_else(|| unusable("its name is not UTF-8"))?;
        let inside = format!("{prefix}{name}");
        let permissions = metadata.permissions().mode() & 0o7777;
        if metadata.is_dir() {
            tree.directory(&inside, permissions);
            add(tree, &path, &format!("{inside}/"))?;
        } else if metadata.is_file() {
            tree.file(&inside, permissions, fs::read(&path).map_err(host("read", &path))?);
        } else if metadata.is_symlink() {
            let target = fs::read_link(&path).map_err(host("read", &path))?;
            tree.symlink(&inside, target.as_os_str().as_bytes().to_vec());
        } else {
            return Err(unusable("it is neither a file, a directory nor a symlink"));
        }
    }
    Ok(())
}

/// Writes a file that everybody may read: whole, and on the disk before its name is.
fn put(directory: &Path, name: &str, bytes: &[u8]) -> Result<(), Error> {
    let path = directory.join(name);
    let mut file =
        tempfile::NamedTempFile::new_in(directory).map_err(host("write in", directory))?;
    file.write_all(bytes)
        .and_then(|()| file.as_file().set_permissions(Permissions::from_mode(0o644)))
        .and_then(|()| file.as_file().sync_all())
        .map_err(host("write", &path))?;
    file.persist(&path).map_err(|error| host("write", &path)(error.error))?;
    // The name too must be on the disk before the manifest that tells of it.
    File::open(directory).and_then(|dir| dir.sync_all()).map_err(host("write", directory))
}

/// Removes the parts of older images.
fn remove_others(directory: &Path, manifest: &Manifest) -> Result<(), Error> {
    let ours =
        |name: &str| ["vmlinux-", "initrd-", "modules-"].iter().any(|stem| name.starts_with(stem));
    let kept: Vec<&str> = manifest.parts().map(|part| &*part.file).collect();
    for entry in fs::read_dir(directory).map_err(host("read", directory))? {
        let entry = entry.map_err(host("read", directory))?;
        if entry.file_name().to_str().is_some_and(|name| ours(name) && !kept.contains(&name)) {
            fs::remove_file(entry.path()).map_err(host("remove", entry.path()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{KernelSource, Recipe, build};
    use crate::{Error, Image, KernelFormat};
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;
    use tempfile::TempDir;

    /// An ELF program for x86-64 with a PVH note and a version: a kernel, and an agent, as far as a builder can tell.
    fn program() -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[18] = 62;
        bytes[32] = 64;
        bytes[54] = 56;
        bytes[56] = 1;
        bytes[64] = 4;
        bytes[72] = 64 + 56;
        bytes[96] = 24;
        bytes.extend_from_slice(&[4, 0, 0, 0, 8, 0, 0, 0, 18, 0, 0, 0]);
        bytes.extend_from_slice(b"Xen\0\0\0\0\0\0\0\0\0");
        bytes.extend_from_slice(b"Linux version 6.1.0-test (x)\0");
        bytes
    }

    fn recipe(dir: &TempDir) -> Recipe {
        let at = |name: &str| dir.path().join(name);
        fs::write(at("kernel"), program()).unwrap();
        fs::write(at("agent"), program()).unwrap();
        Recipe {
            kernel: KernelSource::File { kernel: at("kernel"), modules: None },
            agent: Some(at("agent")),
            overlays: Vec::new(),
            output: at("image"),
        }
    }

    fn files(directory: &Path) -> Vec<(String, Vec<u8>)> {
        let mut files: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| {
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                (name, fs::read(path).unwrap())
            })
            .collect();
        files.sort();
        files
    }

    #[test]
    fn the_same_inputs_give_the_same_bytes() {
        let [first, second] = [(); 2].map(|()| {
            let dir = tempfile::tempdir().unwrap();
            let mut recipe = recipe(&dir);
            let overlay = dir.path().join("overlay");
            fs::create_dir_all(overlay.join("etc/deep")).unwrap();
            fs::write(overlay.join("etc/deep/file"), "hello").unwrap();
            symlink("deep/file", overlay.join("etc/link")).unwrap();
            recipe.overlays.push(overlay);
            build(&recipe).unwrap();
            files(&recipe.output)
        });
        assert_eq!(first.len(), 3);
        assert!(first == second);
    }

    #[test]
    fn what_was_built_can_be_opened_and_verified() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = recipe(&dir);
        let image = build(&recipe).unwrap();
        image.verify().unwrap();
        assert_eq!(image, Image::open(&recipe.output).unwrap());
        assert_eq!(image.manifest().kernel_release, "6.1.0-test");
        assert_eq!(image.manifest().kernel_format, KernelFormat::Pvh);
        assert_eq!(fs::read(image.kernel()).unwrap(), program());
    }

    #[test]
    fn a_new_image_takes_the_old_ones_place() {
        let dir = tempfile::tempdir().unwrap();
        let mut recipe = recipe(&dir);
        let old = build(&recipe).unwrap();
        let overlay = dir.path().join("overlay");
        fs::create_dir(&overlay).unwrap();
        fs::write(overlay.join("file"), "hello").unwrap();
        recipe.overlays.push(overlay);
        let new = build(&recipe).unwrap();
        assert_eq!(old.kernel(), new.kernel());
        assert_ne!(old.initrd(), new.initrd());
        assert!(!old.initrd().exists());
        assert_eq!(files(&recipe.output).len(), 3);
    }

    #[test]
    fn a_failed_build_leaves_the_old_image() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = recipe(&dir);
        let image = build(&recipe).unwrap();
        fs::write(dir.path().join("agent"), "#!/bin/sh").unwrap();
        let error = build(&recipe).unwrap_err().to_string();
        assert!(error.ends_with("it is not an ELF program for x86-64"), "{error}");
        image.verify().unwrap();
    }

    #[test]
    fn an_agent_that_needs_libraries_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = Recipe { agent: Some("/proc/self/exe".into()), ..recipe(&dir) };
        let error = build(&recipe).unwrap_err().to_string();
        assert!(error.contains("linked dynamically"), "{error}");
    }

    #[test]
    fn a_missing_input_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = Recipe { agent: Some("/no/such/agent".into()), ..recipe(&dir) };
        assert_eq!(build(&recipe).unwrap_err().to_string(), "cannot read /no/such/agent");
    }

    #[test]
    fn damage_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = recipe(&dir);
        let missing = Image::open(&recipe.output).unwrap_err();
        assert!(matches!(missing, Error::NotBuilt { .. }));
        let image = build(&recipe).unwrap();

        let mut other = program();
        other.reverse();
        fs::write(image.kernel(), &other).unwrap();
        let error = Image::open(&recipe.output).unwrap().verify().unwrap_err().to_string();
        assert!(error.contains("has the SHA-256"), "{error}");

        fs::write(image.kernel(), "short").unwrap();
        let error = Image::open(&recipe.output).unwrap_err().to_string();
        assert!(error.contains("has 5 bytes instead of"), "{error}");

        fs::write(recipe.output.join("manifest.json"), "{").unwrap();
        let error = Image::open(&recipe.output).unwrap_err().to_string();
        assert!(error.contains("run `kata-runtime image build` again"), "{error}");
    }
}
