//! Cases, and running them.

use std::any::Any;
use std::fmt::Debug;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use anyhow::{Error, Result, anyhow, ensure};

use crate::Bench;
use crate::known;
use crate::report::{Report, Verdict};

/// One fact that a suite checks, in a context that the suite makes for each runtime.
pub(crate) struct Case<C> {
    /// The fact, as a sentence.
    pub(crate) name: &'static str,
    /// Checks it.
    pub(crate) check: fn(&C) -> Result<()>,
}

/// A case; the name of the function is not shown.
pub(crate) const fn case<C>(name: &'static str, check: fn(&C) -> Result<()>) -> Case<C> {
    Case { name, check }
}

/// Why a case cannot run.
#[derive(Debug)]
struct Skip(String);

impl std::fmt::Display for Skip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "needs {}", self.0)
    }
}

impl std::error::Error for Skip {}

/// Leaves a case that cannot run: it needs `what`.
pub(crate) fn skip(what: impl Into<String>) -> Error {
    Skip(what.into()).into()
}

/// That two things are equal.
#[expect(clippy::needless_pass_by_value, reason = "reads better where it is called")]
pub(crate) fn same<T: PartialEq + Debug>(what: &str, actual: T, expected: T) -> Result<()> {
    ensure!(actual == expected, "{what}: {actual:?}, not {expected:?}");
    Ok(())
}

/// That a text has this in it.
pub(crate) fn has(text: &str, part: &str) -> Result<()> {
    ensure!(text.contains(part), "no {part:?} in: {}", text.trim());
    Ok(())
}

impl Bench {
    /// Runs the cases of `suite` for one runtime.
    pub(crate) fn cases<C>(
        &self,
        suite: &'static str,
        runtime: &str,
        context: &C,
        cases: &[Case<C>],
        report: &mut Report,
    ) {
        if self.list {
            return self.list_cases(suite, cases, report);
        }
        for case in self.chosen(cases) {
            let began = Instant::now();
            let verdict = match self.run_one(context, case, runtime != "runc") {
                Ok(()) => Verdict::Passed,
                Err(error) => {
                    match (error.downcast::<Skip>(), known::reason(suite, case.name, runtime)) {
                        (Ok(skip), _) => Verdict::Skipped(skip.to_string()),
                        (Err(_), Some(reason)) => Verdict::Known(reason),
                        (Err(error), None) => Verdict::Failed(format!("{error:#}")),
                    }
                }
            };
            report.add(suite, case.name, runtime, verdict, began.elapsed());
        }
    }

    /// Says which cases there are, where that was asked.
    pub(crate) fn list_cases<C>(
        &self,
        suite: &'static str,
        cases: &[Case<C>],
        report: &mut Report,
    ) {
        for case in self.chosen(cases).filter(|_| self.list) {
            report.list(suite, case.name);
        }
    }

    /// Whether any of the cases would run.
    pub(crate) fn wants<C>(&self, cases: &[Case<C>]) -> bool {
        self.chosen(cases).next().is_some()
    }

    fn chosen<'a, C>(&self, cases: &'a [Case<C>]) -> impl Iterator<Item = &'a Case<C>> {
        cases
            .iter()
            .filter(|case| self.filter.as_deref().is_none_or(|word| case.name.contains(word)))
    }

    /// Runs one case, and with `tidy` checks that it leaves the host as it found it: what a peer leaves is not ours to judge.
    fn run_one<C>(&self, context: &C, case: &Case<C>, tidy: bool) -> Result<()> {
        let before = self.host.snapshot()?;
        let outcome = catch_unwind(AssertUnwindSafe(|| (case.check)(context)))
            .unwrap_or_else(|panic| Err(anyhow!("it panicked: {}", panic_text(&*panic))));
        let left = if tidy { self.host.expect(&before) } else { Ok(()) };
        match (outcome, left) {
            (outcome, Ok(())) => outcome,
            (Ok(()), left) => left,
            (Err(error), Err(left)) => Err(error
                .context(format!("and {left:#}"))
                .context("a case that failed left things too")),
        }
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no words")
}
