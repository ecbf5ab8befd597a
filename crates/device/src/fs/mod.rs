//! virtio-fs: the shared directory, passed through to the guest with owners, modes, attributes and links as they are.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::Duration;

use vhost_user_backend::VhostUserDaemon;
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{self, CachePolicy, PassthroughFs};
use virtiofsd::server::Server;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::Error;
use crate::frontend::serve_until_hang_up;
use crate::jail::Opened;

mod backend;
mod echo;
mod keep;

use backend::Backend;
use keep::Kept;

/// How long the guest may believe what it was told of a file without asking again: the host may change it, seldom.
const BELIEF: Duration = Duration::from_secs(1);

/// Attributes `trusted.*`, which an overlay in the guest keeps its notes in, take a privilege on the host that would be too
/// much: they are the host's `user.virtiofs.trusted.*`, which the guest cannot name otherwise. It sees none of the host's
/// own `trusted.*`.
const ATTRIBUTES: &str = "/prefix/all/trusted./user.virtiofs./
/bad/server//trusted./
/bad/client/user.virtiofs.//
/ok/all///";

/// Descriptors that are not the guest's files: memory regions (the library takes 509 at most), vsock streams, our own.
/// Where few are allowed, half of them.
const RESERVED: u64 = 509 + 1024 + 64;

/// Starts to serve the root directory. `report` hears of a failure; that the hypervisor hangs up is none.
///
/// # Errors
///
/// When no thread can be made.
pub(crate) fn start(
    listener: UnixListener,
    opened: Opened,
    report: Sender<Result<(), Error>>,
) -> Result<(), Error> {
    let files = PassthroughFs::new(config(opened)?).map_err(|error| failed(error.into()))?;
    let backend = Arc::new(Backend::new(Server::new(Kept::new(files)), report.clone()));
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("fs".into(), backend, memory)
        .map_err(|error| failed(error.to_string().into()))?;
    let serve = move || {
        if let Err(error) = serve_until_hang_up(&mut daemon, listener) {
            // Nobody hears it any more where another device failed first.
            drop(report.send(Err(failed(error))));
        }
    };
    let thread = thread::Builder::new().name("fs-control".into()).spawn(serve);
    thread.map(drop).map_err(|error| failed(error.into()))
}

fn failed(source: Box<dyn std::error::Error + Send + Sync>) -> Error {
    Error::Device { device: "fs", source }
}

fn config(opened: Opened) -> Result<passthrough::Config, Error> {
    let map = XattrMap::try_from(ATTRIBUTES).map_err(|error| failed(error.to_string().into()))?;
    Ok(passthrough::Config {
        entry_timeout: BELIEF,
        attr_timeout: BELIEF,
        cache_policy: CachePolicy::Auto,
        // Written pages reach the host at once, so that the host sees what the guest wrote, and a killed guest loses
        // nothing that a killed process would not.
        writeback: false,
        proc_sfd_rawfd: Some(opened.proc_self_fd),
        xattr: true,
        xattrmap: Some(map),
        // Each mount below the directory is a device of its own, or inode numbers would collide.
        announce_submounts: true,
        readdirplus: true,
        // The host clears set-user-id bits on writes; otherwise the guest asks for `security.capability` before each.
        killpriv_v2: true,
        // O_DIRECT is accepted and ignored: host file systems that refuse it would break guests that ask for it.
        allow_direct_io: false,
        guest_fd_limit: opened.descriptors - RESERVED.min(opened.descriptors / 2),
        ..passthrough::Config::default()
    })
}
