//! The hypervisor's side of a vhost-user connection.

use std::os::unix::net::UnixListener;

use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::bitmap::BitmapReplace;
use vhost_user_backend::{Error as DaemonError, VhostUserBackend, VhostUserDaemon};
use vm_memory::mmap::NewBitmap;

/// Takes one connection from `listener` and serves it until the hypervisor closes it, by its own will or not.
///
/// # Errors
///
/// When the hypervisor breaks the protocol.
pub(crate) fn serve_until_hang_up<T>(
    daemon: &mut VhostUserDaemon<T>,
    listener: UnixListener,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>>
where
    T: VhostUserBackend + Clone + 'static,
    T::Bitmap: BitmapReplace + NewBitmap + Clone + Send + Sync,
    T::Vring: Clone + Send + Sync,
{
    // The listener goes when it has done its one duty: a second hypervisor is refused instead of left waiting.
    let mut listener = Listener::from(listener);
    daemon.start(&mut listener).map_err(|error| error.to_string())?;
    drop(listener);
    match daemon.wait() {
        Ok(())
        | Err(DaemonError::HandleRequest(
            VhostUserError::Disconnected
            | VhostUserError::PartialMessage
            | VhostUserError::SocketBroken(_),
        )) => Ok(()),
        Err(error) => Err(error.to_string().into()),
    }
}
