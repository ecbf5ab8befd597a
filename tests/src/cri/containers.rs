//! One container of a pod.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use protobuf::MessageField;
use testkit::cri::PATIENCE;
use testkit::cri::api::{
    Container as ContainerId, ContainerStatsResponse, KeyValue, LinuxContainerConfig,
    LinuxContainerResources, LinuxContainerSecurityContext, Mount,
};
use testkit::{Run, eventually};

use super::Pods;
use crate::case::{Case, case, has, same};

pub(super) const CASES: &[Case<Pods>] = &[
    case("a command in a container has output, error and exit code", exec),
    case("a container's output is in its log", log),
    case("a container is stopped by SIGTERM, and killed where that does not help", stop),
    case("a container has its environment, directory and read-only root", settings),
    case("each container has figures of its own", figures),
    case("a container that needs more memory than it may have is OOMKilled", out_of_memory),
    case("volumes of the host are there, and what is changed shows", volumes),
    case("what the host mounts after the pod's start can be a volume", late_volume),
];

fn exec(pods: &Pods) -> Result<()> {
    let pod = pods.pod()?;
    let id = pod.run_line("one", "sleep 1000")?;
    let answer = pod.exec(&id, "echo out; echo err >&2; exit 7")?;
    same("exit code", answer.exit_code, 7)?;
    same("stdout", &*answer.stdout, b"out\n")?;
    same("stderr", &*answer.stderr, b"err\n")
}

fn log(pods: &Pods) -> Result<()> {
    let pod = pods.pod()?;
    let id = pod.run_line("one", "echo to the log; echo to err >&2")?;
    pods.exited(&id)?;
    let file = Path::new(&pod.config.log_directory).join("one.log");
    eventually(PATIENCE, "both lines are in the log", || {
        let log = fs::read_to_string(&file).unwrap_or_default();
        let both = log.contains("stdout F to the log") && log.contains("stderr F to err");
        Ok(both.then_some(()))
    })
}

fn stop(pods: &Pods) -> Result<()> {
    let pod = pods.pod()?;
    let graceful =
        pod.run_line("one", "trap 'exit 3' TERM; touch /ready; while :; do sleep 0.1; done")?;
    let deaf = pod.run_line("two", "trap '' TERM; touch /ready; while :; do sleep 1; done")?;
    for id in [&graceful, &deaf] {
        eventually(PATIENCE, "the trap is set", || Ok(pod.text(id, "ls /ready").ok()))?;
        pod.stop_container(id)?;
    }
    same("exit code after SIGTERM", pods.exited(&graceful)?.exit_code, 3)?;
    same("exit code after SIGKILL", pods.exited(&deaf)?.exit_code, 137)
}

fn settings(pods: &Pods) -> Result<()> {
    let pod = pods.pod()?;
    let mut config = pod.container_config("one", "sleep 1000");
    config.envs =
        vec![KeyValue { key: "WORD".into(), value: b"value".to_vec(), ..Default::default() }];
    config.working_dir = "/tmp".into();
    config.linux = MessageField::some(LinuxContainerConfig {
        security_context: MessageField::some(LinuxContainerSecurityContext {
            readonly_rootfs: true,
            ..Default::default()
        }),
        ..Default::default()
    });
    let id = pod.run(config)?;
    same("environment and directory", pod.text(&id, "echo $WORD; pwd")?.as_str(), "value\n/tmp")?;
    ensure!(pod.exec(&id, "touch /new")?.exit_code != 0, "the root can be written");
    Ok(())
}

