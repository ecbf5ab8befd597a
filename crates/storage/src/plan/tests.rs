use std::path::{Path, PathBuf};

use linux::mount::Propagation;
use protocol::oci;

use super::plan;
use crate::{Error, Input, Kind, Plan, ReadOnly, Source};

/// A host where what a path is can be read off its name.
#[expect(clippy::unnecessary_wraps, reason = "the form of a probe")]
fn host(path: &Path) -> Result<Source, Error> {
    let text = path.to_str().unwrap();
    let kind = match text {
        _ if text.contains("missing") => Kind::Missing,
        _ if text.ends_with("-socket") => Kind::Socket,
        _ if text.ends_with("fifo") => Kind::Fifo,
        _ if text.ends_with("sda") => Kind::Block,
        _ if text.ends_with("null") || text.ends_with("kvm") => Kind::Character,
        _ if text.contains("file") => Kind::File,
        _ => Kind::Directory,
    };
    let path = text.replace("/link-to-proc", "/proc").into();
    Ok(Source { kind, path, tmpfs_size: text.ends_with("/shm").then_some(64 << 20) })
}

fn planned(root: &str, mounts: &str) -> Result<Plan, Error> {
    let json = format!(r#"{{"ociVersion":"1.0.2","root":{root},"mounts":{mounts}}}"#);
    let spec: oci::Spec = serde_json::from_str(&json).unwrap();
    let input = Input { container_id: "c1", bundle: Path::new("/bundle"), spec: &spec };
    plan(&input, host)
}

fn one(mount: &str) -> Result<Plan, Error> {
    planned(r#"{"path":"rootfs"}"#, &format!("[{mount}]"))
}

fn options(mount: &oci::Mount) -> Vec<&str> {
    mount.options().as_ref().unwrap().iter().map(String::as_str).collect()
}

#[test]
fn a_root_is_relative_to_the_bundle_and_bound_with_what_is_mounted_below_it() {
    let plan = planned(r#"{"path":"rootfs"}"#, "[]").unwrap();
    assert_eq!(plan.guest_root, "/run/kata/share/c1/rootfs");
    let root = &plan.binds[0];
    assert_eq!(root.source, Path::new("/bundle/rootfs"));
    assert_eq!(root.name, Path::new("c1/rootfs"));
    assert!(root.recursive && root.is_directory);
    assert_eq!(root.read_only, ReadOnly::No);
    let plan = planned(r#"{"path":"/elsewhere"}"#, "[]").unwrap();
    assert_eq!(plan.binds[0].source, Path::new("/elsewhere"));
}

#[test]
fn a_root_that_is_not_a_directory_is_refused() {
    let table = [
        ("missing", "invalid root: /bundle/missing does not exist"),
        ("file", "invalid root: /bundle/file is a file, not a directory"),
        ("", "invalid root: root.path is empty"),
        (r"a\u0000b", "invalid root: path a\\0b has a NUL in it"),
    ];
    for (path, text) in table {
        let error = planned(&format!(r#"{{"path":"{path}"}}"#), "[]").unwrap_err();
        assert_eq!(error.to_string(), text);
    }
}

#[test]
fn a_read_only_root_gets_its_mount_points_on_the_host_first() {
    let mounts = r#"[
        {"destination":"/dev","type":"tmpfs","source":"tmpfs"},
        {"destination":"/dev/pts","type":"devpts","source":"devpts"},
        {"destination":"/etc/hosts","type":"bind","source":"/x/file","options":["rbind"]},
        {"destination":"data/../srv","type":"bind","source":"/srv","options":["rbind"]}
    ]"#;
    let plan = planned(r#"{"path":"rootfs","readonly":true}"#, mounts).unwrap();
    assert_eq!(plan.binds[0].read_only, ReadOnly::Top);
    let expected: [(PathBuf, bool); 3] =
        [("/dev".into(), true), ("/etc/hosts".into(), false), ("/srv".into(), true)];
    assert_eq!(plan.mount_points, expected);
    // The guest must be able to make /dev/null in it.
    let plan = planned(r#"{"path":"rootfs","readonly":true}"#, "[]").unwrap();
    assert_eq!(plan.binds[0].read_only, ReadOnly::No);
}

#[test]
fn binds_are_shared_and_the_rest_passes_in_order() {
    let mounts = r#"[
        {"destination":"/proc","type":"proc","source":"proc"},
        {"destination":"/data","type":"bind","source":"/srv/data","options":["rbind","ro","nosuid"]},
        {"destination":"/data/tmp","type":"tmpfs","source":"tmpfs","options":["size=8m"]},
        {"destination":"/etc/hosts","source":"/x/file","options":["bind","rslave","rro"]}
    ]"#;
    let plan = planned(r#"{"path":"rootfs"}"#, mounts).unwrap();
    let destinations: Vec<_> =
        plan.guest_mounts.iter().map(|mount| mount.destination().to_str().unwrap()).collect();
    assert_eq!(destinations, ["/proc", "/data", "/data/tmp", "/etc/hosts"]);
    let source = |index: usize| plan.guest_mounts[index].source().clone().unwrap();
    assert_eq!(source(1), Path::new("/run/kata/share/c1/mounts/1"));
    assert_eq!(options(&plan.guest_mounts[1]), ["rbind", "ro", "nosuid"]);
    assert_eq!(source(3), Path::new("/run/kata/share/c1/mounts/3"));

    let [_, data, hosts] = &plan.binds[..] else { panic!("{:?}", plan.binds) };
    assert_eq!((data.read_only, data.recursive), (ReadOnly::Top, true));
    assert_eq!(data.propagation, Propagation::Private);
    assert!(data.is_directory);
    assert_eq!((hosts.read_only, hosts.recursive), (ReadOnly::All, false));
    assert_eq!(hosts.propagation, Propagation::Slave);
    assert!(!hosts.is_directory);
}

#[test]
fn of_ro_and_rw_the_last_counts() {
    let read_only = |options: &str| {
        let mount = format!(
            r#"{{"destination":"/d","type":"bind","source":"/d","options":["rbind",{options}]}}"#
        );
        one(&mount).unwrap().binds[1].read_only
    };
    assert_eq!(read_only(r#""ro","rw""#), ReadOnly::No);
    assert_eq!(read_only(r#""rw","ro""#), ReadOnly::Top);
    assert_eq!(read_only(r#""ro","rro""#), ReadOnly::All);
}

#[test]
fn a_tmpfs_on_dev_shm_becomes_the_guests_own_of_the_same_size() {
    let plan = one(
        r#"{"destination":"/dev/shm","type":"bind","source":"/var/c/shm","options":["rbind"]}"#,
    )
    .unwrap();
    assert_eq!(plan.binds.len(), 1);
    let shm = &plan.guest_mounts[0];
    assert_eq!(shm.typ().as_deref(), Some("tmpfs"));
    assert_eq!(options(shm), ["nosuid", "noexec", "nodev", "mode=1777", "size=67108864"]);
}

#[test]
fn kernel_interfaces_are_the_guests_own() {
    for (source, warns) in [
        ("/sys/fs/cgroup", false),
        ("/dev/null", false),
        ("/proc", true),
        ("/link-to-proc", true),
        ("/sys/kernel/debug", true),
        ("/dev", true),
    ] {
        let mount = format!(
            r#"{{"destination":"/x","type":"bind","source":"{source}","options":["rbind","ro"]}}"#
        );
        let plan = one(&mount).unwrap();
        assert_eq!(plan.binds.len(), 1, "{source}");
        let expected = source.replace("/link-to-proc", "/proc");
        assert_eq!(plan.guest_mounts[0].source().as_deref(), Some(Path::new(&expected)));
        assert_eq!(!plan.warnings.is_empty(), warns, "{source}");
    }
    let plan = one(r#"{"destination":"/x","type":"bind","source":"/dev/shm/files"}"#).unwrap();
    assert_eq!(plan.binds.len(), 2);
}

#[test]
fn a_socket_is_one_of_the_agents_and_a_pipe_is_shared_with_a_warning() {
    let plan = one(r#"{"destination":"/s","type":"bind","source":"/run/docker-socket"}"#).unwrap();
    assert_eq!(plan.sockets[0].source, Path::new("/run/docker-socket"));
    assert_eq!(plan.sockets[0].guest_path, "/run/kata/sockets/c1/0");
    assert_eq!(plan.guest_mounts[0].source().as_deref(), Some(Path::new("/run/kata/sockets/c1/0")));
    assert_eq!((plan.binds.len(), plan.warnings.len()), (1, 0));
    let plan =
        one(r#"{"destination":"/dev/log","type":"bind","source":"/dev/log-socket"}"#).unwrap();
    assert_eq!(plan.sockets.len(), 1);
    let plan = one(r#"{"destination":"/s","type":"bind","source":"/run/fifo"}"#).unwrap();
    assert_eq!(plan.warnings.len(), 1);
}

#[test]
fn what_cannot_be_shared_is_refused_with_a_reason() {
    let long = "x".repeat(300);
    let table = [
        (
            r#"{"destination":"/d","type":"bind","source":"/missing"}"#.to_owned(),
            "invalid mount /d: source /missing does not exist",
        ),
        (
            r#"{"destination":"/d","type":"bind","source":"/dev/sda"}"#.to_owned(),
            "invalid mount /d: source /dev/sda is a block device; a guest has devices of its own, give it to the \
             container as a device instead",
        ),
        (
            r#"{"destination":"/d","type":"bind"}"#.to_owned(),
            "invalid mount /d: a bind mount needs a source",
        ),
        (
            r#"{"destination":"/d","type":"overlay","source":"overlay"}"#.to_owned(),
            "invalid mount /d: a file system of type `overlay` cannot be mounted in a guest; mount it on the host and \
             bind it",
        ),
        (
            r#"{"destination":"/d","type":"bind","source":"/d","options":["rbind","idmap"]}"#
                .to_owned(),
            "invalid mount /d: ID-mapped mounts cannot be shared with a guest; leave out idmap and the mappings",
        ),
        (
            r#"{"destination":"","type":"proc"}"#.to_owned(),
            "invalid mount : a mount needs a destination",
        ),
        (
            r#"{"destination":"/d\u001b[2J\u0000","type":"proc"}"#.to_owned(),
            r"invalid mount /d\u{1b}[2J\0: path /d\u{1b}[2J\0 has a NUL in it",
        ),
        (
            format!(r#"{{"destination":"/{long}","type":"proc"}}"#),
            "has a name longer than 255 bytes in it",
        ),
        (
            format!(r#"{{"destination":"{}","type":"proc"}}"#, "/a".repeat(2100)),
            "is longer than 4095 bytes",
        ),
    ];
    for (mount, text) in table {
        let error = one(&mount).unwrap_err().to_string();
        assert!(error.ends_with(text), "{error}");
        assert!(error.len() < 600, "{error}");
    }
}

#[test]
fn an_id_that_is_no_file_name_is_refused() {
    let spec: oci::Spec =
        serde_json::from_str(r#"{"ociVersion":"1.0.2","root":{"path":"rootfs"}}"#).unwrap();
    for id in ["", ".", "..", "a/b", "../x"] {
        let input = Input { container_id: id, bundle: Path::new("/bundle"), spec: &spec };
        assert!(matches!(plan(&input, host), Err(Error::ContainerId { .. })), "{id}");
    }
}
