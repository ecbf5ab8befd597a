//! Measures: ours beside runc, interleaved in one run, as a Markdown table of medians and ratios.

mod figures;
mod rig;
mod services;
mod variants;

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use testkit::docker::{self, IMAGE};
use testkit::{Bundle, Container, Run, Runtime};

use crate::Bench;
use crate::report::Report;
use figures::Figures;
use rig::{Servers, boot_phases, pss_mib, seconds_inside};
use variants::{Variant, variants};

/// One part of the measurement: `--filter run`, `inside`, `many`, `docker` or `services` chooses one.
type Part = fn(&Bench, &[Variant], &mut Figures, &mut Report) -> Result<()>;

/// How often each thing is measured on each runtime, or as often as `KATA_BENCH_ROUNDS` says.
fn rounds() -> usize {
    std::env::var("KATA_BENCH_ROUNDS").ok().and_then(|word| word.parse().ok()).unwrap_or(5)
}

/// How many containers are started at once, and are then idle.
const MANY: [usize; 3] = [1, 10, 50];

/// Measures everything, and prints the table.
pub(crate) fn run(bench: &Bench, report: &mut Report) -> Result<()> {
    let variants = variants(bench)?;
    let names: Vec<_> = variants.iter().map(|variant| variant.runtime.name.clone()).collect();
    let mut figures = Figures::new(names);
    let parts: [(&str, Part); 5] = [
        ("run", command_line),
        ("inside", inside),
        ("many", many),
        ("docker", with_docker),
        ("services", with_services),
    ];
    for (name, part) in parts {
        if bench.filter.as_deref().is_none_or(|word| name.contains(word)) {
            part(bench, &variants, &mut figures, report)?;
        }
    }
    report.say(&figures.table());
    Ok(())
}

/// Start to exit of `run`, and its phases where the runtime logs them.
fn command_line(
    bench: &Bench,
    variants: &[Variant],
    figures: &mut Figures,
    report: &mut Report,
) -> Result<()> {
    report.say("bench: run, from start to exit");
    // The first of each makes a template, or reads files for the first time.
    for round in 0..=rounds() {
        for variant in variants {
            let runtime = &variant.runtime;
            let bundle = Bundle::new(&bench.work, &["true"])?;
            variant.settle()?;
            let log = bundle.dir.join("log");
            let run = runtime.run(&["--debug", "--log-format", "json", "--log"]).arg(&log);
            let run = run.args(["run", "--bundle"]).arg(&bundle.dir).arg(&bundle.id);
            let began = Instant::now();
            run.text()?;
            let took = began.elapsed();
            variant.settle()?;
            if round == 0 {
                continue;
            }
            figures.add("`run` of `true`, start to exit", "s", &runtime.name, took.as_secs_f64());
            let log = fs::read_to_string(&log).unwrap_or_default();
            for (phase, seconds) in boot_phases(&log) {
                figures.add(&format!("phase {phase}"), "s", &runtime.name, seconds);
            }
        }
    }
    Ok(())
}

/// A container's file I/O, execs and memory, one container for each runtime, alive at the same time.
fn inside(bench: &Bench, _: &[Variant], figures: &mut Figures, report: &mut Report) -> Result<()> {
    report.say("bench: exec, memory and files");
    let mut containers = Vec::new();
    for runtime in &bench.runtimes {
        let bundle = Bundle::shell(&bench.work, "exec sleep 100000")?;
        let volume = bundle.dir.join("volume");
        fs::create_dir(&volume)?;
        let bundle = bundle.mount("bind", &volume.to_string_lossy(), "/volume", &["rbind"])?;
        containers.push((runtime, runtime.start(&bundle)?));
    }
    for _ in 0..rounds() * 2 {
        for (runtime, container) in &containers {
            let began = Instant::now();
            container.exec(&["true"]).text()?;
            figures.add(
                "`exec` of `true`",
                "ms",
                &runtime.name,
                began.elapsed().as_secs_f64() * 1e3,
            );
        }
    }
    for (runtime, container) in &containers {
        report.say(&format!("bench: files in a container of {}", runtime.name));
        files(figures, runtime, container)?;
    }
    Ok(())
}

/// Containers started at once, and what the host's processes of all of them take while they are idle.
fn many(
    bench: &Bench,
    variants: &[Variant],
    figures: &mut Figures,
    report: &mut Report,
) -> Result<()> {
    for count in MANY {
        report.say(&format!("bench: {count} starts at once, and the memory of {count} containers"));
        for variant in variants.iter().filter(|variant| !variant.is_pool()) {
            let runtime = &variant.runtime;
            let bundles: Vec<_> = (0..count)
                .map(|_| Bundle::shell(&bench.work, "exec sleep 100000"))
                .collect::<Result<_>>()?;
            let began = Instant::now();
            let containers: Vec<_> = std::thread::scope(|scope| {
                let starts: Vec<_> = bundles
                    .iter()
                    .map(|bundle| scope.spawn(move || runtime.start(bundle)))
                    .collect();
                let joined =
                    starts.into_iter().map(|start| start.join().map_err(|_| anyhow!("a panic"))?);
                joined.collect::<Result<_>>()
            })?;
            let took = began.elapsed().as_secs_f64();
            figures.add(&format!("{count} starts at once"), "s", &runtime.name, took);
            let mib = pss_mib(runtime, &containers)?;
            figures.add(
                &format!("memory of {count} idle containers, PSS"),
                "MiB",
                &runtime.name,
                mib,
            );
        }
    }
    Ok(())
}

