//! QEMU's command line, as a pure function of what is asked.
//!
//! Chosen so that a guest boots soon: under emulation each device that a kernel probes costs it milliseconds. What was
//! measured is told at the options.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::RawFd;
use std::path::Path;

use serde_json::{Value, json};

use crate::back_ends::Sockets;
use crate::qemu::SLOTS;
use crate::{Acceleration, VmSpec};

/// The descriptors that QEMU inherits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Inherited {
    /// A connected socket, for its monitor.
    pub(super) qmp: RawFd,
    /// The writing end of a pipe, for what the guest writes to its serial console.
    pub(super) console: RawFd,
    /// The guest's memory, a memfd.
    pub(super) memory: RawFd,
}

/// Where a machine's state comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    /// The kernel's first instruction.
    Boot,
    /// A template, loaded by the monitor later; its back ends' devices are added after that. The kernel is in the
    /// template's memory: to read it anew would cost a third of the start, and its size in the host's memory once more.
    Template(Loader),
}

/// What QEMU puts into a machine to start a kernel of a kind. A template of it has the same in its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loader {
    /// Of an ELF image, by its PVH entry.
    Pvh,
    /// Of a bzImage.
    Linux,
}

impl Loader {
    /// That of `kernel`.
    pub(super) fn of(kernel: &Path) -> io::Result<Self> {
        let mut magic = [0; 4];
        File::open(kernel)?.read_exact(&mut magic)?;
        Ok(if magic == *b"\x7fELF" { Self::Pvh } else { Self::Linux })
    }

    fn rom(self) -> &'static str {
        match self {
            Self::Pvh => "pvh.bin",
            Self::Linux => "linuxboot_dma.bin",
        }
    }
}

/// The kernel's parameters on every machine.
///
/// - `panic=-1 reboot=t`: a panic or reboot is a triple fault at once, at which QEMU ends (`-no-reboot`).
/// - `cryptomgr.notests`: the kernel's self-tests of ciphers are a fifth of an emulated boot.
/// - `random.trust_cpu=on`: or the first reader of random numbers waits for entropy.
/// - `i8042.*`: there is no keyboard to look for.
const KERNEL: &str = "console=ttyS0 quiet panic=-1 reboot=t cryptomgr.notests random.trust_cpu=on \
                      no_timer_check tsc=reliable audit=0 i8042.noaux i8042.nokbd";

/// The kernel's parameters where memory can be added: it is used as soon as it is there, movable as far as the
/// kernel's own needs leave room, so that it can be taken away again. No bounce buffers, 64 MiB that the kernel else takes
/// where memory may lie beyond 4 GiB: no device needs them.
const KERNEL_MEMORY: &str =
    "memhp_default_state=online memory_hotplug.online_policy=auto-movable swiotlb=noforce";

/// The emulator's cache of translated code, in MiB: a bound, taken only as it fills. Booting takes some 40.
const TRANSLATION_CACHE: u32 = 256;

/// The command line, without the program's name.
pub(super) fn arguments(
    spec: &VmSpec,
    sockets: &Sockets,
    fds: Inherited,
    from: Start,
) -> Vec<OsString> {
    let mut line = Line::default();
    line.words(&["-no-user-config", "-nodefaults", "-nographic", "-no-reboot", "-S"]);
    line.option(
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    );
    machine(spec, &mut line);
    memory(spec, fds.memory, &mut line);
    match from {
        Start::Boot => {
            line.option("-kernel", &spec.kernel);
            line.option("-initrd", &spec.initrd);
            line.option("-append", kernel_parameters(spec));
        }
        Start::Template(loader) => line.option("-option-rom", loader.rom()),
    }

    let Inherited { qmp, console, .. } = fds;
    line.option("-chardev", format!("socket,id=qmp,fd={qmp}"));
    line.option("-mon", "chardev=qmp,mode=control");
    line.option("-add-fd", format!("fd={console},set=1"));
    line.option("-chardev", "file,id=console,path=/dev/fdset/1,append=on");
    line.option("-serial", "chardev:console");
    sockets_of_back_ends(spec, sockets, &mut line);
    devices(spec, &mut line);
    match from {
        Start::Boot => {
            for (_, device) in back_end_devices(spec) {
                line.option("-device", device.to_string());
            }
        }
        Start::Template(_) => line.option("-incoming", "defer"),
    }
    line.words
}

