//! Holds every driver to its own capabilities: the same script for all, the fake one first.
//!
//! `cargo test -p hypervisor --test conformance`. QEMU's part needs root, QEMU and a guest image: the one that
//! `KATA_IMAGE` names, else the source tree's, else the installed one.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "it is its own test harness")]

mod script;

use std::env;
use std::error::Error;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use hypervisor::fake::{Fake, Guest, Machine};
use hypervisor::{Hypervisor, Port, SharedDirectory, VmSpec, detect};
use image::Image;
use tokio::net::UnixStream;

type Outcome = Result<(), Box<dyn Error>>;

/// For one whole script.
const DEADLINE: Duration = Duration::from_mins(10);

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        // The drivers start this program again for a machine's device process.
        ["device", config] => serve_devices(config),
        ["--list", ..] => ExitCode::SUCCESS,
        _ => check_all(),
    }
}

fn serve_devices(config: &str) -> ExitCode {
    let served = serde_json::from_str(config)
        .map_err(|error| error.to_string())
        .and_then(|config| device::serve(config).map_err(|error| error.to_string()));
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn check_all() -> ExitCode {
    let fake = Fake::new(TestGuest);
    let mut good = run("fake", script::whole_life(&fake, &spec("/dev/null", "/dev/null")));
    good &= run("fake: a template", script::template(&fake, &spec("/dev/null", "/dev/null")));
    match qemu() {
        Err(need) => println!("qemu: SKIPPED: needs {need}"),
        Ok((driver, spec)) => {
            let driver = &*driver;
            good &= run("qemu: a whole life", script::whole_life(driver, &spec));
            good &= run("qemu: a template", script::template(driver, &spec));
            good &= run("qemu: a killed hypervisor", script::killed_from_outside(driver, &spec));
            good &= run("qemu: a guest that panics", script::panic(driver, &spec));
            good &= run("qemu: a missing program", script::missing_program(driver, &spec));
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn run(what: &str, script: impl Future<Output = Outcome>) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = runtime.map_err(Box::from).and_then(|runtime| {
        runtime.block_on(async { tokio::time::timeout(DEADLINE, script).await? })
    });
    match &outcome {
        Ok(()) => println!("{what}: ok"),
        Err(error) => println!("{what}: FAILED: {error}"),
    }
    outcome.is_ok()
}

/// The driver of QEMU and a machine for it, or what is missing.
fn qemu() -> Result<(Box<dyn Hypervisor>, VmSpec), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("root".into());
    }
    let there = Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status();
    there.map_err(|error| format!("qemu-system-x86_64: {error}"))?;
    let image = image().map_err(|error| error.to_string())?;
    let driver = hypervisor::driver("qemu").map_err(|error| error.to_string())?;
    Ok((driver, spec(image.kernel(), image.initrd())))
}

fn image() -> Result<Image, image::Error> {
    if let Some(directory) = env::var_os("KATA_IMAGE") {
        return Image::open(Path::new(&directory));
    }
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../build/share/kata-containers");
    Image::open(&tree).or_else(|_| Image::find())
}

fn spec(kernel: impl Into<PathBuf>, initrd: impl Into<PathBuf>) -> VmSpec {
    VmSpec {
        acceleration: detect().acceleration,
        vcpus: 1,
        max_vcpus: 2,
        memory_mib: 256,
        max_memory_mib: 512,
        kernel: kernel.into(),
        initrd: initrd.into(),
        cmdline: String::new(),
        // Each script puts its own directory in.
        share: Some(SharedDirectory { tag: "kata".into(), path: PathBuf::new() }),
        program: None,
        device_program: (env::current_exe().unwrap_or_default(), vec!["device".into()]),
    }
}

/// A guest with an agent that is ready at once and says nothing.
struct TestGuest;

impl Guest for TestGuest {
    fn boot(&self, machine: &Machine) {
        let machine = machine.clone();
        tokio::spawn(async move { machine.open(Port(protocol::READY_PORT)).await });
    }

    fn listens(&self, port: Port) -> bool {
        port.0 == protocol::CONTROL_PORT
    }

    fn serve(&self, _port: Port, _stream: UnixStream) {}
}
