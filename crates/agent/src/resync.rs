//! Making a guest one of its own, whatever memory it was started from.

use std::fs::{self, File};
use std::io::Read;

use protocol::agent::ResyncRequest;
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::error::{Doing, Error};
use crate::sys;

const MACHINE_ID: &str = "/etc/machine-id";
const NS: u64 = 1_000_000_000;

/// Sets the clock, the state of the random number generator and the guest's names.
pub(crate) fn resync(request: &ResyncRequest) -> Result<(), Error> {
    if request.unix_ns != 0 {
        set_clock(request.unix_ns)?;
    }
    if !request.entropy.is_empty() {
        let action = || "seed the random number generator".to_owned();
        let urandom = File::options().read(true).write(true).open("/dev/urandom").doing(action)?;
        sys::add_entropy(&urandom, &request.entropy).doing(action)?;
        sys::reseed(&urandom).doing(action)?;
    }
    if !request.hostname.is_empty() {
        set_hostname(&request.hostname)?;
    }
    let id =
        if request.machine_id.is_empty() { new_machine_id()? } else { request.machine_id.clone() };
    if id.len() != 32 || !id.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(Error::Invalid(format!("machine id {id:?} is not 32 hex digits")));
    }
    write(MACHINE_ID, &format!("{}\n", id.to_ascii_lowercase()))
}

fn set_clock(unix_ns: u64) -> Result<(), Error> {
    let out_of_range = || Error::Invalid(format!("{unix_ns} ns is no time"));
    let now = Timespec {
        tv_sec: i64::try_from(unix_ns / NS).map_err(|_| out_of_range())?,
        tv_nsec: i64::try_from(unix_ns % NS).map_err(|_| out_of_range())?,
    };
    clock_settime(ClockId::Realtime, now).doing(|| "set the clock".to_owned())
}

fn set_hostname(name: &str) -> Result<(), Error> {
    rustix::system::sethostname(name.as_bytes()).doing(|| format!("set the hostname to {name}"))?;
    write("/etc/hostname", &format!("{name}\n"))
}

fn new_machine_id() -> Result<String, Error> {
    let action = || "make a machine id".to_owned();
    let mut uuid = String::new();
    File::open("/proc/sys/kernel/random/uuid")
        .and_then(|mut file| file.read_to_string(&mut uuid))
        .doing(action)?;
    Ok(uuid.trim().replace('-', ""))
}

fn write(path: &str, text: &str) -> Result<(), Error> {
    fs::create_dir_all("/etc").doing(|| "make /etc".to_owned())?;
    fs::write(path, text).doing(|| format!("write {path}"))
}
