//! run, exec, cp, stats, stop, kill, logs, pause, inspect, top, commit, volumes, networks, pods.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use testkit::podman::IMAGE;
use testkit::{Run, eventually};

use super::Podman;
use crate::case::{Case, case, has, same};

pub(super) const CASES: &[Case<Podman>] = &[
    case("podman run prints the kernel of the container", |podman| {
        let inside = podman.once(&[], "uname -r").text()?;
        let outside = Run::new("uname").arg("-r").text()?;
        same("an own kernel", inside != outside, podman.is_kata)
    }),
    case("podman run ends with 0, the program's code, 125, 126 and 127", exit_codes),
    case("podman run -i passes stdin, stdout and stderr", streams),
    case("podman run -it is a terminal", terminal),
    case("podman exec has user, directory, environment and exit code", exec),
    case("podman logs, ps, inspect and wait tell of a container", detached),
    case("podman stop, kill and restart", stop),
    case("podman pause stops a container and unpause continues it", pause),
    case("podman stats and top tell of a container", stats),
    case("podman cp goes into and out of a running and a stopped container", copy),
    case("podman commit, diff and export have the container's files", commit),
    case("podman volumes keep their files", volumes),
    case("podman networks: an address, published ports, names", network),
    case("limits of memory, CPU, processes, files and sysctls hold", limits),
    case("a container that takes more than its memory is killed", out_of_memory),
    case("podman pod: containers share their network and end together", pod),
    case("conmon killed: the container is seen to have ended, and is removed", conmon_killed),
];

fn exit_codes(podman: &Podman) -> Result<()> {
    podman.once(&[], "true").output()?.ended(0)?;
    podman.once(&[], "exit 42").output()?.ended(42)?;
    let parent = podman.cgroup_parent();
    let run = |program: &str| {
        podman.run(&["run", "--rm", "--cgroup-parent", &parent, IMAGE, program]).output()
    };
    has(&run("no-such-program")?.ended(127)?.stderr.to_lowercase(), "executable file not found")?;
    has(&run("/bin/not-executable")?.ended(126)?.stderr.to_lowercase(), "permission denied")?;
    podman.run(&["run", "--rm", "--no-such-flag", IMAGE]).output()?.ended(125).map(drop)
}

fn streams(podman: &Podman) -> Result<()> {
    let run = podman.once(&["-i"], "cat; echo err >&2").stdin("one\ntwo\n");
    let output = run.output()?.success()?;
    same("stdout", output.text().as_str(), "one\ntwo")?;
    has(&output.stderr, "err")
}

fn terminal(podman: &Podman) -> Result<()> {
    let parent = podman.cgroup_parent();
    let words = ["run", "--rm", "-it", "--cgroup-parent", &parent, IMAGE, "sh"];
    let mut terminal = podman.on_terminal(&words)?;
    terminal.send("tty && echo be''gin\n")?;
    has(&terminal.expect("begin")?, "/dev/pts/")?;
    terminal.send("exit 5\n")?;
    same("exit code", terminal.finish()?.1, 5)
}

fn exec(podman: &Podman) -> Result<()> {
    let container = podman.sleeper(&["-e", "BASE=x"])?;
    let flags = ["-u", "1000:2000", "-w", "/tmp", "-e", "WORD=a b"];
    let line = "echo $(id -u):$(id -g) $(pwd) $WORD $BASE";
    same("context", container.exec(&flags, line).text()?.as_str(), "1000:2000 /tmp a b x")?;
    container.exec(&[], "exit 17").output()?.ended(17)?;
    same("stdin", container.exec(&["-i"], "cat").stdin("through").text()?.as_str(), "through")?;
    let missing = podman.run(&["exec", &container.id, "no-such-program"]).output()?;
    missing.ended(127)?;
    container.remove()
}

fn detached(podman: &Podman) -> Result<()> {
    let name = podman.name("detached");
    let flags = ["--name", &name, "--label", "a=b"];
    let container = podman.start(&flags, "echo out; echo err >&2; sleep 2; exit 6")?;
    has(&podman.run(&["ps", "--format", "{{.Names}} {{.Status}}"]).text()?, &name)?;
    ensure!(container.inspect("{{.State.Pid}}")?.parse::<u32>()? > 1, "no pid");
    same("wait", container.run(&["wait"]).text()?.as_str(), "6")?;
    let logs = container.run(&["logs"]).output()?.success()?;
    same("logs", (logs.text().as_str(), logs.stderr.as_str()), ("out", "err\n"))?;
    let state = "{{.State.Status}} {{.State.ExitCode}}";
    same("state", container.inspect(state)?.as_str(), "exited 6")?;
    container.remove()
}