fn machine(spec: &VmSpec, line: &mut Line) {
    line.option(
        "-machine",
        "q35,memory-backend=memory,sata=off,smbus=off,hpet=off,i8042=off,vmport=off,smm=off,usb=off,graphics=off",
    );
    // Native PCIe hot-plug: a device shows up in 0.1 s, where ACPI's takes an emulated guest a second.
    line.option("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off");
    match spec.acceleration {
        Acceleration::Kvm => {
            line.option("-accel", "kvm");
            line.option("-cpu", "host,pmu=off");
        }
        Acceleration::Tcg => {
            line.option("-accel", format!("tcg,thread=multi,tb-size={TRANSLATION_CACHE}"));
            line.option("-cpu", "max");
        }
    }
    let (cpus, most) = (spec.vcpus, spec.max_vcpus.max(spec.vcpus));
    // A socket each: x86's unit of hot-plug that needs no knowledge of its neighbours.
    line.option("-smp", format!("{cpus},sockets={most},cores=1,threads=1,maxcpus={most}"));
}

fn memory(spec: &VmSpec, fd: RawFd, line: &mut Line) {
    let size = spec.memory_mib;
    // Shared, as the device process must see it.
    line.option(
        "-object",
        format!("memory-backend-file,id=memory,size={size}M,share=on,mem-path=/proc/self/fd/{fd}"),
    );
    match extra_memory(spec) {
        0 => line.option("-m", format!("{size}M")),
        extra => {
            line.option("-m", format!("{size}M,maxmem={}M", size + extra));
            line.option(
                "-object",
                format!("memory-backend-memfd,id=extra,size={extra}M,share=on,reserve=off"),
            );
        }
    }
}

/// How many MiB can be added: what the spec says, in whole blocks of Linux's memory hot-plug.
pub(super) fn extra_memory(spec: &VmSpec) -> u32 {
    const BLOCK: u32 = 128;
    spec.max_memory_mib.saturating_sub(spec.memory_mib) / BLOCK * BLOCK
}

fn kernel_parameters(spec: &VmSpec) -> String {
    let mut parameters = KERNEL.to_owned();
    if extra_memory(spec) > 0 {
        parameters.extend([" ", KERNEL_MEMORY]);
    }
    if !spec.cmdline.is_empty() {
        parameters.extend([" ", &*spec.cmdline]);
    }
    parameters
}

fn sockets_of_back_ends(spec: &VmSpec, sockets: &Sockets, line: &mut Line) {
    let socket = |id: &str, path: &Path| option_with_path(&format!("socket,id={id},path="), path);
    line.option("-chardev", socket("vsock", &sockets.vsock));
    if spec.share.is_some() {
        line.option("-chardev", socket("fs", &sockets.fs));
    }
}

/// The devices of the device process, by their ids: in JSON, which the command line takes as well as the monitor.
///
/// They sit in root ports, so that they can be taken out before a template is saved and put into what is made of it.
pub(super) fn back_end_devices(spec: &VmSpec) -> Vec<(&'static str, Value)> {
    let vsock = json!({
        "driver": "vhost-user-vsock-pci",
        "id": "vsock",
        "bus": "port-vsock",
        "chardev": "vsock",
        "disable-legacy": "on",
    });
    let fs = spec.share.as_ref().map(|share| {
        let device = json!({
            "driver": "vhost-user-fs-pci",
            "id": "fs",
            "bus": "port-fs",
            "chardev": "fs",
            "tag": share.tag,
            "queue-size": 1024,
        });
        ("fs", device)
    });
    [("vsock", vsock)].into_iter().chain(fs).collect()
}

fn devices(spec: &VmSpec, line: &mut Line) {
    line.option("-object", "rng-builtin,id=random");
    line.option("-device", "virtio-rng-pci,id=rng,rng=random,disable-legacy=on");
    // Memory that the guest frees goes back to the host.
    line.option(
        "-device",
        "virtio-balloon-pci,id=balloon,free-page-reporting=on,deflate-on-oom=on,disable-legacy=on",
    );
    if extra_memory(spec) > 0 {
        line.option(
            "-device",
            "virtio-mem-pci,id=mem,memdev=extra,requested-size=0,disable-legacy=on",
        );
    }
    // All functions of few devices of the root bus: those are probed faster than devices.
    let ports = ["port-vsock".to_owned(), "port-fs".to_owned()].into_iter();
    for (number, id) in ports.chain((0..SLOTS).map(port)).enumerate() {
        let (device, function, chassis) = (0x1c - number / 8, number % 8, number + 1);
        line.option(
            "-device",
            format!(
                "pcie-root-port,id={id},chassis={chassis},slot={number},addr={device:#x}.{function},multifunction=on,io-reserve=0"
            ),
        );
    }
}

