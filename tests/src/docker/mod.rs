//! SIGKILL at every step: nothing may be left after `delete --force`.

use anyhow::Result;

use crate::Bench;
use crate::report::Report;

/// Runs the suite.
pub(crate) fn run(_bench: &Bench, _report: &mut Report) -> Result<()> {
    Ok(())
}
