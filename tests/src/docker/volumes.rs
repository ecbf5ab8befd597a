//! What a volume must be able to do beyond reading and writing: attributes, locks, sockets, mounts made later, events.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testkit::docker::IMAGE;
use testkit::{Run, eventually};

use super::{Docker, Running};
use crate::case::{Case, case, has, same, skip};

pub(super) const CASES: &[Case<Docker>] = &[
    case("files have owners, attributes, locks, holes and links as on any file system", files),
    case("a Unix socket of the host is reached through a bind mount", socket),
    case("Docker's own socket answers in a container", docker_socket),
    case("a mount made on the host below a bind is seen with rslave and rshared", propagation),
    case("a named volume starts with the image's files, and --volumes-from shares it", named),
    case("a directory below a volume and a volume below a volume are mounted", nested),
    case("docker cp reaches into volumes, running and stopped", copy_into_volume),
    case("a program that watches a volume hears of what the host changes in it", watched),
    case("a volume that has vanished is an error that names it, and the container stays", vanished),
    case("--group-add reaches a directory that only the group may write", groups),
];

/// Has the host's programs in the container: those of busybox do not suffice.
const HOST_PROGRAMS: [&str; 6] =
    ["-v", "/usr:/usr:ro", "-v", "/usr/lib:/lib:ro", "-v", "/usr/lib64:/lib64:ro"];

/// A directory for a case, with one of the programs in it; removed when dropped.
struct Place(PathBuf);

impl Place {
    fn new(docker: &Docker) -> Result<Self> {
        Ok(Self(docker.directory()?.canonicalize()?))
    }

    /// The flags by which a container has the host's perl, and `text` as a program of it at /program.
    fn perl(&self, text: &str) -> Result<Vec<String>> {
        if !Path::new("/usr/bin/perl").exists() || !Path::new("/lib").is_symlink() {
            return Err(skip("perl below a merged /usr"));
        }
        let program = self.0.join("program");
        fs::write(&program, text)?;
        let mount = format!("{}:/program:ro", program.display());
        Ok(HOST_PROGRAMS.map(str::to_owned).into_iter().chain(["-v".to_owned(), mount]).collect())
    }

