//! The host's Unix sockets that a container has as bind mounts: the agent listens in their stead, and each connection
//! becomes a vsock stream that the host joins with a connection to its socket.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use protocol::{SOCKET_PORT, agent, paths};
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

use crate::error::{Doing, Error};

/// Connections of one container at once; further ones wait. The vsock device takes some thousand streams for the whole
/// guest, and those of stdio must find room.
const MOST: usize = 256;

/// What is moved at once: each move costs an interrupt of the guest.
const BLOCK: usize = 64 * 1024;

/// The sockets of one container; they go with this value.
#[derive(Debug)]
pub(crate) struct Sockets {
    directory: PathBuf,
    listening: Vec<JoinHandle<()>>,
}

impl Sockets {
    /// Listens on those of a container that is about to be made.
    ///
    /// # Errors
    ///
    /// When one cannot be made; then none is left.
    pub(crate) fn listen(container: &str, wanted: &[agent::Socket]) -> Result<Self, Error> {
        let directory = Path::new(paths::SOCKETS).join(container);
        let mut sockets = Self { directory, listening: Vec::new() };
        if wanted.is_empty() {
            return Ok(sockets);
        }
        fs::create_dir_all(&sockets.directory)
            .doing(|| format!("make {}", sockets.directory.display()))?;
        let room = Arc::new(Semaphore::new(MOST));
        for socket in wanted {
            let path = Path::new(&socket.path);
            if path.parent() != Some(&sockets.directory) {
                return Err(Error::Invalid(format!("{:?} is no place for a socket", socket.path)));
            }
            let action = || format!("listen on {}", socket.path);
            let listener = UnixListener::bind(path).doing(action)?;
            fs::set_permissions(path, Permissions::from_mode(socket.mode & 0o7777))
                .doing(action)?;
            chown(path, Some(socket.uid), Some(socket.gid)).doing(action)?;
            let accepting = accept(listener, socket.number, Arc::clone(&room));
            sockets.listening.push(tokio::spawn(accepting));
        }
        Ok(sockets)
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        for listening in &self.listening {
            listening.abort();
        }
        // It is in memory, and no other container's.
        drop(fs::remove_dir_all(&self.directory));
    }
}

async fn accept(listener: UnixListener, number: u32, room: Arc<Semaphore>) {
    while let Ok(place) = Arc::clone(&room).acquire_owned().await {
        // With an error the listener goes, and clients hear that nobody listens.
        let Ok((connection, _)) = listener.accept().await else { return };
        tokio::spawn(async move {
            // How it ended, each end sees for itself.
            drop(join(connection, number).await);
            drop(place);
        });
    }
}

/// Carries a connection's bytes, and each side's end of them, until both have ended.
async fn join(mut connection: UnixStream, number: u32) -> std::io::Result<()> {
    let mut host = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, SOCKET_PORT)).await?;
    host.write_all(&number.to_le_bytes()).await?;
    tokio::io::copy_bidirectional_with_sizes(&mut connection, &mut host, BLOCK, BLOCK).await?;
    Ok(())
}
