//! What a pod's containers share.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use protobuf::MessageField;
use testkit::Run;
use testkit::cri::PATIENCE;
use testkit::cri::api::{
    DNSConfig, LinuxContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext,
    LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig,
};
use testkit::eventually;

use super::Pods;
use crate::case::{Case, case, has, same, skip};

pub(super) const CASES: &[Case<Pods>] = &[
    case("a pod's containers have one kernel, which is not the host's", one_kernel),
    case("a pod has an address at which its servers are reached, from both sides", network),
    case("a pod's containers reach each other by localhost and share /dev/shm", shared),
    case("a pod's containers have files and processes of their own", apart),
    case("a pod has its host name, its DNS servers and its sysctls", names),
    case("a pod can share its process namespace", shared_processes),
    case("a container for debugging joins the processes of another one", target),
    case("a container that is made again joins the pod as it runs", made_again),
    case("a pod's machine has the size that the pod's limits need", size),
    case("a stopped pod is not ready, and is removed with its containers", stopped),
];

/// As `kubectl debug --target` has it.
fn target(pods: &Pods) -> Result<()> {
    let pod = pods.pod()?;
    pod.run_line("other", "sleep 1001")?;
    let one = pod.run_line("one", "sleep 1002")?;
    let mut config = pod.container_config("debug", "sleep 1003");
    config
        .linux
        .mut_or_insert_default()
        .security_context
        .mut_or_insert_default()
        .namespace_options = MessageField::some(NamespaceOption {
        pid: NamespaceMode::TARGET.into(),
        target_id: one,
        ..Default::default()
    });
    let debug = pod.run(config)?;
    let processes = pod.text(&debug, "ps")?;
    has(&processes, "sleep 1002")?;
    has(&processes, "sleep 1003")?;
    ensure!(!processes.contains("sleep 1001"), "another container's too: {processes}");
    Ok(())
}

/// As a kubelet tells the sums of a pod's limits.
fn size(pods: &Pods) -> Result<()> {
    let mut config = pods.config();
    let linux = config.linux.mut_or_insert_default();
    linux.resources = MessageField::some(LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 150_000,
        memory_limit_in_bytes: 3 << 30,
        ..Default::default()
    });
    let pod = pods.run(config)?;
    let id = pod.run_line("one", "sleep 1000")?;
    if !pods.is_kata {
        return Err(skip("a virtual machine"));
    }
    same("processors", pod.text(&id, "nproc")?.as_str(), "2")?;
    let total = pod.text(&id, "sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")?;
    let mib = total.parse::<u64>()? >> 10;
    ensure!(mib > 2800, "{mib} MiB");
    Ok(())
}

const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";

fn one_kernel(pods: &Pods) -> Result<()> {
    let pod = pods.pod()?;
    let one = pod.run_line("one", "sleep 1000")?;
    let two = pod.run_line("two", "sleep 1000")?;
    let id = pod.text(&one, BOOT_ID)?;
    same("the other's kernel", pod.text(&two, BOOT_ID)?, id.clone())?;
    let outside = Run::shell(BOOT_ID).text()?;
    same("a kernel of its own", id != outside, pods.is_kata)
}

fn network(pods: &Pods) -> Result<()> {
    let pod = pods.pod()?;
    let ip = pods.pod_status(&pod)?.network.ip.clone();
    let server = pod.run_line("server", "echo hello >/tmp/index.html; httpd -f -p 80 -h /tmp")?;
    has(&pod.text(&server, "ip -4 addr show eth0")?, &ip)?;
    let get = format!("busybox wget -q -O - http://{ip}/");
    let page = eventually(PATIENCE, "the server answers", || {
        Ok(pods.node.shell(&get).output()?.success().ok().map(|output| output.text()))
    })?;
    same("the page", page.as_str(), "hello")?;
    // The other way: a server of the node.
    let serve = "mkdir -p www && echo node >www/index.html && exec busybox httpd -f -p 8099 -h www";
    let mut daemon = std::process::Command::new("nsenter");
    daemon.arg(format!("--net=/proc/{}/ns/net", pods.node.daemon().pid()));
    daemon.args(["sh", "-c", serve]).current_dir(pods.directory()?);
    let mut daemon = daemon.spawn()?;
    let gateway = pod.text(&server, "ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'");
    let page = gateway.and_then(|gateway| {
        let line = format!("wget -q -O - http://{gateway}:8099/");
        eventually(PATIENCE, "the node answers", || Ok(pod.text(&server, &line).ok()))
    });
    daemon.kill()?;
    daemon.wait()?;
    same("the node's page", page?.as_str(), "node")
}

