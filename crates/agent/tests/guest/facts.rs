//! What must be true of an agent.

use protocol::agent::{Empty, ResyncRequest, TtySize};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::Outcome;
use crate::guest::{Guest, container, context, process, shell, spec};

/// Ends the test with what there is instead.
macro_rules! same {
    ($found:expr, $expected:expr) => {
        let (found, expected) = (&$found, &$expected);
        if found != expected {
            return Err(format!("{found:?} instead of {expected:?}").into());
        }
    };
}

macro_rules! tests {
    ($($test:ident),* $(,)?) => {
        /// Runs those whose name is wanted, one after the other.
        pub(crate) async fn all(
            guest: &Guest,
            wanted: &dyn Fn(&str) -> bool,
        ) -> Vec<(String, Outcome)> {
            let mut outcomes = Vec::new();
            $(
                let name = stringify!($test).replace('_', " ");
                if wanted(&name) {
                    outcomes.push((name, Box::pin($test(guest)).await));
                }
            )*
            outcomes
        }
    };
}

tests![
    a_container_says_what_it_said_and_ends_as_it_ended,
    a_container_has_namespaces_and_capabilities_of_its_own,
    errors_are_in_the_words_of_runc,
    an_exec_joins_a_container_that_is_only_created,
    a_process_that_has_ended_takes_no_signal,
    output_waits_for_a_late_host,
    a_process_gets_epipe_when_the_host_has_gone,
    a_megabyte_goes_through_cat,
    a_terminal_has_a_size_and_hangs_up,
    a_seccomp_filter_holds_for_execs_too,
    devices_are_denied_by_default,
    limits_are_set_and_can_be_changed,
    the_kernel_kills_for_lack_of_memory_and_that_is_told,
    a_paused_container_stands_still,
    a_user_namespace_maps_and_leaves_nothing_behind,
    mounts_hooks_devices_and_sysctls_are_as_the_spec_says,
    a_resync_sets_the_clock,
];

async fn a_container_says_what_it_said_and_ends_as_it_ended(guest: &Guest) -> Outcome {
    let run = guest.run(&shell("echo hello; echo oh >&2; exit 3")).await?;
    same!((run.code, run.out.as_str(), run.err.as_str()), (3, "hello\n", "oh\n"));
    same!((run.exit.stdout_bytes, run.exit.stderr_bytes), (6, 3));
    Ok(())
}

async fn a_container_has_namespaces_and_capabilities_of_its_own(guest: &Guest) -> Outcome {
    let script = "hostname; echo $$; cat /proc/self/cgroup; grep CapEff /proc/self/status; \
                  wc -c </proc/timer_list; echo x >/proc/sys/kernel/hostname";
    let run = guest.run(&shell(script)).await?;
    same!(run.out, "box\n1\n0::/\nCapEff:\t00000000080000e3\n0\n");
    same!(run.err.contains("Read-only file system"), true);
    Ok(())
}

async fn refused(guest: &Guest, spec: &Value) -> Result<String, Box<dyn std::error::Error>> {
    match guest.create(&guest.id(), spec, false).await {
        Err(ttrpc::Error::RpcStatus(status)) => Ok(status.message),
        other => Err(format!("not refused: {other:?}").into()),
    }
}

async fn errors_are_in_the_words_of_runc(guest: &Guest) -> Outcome {
    for (program, words) in [
        ("foo", "exec: \"foo\": executable file not found in $PATH"),
        ("/foo", "exec: \"/foo\": stat /foo: no such file or directory"),
        ("/etc/passwd", "exec: \"/etc/passwd\": permission denied"),
        ("/bin", "exec: \"/bin\": is a directory"),
    ] {
        same!(refused(guest, &spec(&[program])).await?, words);
    }
    let mut spec = shell("true");
    spec["process"]["cwd"] = json!("/etc/passwd");
    let words = "chdir to cwd (\"/etc/passwd\") set in config.json failed: not a directory";
    same!(refused(guest, &spec).await?, words);
    Ok(())
}

