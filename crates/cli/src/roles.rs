//! The roles that the runtime starts itself in.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;

use crate::output;

/// Whether this program was called by the name that containerd knows.
pub(crate) fn is_shim(arguments: &[OsString]) -> bool {
    let name = arguments.first().and_then(|program| Path::new(program).file_name());
    name.is_some_and(|name| name == shim::NAME)
}

/// Runs the role that `arguments` name; `None` where they name none.
pub(crate) fn dispatch(arguments: &[OsString]) -> Option<ExitCode> {
    let [_, role, argument] = arguments else { return None };
    Some(match role.to_str()? {
        "sandbox" => with_channel(argument, sandbox::serve),
        "keeper" => with_channel(argument, sandbox::pool::keep),
        "stand-in" => with_channel(argument, sandbox::stand_in),
        "out-of-memory" => with_channel(argument, sandbox::out_of_memory),
        "device" => {
            let config = argument.to_str().unwrap_or_default();
            let served = serde_json::from_str(config)
                .map_err(anyhow::Error::from)
                .and_then(|config| device::serve(config).map_err(anyhow::Error::from));
            match served {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => output::failed(&error),
            }
        }
        _ => return None,
    })
}

fn with_channel(number: &OsString, serve: impl FnOnce(OwnedFd) -> u8) -> ExitCode {
    let number = number.to_str().and_then(|number| number.parse().ok());
    match number.map(linux::process::inherited) {
        Some(Ok(channel)) => ExitCode::from(serve(channel)),
        _ => output::failed(&anyhow::anyhow!("this role is started by kata-runtime itself")),
    }
}
