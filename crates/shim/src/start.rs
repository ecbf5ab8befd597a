//! `start`: a shim for a sandbox, or the one that runs already for a container that joins its sandbox.

use std::env;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use linux::process::{Command, ProcessId};
use rustix::fs::OFlags;

use crate::args::Args;
use crate::bootstrap::Params;
use crate::error::Error;
use crate::group::{self, Place};

/// The file in the bundle by which containerd finds a shim again after it was restarted.
const ADDRESS: &str = "address";

/// The file in the sandbox's bundle that says which process the shim is, for `delete`.
const PROCESS: &str = "shim.json";

/// What containerd may write to us at most: addresses and options.
const LONGEST_INPUT: u64 = 1 << 20;

/// Starts or finds the shim; answers what containerd wants to read.
///
/// # Errors
///
/// When the bundle makes no sense, the sandbox of a container does not run, or the host refuses.
pub(crate) fn start(args: &Args) -> Result<Vec<u8>, Error> {
    let bundle = bundle(args)?;
    let params = Params::read(&input()?, args);
    let place = Place::of(&bundle)?;
    let containerd = params.grpc_address.as_deref().unwrap_or(&args.address);
    let sandbox = match &place {
        Place::Sandbox => &args.id,
        Place::In(sandbox) => sandbox,
    };
    let socket = group::socket(params.socket_dir.as_deref(), containerd, &args.namespace, sandbox);
    let answers = UnixStream::connect(&socket).is_ok();
    match place {
        // For a sandbox itself: containerd asks again where it lost our first answer.
        _ if answers => {}
        Place::Sandbox => launch(args, &params, &bundle, &socket)?,
        Place::In(sandbox) => return Err(Error::NoSandbox { sandbox }),
    }
    let address = format!("unix://{}", socket.display());
    let file = bundle.join(ADDRESS);
    linux::file::replace(&file, address.as_bytes()).map_err(Error::host("write", file))?;
    params.answer(&address)
}

/// The bundle's absolute path.
pub(crate) fn bundle(args: &Args) -> Result<PathBuf, Error> {
    let here = env::current_dir().map_err(Error::host("find", "the working directory"))?;
    Ok(here.join(&args.bundle))
}

fn input() -> Result<Vec<u8>, Error> {
    let mut input = Vec::new();
    io::stdin()
        .take(LONGEST_INPUT)
        .read_to_end(&mut input)
        .map_err(Error::host("read", "the standard input"))?;
    Ok(input)
}

/// Starts the shim's own process, on a socket that listens already.
fn launch(args: &Args, params: &Params, bundle: &Path, socket: &Path) -> Result<(), Error> {
    let listener = listen(socket)?;
    let launched = (|| {
        let log = log(bundle)?;
        let copy = log.try_clone().map_err(Error::host("copy", "the log"))?;
        // However this program was called, and even where its file has been replaced since.
        let mut command = Command::new("/proc/self/exe");
        let number = command.pass(listener.into());
        command.name(crate::NAME).args(["-namespace", &args.namespace, "-id", &args.id]);
        command.args(["-address", &args.address, "-serve", &number.to_string()]);
        if let Some(events) = &params.ttrpc_address {
            command.args(["-events", events]);
        }
        if args.debug {
            command.args(["-debug"]);
        }
        command.directory(bundle).new_session();
        command.stdio(Stdio::null(), log.into(), copy.into());
        let child = command.spawn().map_err(Error::host("start", crate::NAME))?;
        let id = child.id().map_err(Error::host("start", crate::NAME))?;
        let file = bundle.join(PROCESS);
        let text = serde_json::to_vec(&id).map_err(io::Error::from);
        text.and_then(|text| linux::file::replace(&file, &text))
            .map_err(Error::host("write", &file))
    })();
    if launched.is_err() {
        // The first error is the one to tell.
        drop(std::fs::remove_file(socket));
    }
    launched
}

/// Listens where a dead shim may have listened before.
fn listen(socket: &Path) -> Result<UnixListener, Error> {
    if let Some(dir) = socket.parent() {
        std::fs::create_dir_all(dir).map_err(Error::host("create", dir))?;
    }
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(Error::host("remove", socket)(error));
        }
        _ => {}
    }
    let listener = UnixListener::bind(socket).map_err(Error::host("listen on", socket))?;
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::chmod(socket, mode).map_err(Error::host("protect", socket))?;
    Ok(listener)
}

/// The named pipe that containerd copies to its own log; opened both ways, so that a containerd that is restarted
/// neither blocks nor ends us.
fn log(bundle: &Path) -> Result<OwnedFd, Error> {
    let path = bundle.join("log");
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let pipe = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path);
    match pipe {
        Ok(pipe) => Ok(pipe.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let null = OpenOptions::new().write(true).open("/dev/null");
            Ok(null.map_err(Error::host("open", "/dev/null"))?.into())
        }
        Err(error) => Err(Error::host("open", path)(error)),
    }
}

/// The shim's process, where one was started for this bundle.
pub(crate) fn process(bundle: &Path) -> Option<ProcessId> {
    serde_json::from_slice(&std::fs::read(bundle.join(PROCESS)).ok()?).ok()
}
