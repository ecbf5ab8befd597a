//! `check`, `env`, `image`: what an operator asks of a host rather than of a container.

use std::fs;
use std::process::ExitCode;

use anyhow::Context as _;
use image::{KernelSource, Recipe};
use serde_json::json;

use super::Context;
use crate::args::{Image, ImageBuild};
use crate::output;

/// One thing that was looked at.
struct Finding {
    what: &'static str,
    /// Whether VMs can run; what is merely slower or smaller is a warning.
    outcome: Outcome,
    words: String,
}

#[derive(PartialEq, Eq, Clone, Copy)]
enum Outcome {
    Good,
    Warning,
    Bad,
}

pub(super) fn check(context: &Context<'_>) -> anyhow::Result<ExitCode> {
    let findings = findings(context);
    for finding in &findings {
        let mark = match finding.outcome {
            Outcome::Good => "ok     ",
            Outcome::Warning => "warning",
            Outcome::Bad => "MISSING",
        };
        output::line(format_args!("{mark}  {}: {}", finding.what, finding.words));
    }
    if findings.iter().any(|finding| finding.outcome == Outcome::Bad) {
        anyhow::bail!("this host cannot run VMs yet");
    }
    output::line("this host can run VMs");
    Ok(ExitCode::SUCCESS)
}

fn findings(context: &Context<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut add = |what, outcome, words: String| findings.push(Finding { what, outcome, words });
    let config = match context.config() {
        Ok(config) => {
            add("configuration", Outcome::Good, "understood".into());
            config
        }
        Err(error) => {
            add("configuration", Outcome::Bad, format!("{error:#}"));
            return findings;
        }
    };
    match hypervisor::detect().obstacle {
        None => add("virtualisation", Outcome::Good, "KVM".into()),
        Some(obstacle) => {
            add("virtualisation", Outcome::Warning, format!("emulation only: {obstacle}"));
        }
    }
    match hypervisor::qemu::version(config.hypervisor.qemu.path.as_deref()) {
        Ok(version) => add("hypervisor", Outcome::Good, version),
        Err(error) => add("hypervisor", Outcome::Bad, format!("{:#}", anyhow::Error::from(error))),
    }
    match config.image.open() {
        Ok(image) => {
            let words = format!("Linux {}", image.manifest().kernel_release);
            add("guest image", Outcome::Good, words);
        }
        Err(error) => {
            let words = format!(
                "{:#}; build it with: kata-runtime image build",
                anyhow::Error::from(error)
            );
            add("guest image", Outcome::Bad, words);
        }
    }
    match fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => add("networking", Outcome::Good, "/dev/net/tun".into()),
        Err(error) => {
            add(
                "networking",
                Outcome::Warning,
                format!("/dev/net/tun: {error}; only --network none works"),
            );
        }
    }
    let user = rustix::process::geteuid();
    if user.is_root() {
        add("user", Outcome::Good, "root".into());
    } else {
        add("user", Outcome::Bad, format!("uid {}: root is needed", user.as_raw()));
    }
    findings
}

pub(super) fn env(context: &Context<'_>, as_json: bool) -> anyhow::Result<()> {
    let config = context.config()?;
    let image = config.image.open();
    let detection = hypervisor::detect();
    let value = json!({
        "runtime": {
            "version": env!("CARGO_PKG_VERSION"),
            "ociVersion": protocol::OCI_VERSION,
            "root": context.root()?.path(),
            "path": std::env::current_exe().ok(),
        },
        "host": {
            "kernel": rustix::system::uname().release().to_string_lossy(),
            "acceleration": detection.acceleration,
            "obstacle": detection.obstacle.map(|obstacle| obstacle.to_string()),
        },
        "hypervisor": {
            "driver": config.hypervisor.driver,
            "version": hypervisor::qemu::version(config.hypervisor.qemu.path.as_deref()).ok(),
        },
        "image": image.as_ref().ok().map(|image| json!({
            "kernel": image.kernel(),
            "initrd": image.initrd(),
            "manifest": image.manifest(),
        })),
        "config": config,
    });
    if as_json {
        return output::json(&value);
    }
    for (section, members) in value.as_object().into_iter().flatten() {
        output::line(format_args!("[{section}]"));
        for (name, member) in members.as_object().into_iter().flatten() {
            output::line(format_args!("  {name} = {member}"));
        }
    }
    Ok(())
}

pub(super) fn image(context: &Context<'_>, command: &Image) -> anyhow::Result<()> {
    match command {
        Image::Build(args) => build(context, args),
        Image::Verify { path } => {
            let image = match path {
                Some(path) => image::Image::open(path)?,
                None => context.config()?.image.open()?,
            };
            image.verify()?;
            output::line(format_args!("{} is as its manifest says", image.kernel().display()));
            Ok(())
        }
    }
}

fn build(context: &Context<'_>, args: &ImageBuild) -> anyhow::Result<()> {
    let output_directory = match (&args.output, context.config()?.image.path) {
        (Some(path), _) => path.clone(),
        (None, Some(path)) => path,
        (None, None) => image::default_directory(),
    };
    let kernel = match (&args.kernel, &args.kernel_package) {
        (Some(kernel), _) => {
            KernelSource::File { kernel: kernel.clone(), modules: args.modules.clone() }
        }
        (None, Some(package)) => KernelSource::Package(package.clone()),
        (None, None) => KernelSource::Apt { cache: "/var/cache/kata-containers".into() },
    };
    let recipe = Recipe {
        kernel,
        agent: args.agent.clone(),
        overlays: args.rootfs_overlay.clone(),
        output: output_directory,
    };
    let image = image::build(&recipe).context("the image was not built")?;
    output::line(format_args!(
        "kernel  {} (Linux {})",
        image.kernel().display(),
        image.manifest().kernel_release
    ));
    output::line(format_args!("initrd  {}", image.initrd().display()));
    Ok(())
}