/// The id of the root port that is this slot.
pub(super) fn port(slot: usize) -> String {
    format!("port{slot}")
}

/// A comma ends an option's value; two are one.
fn option_with_path(before: &str, path: &Path) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut bytes = before.as_bytes().to_vec();
    for &byte in path.as_os_str().as_bytes() {
        bytes.extend_from_slice(if byte == b',' { b",," } else { std::slice::from_ref(&byte) });
    }
    OsString::from_vec(bytes)
}

#[derive(Default)]
struct Line {
    words: Vec<OsString>,
}

impl Line {
    fn words(&mut self, words: &[&str]) {
        self.words.extend(words.iter().map(OsString::from));
    }

    fn option(&mut self, name: &str, value: impl Into<OsString>) {
        self.words.extend([name.into(), value.into()]);
    }
}

#[cfg(test)]
mod tests {
    use super::{Inherited, Start, arguments};
    use crate::back_ends::Sockets;
    use crate::{Acceleration, SharedDirectory, VmSpec};
    use std::path::Path;

    fn spec() -> VmSpec {
        VmSpec {
            acceleration: Acceleration::Tcg,
            vcpus: 1,
            max_vcpus: 1,
            memory_mib: 256,
            max_memory_mib: 256,
            kernel: "/image/vmlinux".into(),
            initrd: "/image/initrd".into(),
            cmdline: String::new(),
            share: Some(SharedDirectory { tag: "kata".into(), path: "/share".into() }),
            program: None,
            device_program: ("/usr/bin/kata".into(), vec!["device".into()]),
        }
    }

    /// The command line, an option a line.
    fn lines(spec: &VmSpec, dir: &str) -> String {
        let sockets = Sockets::of(Path::new(dir));
        arguments(spec, &sockets, Inherited { qmp: 7, console: 9, memory: 11 }, Start::Boot)
            .iter()
            .map(|word| word.to_str().unwrap())
            .map(
                |word| if word.starts_with('-') { format!("\n{word}") } else { format!(" {word}") },
            )
            .collect::<String>()
            .trim_start()
            .to_owned()
    }

    #[test]
    fn the_whole_command_line_under_emulation() {
        assert_eq!(lines(&spec(), "/vm"), include_str!("golden/tcg.txt").trim_end());
    }

    #[test]
    fn kvm_takes_the_hosts_cpu() {
        let lines = lines(&VmSpec { acceleration: Acceleration::Kvm, ..spec() }, "/vm");
        assert!(lines.contains("\n-accel kvm\n-cpu host,pmu=off\n"), "{lines}");
        assert!(!lines.contains("tcg"), "{lines}");
    }

    #[test]
    fn room_to_grow_is_there_from_the_start() {
        let lines = lines(&VmSpec { max_vcpus: 4, max_memory_mib: 1200, ..spec() }, "/vm");
        assert!(lines.contains("\n-smp 1,sockets=4,cores=1,threads=1,maxcpus=4\n"), "{lines}");
        // Whole blocks of 128 MiB only: 7 of them.
        assert!(lines.contains("\n-m 256M,maxmem=1152M\n"), "{lines}");
        assert!(lines.contains("id=extra,size=896M,share=on,reserve=off"), "{lines}");
        assert!(lines.contains("virtio-mem-pci"), "{lines}");
        assert!(lines.contains("auto-movable"), "{lines}");
    }

    #[test]
    fn no_share_no_virtio_fs() {
        let lines = lines(&VmSpec { share: None, ..spec() }, "/vm");
        assert!(!lines.contains("vhost-user-fs"), "{lines}");
    }

    #[test]
    fn the_callers_kernel_parameters_come_last() {
        let lines = lines(&VmSpec { cmdline: "agent.log=debug".into(), ..spec() }, "/vm");
        assert!(lines.contains(" agent.log=debug\n"), "{lines}");
    }

    #[test]
    fn a_comma_in_a_path_stays_in_the_path() {
        let lines = lines(&spec(), "/a,b");
        assert!(lines.contains("path=/a,,b/vhost-vsock.sock\n"), "{lines}");
    }
}
