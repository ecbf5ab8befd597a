//! cp, diff, commit, volumes, tmpfs, read-only roots.

use std::fs;

use anyhow::{Result, ensure};

use super::Docker;
use crate::case::{Case, case, has, same};

pub(super) const CASES: &[Case<Docker>] = &[
    case("docker cp copies both ways, running and stopped", copy),
    case("docker diff and commit have what the container wrote", diff_and_commit),
    case("volumes are shared both ways, and :ro is enforced", volumes),
    case("a single file is mounted", single_file),
    case("--read-only, --tmpfs and --shm-size hold", mounts),
    case("10 MiB written to the root file system are whole on the host", large_file),
];

fn copy(docker: &Docker) -> Result<()> {
    let container = docker.sleeper(&[])?;
    let dir = docker.directory()?;
    let (to, from) = (dir.join("to"), dir.join("from"));
    fs::write(&to, "from the host\n")?;
    let place = |path: &str| format!("{}:{path}", container.id);
    docker.run(&["cp"]).arg(&to).arg(place("/tmp/to")).text()?;
    same("into a running one", container.exec(&[], "cat /tmp/to")?.as_str(), "from the host")?;
    container.exec(&[], "echo from the guest >/root/from; mkdir /root/d; echo x >/root/d/x")?;
    docker.run(&["cp"]).arg(place("/root/from")).arg(&from).text()?;
    same("from a running one", fs::read_to_string(&from)?.as_str(), "from the guest\n")?;
    container.run(&["stop", "-t", "30"]).text()?;
    docker.run(&["cp"]).arg(place("/root/d")).arg(dir.join("d")).text()?;
    same("from a stopped one", fs::read_to_string(dir.join("d/x"))?.as_str(), "x\n")?;
    docker.run(&["cp"]).arg(&to).arg(place("/root/again")).text()?;
    container.run(&["start"]).text()?;
    same("into a stopped one", container.exec(&[], "cat /root/again")?.as_str(), "from the host")?;
    fs::remove_dir_all(dir)?;
    container.remove()
}

fn diff_and_commit(docker: &Docker) -> Result<()> {
    let container =
        docker.start(&[], "echo text >/added; rm /etc/group; echo x >>/etc/passwd; sync")?;
    container.run(&["wait"]).text()?;
    let diff = container.run(&["diff"]).text()?;
    for line in ["A /added", "D /etc/group", "C /etc/passwd"] {
        has(&diff, line)?;
    }
    let image = docker.name("committed");
    container.run(&["commit"]).arg(&image).text()?;
    let run = docker.run(&["run", "--rm", "--runtime", &docker.runtime, &image, "cat", "/added"]);
    let text = run.text();
    docker.run(&["rmi", &image]).text()?;
    same("in the new image", text?.as_str(), "text")?;
    container.remove()
}

fn volumes(docker: &Docker) -> Result<()> {
    let dir = docker.directory()?;
    fs::write(dir.join("from-host"), "outside\n")?;
    let (rw, ro) = (format!("{}:/rw", dir.display()), format!("{}:/ro:ro", dir.display()));
    let container = docker.sleeper(&["-v", &rw, "-v", &ro])?;
    same(
        "read",
        container.exec(&[], "cat /rw/from-host /ro/from-host")?.as_str(),
        "outside\noutside",
    )?;
    let output = container.exec_run(&[], "touch /ro/x").output()?;
    ensure!(output.code != 0, "/ro is writable");
    has(&output.stderr, "Read-only file system")?;
    container.exec(&[], "echo inside >/rw/from-guest; mkdir /rw/d")?;
    same("on the host", fs::read_to_string(dir.join("from-guest"))?.as_str(), "inside\n")?;
    fs::write(dir.join("d/later"), "later\n")?;
    same("made later", container.exec(&[], "cat /rw/d/later")?.as_str(), "later")?;
    fs::remove_dir_all(&dir)?;
    container.remove()
}

fn single_file(docker: &Docker) -> Result<()> {
    let dir = docker.directory()?;
    let file = dir.join("file");
    fs::write(&file, "one\n")?;
    let volume = format!("{}:/etc/single", file.display());
    same(
        "text",
        docker.once(&["-v", &volume], "cat /etc/single; echo two >>/etc/single")?.as_str(),
        "one",
    )?;
    same("on the host", fs::read_to_string(&file)?.as_str(), "one\ntwo\n")?;
    Ok(fs::remove_dir_all(dir)?)
}

fn mounts(docker: &Docker) -> Result<()> {
    let flags = ["--read-only", "--tmpfs", "/scratch:size=8m", "--shm-size", "16m"];
    let line = "touch /x; touch /scratch/x && echo written; df -k /scratch /dev/shm | awk 'NR>1{print $2}'";
    let output = docker.once_run(&flags, line).output()?.success()?;
    same("sizes", output.text().as_str(), "written\n8192\n16384")?;
    has(&output.stderr, "Read-only file system")
}

fn large_file(docker: &Docker) -> Result<()> {
    let line = "dd if=/dev/urandom of=/large bs=64k count=160 2>/dev/null; sync; sha256sum /large";
    let container = docker.start(&[], line)?;
    container.run(&["wait"]).text()?;
    let logs = container.run(&["logs"]).text()?;
    let inside = logs.split_whitespace().next().unwrap_or_default();
    let line = format!("docker cp {}:/large - | tar -xO | sha256sum", container.id);
    let outside = docker.daemon.shell(&line).text()?;
    same("checksum", outside.split_whitespace().next(), Some(inside))?;
    container.remove()
}
