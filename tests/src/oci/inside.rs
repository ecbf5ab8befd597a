//! What the configuration makes of the container's inside.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;
use testkit::{Bundle, Run};

use super::Oci;
use crate::case::{Case, case, has, same, skip};

pub(super) const CASES: &[Case<Oci>] = &[
    case("the container has a kernel of its own", own_kernel),
    case("copies of a template share no random numbers, ids or clock", copies_differ),
    case("hostname, user, groups, directory, environment and umask are the spec's", identity),
    case("capabilities, no-new-privileges and seccomp hold", privileges),
    case("a read-only root file system and the masked paths hold", read_only),
    case("rlimits and sysctls are set", limits),
    case("tmpfs mounts and /dev/shm have their size and options", tmpfs),
    case("bind mounts show files both ways, and ro is enforced", binds),
    case("what the container writes is in the rootfs on the host", written),
    case("the usual devices are there and others are refused", devices),
    case("the container is pid 1 of its own namespace and sees only its processes", processes),
    case("the clock runs as fast as the host's", clock),
    case("a network namespace by path brings its interface and addresses", network_namespace),
];

fn copies_differ(oci: &Oci) -> Result<()> {
    if !oci.runtime.is_kata() {
        return Err(skip("a runtime that starts virtual machines"));
    }
    let script = "cd /proc/sys/kernel/random; cat boot_id uuid; head -c 16 /dev/urandom | od -An -tx1; date +%s";
    let tell = || -> Result<Vec<String>> {
        Ok(oci.run(script)?.success()?.text().lines().map(str::to_owned).collect())
    };
    let (one, other) = (tell()?, tell()?);
    ensure!(one.len() == 4 && other.len() == 4, "not four lines: {one:?}, {other:?}");
    for (mine, others) in one.iter().zip(&other).take(3) {
        ensure!(mine != others, "both sandboxes say {mine}");
    }
    let now = Run::new("date").arg("+%s").text()?.parse::<i64>()?;
    let then = other[3].parse::<i64>()?;
    ensure!((now - then).abs() < 30, "the guest's clock says {then}, the host's {now}");
    Ok(())
}

fn clock(oci: &Oci) -> Result<()> {
    let container = oci.sleeper()?;
    let guest = || -> Result<f64> {
        let text = container.shell("cat /proc/uptime")?;
        let first = text.split(' ').next().unwrap_or_default();
        Ok(first.parse()?)
    };
    // A reading of the guest's lies somewhere between two of the host's.
    let start = Instant::now();
    let first = guest()?;
    let (inner, enough) = (Instant::now(), Duration::from_secs(3));
    while inner.elapsed() < enough {
        guest()?;
    }
    let passed = guest()? - first;
    let (least, most) = (enough.as_secs_f64() * 0.7, start.elapsed().as_secs_f64() * 1.3);
    ensure!(least < passed && passed < most, "{passed} s passed, not {least} to {most}");
    Ok(())
}

fn own_kernel(oci: &Oci) -> Result<()> {
    if !oci.runtime.is_kata() {
        return Err(skip("a runtime that starts virtual machines"));
    }
    let inside = oci.run("uname -r")?.success()?.text();
    let outside = Run::new("uname").arg("-r").text()?;
    ensure!(!inside.is_empty() && inside != outside, "inside {inside}, outside {outside}");
    Ok(())
}

/// Runs a shell line in a bundle that `change` has changed; answers what it wrote.
fn run(oci: &Oci, line: &str, change: impl FnOnce(&mut serde_json::Value)) -> Result<String> {
    let bundle = oci.bundle(line)?.with(change)?;
    Ok(oci.runtime.run_bundle(&bundle)?.success()?.text())
}

fn identity(oci: &Oci) -> Result<()> {
    let line = "hostname; id -u; id -g; id -G; pwd; echo $WORD; umask";
    let text = run(oci, line, |config| {
        config["hostname"] = json!("name-of-it");
        config["process"]["user"] =
            json!({"uid": 1000, "gid": 1000, "additionalGids": [2000], "umask": 0o27});
        config["process"]["cwd"] = json!("/home");
        config["process"]["env"] = json!(["PATH=/bin", "WORD=a b"]);
    })?;
    same("identity", text.as_str(), "name-of-it\n1000\n1000\n1000 2000\n/home\na b\n0027")
}

fn privileges(oci: &Oci) -> Result<()> {
    let line =
        "grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status; mkdir /tmp/x; true";
    let bundle = oci.bundle(line)?.with(|config| {
        let capabilities = json!(["CAP_KILL", "CAP_CHOWN"]);
        config["process"]["capabilities"] = json!({
            "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
        });
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}],
        });
    })?;
    let output = oci.runtime.run_bundle(&bundle)?.success()?;
    let text = output.text().replace('\t', " ");
    for line in
        ["CapEff: 0000000000000021", "CapBnd: 0000000000000021", "NoNewPrivs: 1", "Seccomp: 2"]
    {
        has(&text, line)?;
    }
    has(&output.stderr, "Permission denied")
}

