//! The initial file system as a cpio archive of the "newc" format (the kernel's
//! Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! The same tree always gives the same bytes: entries are sorted, and neither times, owners nor inode numbers of the
//! host get in.

use std::collections::BTreeMap;
use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

/// A tree of files, all owned by root.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    /// By path without a leading slash; a directory sorts before what is in it.
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    mode: u32,
    bytes: Vec<u8>,
}

impl Tree {
    /// Adds a directory, and those above it where they are missing.
    pub(crate) fn directory(&mut self, path: &str, permissions: u32) {
        self.insert(path, DIRECTORY | permissions, Vec::new());
    }

    /// Adds a file, replacing what is at `path`.
    pub(crate) fn file(&mut self, path: &str, permissions: u32, bytes: Vec<u8>) {
        self.insert(path, REGULAR | permissions, bytes);
    }

    /// Adds a symlink to `target`, replacing what is at `path`.
    pub(crate) fn symlink(&mut self, path: &str, target: Vec<u8>) {
        self.insert(path, SYMLINK | 0o777, target);
    }

    fn insert(&mut self, path: &str, mode: u32, bytes: Vec<u8>) {
        let path = path.trim_matches('/');
        for (slash, _) in path.match_indices('/') {
            let parent = || Entry { mode: DIRECTORY | 0o755, bytes: Vec::new() };
            self.entries.entry(path[..slash].to_owned()).or_insert_with(parent);
        }
        self.entries.insert(path.to_owned(), Entry { mode, bytes });
    }

    /// Writes the archive.
    pub(crate) fn write(&self, mut out: impl Write) -> io::Result<()> {
        for (inode, (path, entry)) in (1..).zip(&self.entries) {
            member(&mut out, inode, path, entry)?;
        }
        member(&mut out, 0, "TRAILER!!!", &Entry { mode: 0, bytes: Vec::new() })
    }
}

fn member(out: &mut impl Write, inode: u32, path: &str, entry: &Entry) -> io::Result<()> {
    let size = u32::try_from(entry.bytes.len()).map_err(|_too_large| {
        io::Error::new(io::ErrorKind::FileTooLarge, format!("{path}: 4 GiB or more"))
    })?;
    let links = if entry.mode & DIRECTORY == 0 { 1 } else { 2 };
    let name_size = path.len() + 1;
    // Magic, inode, mode, uid, gid, links, mtime, size, device (2), rdevice (2), name's size, checksum.
    write!(
        out,
        "070701{inode:08x}{:08x}{:08x}{:08x}{links:08x}{:08x}{size:08x}{:08x}{:08x}{:08x}{:08x}{name_size:08x}{:08x}",
        entry.mode, 0, 0, 0, 0, 0, 0, 0, 0
    )?;
    out.write_all(path.as_bytes())?;
    out.write_all(&[0])?;
    pad(out, 110 + name_size)?;
    out.write_all(&entry.bytes)?;
    pad(out, entry.bytes.len())
}

/// Fills up to a multiple of four.
fn pad(out: &mut impl Write, length: usize) -> io::Result<()> {
    out.write_all(&[0; 3][..length.wrapping_neg() % 4])
}

#[cfg(test)]
mod tests {
    use super::Tree;
    use std::process::{Command, Stdio};

    fn sample() -> Vec<u8> {
        let mut tree = Tree::default();
        tree.file("/etc/kata/modules", 0o644, b"/lib/x.ko\n".to_vec());
        tree.symlink("sbin/init", b"../init".to_vec());
        tree.directory("/tmp", 0o1777);
        tree.file("init", 0o755, vec![7; 5]);
        let mut bytes = Vec::new();
        tree.write(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn the_archive_is_what_cpio_reads() {
        let mut child = match Command::new("cpio")
            .args(["-tv", "--numeric-uid-gid", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .env("LC_ALL", "C")
            .spawn()
        {
            Ok(child) => child,
            Err(error) => {
                println!("SKIPPED: needs cpio: {error}");
                return;
            }
        };
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), &sample()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        let listing = String::from_utf8(output.stdout).unwrap();
        let seen: Vec<(&str, &str)> = listing
            .lines()
            .map(|line| (&line[..10], line.rsplit("1970 ").next().unwrap()))
            .collect();
        assert_eq!(
            seen,
            [
                ("drwxr-xr-x", "etc"),
                ("drwxr-xr-x", "etc/kata"),
                ("-rw-r--r--", "etc/kata/modules"),
                ("-rwxr-xr-x", "init"),
                ("drwxr-xr-x", "sbin"),
                ("lrwxrwxrwx", "sbin/init -> ../init"),
                ("drwxrwxrwt", "tmp"),
            ]
        );
    }

    #[test]
    fn the_order_of_adding_does_not_show() {
        let mut other = Tree::default();
        other.file("init", 0o755, vec![7; 5]);
        other.directory("tmp", 0o1777);
        other.directory("sbin", 0o755);
        other.symlink("sbin/init", b"../init".to_vec());
        other.file("etc/kata/modules", 0o644, b"/lib/x.ko\n".to_vec());
        let mut bytes = Vec::new();
        other.write(&mut bytes).unwrap();
        assert_eq!(bytes, sample());
    }
}