fn shared(pods: &Pods) -> Result<()> {
    let pod = pods.pod()?;
    let one = pod.run_line("one", "echo hello >/tmp/index.html; httpd -f -p 81 -h /tmp")?;
    let two = pod.run_line("two", "sleep 1000")?;
    let page = eventually(PATIENCE, "the neighbour answers", || {
        Ok(pod.text(&two, "wget -q -O - http://127.0.0.1:81/").ok())
    })?;
    same("the page", page.as_str(), "hello")?;
    pod.text(&one, "echo shared >/dev/shm/word")?;
    same("/dev/shm", pod.text(&two, "cat /dev/shm/word")?.as_str(), "shared")
}

fn apart(pods: &Pods) -> Result<()> {
    let pod = pods.pod()?;
    let one = pod.run_line("one", "touch /only-here; sleep 1001")?;
    let two = pod.run_line("two", "sleep 1002")?;
    eventually(PATIENCE, "the file is there", || Ok(pod.text(&one, "ls /only-here").ok()))?;
    ensure!(pod.exec(&two, "ls /only-here")?.exit_code != 0, "files are shared");
    let processes = pod.text(&two, "ps")?;
    has(&processes, "sleep 1002")?;
    ensure!(!processes.contains("sleep 1001"), "processes are shared: {processes}");
    Ok(())
}

fn names(pods: &Pods) -> Result<()> {
    let mut config = PodSandboxConfig { hostname: "pod-name".into(), ..pods.config() };
    config.dns_config = MessageField::some(DNSConfig {
        servers: vec!["192.0.2.7".into()],
        searches: vec!["tests.local".into()],
        options: vec!["ndots:3".into()],
        ..Default::default()
    });
    let sysctl = ("net.ipv4.ip_local_port_range".to_owned(), "40000 50000".to_owned());
    config.linux.mut_or_insert_default().sysctls = HashMap::from([sysctl]);
    let pod = pods.run(config)?;
    let id = pod.run_line("one", "sleep 1000")?;
    same("host name", pod.text(&id, "hostname")?.as_str(), "pod-name")?;
    let resolver = pod.text(&id, "cat /etc/resolv.conf")?;
    for line in ["nameserver 192.0.2.7", "search tests.local", "options ndots:3"] {
        has(&resolver, line)?;
    }
    let range = pod.text(&id, "cat /proc/sys/net/ipv4/ip_local_port_range")?;
    same(
        "the sysctl",
        range.split_whitespace().collect::<Vec<_>>().join(" ").as_str(),
        "40000 50000",
    )
}

fn shared_processes(pods: &Pods) -> Result<()> {
    let option = NamespaceOption { pid: NamespaceMode::POD.into(), ..Default::default() };
    let mut config = pods.config();
    let linux = config.linux.mut_or_insert_default();
    linux.security_context = MessageField::some(LinuxSandboxSecurityContext {
        namespace_options: MessageField::some(option.clone()),
        ..Default::default()
    });
    let pod = pods.run(config)?;
    let with = |name: &str, line: &str| {
        let mut container = pod.container_config(name, line);
        container.linux = MessageField::some(LinuxContainerConfig {
            security_context: MessageField::some(LinuxContainerSecurityContext {
                namespace_options: MessageField::some(option.clone()),
                ..Default::default()
            }),
            ..Default::default()
        });
        pod.run(container)
    };
    with("one", "sleep 1001")?;
    let two = with("two", "sleep 1002")?;
    let processes = pod.text(&two, "ps")?;
    for word in ["sleep 1001", "sleep 1002"] {
        has(&processes, word)?;
    }
    Ok(())
}

fn made_again(pods: &Pods) -> Result<()> {
    let pod = pods.pod()?;
    let one = pod.run_line("one", "exit 7")?;
    same("exit code", pods.exited(&one)?.exit_code, 7)?;
    let other = pod.run_line("other", "sleep 1000")?;
    let id = pod.text(&other, BOOT_ID)?;
    pod.remove_container(&one)?;
    let again = pod.run_line("one", "sleep 1000")?;
    same("the kernel", pod.text(&again, BOOT_ID)?, id)?;
    pod.stop_container(&other)?;
    pod.remove_container(&other)?;
    same("still there", pod.text(&again, "echo here")?.as_str(), "here")
}

fn stopped(pods: &Pods) -> Result<()> {
    let pod = pods.pod()?;
    let id = pod.run_line("one", "sleep 1000")?;
    same("state", pods.pod_status(&pod)?.state, 0)?;
    pod.stop()?;
    same("state", pods.pod_status(&pod)?.state, 1)?;
    same("exit code", pods.exited(&id)?.exit_code, 137)?;
    pod.stop()?;
    pod.remove()?;
    ensure!(pods.pod_status(&pod).is_err(), "it is still there");
    Ok(())
}