    /// `-v` of a new directory here.
    fn volume(&self, name: &str, target: &str) -> Result<String> {
        fs::create_dir_all(self.0.join(name))?;
        Ok(format!("{}:{target}", self.0.join(name).display()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

fn with<'a>(flags: &'a [String], more: &[&'a str]) -> Vec<&'a str> {
    flags.iter().map(String::as_str).chain(more.iter().copied()).collect()
}

/// What the program in files.pl finds on any file system.
const FILES: &str = "mode: 4751
owner: 1234:2345
link: 2
user xattr: okv
trusted xattr: okv
capability: ok20
flock: held
posix lock: held
ofd lock: held
sparse: sparse
seek_data: 1048576
seek_hole: 1052672
punch: ok
punched: no data: No such device or address
fallocate: 1
mmap: world
rename: ok
exchange: ok
symlink: f
mkfifo: ok
mknod: ok
unix socket: ok
connect: ok
unlinked: abc 0
direct: ok
atime: 1000,2000
statfs: ok
suid cleared: 755
copy_file_range: 5";

fn files(docker: &Docker) -> Result<()> {
    let place = Place::new(docker)?;
    let flags = place.perl(include_str!("programs/files.pl"))?;
    let volume = place.volume("volume", "/volume")?;
    // For trusted.* attributes.
    let flags = with(&flags, &["-v", &volume, "--cap-add", "SYS_ADMIN"]);
    let text = docker.once(&flags, "perl /program /volume && echo -- && perl /program /root")?;
    for part in text.split("--") {
        for (found, expected) in part.trim().lines().zip(FILES.lines()) {
            same("a fact", found, expected)?;
        }
        same("facts", part.trim().lines().count(), FILES.lines().count())?;
    }
    Ok(())
}

/// A server on the host that answers each connection with what it has heard, once that has ended.
fn echo(path: &Path) -> Result<()> {
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = connection?;
            let mut text = Vec::new();
            connection.read_to_end(&mut text)?;
            if text == b"end" {
                break;
            }
            connection.write_all(format!("{} bytes: ", text.len()).as_bytes())?;
            connection.write_all(&text[..text.len().min(10)])?;
        }
        Ok::<_, std::io::Error>(())
    });
    Ok(())
}

fn socket(docker: &Docker) -> Result<()> {
    let place = Place::new(docker)?;
    let flags = place.perl(include_str!("programs/connect.pl"))?;
    let path = place.0.join("socket");
    echo(&path)?;
    let (plain, read_only) =
        (format!("{}:/socket", path.display()), format!("{}:/ro/socket:ro", path.display()));
    let flags = with(&flags, &["-v", &plain, "-v", &read_only]);
    let line = "test -S /socket && perl /program /socket hello; echo; perl /program /ro/socket again; echo; \
                perl -e 'exec qw(perl /program /socket), \"x\" x 100000'";
    let text = docker.once(&flags, line)?;
    same("answers", text.as_str(), "5 bytes: hello\n5 bytes: again\n100000 bytes: xxxxxxxxxx")?;
    // A server that was started again is another socket at the same place; with runc, the mount is of the old one.
    if docker.is_kata {
        let container = docker.sleeper(&flags)?;
        std::os::unix::net::UnixStream::connect(&path)?.write_all(b"end")?;
        fs::remove_file(&path)?;
        echo(&path)?;
        let text = container.exec(&[], "perl /program /socket anew")?;
        same("the new server's answer", text.as_str(), "4 bytes: anew")?;
        container.remove()?;
    }
    std::os::unix::net::UnixStream::connect(&path)?.write_all(b"end")?;
    Ok(())
}

fn docker_socket(docker: &Docker) -> Result<()> {
    let place = Place::new(docker)?;
    let flags = place.perl(include_str!("programs/connect.pl"))?;
    let address = docker.daemon.address();
    let socket = format!("{}:/var/run/docker.sock", address.trim_start_matches("unix://"));
    let line =
        "perl /program /var/run/docker.sock \"$(printf 'GET /_ping HTTP/1.0\\r\\n\\r\\n.')\"";
    let text = docker.once(&with(&flags, &["-v", &socket]), line)?;
    has(&text, "200 OK")?;
    ensure!(text.ends_with("OK"), "{text}");
    Ok(())
}

/// A directory that is a mount of its own, and shared.
struct SharedMount(PathBuf);

impl SharedMount {
    fn new(path: &Path) -> Result<Self> {
        fs::create_dir(path)?;
        let mount = |words: &[&str]| Run::new("mount").args(words).arg(path).text();
        mount(&["-t", "tmpfs", "-o", "size=1m", "shared"])?;
        let shared = Self(path.to_owned());
        mount(&["--make-shared"])?;
        Ok(shared)
    }
}

impl Drop for SharedMount {
    fn drop(&mut self) {
        drop(Run::new("umount").args(["-R", "-l"]).arg(&self.0).output());
    }
}

fn propagation(docker: &Docker) -> Result<()> {
    let place = Place::new(docker)?;
    let shared = SharedMount::new(&place.0.join("shared"))?;
    let at = |target: &str, how: &str| format!("{}:/{target}:{how}", shared.0.display());
    let (slave, both, private) = (at("s", "rslave"), at("b", "rshared"), at("p", "rprivate"));
    let container = docker.sleeper(&["-v", &slave, "-v", &both, "-v", &private])?;
    let later = shared.0.join("later");
    fs::create_dir(&later)?;
    Run::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "later"]).arg(&later).text()?;
    fs::write(later.join("file"), "seen\n")?;
    let text = container.exec(&[], "cat /s/later/file /b/later/file; ls /p/later")?;
    same("what is seen", text.as_str(), "seen\nseen")?;
    // Lazily: what a guest has looked up keeps a mount busy.
    Run::new("umount").arg("-l").arg(&later).text()?;
    let line = "while ls /s/later /b/later | grep -q file; do sleep 0.1; done";
    container.exec(&[], line).context("the mount that has gone is still seen")?;
    container.remove()
}

fn named(docker: &Docker) -> Result<()> {
    let volume = docker.name("named");
    let mount = format!("{volume}:/home");
    let first = docker.sleeper(&["-v", &format!("{volume}:/etc"), "--tmpfs", "/scratch"])?;
    let outcome = (|| {
        has(&first.exec(&[], "cat /etc/passwd; echo mine >/etc/mine")?, "root:x:0:0")?;
        let from = format!("{}:ro", first.id);
        let text =
            docker.once(&["--volumes-from", &from], "cat /etc/mine; touch /etc/x || echo ro")?;
        same("by --volumes-from", text.as_str(), "mine\nro")?;
        let text = docker.once(&["-v", &mount], "cat /home/mine")?;
        same("by name", text.as_str(), "mine")
    })();
    first.remove()?;
    docker.run(&["volume", "rm", &volume]).text()?;
    outcome
}

