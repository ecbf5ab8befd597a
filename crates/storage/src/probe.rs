//! What is at a path on this host.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use linux::mount::is_mount_point;
use rustix::fs::statfs;

use crate::{Error, Kind, Source};

/// What is at `path` on this host: the probe for [`plan`](crate::plan).
///
/// # Errors
///
/// [`Error::Host`], but not for what is missing.
pub fn probe(path: &Path) -> Result<Source, Error> {
    let resolved = match fs::canonicalize(path) {
        Ok(resolved) => resolved,
        Err(error) if is_missing(&error) => return Ok(missing(path)),
        Err(error) => return Err(Error::host("resolve", path)(error)),
    };
    let file_type = match fs::symlink_metadata(&resolved) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if is_missing(&error) => return Ok(missing(path)),
        Err(error) => return Err(Error::host("look at", path)(error)),
    };
    let kinds = [
        (file_type.is_dir(), Kind::Directory),
        (file_type.is_file(), Kind::File),
        (file_type.is_socket(), Kind::Socket),
        (file_type.is_fifo(), Kind::Fifo),
        (file_type.is_block_device(), Kind::Block),
        (file_type.is_char_device(), Kind::Character),
    ];
    // There is no other kind once symlinks have been followed.
    let kind = kinds.iter().find(|(is_it, _)| *is_it).map_or(Kind::Missing, |&(_, kind)| kind);
    let tmpfs_size = if kind == Kind::Directory { tmpfs_size(&resolved)? } else { None };
    Ok(Source { kind, path: resolved, tmpfs_size })
}

fn missing(path: &Path) -> Source {
    Source { kind: Kind::Missing, path: path.to_owned(), tmpfs_size: None }
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn tmpfs_size(directory: &Path) -> Result<Option<u64>, Error> {
    const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;
    if !is_mount_point(directory).map_err(Error::host("look at", directory))? {
        return Ok(None);
    }
    let stat = statfs(directory).map_err(Error::host("look at", directory))?;
    let size = u64::try_from(stat.f_bsize).unwrap_or(0).saturating_mul(stat.f_blocks);
    Ok((stat.f_type == TMPFS_MAGIC).then_some(size))
}

#[cfg(test)]
mod tests {
    use super::probe;
    use crate::Kind;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;
    use std::path::Path;

    #[test]
    fn each_kind_is_told_and_symlinks_are_followed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("file"), "").unwrap();
        let _listener = UnixListener::bind(at("socket")).unwrap();
        symlink(at("file"), at("link")).unwrap();
        symlink(at("nothing"), at("dangling")).unwrap();

        assert_eq!(probe(dir.path()).unwrap().kind, Kind::Directory);
        assert_eq!(probe(&at("socket")).unwrap().kind, Kind::Socket);
        assert_eq!(probe(&at("link")).unwrap().kind, Kind::File);
        assert_eq!(probe(&at("link")).unwrap().path, at("file").canonicalize().unwrap());
        assert_eq!(probe(&at("dangling")).unwrap().kind, Kind::Missing);
        assert_eq!(probe(&at("file/below")).unwrap().kind, Kind::Missing);
        assert_eq!(probe(Path::new("/dev/null")).unwrap().kind, Kind::Character);
    }

    #[test]
    fn symlinks_in_a_circle_are_an_error_that_names_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("circle");
        symlink(&path, &path).unwrap();
        let error = probe(&path).unwrap_err();
        assert_eq!(error.to_string(), format!("cannot resolve {}", path.display()));
    }
}