async fn an_exec_joins_a_container_that_is_only_created(guest: &Guest) -> Outcome {
    let id = guest.id();
    guest.create(&id, &spec(&["sleep", "1000"]), false).await?;
    let mut other = process(&["sh", "-c", "hostname; id -u; pwd; cat /proc/self/cgroup"]);
    other["user"] = json!({"uid": 1000, "gid": 1000});
    other["cwd"] = json!("/tmp");
    same!(guest.exec(&id, &other).await?.out, "box\n1000\n/tmp\n0::/\n");
    guest.start(&id).await?;
    same!(guest.exec(&id, &process(&["cat", "/proc/1/comm"])).await?.out, "sleep\n");
    guest.remove(&id).await?;
    Ok(())
}

async fn a_process_that_has_ended_takes_no_signal(guest: &Guest) -> Outcome {
    let id = guest.id();
    guest.create(&id, &spec(&["sleep", "1000"]), false).await?;
    guest.start(&id).await?;
    guest.kill(&id, 9).await?;
    same!(guest.wait(&id, "").await?.exit_code, 137);
    let error = guest.kill(&id, 9).await.err().map(|error| error.to_string()).unwrap_or_default();
    same!(error.contains("process already finished"), true);
    // As often as one likes, until it is removed.
    same!(guest.wait(&id, "").await?.exit_code, 137);
    guest.remove(&id).await?;
    same!(guest.wait(&id, "").await.is_err(), true);
    Ok(())
}

async fn output_waits_for_a_late_host(guest: &Guest) -> Outcome {
    let id = guest.id();
    let created = guest.create(&id, &shell("yes | head -c 60000; exit 5"), false).await?;
    guest.start(&id).await?;
    let exit = guest.wait(&id, "").await?;
    same!((exit.exit_code, exit.stdout_bytes), (5, 60000));
    same!(guest.read(&created.stdout).await?.len(), 60000);
    guest.remove(&id).await?;
    Ok(())
}

async fn a_process_gets_epipe_when_the_host_has_gone(guest: &Guest) -> Outcome {
    let id = guest.id();
    let created = guest.create(&id, &spec(&["yes"]), false).await?;
    guest.start(&id).await?;
    let mut stream = guest.stream(&created.stdout).await?;
    stream.read_exact(&mut [0; 4096]).await?;
    drop(stream);
    same!(guest.wait(&id, "").await?.exit_code, 1);
    guest.remove(&id).await?;
    Ok(())
}

async fn a_megabyte_goes_through_cat(guest: &Guest) -> Outcome {
    const SIZE: usize = 1 << 20;
    let id = guest.id();
    let created = guest.create(&id, &spec(&["cat"]), true).await?;
    guest.start(&id).await?;
    let mut stdin = guest.stream(&created.stdin).await?;
    let mut stdout = guest.stream(&created.stdout).await?;
    let sent: Vec<u8> = (0..=250).cycle().take(SIZE).collect();
    let mut received = Vec::new();
    let write = async {
        stdin.write_all(&sent).await?;
        stdin.shutdown().await
    };
    let (written, read) = tokio::join!(write, stdout.read_to_end(&mut received));
    written?;
    read?;
    same!(received == sent, true);
    same!(guest.wait(&id, "").await?.stdout_bytes, SIZE as u64);
    guest.remove(&id).await?;
    Ok(())
}