fn nested(docker: &Docker) -> Result<()> {
    let place = Place::new(docker)?;
    fs::create_dir_all(place.0.join("outer/sub"))?;
    fs::write(place.0.join("outer/sub/file"), "deep\n")?;
    let sub = format!("type=bind,source={}/outer/sub,target=/sub,readonly", place.0.display());
    let outer = place.volume("outer", "/outer")?;
    let inner = place.volume("inner", "/outer/inner")?;
    fs::write(place.0.join("inner/file"), "inner\n")?;
    // The inner one is named first: order is by target, not by flag.
    let flags = ["-v", &inner, "-v", &outer, "--mount", &sub, "--tmpfs", "/outer/scratch:size=1m"];
    let line = "cat /sub/file /outer/sub/file /outer/inner/file; echo x >/outer/inner/new; echo y >/outer/scratch/y; \
                touch /sub/x 2>/dev/null || echo ro";
    same("files", docker.once(&flags, line)?.as_str(), "deep\ndeep\ninner\nro")?;
    same("written", fs::read_to_string(place.0.join("inner/new"))?.as_str(), "x\n")?;
    ensure!(!place.0.join("outer/scratch/y").exists(), "the tmpfs is on the host");
    Ok(())
}

fn copy_into_volume(docker: &Docker) -> Result<()> {
    let place = Place::new(docker)?;
    let volume = place.volume("volume", "/data")?;
    fs::write(place.0.join("file"), "copied\n")?;
    let container = docker.sleeper(&["-v", &volume])?;
    let copy = |container: &Running<'_>, name: &str| {
        let target = format!("{}:/data/{name}", container.id);
        docker.run(&["cp"]).arg(place.0.join("file")).arg(target).text()
    };
    copy(&container, "running")?;
    same("running", container.exec(&[], "cat /data/running")?.as_str(), "copied")?;
    container.run(&["stop", "-t", "30"]).text()?;
    copy(&container, "stopped")?;
    same("stopped", fs::read_to_string(place.0.join("volume/stopped"))?.as_str(), "copied\n")?;
    container.remove()
}

fn watched(docker: &Docker) -> Result<()> {
    let place = Place::new(docker)?;
    let flags = place.perl(include_str!("programs/watch.pl"))?;
    let volume = place.volume("volume", "/data")?;
    let directory = place.0.join("volume");
    fs::write(directory.join("old"), "old")?;
    let container = docker.start(&with(&flags, &["-v", &volume]), "perl /program /data")?;
    container.wait_for_log("watching")?;
    let mut number = 0;
    // Again and again: with a virtual machine it takes a moment from the first watch on until the host looks.
    for name in ["old", "new"] {
        eventually(Duration::from_mins(2), &format!("the watcher hears of {name}"), || {
            number += 1;
            fs::write(directory.join(name), format!("{number}"))?;
            Ok(container.run(&["logs"]).text()?.contains(&format!(" {name}")).then_some(()))
        })?;
    }
    let logs = container.run(&["logs"]).text()?;
    ensure!(logs.lines().any(|line| line == "2 old"), "no change of contents: {logs}");
    let text = container.exec(&[], "cat /data/new")?;
    same("what is read then", text, number.to_string())?;
    container.remove()
}

fn vanished(docker: &Docker) -> Result<()> {
    let place = Place::new(docker)?;
    let source = place.0.join("vanishing");
    fs::create_dir(&source)?;
    let mount = format!("type=bind,source={},target=/data", source.display());
    let words = ["create", "--runtime", &docker.runtime, "--mount", &mount, IMAGE, "true"];
    let id = docker.run(&words).text()?;
    fs::remove_dir(&source)?;
    let output = docker.run(&["start", "-a", &id]).output()?;
    let state = docker.run(&["inspect", "--format", "{{.State.Status}}", &id]).text();
    fs::create_dir(&source)?;
    let again = docker.run(&["start", "-a", &id]).output();
    docker.run(&["rm", "-f", &id]).text()?;
    ensure!(output.code != 0, "{output}");
    has(&output.stderr, &source.display().to_string())?;
    same("status", state?.as_str(), "created")?;
    same("the exit code once it is back", again?.code, 0)
}

fn groups(docker: &Docker) -> Result<()> {
    let place = Place::new(docker)?;
    let volume = place.volume("volume", "/data")?;
    let directory = place.0.join("volume");
    std::os::unix::fs::chown(&directory, Some(5), Some(2000))?;
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o2770))?;
    let line = "id -G; touch /data/x && stat -c '%u %g' /data/x";
    let flags = ["--user", "1000:1000", "-v", &volume];
    let output = docker.once_run(&flags, line).output()?;
    ensure!(output.code != 0, "anybody may write: {output}");
    let text = docker.once(&[&flags[..], &["--group-add", "2000"]].concat(), line)?;
    same("groups and owner", text.as_str(), "1000 2000\n1000 2000")
}