fn stop(podman: &Podman) -> Result<()> {
    let line = "trap 'echo stopped; exit 9' TERM; trap 'echo usr1' USR1; echo ready; \
                while :; do sleep 0.1; done";
    let container = podman.start(&[], line)?;
    container.wait_for_log("ready")?;
    container.run(&["kill", "-s", "USR1"]).text()?;
    container.wait_for_log("usr1")?;
    container.run(&["stop", "-t", "60"]).text()?;
    same("exit code", container.inspect("{{.State.ExitCode}}")?.as_str(), "9")?;
    container.run(&["restart"]).text()?;
    container.wait_for_log("stopped\nready")?;
    container.run(&["kill"]).text()?;
    same("wait", container.run(&["wait"]).text()?.as_str(), "137")?;
    container.remove()
}

fn pause(podman: &Podman) -> Result<()> {
    let line = "while :; do date +%s%N >/time; sleep 0.1; done";
    let container = podman.start(&[], line)?;
    let time = || podman.run(&["cp", &format!("{}:/time", container.id), "-"]).output();
    eventually(Duration::from_mins(1), "it runs", || Ok((time()?.code == 0).then_some(())))?;
    container.run(&["pause"]).text()?;
    same("status", container.inspect("{{.State.Status}}")?.as_str(), "paused")?;
    let before = time()?.success()?.stdout;
    ensure!(container.exec(&[], "true").output()?.code != 0, "exec in a paused container");
    same("it goes on", time()?.success()?.stdout == before, true)?;
    container.run(&["unpause"]).text()?;
    same("exec", container.exec(&[], "echo alive").text()?.as_str(), "alive")?;
    container.remove()
}

fn stats(podman: &Podman) -> Result<()> {
    let container = podman.sleeper(&[])?;
    let format = "{{.MemUsage}} {{.PIDs}}";
    let text = container.run(&["stats", "--no-stream", "--format", format]).text()?;
    ensure!(!text.starts_with("0B") && text.contains(" / "), "no memory: {text}");
    // With ps's own arguments podman runs ps in the container.
    let parent = container.run(&["top"]).arg("-o").arg("args").output()?;
    has(&parent.text(), "sleep 1000")?;
    container.remove()
}

fn copy(podman: &Podman) -> Result<()> {
    let (from, to) = (podman.path("copied"), podman.path("back"));
    fs::write(&from, "content\n")?;
    let volume = podman.path("volume");
    fs::create_dir_all(&volume)?;
    let mount = format!("{volume}:/data");
    let container = podman.sleeper(&["-v", &mount])?;
    for stopped in [false, true] {
        if stopped {
            container.run(&["stop", "-t", "20"]).text()?;
        }
        for place in ["/tmp/in", "/data/in"] {
            let inside = format!("{}:{place}", container.id);
            podman.run(&["cp", &from, &inside]).text()?;
            podman.run(&["cp", &inside, &to]).text()?;
            same("what came back", fs::read_to_string(&to)?.as_str(), "content\n")?;
        }
        if !stopped {
            same("inside", container.exec(&[], "cat /tmp/in /data/in").text()?.lines().count(), 2)?;
            let missing = format!("{}:/no/such", container.id);
            ensure!(podman.run(&["cp", &missing, &to]).output()?.code != 0, "a missing file came");
        }
    }
    same("the volume", fs::read_to_string(format!("{volume}/in"))?.as_str(), "content\n")?;
    container.remove()
}

fn commit(podman: &Podman) -> Result<()> {
    let container = podman.sleeper(&[])?;
    container.exec(&[], "echo made >/made; sync").text()?;
    has(&container.run(&["diff"]).text()?, "A /made")?;
    let image = format!("localhost/{}", podman.name("image"));
    podman.run(&["commit", "--quiet", &container.id, &image]).text()?;
    let parent = podman.cgroup_parent();
    let run =
        podman.run(&["run", "--rm", "--cgroup-parent", &parent, &image, "cat", "/made"]).text()?;
    same("in the image", run.as_str(), "made")?;
    container.remove()?;
    podman.run(&["rmi", &image]).text().map(drop)
}

fn volumes(podman: &Podman) -> Result<()> {
    let name = podman.name("volume");
    let mount = format!("{name}:/data");
    podman.once(&["-v", &mount], "echo kept >/data/file").text()?;
    let read_only = format!("{name}:/data:ro");
    let output =
        podman.once(&["-v", &read_only], "cat /data/file; echo no >/data/file").output()?;
    has(&output.text(), "kept")?;
    has(&output.stderr, "Read-only file system")?;
    let flags = ["--tmpfs", "/scratch:size=1m", "--shm-size", "8m", "--read-only"];
    let line =
        "dd if=/dev/zero of=/scratch/x bs=2M count=1; df -k /dev/shm | tail -1; touch /root/x";
    let output = podman.once(&flags, line).output()?;
    has(&output.stderr, "No space left on device")?;
    has(&output.text(), "8192")?;
    has(&output.stderr, "Read-only file system")?;
    podman.run(&["volume", "rm", &name]).text().map(drop)
}