async fn a_terminal_has_a_size_and_hangs_up(guest: &Guest) -> Outcome {
    let id = guest.id();
    // SIGHUP does nothing to the first process of a pid namespace, pid_namespaces(7); but it can read no more.
    let mut with_terminal = shell("tty; stty size; read x; stty size; read x; exit 9");
    with_terminal["process"]["terminal"] = json!(true);
    with_terminal["process"]["consoleSize"] = json!({"height": 33, "width": 77});
    let created = guest.create(&id, &with_terminal, false).await?;
    guest.start(&id).await?;
    let mut terminal = guest.stream(&created.tty).await?;
    let mut text = vec![0; "/dev/pts/0\r\n33 77\r\n".len()];
    terminal.read_exact(&mut text).await?;
    same!(String::from_utf8(text)?, "/dev/pts/0\r\n33 77\r\n");
    let size = TtySize { rows: 40, columns: 90, ..TtySize::default() };
    let request = protocol::agent::ResizeTtyRequest {
        container_id: id.clone(),
        size: Some(size).into(),
        ..protocol::agent::ResizeTtyRequest::default()
    };
    guest.agent.resize_tty(context(), &request).await?;
    terminal.write_all(b"\n").await?;
    let mut text = vec![0; "\r\n40 90\r\n".len()];
    terminal.read_exact(&mut text).await?;
    same!(String::from_utf8(text)?, "\r\n40 90\r\n");
    let mut other = process(&["sleep", "1000"]);
    other["terminal"] = json!(true);
    let other = guest.start_exec(&id, "e", &other).await?;
    drop(guest.stream(&other.tty).await?);
    same!(guest.wait(&id, "e").await?.exit_code, 129);
    drop(terminal);
    same!(guest.wait(&id, "").await?.exit_code, 9);
    guest.remove(&id).await?;
    Ok(())
}

async fn a_seccomp_filter_holds_for_execs_too(guest: &Guest) -> Outcome {
    let id = guest.id();
    let mut filtered = spec(&["sleep", "1000"]);
    filtered["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
    });
    guest.create(&id, &filtered, false).await?;
    guest.start(&id).await?;
    for no_new_privileges in [false, true] {
        let mut other = process(&["mkdir", "/tmp/d"]);
        other["noNewPrivileges"] = json!(no_new_privileges);
        let run = guest.exec(&id, &other).await?;
        same!(run.err, "mkdir: can't create directory '/tmp/d': Operation not permitted\n");
    }
    let status = guest.exec(&id, &process(&["grep", "Seccomp:", "/proc/1/status"])).await?;
    same!(status.out, "Seccomp:\t2\n");
    guest.remove(&id).await?;
    Ok(())
}

async fn devices_are_denied_by_default(guest: &Guest) -> Outcome {
    let script = "mknod /dev/a b 8 0; mknod /dev/b c 1 11; cat /dev/a; cat /dev/b; \
                  head -c1 /dev/zero | wc -c";
    let run = guest.run(&shell(script)).await?;
    same!(run.out, "1\n");
    same!(run.err.matches("Operation not permitted").count(), 2);
    Ok(())
}

async fn limits_are_set_and_can_be_changed(guest: &Guest) -> Outcome {
    let id = guest.id();
    guest.create(&id, &spec(&["sleep", "1000"]), false).await?;
    guest.start(&id).await?;
    let limits = process(&[
        "sh",
        "-c",
        "cd /sys/fs/cgroup; cat memory.max memory.swap.max pids.max cpu.max",
    ]);
    same!(guest.exec(&id, &limits).await?.out, "67108864\n0\n100\nmax 100000\n");
    guest.update(&id, &json!({"cpu": {"quota": 50000}, "pids": {"limit": 50}})).await?;
    same!(guest.exec(&id, &limits).await?.out, "67108864\n0\n50\n50000 100000\n");
    let stats = guest.agent.stats(context(), &container(&id)).await?;
    same!((stats.memory_limit, stats.pids_limit), (67_108_864, 50));
    guest.remove(&id).await?;
    Ok(())
}

async fn the_kernel_kills_for_lack_of_memory_and_that_is_told(guest: &Guest) -> Outcome {
    let mut events = guest.agent.events(context(), &Empty::default()).await?;
    let mut small = shell("dd if=/dev/zero of=/dev/shm/x bs=1M count=60; exit $?");
    small["linux"]["resources"]["memory"] = json!({"limit": 33_554_432, "swap": 33_554_432});
    let run = guest.run(&small).await?;
    same!((run.code, run.exit.oom_killed), (137, true));
    let event = events.recv().await?.ok_or("the events ended")?;
    same!(event.has_oom(), true);
    Ok(())
}