/// One round: emulation makes 10,000 files a matter of minutes.
fn files(figures: &mut Figures, runtime: &Runtime, container: &Container) -> Result<()> {
    for (place, directory) in [("root file system", ""), ("volume", "/volume")] {
        let file = format!("{directory}/large");
        let write = format!("dd if=/dev/zero of={file} bs=1M count=256 conv=fsync");
        let seconds = seconds_inside(container, &write)?;
        figures.add(&format!("sequential write, {place}"), "MiB/s", &runtime.name, 256.0 / seconds);
        let read = format!("dd if={file} of=/dev/null bs=1M");
        let seconds = seconds_inside(container, &read)?;
        figures.add(&format!("sequential read, {place}"), "MiB/s", &runtime.name, 256.0 / seconds);
        let random = format!(
            "n=0; x=1; while [ $n -lt 200 ]; do x=$(( (x * 1103515245 + 12345) % 65536 )); \
             dd if={file} of=/dev/null bs=4k count=1 skip=$x 2>/dev/null; n=$((n + 1)); done"
        );
        let rate = 200.0 / seconds_inside(container, &random)?;
        figures.add(
            &format!("4 KiB random reads, a process each, {place}"),
            "1/s",
            &runtime.name,
            rate,
        );
        container.exec(&["rm", &file]).text()?;
    }
    let many = "mkdir /volume/many && cd /volume/many && seq 1 10000 | \
                while read n; do echo $n >$n; done; cat ./* >/dev/null; cd / && rm -r /volume/many";
    let seconds = seconds_inside(container, many)?;
    figures.add("10,000 small files made, read and removed, volume", "s", &runtime.name, seconds);
    Ok(())
}

/// A Docker daemon with those runtimes whose containers have the bridge's network; nothing where Docker is not installed.
fn daemon(
    bench: &Bench,
    variants: &[Variant],
    report: &mut Report,
) -> Result<Option<docker::Docker>> {
    let missing = docker::missing_programs();
    if !missing.is_empty() {
        report.say(&format!("SKIPPED: Docker's figures need {}", missing.join(", ")));
        return Ok(None);
    }
    let bin = bench.work.path().join("bin");
    let programs: Vec<_> = variants
        .iter()
        .filter(|variant| variant.has_bridge())
        .map(|variant| &variant.runtime)
        .map(|runtime| Ok((runtime.name.as_str(), runtime.registrable(&bin)?)))
        .collect::<Result<_>>()?;
    let registered: Vec<_> = programs.iter().map(|(name, path)| (*name, path.as_path())).collect();
    docker::Docker::start(&bench.work, &registered).map(Some)
}

/// `docker run --rm`, and TCP through the bridge.
fn with_docker(
    bench: &Bench,
    variants: &[Variant],
    figures: &mut Figures,
    report: &mut Report,
) -> Result<()> {
    report.say("bench: docker run and TCP");
    let Some(docker) = daemon(bench, variants, report)? else { return Ok(()) };
    for round in 0..=rounds() {
        for variant in variants.iter().filter(|variant| variant.has_bridge()) {
            let runtime = &variant.runtime;
            variant.settle()?;
            let began = Instant::now();
            docker.run(&["run", "--rm", "--runtime", &runtime.name, IMAGE, "true"]).text()?;
            let seconds = began.elapsed().as_secs_f64();
            variant.settle()?;
            if round == 0 {
                continue;
            }
            figures.add("`docker run --rm` of `true`", "s", &runtime.name, seconds);
        }
    }
    let dir = bench.work.path().join("served");
    fs::create_dir(&dir)?;
    for _ in 0..3 {
        for runtime in &bench.runtimes {
            let servers = Servers::start(&docker, &runtime.name, &dir)?;
            for (direction, rate) in servers.throughput().context("TCP throughput")? {
                let what = format!("TCP through the bridge, {direction}");
                figures.add(&what, "Mbit/s", &runtime.name, rate);
            }
        }
    }
    Ok(())
}

/// Network, web server, database and disk in a Docker container.
fn with_services(
    bench: &Bench,
    variants: &[Variant],
    figures: &mut Figures,
    report: &mut Report,
) -> Result<()> {
    let there =
        |name: &&str| Run::new("sh").args(["-c", "command -v \"$1\"", "sh", name]).text().is_ok();
    if let Some(program) = services::PROGRAMS.iter().find(|name| !there(name)) {
        report.say(&format!("SKIPPED: the services' figures need {program}"));
        return Ok(());
    }
    report.say("bench: iperf3, nginx, redis and fio");
    let Some(docker) = daemon(bench, variants, report)? else { return Ok(()) };
    let dir = bench.work.path().join("services");
    for _ in 0..2 {
        for runtime in &bench.runtimes {
            services::measure(&docker, &runtime.name, &dir, figures)
                .with_context(|| runtime.name.clone())?;
        }
    }
    Ok(())
}

/// What the machine is, for the table's head.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let kernel = Run::new("uname").arg("-r").text().unwrap_or_default();
    format!("{cores} cores, Linux {kernel}")
}
