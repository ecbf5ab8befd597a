//! `kata-agent` as the kernel's modprobe(8): loads what the kernel asks for from the host's file of modules.
//!
//! The kernel starts the program that `/proc/sys/kernel/modprobe` names when somebody uses what a module brings: a file
//! system, a device, a part of the packet filter. The `image` crate says how the file is made.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;

use protocol::paths;
use rustix::io::Errno;

use crate::error::{Doing, Error};

/// The first line of a file that we can read.
const HEADING: &str = "kata modules 1";

/// A module in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Module {
    name: String,
    /// From the end of the text on.
    offset: u64,
    size: usize,
    needs: Vec<String>,
    names: Vec<String>,
}

/// Loads the module that has this name, and those that it needs before it. One that nobody knows is none to load: the
/// kernel asks for much that no module brings.
///
/// # Errors
///
/// When the file cannot be read, or the kernel refuses a module.
pub(crate) fn load(name: &str) -> Result<(), Error> {
    let file = match File::open(paths::MODULES) {
        // The share is not mounted, or the image has no such file.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        file => file.doing(|| format!("open {}", paths::MODULES))?,
    };
    let reading = || format!("read {}", paths::MODULES);
    let (modules, start) = index(BufReader::with_capacity(256 << 10, &file)).doing(reading)?;
    for module in in_order(&modules, name) {
        let mut bytes = vec![0; module.size];
        file.read_exact_at(&mut bytes, start + module.offset).doing(reading)?;
        match rustix::system::init_module(&bytes, c"") {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => {
                return Err(Error::guest(format!("load the kernel module {}", module.name), error));
            }
        }
    }
    Ok(())
}

/// The modules that the text tells of, and where it ends.
fn index(mut text: impl BufRead) -> std::io::Result<(Vec<Module>, u64)> {
    let bad = |line: &str| std::io::Error::other(format!("line {line:?} makes no sense"));
    let mut modules = Vec::new();
    let mut read = 0;
    let mut line = String::new();
    loop {
        line.clear();
        let size = text.read_line(&mut line)?;
        let heading = read == 0;
        read += size as u64;
        match line.trim_end_matches('\n') {
            "" if size == 1 => return Ok((modules, read)),
            HEADING if heading => {}
            words if heading => return Err(bad(words)),
            words => modules.push(module(words).ok_or_else(|| bad(words))?),
        }
    }
}

fn module(line: &str) -> Option<Module> {
    let mut words = line.split(' ');
    let name = words.next()?.to_owned();
    let (offset, size) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let needs = words.next()?.split(',').filter(|&name| name != "-").map(str::to_owned).collect();
    Some(Module { name, offset, size, needs, names: words.map(str::to_owned).collect() })
}

/// The modules that have this name, each behind those that it needs.
fn in_order<'a>(modules: &'a [Module], name: &str) -> Vec<&'a Module> {
    let plain = name.replace('-', "_");
    let asked =
        |module: &&Module| module.name == plain || module.names.iter().any(|other| other == name);
    let mut order = Vec::new();
    let mut seen = HashSet::new();
    for module in modules.iter().filter(asked) {
        add(modules, module, &mut seen, &mut order);
    }
    order
}

fn add<'a>(
    modules: &'a [Module],
    module: &'a Module,
    seen: &mut HashSet<&'a str>,
    order: &mut Vec<&'a Module>,
) {
    if !seen.insert(&module.name) {
        return;
    }
    for needed in &module.needs {
        if let Some(needed) = modules.iter().find(|other| other.name == *needed) {
            add(modules, needed, seen, order);
        }
    }
    order.push(module);
}

#[cfg(test)]
mod tests {
    use super::{in_order, index};

    const TEXT: &str = "kata modules 1\nbr_netfilter 0 10 bridge\nbridge 10 20 stp,llc rtnl-link-bridge\n\
                        llc 30 1 -\nstp 31 1 llc\n\nELF";

    #[test]
    fn a_module_comes_behind_what_it_needs() {
        let (modules, start) = index(TEXT.as_bytes()).unwrap();
        assert_eq!(&TEXT[usize::try_from(start).unwrap()..], "ELF");
        let names = |name: &str| -> Vec<String> {
            in_order(&modules, name).into_iter().map(|module| module.name.clone()).collect()
        };
        assert_eq!(names("rtnl-link-bridge"), ["llc", "stp", "bridge"]);
        assert_eq!(names("br-netfilter"), ["llc", "stp", "bridge", "br_netfilter"]);
        assert!(names("binfmt-464c").is_empty());
    }

    #[test]
    fn a_file_that_is_none_is_refused() {
        for text in ["", "kata modules 9\n\n", "kata modules 1\nname x y -\n\n", "kata modules 1\n"]
        {
            assert!(index(text.as_bytes()).is_err(), "{text:?}");
        }
    }
}