fn figures(pods: &Pods) -> Result<()> {
    let pod = pods.pod()?;
    let busy = pod.run_line("busy", "while :; do :; done")?;
    let idle = pod.run_line("idle", "sleep 1000")?;
    let of = |id: &str| -> Result<(u64, u64)> {
        let request = ContainerId { container_id: id.to_owned(), ..Default::default() };
        let answer: ContainerStatsResponse = pods.node.cri.call("ContainerStats", &request)?;
        let time = answer.stats.cpu.usage_core_nano_seconds.value;
        Ok((time, answer.stats.memory.working_set_bytes.value))
    };
    eventually(PATIENCE, "one container uses the processor and the other does not", || {
        let ((busy, memory), (idle, other)) = (of(&busy)?, of(&idle)?);
        Ok((busy > 2 * idle && memory > 0 && other > 0).then_some(()))
    })
}

fn out_of_memory(pods: &Pods) -> Result<()> {
    let pod = pods.pod()?;
    let mut config = pod.container_config("one", "tail /dev/zero");
    config.linux = MessageField::some(LinuxContainerConfig {
        resources: MessageField::some(LinuxContainerResources {
            memory_limit_in_bytes: 64 << 20,
            ..Default::default()
        }),
        ..Default::default()
    });
    let id = pod.run(config)?;
    pods.exited(&id)?;
    eventually(PATIENCE, "the reason is OOMKilled", || {
        Ok((pods.status(&id)?.reason == "OOMKilled").then_some(()))
    })
}

fn mount(host: &Path, inside: &str, readonly: bool) -> Mount {
    Mount {
        container_path: inside.to_owned(),
        host_path: host.to_string_lossy().into_owned(),
        readonly,
        ..Default::default()
    }
}

fn volumes(pods: &Pods) -> Result<()> {
    let dir = pods.directory()?;
    // As a kubelet keeps a ConfigMap: a symlink is moved to change all files at once.
    let config_map = dir.join("config");
    let publish = |name: &str, word: &str| {
        let line = format!(
            "mkdir -p {name} && echo {word} >{name}/key && ln -sfn {name} .tmp && mv -T .tmp ..data && \
             {{ [ -e key ] || ln -s ..data/key key; }}"
        );
        Run::shell(&line).directory(&config_map).text()
    };
    fs::create_dir_all(&config_map)?;
    publish("..1", "before")?;
    let data = dir.join("data");
    fs::create_dir_all(&data)?;
    let pod = pods.pod()?;
    let mut config = pod.container_config("one", "sleep 1000");
    config.mounts = vec![mount(&data, "/data", false), mount(&config_map, "/config", true)];
    let one = pod.run(config.clone())?;
    config.metadata.mut_or_insert_default().name = "two".into();
    config.log_path = "two.log".into();
    let two = pod.run(config)?;
    pod.text(&one, "echo from one >/data/file")?;
    same("the other's view", pod.text(&two, "cat /data/file")?.as_str(), "from one")?;
    same("the host's view", fs::read_to_string(data.join("file"))?.trim(), "from one")?;
    ensure!(pod.exec(&one, "touch /config/new")?.exit_code != 0, "it can be written");
    same("the key", pod.text(&one, "cat /config/key")?.as_str(), "before")?;
    publish("..2", "after")?;
    eventually(PATIENCE, "the new value shows", || {
        Ok((pod.text(&two, "cat /config/key")? == "after").then_some(()))
    })
}

fn late_volume(pods: &Pods) -> Result<()> {
    let pod = pods.pod()?;
    let dir = pods.directory()?;
    Run::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(&dir).text()?;
    let looked = (|| {
        fs::write(dir.join("file"), "on the tmpfs")?;
        let mut config = pod.container_config("one", "sleep 1000");
        config.mounts = vec![mount(&dir, "/data", false)];
        let id = pod.run(config)?;
        same("the file", pod.text(&id, "cat /data/file")?.as_str(), "on the tmpfs")?;
        let full = pod.exec(&id, "dd if=/dev/zero of=/data/big bs=1M count=2")?;
        has(&String::from_utf8_lossy(&full.stderr), "No space left")?;
        pod.stop_container(&id)?;
        pod.remove_container(&id)
    })();
    drop(pod);
    Run::new("umount").arg(&dir).text()?;
    looked
}
