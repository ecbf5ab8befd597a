//! The OCI command line, called directly.

mod bad;
mod exec;
mod inside;
mod lifecycle;
mod mounts;
mod network;
mod pool;
mod query;
mod stdio;

use std::cell::OnceCell;
use std::rc::Rc;

use anyhow::Result;
use testkit::{Bundle, Container, Output, Runtime, Work};

use crate::Bench;
use crate::report::Report;

const SUITE: &str = "oci";

/// What a case is given.
pub(crate) struct Oci {
    /// Where bundles are made.
    pub(crate) work: Rc<Work>,
    /// The runtime under test.
    pub(crate) runtime: Runtime,
    /// A running container that cases share who leave it as it was.
    shared: OnceCell<Rc<Container>>,
}

impl Oci {
    /// A bundle that runs a shell line.
    pub(crate) fn bundle(&self, line: &str) -> Result<Bundle> {
        Bundle::shell(&self.work, line)
    }

    /// `run` of a shell line.
    pub(crate) fn run(&self, line: &str) -> Result<Output> {
        self.runtime.run_bundle(&self.bundle(line)?)
    }

    /// A container of one's own that sleeps.
    pub(crate) fn sleeper(&self) -> Result<Container> {
        self.runtime.start(&self.bundle("exec sleep 1000")?)
    }

    /// The container that cases share: it sleeps.
    pub(crate) fn shared(&self) -> Result<Rc<Container>> {
        if let Some(container) = self.shared.get() {
            return Ok(Rc::clone(container));
        }
        let container = Rc::new(self.sleeper()?);
        Ok(Rc::clone(self.shared.get_or_init(|| container)))
    }
}

/// Runs the suite.
pub(crate) fn run(bench: &Bench, report: &mut Report) {
    for runtime in &bench.runtimes {
        let mut oci =
            Oci { work: Rc::clone(&bench.work), runtime: runtime.clone(), shared: OnceCell::new() };
        for cases in [
            lifecycle::CASES,
            query::CASES,
            inside::CASES,
            network::CASES,
            pool::CASES,
            stdio::CASES,
            bad::CASES,
            mounts::CASES,
        ] {
            bench.cases(SUITE, &runtime.name, &oci, cases, report);
        }
        if bench.wants(exec::CASES) && !bench.list {
            // Before the first snapshot, since it lives longer than one case. Failing is the first case's to tell.
            drop(oci.shared());
        }
        bench.cases(SUITE, &runtime.name, &oci, exec::CASES, report);
        oci.shared.take();
    }
}