fn read_only(oci: &Oci) -> Result<()> {
    let line = "touch /x 2>&1; touch /tmp/x 2>&1; ls -A /masked | wc -l; wc -c </etc/group; \
                touch /home/x 2>&1; touch /proc/sys/kernel/domainname 2>&1; true";
    let text = run(oci, line, |config| {
        config["root"]["readonly"] = json!(true);
        config["linux"]["maskedPaths"] = json!(["/masked", "/etc/group"]);
        config["linux"]["readonlyPaths"] = json!(["/proc/sys"]);
        config["mounts"] = with_mount(
            &config["mounts"],
            &json!({"destination": "/masked", "type": "tmpfs", "source": "tmpfs"}),
        );
    });
    // A mount point for /masked must be there: a read-only root has none made.
    let text = match text {
        Err(error) if format!("{error:#}").contains("masked") => {
            let line = line.replace("ls -A /masked | wc -l", "echo 0");
            run(oci, &line, |config| {
                config["root"]["readonly"] = json!(true);
                config["linux"]["maskedPaths"] = json!(["/etc/group"]);
                config["linux"]["readonlyPaths"] = json!(["/proc/sys"]);
            })?
        }
        other => other?,
    };
    same("refused writes", text.matches("Read-only file system").count(), 4)?;
    has(&text, "\n0\n0\n")
}

fn with_mount(mounts: &serde_json::Value, mount: &serde_json::Value) -> serde_json::Value {
    let list = mounts.as_array().into_iter().flatten();
    list.chain([mount]).cloned().collect()
}

fn limits(oci: &Oci) -> Result<()> {
    let line = "ulimit -n; ulimit -Hn; ulimit -c; cat /proc/sys/net/ipv4/ip_forward \
                /proc/sys/kernel/msgmax";
    let text = run(oci, line, |config| {
        config["process"]["rlimits"] = json!([
            {"type": "RLIMIT_NOFILE", "soft": 300, "hard": 600},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        ]);
        config["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1", "kernel.msgmax": "9000"});
    })?;
    same("limits", text.as_str(), "300\n600\n0\n1\n9000")
}

fn tmpfs(oci: &Oci) -> Result<()> {
    let bundle = oci
        .bundle("df -k /dev/shm /scratch | awk 'NR>1{print $2}'; grep ' /scratch ' /proc/mounts; df -T /scratch")?
        .mount("tmpfs", "tmpfs", "/scratch", &["size=8m", "noexec", "nosuid", "mode=1777"])?;
    let text = oci.runtime.run_bundle(&bundle)?.success()?.text();
    ensure!(text.starts_with("65536\n8192\n"), "{text}");
    has(&text, "noexec")?;
    has(&text, "tmpfs")
}

fn binds(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle(
        "cat /rw/from-host /one; echo inside >/rw/from-guest; echo more >>/one; touch /ro/x; \
         mkdir /rw/dir && mv /rw/from-host /rw/dir/; ls /ro",
    )?;
    let source = bundle.dir.join("source");
    fs::create_dir(&source)?;
    fs::write(source.join("from-host"), "outside\n")?;
    let file = bundle.dir.join("file");
    fs::write(&file, "single\n")?;
    let read_only = bundle.dir.join("read-only");
    fs::create_dir(&read_only)?;
    fs::write(read_only.join("there"), "")?;
    let mount = |bundle: Bundle, from: &std::path::Path, to: &str, options: &[&str]| {
        bundle.mount("bind", &from.to_string_lossy(), to, options)
    };
    let bundle = mount(bundle, &source, "/rw", &["rbind", "rw"])?;
    let bundle = mount(bundle, &read_only, "/ro", &["bind", "ro"])?;
    let bundle = mount(bundle, &file, "/one", &["bind"])?;
    let output = oci.runtime.run_bundle(&bundle)?.success()?;
    same("what it read", output.text().as_str(), "outside\nsingle\nthere")?;
    has(&output.stderr, "Read-only file system")?;
    same("from the guest", fs::read_to_string(source.join("from-guest"))?, "inside\n".to_owned())?;
    same("the single file", fs::read_to_string(&file)?, "single\nmore\n".to_owned())?;
    ensure!(source.join("dir/from-host").exists(), "the rename is not seen on the host");
    same("read-only", fs::read_dir(&read_only)?.count(), 1)
}

