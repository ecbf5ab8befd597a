//! Black-box suites: what a user of the runtime sees, checked on runc and on ours side by side.
//!
//! ```text
//! suites --runtime runc --runtime kata-runtime=PROGRAM --config FILE oci docker containerd crash
//! ```
//!
//! Each case runs once for each runtime. A case that cannot run says `SKIPPED: needs ...`; one that fails for a reason
//! that is written down in `known.rs` counts as a known difference, among the skipped. The last line is
//! `N passed, N failed, N skipped`.

#![forbid(unsafe_code)]

mod bench;
mod case;
mod containerd;
mod crash;
mod cri;
mod docker;
mod known;
mod oci;
mod podman;
mod report;
mod validation;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use clap::Parser;
use testkit::residue::{Host, remove_cgroups};
use testkit::{Runtime, Work};

use crate::report::Report;

/// Runs black-box suites on OCI runtimes.
#[derive(Debug, Parser)]
struct Args {
    /// A runtime: its name, and its program where that is not the name.
    #[arg(long = "runtime", value_name = "NAME[=PROGRAM]", default_values = ["runc"])]
    runtimes: Vec<String>,
    /// The configuration file for kata-runtime.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Run only the cases with this in their name.
    #[arg(long)]
    filter: Option<String>,
    /// Say which cases there are, and run none.
    #[arg(long)]
    list: bool,
    /// Nobody else uses this machine: every process, mount and link that is left counts.
    #[arg(long)]
    alone: bool,
    /// The suites: oci, docker, podman, containerd, cri, crash, nested, soak, validation, bench.
    #[arg(required = true)]
    suites: Vec<String>,
}

/// What every suite is given.
pub(crate) struct Bench {
    /// The directory of this run.
    pub(crate) work: Rc<Work>,
    /// The runtimes under test.
    pub(crate) runtimes: Vec<Runtime>,
    /// The residue check.
    pub(crate) host: Host,
    /// Only the cases with this in their name.
    pub(crate) filter: Option<String>,
    /// Say which cases there are, and run none.
    pub(crate) list: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            report::complain(&error);
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args) -> Result<bool> {
    let work = Rc::new(Work::new()?);
    let runtimes: Vec<_> = args
        .runtimes
        .iter()
        .map(|text| runtime(&work, text, args.config.as_deref()))
        .collect::<Result<_>>()?;
    let host = Host::of(&work, !args.alone);
    let (filter, list) = (args.filter.clone(), args.list);
    let bench = Bench { work, runtimes, host, filter, list };
    let mut report = Report::default();
    for suite in &args.suites {
        match suite.as_str() {
            "oci" => oci::run(&bench, &mut report),
            "docker" => docker::run(&bench, &mut report)?,
            "nested" => docker::run_nested(&bench, &mut report)?,
            "containerd" => containerd::run(&bench, &mut report)?,
            "cri" => cri::run(&bench, &mut report)?,
            "pod-figures" => cri::figures(&bench, &mut report)?,
            "podman" => podman::run(&bench, &mut report)?,
            "soak" => docker::run_soak(&bench, &mut report)?,
            "crash" => crash::run(&bench, &mut report),
            "bench" => bench::run(&bench, &mut report)?,
            "validation" => validation::run(&bench, &mut report)?,
            _ => bail!(
                "there is no suite `{suite}`; there is: oci, docker, podman, containerd, cri, crash, nested, soak, \
                 validation, bench"
            ),
        }
    }
    remove_cgroups(bench.work.mark());
    if !bench.list && !report.is_empty() {
        report.close();
    }
    Ok(report.succeeded())
}

fn runtime(work: &Work, text: &str, config: Option<&Path>) -> Result<Runtime> {
    let (name, program) = text.split_once('=').unwrap_or((text, text));
    let found = testkit::Run::new("sh")
        .args(["-c", "command -v \"$1\"", "sh", program])
        .text()
        .with_context(|| format!("there is no program {program}"))?;
    let mut runtime = Runtime::new(work, name, Path::new(&found))?;
    if runtime.is_kata() {
        runtime.config = config.map(std::path::absolute).transpose()?;
    }
    Ok(runtime)
}
