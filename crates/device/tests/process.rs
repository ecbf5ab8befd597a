//! A device process as its parent sees it: jailed, and gone when it should be. Needs root.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a test program without a harness"
)]

use std::fs;
use std::io::{ErrorKind, Read, Write, pipe};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use device::{Config, Fs};
use rustix::io::FdFlags;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

fn main() -> ExitCode {
    if let Some(config) =
        std::env::args().nth(2).filter(|_| std::env::args().nth(1).as_deref() == Some("device"))
    {
        let config = serde_json::from_str(&config).expect("the test wrote it");
        return match device::serve(config) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
        };
    }
    let tests: [(&str, fn()); 5] = [
        ("the_end_of_the_lifeline_ends_it", the_end_of_the_lifeline_ends_it),
        (
            "it_can_reach_nothing_but_the_shared_directory",
            it_can_reach_nothing_but_the_shared_directory,
        ),
        (
            "without_a_shared_directory_its_root_is_empty",
            without_a_shared_directory_its_root_is_empty,
        ),
        ("mounts_that_come_later_show_up", mounts_that_come_later_show_up),
        ("a_descriptor_of_another_kind_is_named", a_descriptor_of_another_kind_is_named),
    ];
    let root = rustix::process::geteuid().is_root();
    for (name, test) in tests {
        if root {
            test();
            println!("test {name} ... ok");
        } else {
            println!("test {name} ... SKIPPED: needs root");
        }
    }
    ExitCode::SUCCESS
}

/// A running device process.
struct Device {
    child: Child,
    lifeline: Option<OwnedFd>,
    dir: tempfile::TempDir,
}

impl Device {
    fn start(with_fs: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let share = dir.path().join("share");
        fs::create_dir(&share).unwrap();
        fs::write(share.join("inside"), "").unwrap();
        rustix::mount::mount_bind(&share, &share).unwrap();
        rustix::mount::mount_change(&share, MountPropagationFlags::SHARED).unwrap();
        let listener = |name| UnixListener::bind(dir.path().join(name)).unwrap();
        let (vsock, streams, files) = (listener("vsock"), listener("streams"), listener("fs"));
        let (read, write) = pipe().unwrap();
        let (_ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        let config = Config {
            lifeline: inherited(&read),
            vsock_listener: inherited(&vsock),
            guest_cid: 3,
            streams_listener: inherited(&streams),
            host_streams: inherited(&theirs),
            fs: with_fs.then(|| Fs { listener: inherited(&files), directory: share }),
        };
        let child = command(&config).spawn().unwrap();
        // It answers clients when all else is done: this one it shows the door.
        let mut client = UnixStream::connect(dir.path().join("streams")).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        client
            .write_all(
                b"nonsense
",
            )
            .unwrap();
        let answer = client.read(&mut [0]);
        assert!(!answer.is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "no answer");
        Self { child, lifeline: Some(write.into()), dir }
    }

    fn share(&self) -> PathBuf {
        self.dir.path().join("share")
    }

    fn proc(&self, name: &str) -> PathBuf {
        Path::new("/proc").join(self.child.id().to_string()).join(name)
    }

    fn status(&self, field: &str) -> String {
        let text = fs::read_to_string(self.proc("status")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{field}:")));
        line.unwrap_or_default().trim().to_owned()
    }

    fn root(&self) -> Vec<String> {
        let entries = fs::read_dir(self.proc("root")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
        rustix::mount::unmount(self.share(), UnmountFlags::DETACH).unwrap();
    }
}

fn inherited(fd: &impl std::os::fd::AsFd) -> RawFd {
    rustix::io::fcntl_setfd(fd, FdFlags::empty()).unwrap();
    fd.as_fd().as_raw_fd()
}

fn command(config: &Config) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg("device").arg(serde_json::to_string(config).unwrap());
    command
}

fn the_end_of_the_lifeline_ends_it() {
    let mut device = Device::start(true);
    drop(device.lifeline.take());
    assert!(device.child.wait().unwrap().success());
}

fn it_can_reach_nothing_but_the_shared_directory() {
    let device = Device::start(true);
    assert_eq!(device.root(), ["inside"]);
    let mounts = fs::read_to_string(device.proc("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    for namespace in ["ns/mnt", "ns/net", "ns/ipc"] {
        let own = fs::read_link(Path::new("/proc/self").join(namespace)).unwrap();
        assert_ne!(fs::read_link(device.proc(namespace)).unwrap(), own);
    }
    let capabilities = device.status("CapEff");
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP: see capabilities(7).
    let kept = 0x8800_00db_u64;
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        let set = u64::from_str_radix(&device.status(set), 16).unwrap();
        assert_eq!(set & !kept, 0, "{capabilities}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(u64::from_str_radix(&device.status(set), 16).unwrap(), 0);
    }
    assert_eq!(device.status("NoNewPrivs"), "1");
}

fn without_a_shared_directory_its_root_is_empty() {
    let device = Device::start(false);
    assert_eq!(device.root(), Vec::<String>::new());
}

fn mounts_that_come_later_show_up() {
    let device = Device::start(true);
    let (other, target) = (device.dir.path().join("other"), device.share().join("later"));
    fs::create_dir(&other).unwrap();
    fs::write(other.join("mounted"), "").unwrap();
    fs::create_dir(&target).unwrap();
    rustix::mount::mount_bind(&other, &target).unwrap();
    let seen = device.proc("root/later/mounted");
    assert!(seen.exists());
    rustix::mount::unmount(&target, UnmountFlags::DETACH).unwrap();
    assert!(!seen.exists());
    // And nothing that it could mount would come back: see mount_namespaces(7), "master".
    let mounts = fs::read_to_string(device.proc("mountinfo")).unwrap();
    assert!(mounts.contains(" master:") && !mounts.contains(" shared:"), "{mounts}");
    rustix::mount::mount("none", &target, "tmpfs", MountFlags::empty(), None).unwrap();
    rustix::mount::unmount(&target, UnmountFlags::DETACH).unwrap();
}

fn a_descriptor_of_another_kind_is_named() {
    let (stream, other) = UnixStream::pair().unwrap();
    let (stream, other) = (inherited(&stream), inherited(&other));
    let number = |fd| Config {
        lifeline: stream,
        vsock_listener: fd,
        guest_cid: 3,
        streams_listener: 900,
        host_streams: 901,
        fs: None,
    };
    for (fd, expected) in [
        (other, "vsock_listener, is not a listening Unix stream socket"),
        (stream, "an open descriptor that nothing else names"),
        (899, "vsock_listener, is not open"),
    ] {
        let mut child = command(&number(fd)).stderr(Stdio::piped()).spawn().unwrap();
        let mut text = String::new();
        child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        assert!(text.contains(expected), "{text}");
        assert!(!child.wait().unwrap().success());
    }
}
