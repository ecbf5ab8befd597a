//! Log files of a machine's processes, which a guest cannot fill the host's memory with.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;

/// A log is cut when it reaches this size. One older piece is kept, so a log takes twice that.
const LIMIT: u64 = 1 << 20;

/// How much of a log's end counts as its last words.
const LAST_WORDS: u64 = 2048;

/// A log file, filled from a pipe for as long as anybody holds the pipe's writing end.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl Log {
    /// Makes the file, and answers the writing end for the process whose words it shall hold.
    pub(crate) fn open(path: PathBuf) -> io::Result<(Self, OwnedFd)> {
        let mut file = create(&path)?;
        let (read, write) = io::pipe()?;
        let mut pipe = pipe::Receiver::from_owned_fd(read.into())?;
        let place = path.clone();
        let task = tokio::spawn(async move {
            let mut bytes = vec![0; 4096];
            let mut size = 0;
            while let Ok(count @ 1..) = pipe.read(&mut bytes).await {
                // A log that cannot be written must not stop the one who writes: what comes is then dropped.
                drop(file.write_all(&bytes[..count]));
                size += count as u64;
                if size >= LIMIT {
                    size = 0;
                    file = next(&place, file);
                }
            }
        });
        Ok((Self { path, task }, write.into()))
    }

    /// Where the log is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until all is written that the process, which has ended, had to say.
    pub(crate) async fn finish(&mut self) {
        // A failed task has nothing more to write.
        drop((&mut self.task).await);
    }
}

/// Keeps a full log as the older piece and starts a new one.
fn next(path: &Path, full: File) -> File {
    let kept = fs::rename(path, path.with_extension("log.old")).and_then(|()| create(path));
    kept.unwrap_or_else(|_| {
        // What cannot be kept is lost: the bound holds in any case.
        drop(full.set_len(0));
        full
    })
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path).and_then(|file| {
        file.set_len(0)?;
        Ok(file)
    })
}

/// The last lines of the file at `path`, escaped so that a terminal shows them and does nothing else.
pub(crate) fn last_words(path: &Path) -> String {
    let text = tail(path).unwrap_or_default();
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    escaped(&lines[lines.len().saturating_sub(3)..].join("; "))
}

/// Text that a terminal shows and does nothing else with.
pub(crate) fn escaped(text: &str) -> String {
    text.chars().fold(String::new(), |mut out, letter| {
        if letter.is_control() {
            out.extend(letter.escape_default());
        } else {
            out.push(letter);
        }
        out
    })
}

/// The line in which a guest's kernel tells why it panicked, from its console's log.
pub(crate) fn panic_line(console: &Path) -> Option<String> {
    let text = tail(console).ok()?;
    let line = text.lines().find(|line| line.contains("Kernel panic"))?;
    Some(escaped(line.trim()))
}

fn tail(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(LAST_WORDS)))?;
    let mut bytes = Vec::new();
    file.take(LAST_WORDS).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::{LIMIT, Log, last_words, panic_line};
    use std::fs::{self, File};
    use std::io::Write;

    #[tokio::test]
    async fn a_log_holds_what_was_written_and_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qemu.log");
        let (mut log, write) = Log::open(path.clone()).unwrap();
        let writer = std::thread::spawn(move || {
            let mut write = File::from(write);
            let line = [b"0123456789abcde\n".as_slice(); 256].concat();
            for _ in 0..5 * LIMIT / 4096 {
                write.write_all(&line).unwrap();
            }
            write.write_all(b"the end\n").unwrap();
        });
        log.finish().await;
        writer.join().unwrap();
        assert!(fs::metadata(&path).unwrap().len() < LIMIT);
        assert_eq!(fs::metadata(dir.path().join("qemu.log.old")).unwrap().len(), LIMIT);
        assert!(last_words(&path).ends_with("the end"));
    }

    #[test]
    fn last_words_cannot_move_a_terminals_cursor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, "a\nb\nc\n\x1b[2Jd\n\n").unwrap();
        assert_eq!(last_words(&path), "b; c; \\u{1b}[2Jd");
        assert_eq!(last_words(&dir.path().join("missing")), "");
    }

    #[test]
    fn a_panic_is_found_among_what_follows_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        fs::write(&path, "[1.0] Kernel panic - not syncing: VFS\n[1.1] CPU: 0\n").unwrap();
        assert_eq!(panic_line(&path).unwrap(), "[1.0] Kernel panic - not syncing: VFS");
    }
}