fn network(podman: &Podman) -> Result<()> {
    let serve = "while :; do echo -e 'HTTP/1.0 200 OK\\r\\n\\r\\nserved' | nc -l -p 80; done";
    let container = podman.start(&["-p", "18080:80"], serve)?;
    let address = container.inspect("{{.NetworkSettings.IPAddress}}")?;
    has(&container.exec(&[], "ip -o -4 addr").text()?, &address)?;
    for target in [format!("{address}:80"), "127.0.0.1:18080".to_owned()] {
        eventually(Duration::from_mins(1), &format!("{target} answers"), || {
            let answer = podman.host(&format!("curl -s -m 5 http://{target}/")).output()?;
            Ok(answer.text().contains("served").then_some(()))
        })?;
    }
    let line = format!("for i in $(seq 20); do echo | nc {address} 80 && break; sleep 0.5; done");
    has(&podman.once(&[], &line).text()?, "served")?;
    has(&podman.once(&["--network", "none"], "ls /sys/class/net").text()?, "lo")?;
    container.remove()
}

fn limits(podman: &Podman) -> Result<()> {
    let flags = ["-m", "64m", "--memory-swap", "64m", "--cpus", "0.5", "--pids-limit", "30"];
    // Else podman gives as many processes as a root may that has `CAP_SYS_RESOURCE`.
    let more = [
        "--ulimit",
        "nofile=300:600",
        "--ulimit",
        "nproc=4096:4096",
        "--sysctl",
        "net.ipv4.ip_default_ttl=77",
    ];
    let line = "cat /sys/fs/cgroup/memory.max 2>/dev/null || \
                cat /sys/fs/cgroup/memory/memory.limit_in_bytes; ulimit -n; \
                cat /proc/sys/net/ipv4/ip_default_ttl; for i in $(seq 60); do sleep 9 & done";
    let output = podman.once(&[&flags[..], &more[..]].concat(), line).output()?;
    same("limits", output.text().as_str(), "67108864\n300\n77")?;
    has(&output.stderr, "can't fork")
}

fn out_of_memory(podman: &Podman) -> Result<()> {
    let flags = ["-m", "64m", "--memory-swap", "64m"];
    let container = podman.start(&flags, "exec dd if=/dev/zero of=/dev/null bs=200M count=1")?;
    same("wait", container.run(&["wait"]).text()?.as_str(), "137")?;
    container.remove()
}

fn pod(podman: &Podman) -> Result<()> {
    let name = podman.name("pod");
    let parent = podman.cgroup_parent();
    let image = ["--infra-image", IMAGE, "--infra-command", "/bin/sleep 1000"];
    let create = ["pod", "create", "--name", &name, "--cgroup-parent", &parent];
    let id = podman.run(&[&create[..], &image[..]].concat()).text()?;
    let run =
        |line: &str| podman.run(&["run", "-d", "--pod", &name, IMAGE, "sh", "-c", line]).text();
    let server = run("while :; do echo served | nc -l -p 4000; done")?;
    let client = run("sleep 1000")?;
    let exec = |id: &str, line: &str| podman.run(&["exec", id, "sh", "-c", line]).text();
    let ask = "for i in $(seq 20); do nc 127.0.0.1 4000 </dev/null && break; sleep 0.5; done";
    same("over loopback", exec(&client, ask)?.as_str(), "served")?;
    let boot = "cat /proc/sys/kernel/random/boot_id";
    same("the kernel", exec(&client, boot)?, exec(&server, boot)?)?;
    podman.run(&["pod", "stop", "-t", "1", &name]).text()?;
    podman.run(&["pod", "rm", "-f", "-t", "0", &name]).text()?;
    remove_empty_cgroup(&format!("{parent}/{id}"))
}

/// Podman removes the parents of containers' cgroups from those hierarchies alone that it knows; what is empty there is
/// nobody's fault. One that is not empty stays.
fn remove_empty_cgroup(path: &str) -> Result<()> {
    for hierarchy in fs::read_dir("/sys/fs/cgroup")?.flatten() {
        drop(fs::remove_dir(hierarchy.path().join(path.trim_start_matches('/'))));
    }
    Ok(())
}

fn conmon_killed(podman: &Podman) -> Result<()> {
    let container = podman.sleeper(&[])?;
    let conmon = container.inspect("{{.State.ConmonPid}}")?;
    Run::new("kill").args(["-9", &conmon]).text()?;
    let pid = container.inspect("{{.State.Pid}}")?;
    same("exec", container.exec(&[], "echo on").text()?.as_str(), "on")?;
    // Its child is ours now, and a zombie until we look.
    Run::new("kill").args(["-9", &pid]).text()?;
    eventually(Duration::from_secs(20), "the container's process is gone", || {
        testkit::runtime::reap_orphans();
        Ok((!std::path::Path::new("/proc").join(&pid).exists()).then_some(()))
    })?;
    let id = container.id.clone();
    container.remove()?;
    // Podman does not call the runtime's `delete` for a container whose conmon it finds dead.
    Run::new(&podman.program).args(["delete", "--force", &id]).text()?;
    remove_empty_cgroup(&podman.cgroup_parent())
}