fn written(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle("mkdir -p /var/x && echo text >/var/x/f && chown 1000:2000 /var/x/f && chmod 640 /var/x/f && ln -s f /var/x/link")?
        .with(|config| {
            for set in ["bounding", "effective", "permitted"] {
                config["process"]["capabilities"][set] = json!(["CAP_CHOWN", "CAP_FOWNER"]);
            }
            config["process"]["capabilities"]["ambient"] = json!([]);
        })?;
    oci.runtime.run_bundle(&bundle)?.success()?;
    let dir = bundle.rootfs().join("var/x");
    same("text", fs::read_to_string(dir.join("f"))?, "text\n".to_owned())?;
    same("link", fs::read_link(dir.join("link"))?, "f".into())?;
    let stat = Run::new("stat").args(["-c", "%u %g %a"]).arg(dir.join("f")).text()?;
    same("owner and mode", stat.as_str(), "1000 2000 640")
}

fn devices(oci: &Oci) -> Result<()> {
    let line = "for d in null zero full random urandom tty; do test -c /dev/$d || echo no $d; done; \
                head -c 3 /dev/zero | wc -c; echo x >/dev/null; test -c /dev/mine && head -c 2 /dev/mine | wc -c; \
                ls -l /dev/fd /dev/stdin | wc -l; test -e /dev/ptmx && echo ptmx; \
                mknod /tmp/disk b 254 0 && cat /tmp/disk";
    let bundle = oci.bundle(line)?.with(|config| {
        config["linux"]["devices"] = json!([
            {"path": "/dev/mine", "type": "c", "major": 1, "minor": 5, "fileMode": 0o666, "uid": 0, "gid": 0}
        ]);
        config["linux"]["resources"]["devices"] = json!([
            {"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 5, "access": "rwm"}
        ]);
    })?;
    let output = oci.runtime.run_bundle(&bundle)?;
    same("output", output.text().as_str(), "3\n2\n2\nptmx")?;
    has(&output.stderr, "Operation not permitted")
}

fn processes(oci: &Oci) -> Result<()> {
    let text =
        oci.run("echo $$; ls /proc | grep -c '^[0-9]'; readlink /proc/self/exe")?.success()?.text();
    let lines: Vec<_> = text.lines().collect();
    same("pid", lines[0], "1")?;
    let count: u32 = lines[1].parse()?;
    ensure!(count <= 4, "it sees {count} processes");
    same("program", lines[2], "/bin/busybox")
}

/// A network namespace of `ip netns` with one end of a veth pair and an address, deleted when dropped.
struct Netns(String);

impl Netns {
    fn make(name: &str) -> Result<Self> {
        let line = format!(
            "ip netns add {name} && ip -n {name} link set lo up && \
             ip -n {name} link add veth0 type veth peer name peer0 && \
             ip -n {name} link set veth0 mtu 1400 && ip -n {name} addr add 10.77.0.2/24 dev veth0 && \
             ip netns add {name}-peer && ip -n {name} link set peer0 netns {name}-peer && \
             ip -n {name}-peer addr add 10.77.0.1/24 dev peer0 && \
             ip -n {name}-peer link set peer0 up && ip -n {name} link set veth0 up && \
             ip -n {name} route add default via 10.77.0.1"
        );
        let netns = Self(name.to_owned());
        Run::shell(&line).text()?;
        Ok(netns)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        for name in [self.0.clone(), format!("{}-peer", self.0)] {
            drop(Run::new("ip").args(["netns", "delete", &name]).output());
        }
    }
}

fn network_namespace(oci: &Oci) -> Result<()> {
    let bundle = oci.bundle(
        "ip -o addr show dev veth0; cat /sys/class/net/veth0/mtu /sys/class/net/veth0/address; \
         ip route; ping -c 1 -W 10 10.77.0.1 >/dev/null && echo answered",
    )?;
    let netns = Netns::make(&bundle.id)?;
    let name = netns.0.clone();
    let bundle = bundle.with(|config| {
        if let Some(list) = config["linux"]["namespaces"].as_array_mut() {
            for namespace in list.iter_mut().filter(|namespace| namespace["type"] == "network") {
                namespace["path"] = json!(format!("/run/netns/{name}"));
            }
        }
        for set in ["bounding", "effective", "permitted", "ambient", "inheritable"] {
            config["process"]["capabilities"][set] = json!(["CAP_NET_RAW"]);
        }
    })?;
    let mac = format!("ip netns exec {name} cat /sys/class/net/veth0/address");
    let mac = Run::shell(&mac).text()?;
    let text = oci.runtime.run_bundle(&bundle)?.success()?.text();
    for part in ["10.77.0.2/24", "1400", mac.as_str(), "default via 10.77.0.1", "answered"] {
        has(&text, part)?;
    }
    // The namespace is the caller's: it stays, with its interface as it was.
    has(
        &Run::new("ip").args(["-n", &name, "-o", "addr", "show", "dev", "veth0"]).text()?,
        "10.77.0.2/24",
    )?;
    let filters = Run::new("tc").args(["-n", &name, "qdisc", "show", "dev", "veth0"]).text()?;
    ensure!(!filters.contains("ingress"), "a queueing discipline is left: {filters}");
    let links = Run::new("ip").args(["-n", &name, "-o", "link"]).text()?;
    same("links", links.lines().count(), 2)
}
