//! Real mounts, each test in a mount namespace of its own.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::thread;

use linux::ThisHost;
use linux::ledger::Ledger;
use linux::{mount, namespace};
use protocol::oci;

use super::{attach, detach};
use crate::{Input, plan, probe};

/// A bundle, and a share beside it.
struct Fixture {
    dir: PathBuf,
    ledger: PathBuf,
}

impl Fixture {
    fn at(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn share(&self) -> PathBuf {
        self.at("share")
    }

    fn plan(&self, root: &str, mounts: &str) -> crate::Plan {
        let json = format!(
            r#"{{"ociVersion":"1.0.2","root":{root},"mounts":[{}]}}"#,
            mounts.replace("DIR", self.dir.to_str().unwrap())
        );
        let spec: oci::Spec = serde_json::from_str(&json).unwrap();
        let input = Input { container_id: "c1", bundle: &self.dir, spec: &spec };
        plan(&input, probe).unwrap()
    }

    fn attach(&self, plan: &crate::Plan) -> Result<(), crate::Error> {
        let here = Path::new("/proc/thread-self/ns/mnt");
        attach(plan, &self.share(), here, &mut Ledger::open(&self.ledger).unwrap())
    }
}

const ROOT: &str = r#"{"path":"rootfs"}"#;

/// Runs `test` on a thread that has mounts of its own, with a share that is a shared mount.
fn with_mounts(test: impl FnOnce(&Fixture) + Send) {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: needs root");
        return;
    }
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path().canonicalize().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            namespace::unshare_mounts().unwrap();
            for name in ["rootfs/etc", "share", "data/sub"] {
                fs::create_dir_all(dir.join(name)).unwrap();
            }
            mount::share(&dir.join("share")).unwrap();
            let ledger = dir.join("ledger");
            test(&Fixture { dir: dir.clone(), ledger });
        });
    });
}

#[test]
fn directories_and_files_show_up_below_the_share_and_go_again() {
    with_mounts(|fixture| {
        fs::write(fixture.at("rootfs/hello"), "root").unwrap();
        fs::write(fixture.at("data/file"), "data").unwrap();
        let plan = fixture.plan(
            ROOT,
            r#"{"destination":"/d","type":"bind","source":"DIR/data","options":["rbind"]},
               {"destination":"/f","type":"bind","source":"DIR/data/file","options":["rbind","ro"]}"#,
        );
        fixture.attach(&plan).unwrap();
        let share = fixture.share();
        assert_eq!(fs::read_to_string(share.join("c1/rootfs/hello")).unwrap(), "root");
        fs::write(share.join("c1/mounts/0/new"), "from the guest").unwrap();
        assert_eq!(fs::read_to_string(fixture.at("data/new")).unwrap(), "from the guest");
        assert_eq!(fs::read_to_string(share.join("c1/mounts/1")).unwrap(), "data");
        let error = fs::write(share.join("c1/mounts/1"), "x").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);

        detach("c1", &share).unwrap();
        detach("c1", &share).unwrap();
        assert_eq!(fs::read_dir(&share).unwrap().count(), 0);
        assert_eq!(fs::read_to_string(fixture.at("data/file")).unwrap(), "data");
        assert_eq!(fs::read_to_string(fixture.at("rootfs/hello")).unwrap(), "root");
    });
}

#[test]
fn the_ledger_alone_takes_it_all_away_and_leaves_the_sources() {
    with_mounts(|fixture| {
        fs::write(fixture.at("data/file"), "data").unwrap();
        let plan = fixture.plan(
            ROOT,
            r#"{"destination":"/d","type":"bind","source":"DIR/data","options":["rbind"]}"#,
        );
        fixture.attach(&plan).unwrap();
        Ledger::open(&fixture.ledger).unwrap().settle(&ThisHost).unwrap();
        assert_eq!(fs::read_dir(fixture.share()).unwrap().count(), 0);
        assert_eq!(fs::read_to_string(fixture.at("data/file")).unwrap(), "data");
    });
}

#[test]
fn ro_is_of_the_mount_alone_and_rro_of_those_below_it_too() {
    with_mounts(|fixture| {
        mount::tmpfs(&fixture.at("data/sub"), 0o755, None).unwrap();
        let plan = fixture.plan(
            ROOT,
            r#"{"destination":"/a","type":"bind","source":"DIR/data","options":["rbind","ro"]},
               {"destination":"/b","type":"bind","source":"DIR/data","options":["rbind","rro"]},
               {"destination":"/c","type":"bind","source":"DIR/data","options":["bind"]}"#,
        );
        fixture.attach(&plan).unwrap();
        let write =
            |name: &str| fs::write(fixture.share().join("c1/mounts").join(name), "x").is_ok();
        assert!(!write("0/x") && write("0/sub/x"));
        assert!(!write("1/x") && !write("1/sub/y"));
        assert!(write("2/x") && !fixture.share().join("c1/mounts/2/sub/x").exists());
    });
}