async fn a_paused_container_stands_still(guest: &Guest) -> Outcome {
    let id = guest.id();
    guest.create(&id, &spec(&["sleep", "1000"]), false).await?;
    same!(guest.agent.pause(context(), &container(&id)).await.is_err(), true);
    guest.start(&id).await?;
    guest.agent.pause(context(), &container(&id)).await?;
    same!(guest.start_exec(&id, "e", &process(&["true"])).await.is_err(), true);
    guest.agent.resume(context(), &container(&id)).await?;
    same!(guest.exec(&id, &process(&["true"])).await?.code, 0);
    let processes = guest.agent.processes(context(), &container(&id)).await?.processes;
    let commands: Vec<_> = processes.iter().map(|process| process.command.as_str()).collect();
    same!(commands, ["sleep 1000"]);
    guest.agent.pause(context(), &container(&id)).await?;
    guest.remove(&id).await?;
    Ok(())
}

async fn a_user_namespace_maps_and_leaves_nothing_behind(guest: &Guest) -> Outcome {
    let mut mapped = spec(&["sleep", "1000"]);
    let map = json!([{"containerID": 0, "hostID": 0, "size": 1000}]);
    mapped["linux"]["uidMappings"] = map.clone();
    mapped["linux"]["gidMappings"] = map;
    let namespaces = mapped["linux"]["namespaces"].as_array_mut().ok_or("no namespaces")?;
    namespaces.push(json!({"type": "user"}));
    let id = guest.id();
    guest.create(&id, &mapped, false).await?;
    guest.start(&id).await?;
    let run = guest.exec(&id, &process(&["sh", "-c", "cat /proc/self/uid_map; id -u"])).await?;
    let words: Vec<_> = run.out.split_whitespace().collect();
    same!(words, ["0", "0", "1000", "0"]);
    // Its cgroup can be removed only if the guest does not have its mounts.
    guest.remove(&id).await?;
    Ok(())
}

async fn mounts_hooks_devices_and_sysctls_are_as_the_spec_says(guest: &Guest) -> Outcome {
    let script = "touch /x || touch /r/x || echo read-only; cat /r/passwd | head -c 4; echo; \
                  cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/msgmax; \
                  stat -c '%a %u %g %t %T' /dev/foo; grep -c '\"ociVersion\"' /dev/shm/state";
    let mut full = shell(script);
    full["root"]["readonly"] = json!(true);
    full["linux"]["sysctl"] =
        json!({"net.ipv4.ip_unprivileged_port_start": "80", "kernel.msgmax": "8100"});
    full["linux"]["devices"] = json!([{
        "path": "/dev/foo", "type": "c", "major": 1, "minor": 5, "fileMode": 0o644, "uid": 3, "gid": 4,
    }]);
    let mounts = full["mounts"].as_array_mut().ok_or("no mounts")?;
    mounts.push(json!({
        "destination": "/r", "type": "bind", "source": "/run/kata/share/root/etc",
        "options": ["rbind", "ro", "rprivate"],
    }));
    full["hooks"] = json!({
        "startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "cat >/dev/shm/state"]}],
    });
    let run = guest.run(&full).await?;
    same!(run.out, "read-only\nroot\n80\n8100\n644 3 4 1 5\n1\n");
    Ok(())
}

async fn a_resync_sets_the_clock(guest: &Guest) -> Outcome {
    let request = ResyncRequest {
        unix_ns: 1_700_000_000_000_000_000,
        entropy: vec![7; 256],
        hostname: "guest".into(),
        machine_id: "0123456789abcdef0123456789abcdef".into(),
        ..ResyncRequest::default()
    };
    guest.agent.resync(context(), &request).await?;
    let run = guest.run(&shell("date +%Y%m%d")).await?;
    same!(run.out, "20231114\n");
    Ok(())
}
