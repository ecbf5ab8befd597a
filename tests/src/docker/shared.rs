//! Containers that share another one's namespaces: for us, several in one virtual machine.

use anyhow::ensure;

use super::Docker;
use crate::case::{Case, case, has, same};

const BOOT: &str = "cat /proc/sys/kernel/random/boot_id";

pub(super) const CASES: &[Case<Docker>] = &[
    case("a container on another's network runs beside it, apart but for the network", |docker| {
        let first = docker.sleeper(&["--hostname", "first"])?;
        let network = format!("container:{}", first.id);
        let second = docker.sleeper(&["--network", &network])?;
        same("the kernel", second.exec(&[], BOOT)?, first.exec(&[], BOOT)?)?;
        first
            .exec(&[], "echo secret >/only-here; nc -l -p 4000 -e echo hello >/dev/null 2>&1 &")?;
        let heard =
            "for i in 1 2 3 4 5 6 7 8 9; do nc 127.0.0.1 4000 </dev/null && break; sleep 1; done";
        same("over loopback", second.exec(&[], heard)?, "hello".to_owned())?;
        same("the addresses", second.exec(&[], "ip -o addr")?, first.exec(&[], "ip -o addr")?)?;
        let look = "ls / | grep -c only-here; ps -o args | grep -c '^sleep 1000'";
        same("files and processes", second.exec(&[], look)?, "0\n1".to_owned())?;
        second.remove()?;
        has(&first.exec(&[], "ps")?, "sleep 1000")?;
        first.remove()
    }),
    case("a container on another's network outlives it", |docker| {
        let first = docker.sleeper(&[])?;
        let network = format!("container:{}", first.id);
        let second = docker.sleeper(&["--network", &network])?;
        let boot = second.exec(&[], BOOT)?;
        first.remove()?;
        same("the kernel", second.exec(&[], BOOT)?, boot)?;
        let output = second.exec_run(&[], "echo out; exit 7").output()?.ended(7)?;
        has(&output.text(), "out")?;
        second.remove()
    }),
    case("a container on another's network restarts without it", |docker| {
        let first = docker.sleeper(&[])?;
        let network = format!("container:{}", first.id);
        let second = docker.start(&["--network", &network], "cat /proc/uptime; sleep 1000")?;
        let boot = first.exec(&[], BOOT)?;
        for _ in 0..2 {
            second.run(&["restart", "-t", "0"]).text()?;
            same("the kernel", second.exec(&[], BOOT)?, boot.clone())?;
        }
        same("the first", first.inspect("{{.State.Running}}")?, "true".to_owned())?;
        second.remove()?;
        first.remove()
    }),
    case(
        "a container in another's pid and ipc namespaces sees its processes and its memory",
        |docker| {
            let first = docker.sleeper(&["--ipc", "shareable"])?;
            let of_first = format!("container:{}", first.id);
            let flags = ["--network", &of_first, "--pid", &of_first, "--ipc", &of_first];
            let second = docker.sleeper(&flags)?;
            let namespaces = "readlink /proc/self/ns/pid; readlink /proc/self/ns/ipc";
            same("namespaces", second.exec(&[], namespaces)?, first.exec(&[], namespaces)?)?;
            let sleeps = second.exec(&[], "ps -o args | grep -c '^sleep 1000'")?;
            ensure!(sleeps == "2", "the second sees {sleeps} of two");
            first.exec(&[], "echo shared >/dev/shm/word")?;
            same("/dev/shm", second.exec(&[], "cat /dev/shm/word")?, "shared".to_owned())?;
            second.remove()?;
            first.remove()
        },
    ),
    case("the first container's end is seen while another goes on", |docker| {
        let first = docker.start(&[], "sleep 3; exit 5")?;
        let network = format!("container:{}", first.id);
        let second = docker.sleeper(&["--network", &network])?;
        same("the exit code", first.run(&["wait"]).text()?, "5".to_owned())?;
        same("the second", second.exec(&[], "echo on")?, "on".to_owned())?;
        first.remove()?;
        same("the second", second.exec(&[], "echo on")?, "on".to_owned())?;
        second.remove()
    }),
];