#[test]
fn what_the_host_mounts_later_shows_up_where_it_was_asked_for() {
    with_mounts(|fixture| {
        // The host's mounts are shared; the namespace of a sandbox hears of them.
        mount::bind(&fixture.at("data"), &fixture.at("data"), false).unwrap();
        mount::set_propagation(&fixture.at("data"), mount::Propagation::Shared, false).unwrap();
        let plan = fixture.plan(
            ROOT,
            r#"{"destination":"/a","type":"bind","source":"DIR/data","options":["rbind","rslave"]},
               {"destination":"/b","type":"bind","source":"DIR/data","options":["rbind","rprivate"]}"#,
        );
        fixture.attach(&plan).unwrap();
        mount::tmpfs(&fixture.at("data/sub"), 0o755, None).unwrap();
        fs::write(fixture.at("data/sub/later"), "").unwrap();
        let share = fixture.share().join("c1/mounts");
        assert!(share.join("0/sub/later").exists());
        assert!(!share.join("1/sub/later").exists());
    });
}

#[test]
fn another_namespace_that_was_copied_before_sees_the_binds() {
    with_mounts(|fixture| {
        let (ready, wait) = std::sync::mpsc::channel();
        let (done, attached) = std::sync::mpsc::channel();
        let file = fixture.share().join("c1/mounts/0/x");
        thread::scope(|scope| {
            let server = scope.spawn(move || {
                namespace::unshare_mounts().unwrap();
                // As whoever serves the share should: it cannot be written beside the binds.
                let share = file.ancestors().nth(4).unwrap();
                mount::set_attributes(share, mount::Attributes::READ_ONLY, false).unwrap();
                ready.send(()).unwrap();
                attached.recv().unwrap();
                fs::write(&file, "x").unwrap();
                fs::write(share.join("outside"), "x").unwrap_err();
            });
            wait.recv().unwrap();
            let plan = fixture.plan(
                ROOT,
                r#"{"destination":"/a","type":"bind","source":"DIR/data","options":["rbind"]}"#,
            );
            fixture.attach(&plan).unwrap();
            done.send(()).unwrap();
            server.join().unwrap();
        });
        assert_eq!(fs::read_to_string(fixture.at("data/x")).unwrap(), "x");
    });
}

#[test]
fn a_source_swapped_for_a_symlink_is_not_followed() {
    with_mounts(|fixture| {
        let plan = fixture.plan(
            ROOT,
            r#"{"destination":"/a","type":"bind","source":"DIR/data","options":["rbind"]}"#,
        );
        fs::remove_dir_all(fixture.at("data")).unwrap();
        symlink("/etc", fixture.at("data")).unwrap();
        let error = fixture.attach(&plan).unwrap_err();
        assert_eq!(error.to_string(), format!("cannot open {}/data", fixture.dir.display()));
        // And nothing of the rest is left.
        assert_eq!(fs::read_dir(fixture.share()).unwrap().count(), 0);
    });
}

#[test]
fn a_symlink_that_a_guest_left_in_the_share_is_not_followed() {
    with_mounts(|fixture| {
        let outside = fixture.at("outside");
        fs::create_dir(&outside).unwrap();
        symlink(&outside, fixture.share().join("c1")).unwrap();
        fixture.attach(&fixture.plan(ROOT, "")).unwrap_err();
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    });
}

#[test]
fn a_read_only_root_has_its_mount_points_made_inside_it() {
    with_mounts(|fixture| {
        // The image's /var leads out of it, if the host were to follow it.
        symlink("/escape", fixture.at("rootfs/var")).unwrap();
        let plan = fixture.plan(
            r#"{"path":"rootfs","readonly":true}"#,
            r#"{"destination":"/dev","type":"tmpfs","source":"tmpfs"},
               {"destination":"/etc/hosts","type":"bind","source":"DIR/ledger.txt","options":["bind"]},
               {"destination":"/srv/deep/er","type":"bind","source":"DIR/data","options":["bind"]}"#
                .replace("DIR/ledger.txt", "/etc/passwd")
                .as_str(),
        );
        fixture.attach(&plan).unwrap();
        assert!(fixture.at("rootfs/dev").is_dir());
        assert!(fixture.at("rootfs/etc/hosts").is_file());
        assert!(fixture.at("rootfs/srv/deep/er").is_dir());
        fs::write(fixture.share().join("c1/rootfs/x"), "").unwrap_err();
        assert!(!Path::new("/escape").exists());
    });
}

#[test]
fn the_hosts_root_can_be_bound_though_the_share_is_in_it() {
    with_mounts(|fixture| {
        let plan = fixture.plan(
            ROOT,
            r#"{"destination":"/host","type":"bind","source":"/","options":["rbind","ro","rslave"]}"#,
        );
        fixture.attach(&plan).unwrap();
        assert!(fixture.share().join("c1/mounts/0/etc/passwd").exists());
        detach("c1", &fixture.share()).unwrap();
        assert!(Path::new("/etc/passwd").exists());
    });
}
