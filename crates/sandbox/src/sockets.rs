//! The host's Unix sockets that containers connect to: the guest opens a stream for each connection, and here it is
//! joined with one to the socket.
//!
//! The guest can name only the sockets that were given to it, by number. The host's servers see root as their peer, as
//! they would see a container's root without a user namespace.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use hypervisor::GuestStream;
use protocol::agent as wire;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat2};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::spawn_local;
use tracing::debug;

use crate::error::Error;

/// How long a new stream may take to say which socket it is for.
const DEADLINE: Duration = Duration::from_secs(30);

/// What is moved at once.
const BLOCK: usize = 64 << 10;

/// The sockets that the guest may name.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sockets(Rc<RefCell<Table>>);

#[derive(Debug, Default)]
struct Table {
    last: u32,
    sockets: HashMap<u32, Given>,
}

/// A socket, and the container that it was given to.
#[derive(Debug)]
struct Given {
    container: String,
    path: PathBuf,
}

impl Sockets {
    /// Serves the guest's streams until its machine ends.
    pub(crate) fn serve(&self, mut streams: mpsc::Receiver<GuestStream>) {
        let sockets = self.clone();
        spawn_local(async move {
            while let Some(stream) = streams.recv().await {
                let sockets = sockets.clone();
                spawn_local(async move { sockets.join(stream).await });
            }
        });
    }

    /// Lets a container's guest connect to these; answers what its agent is told of them.
    pub(crate) fn add(
        &self,
        container: &str,
        sockets: &[storage::Socket],
    ) -> Result<Vec<wire::Socket>, Error> {
        let add = |socket: &storage::Socket| {
            let path = &socket.source;
            let metadata = fs::symlink_metadata(path).map_err(Error::host("look at", path))?;
            if !metadata.file_type().is_socket() {
                let replaced = io::Error::other("it was replaced meanwhile");
                return Err(Error::host("connect to", path)(replaced));
            }
            let mut table = self.0.borrow_mut();
            table.last = table.last.wrapping_add(1);
            let number = table.last;
            let given = Given { container: container.to_owned(), path: path.clone() };
            table.sockets.insert(number, given);
            Ok(wire::Socket {
                number,
                path: socket.guest_path.clone(),
                mode: metadata.mode() & 0o7777,
                uid: metadata.uid(),
                gid: metadata.gid(),
                ..Default::default()
            })
        };
        sockets.iter().map(add).collect()
    }

    /// Takes a container's sockets back; connections that are there go on.
    pub(crate) fn forget(&self, container: &str) {
        self.0.borrow_mut().sockets.retain(|_, given| given.container != container);
    }

    async fn join(&self, stream: GuestStream) {
        if let Err(error) = self.carry(stream).await {
            debug!(%error, "a connection to a socket of the host ended");
        }
    }

    async fn carry(&self, mut stream: GuestStream) -> io::Result<()> {
        let number = tokio::time::timeout(DEADLINE, stream.read_u32_le()).await??;
        let path = self.0.borrow().sockets.get(&number).map(|given| given.path.clone());
        let path = path.ok_or_else(|| io::Error::other(format!("there is no socket {number}")))?;
        // Anew for each: a server that was started again has another socket there.
        let mut connection = connect(&path).await?;
        tokio::io::copy_bidirectional_with_sizes(&mut stream, &mut connection, BLOCK, BLOCK)
            .await?;
        Ok(())
    }
}

/// Connects to a planned source: its path had no symlinks then, and must have none now.
async fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let socket = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)?;
    if FileType::from_raw_mode(fstat(&socket)?.st_mode) != FileType::Socket {
        return Err(io::Error::other("it is not a socket any more"));
    }
    UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await
}

#[cfg(test)]
mod tests {
    use super::Sockets;
    use std::path::Path;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::net::UnixListener;
    use tokio::sync::mpsc;
    use tokio::task::LocalSet;

    fn socket(path: &Path) -> storage::Socket {
        storage::Socket { source: path.to_owned(), guest_path: "/run/kata/sockets/c/0".to_owned() }
    }

    #[tokio::test]
    async fn a_stream_reaches_the_socket_of_its_number_and_halves_close_one_by_one() {
        let work = async {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().canonicalize().unwrap().join("socket");
            let listener = UnixListener::bind(&path).unwrap();
            let sockets = Sockets::default();
            let told = sockets.add("c", &[socket(&path)]).unwrap();
            let (sender, streams) = mpsc::channel(1);
            sockets.serve(streams);
            let (mut guest, host) = duplex(64);
            sender.send(Box::new(host) as _).await.unwrap();
            guest.write_all(&told[0].number.to_le_bytes()).await.unwrap();
            guest.write_all(b"question").await.unwrap();
            guest.shutdown().await.unwrap();
            let (mut server, _) = listener.accept().await.unwrap();
            let mut text = String::new();
            server.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "question");
            server.write_all(b"answer").await.unwrap();
            drop(server);
            let mut text = String::new();
            guest.read_to_string(&mut text).await.unwrap();
            assert_eq!(text, "answer");
        };
        LocalSet::new().run_until(work).await;
    }

    #[tokio::test]
    async fn a_number_that_is_told_no_more_reaches_nothing() {
        let work = async {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().canonicalize().unwrap().join("socket");
            let _listener = UnixListener::bind(&path).unwrap();
            let sockets = Sockets::default();
            let told = sockets.add("c", &[socket(&path)]).unwrap();
            sockets.forget("c");
            let (sender, streams) = mpsc::channel(1);
            sockets.serve(streams);
            let (mut guest, host) = duplex(64);
            sender.send(Box::new(host) as _).await.unwrap();
            guest.write_all(&told[0].number.to_le_bytes()).await.unwrap();
            assert_eq!(guest.read(&mut [0; 8]).await.unwrap_or(0), 0);
        };
        LocalSet::new().run_until(work).await;
    }

    #[test]
    fn what_is_no_socket_any_more_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "").unwrap();
        let error = Sockets::default().add("c", &[socket(&path)]).unwrap_err();
        assert_eq!(error.to_string(), format!("cannot connect to {}", path.display()));
    }
}
