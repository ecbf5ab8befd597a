//! What is printed: progress, the table side by side, the closing line.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "the one module that prints")]

use std::collections::BTreeSet;
use std::time::Duration;

/// How a case ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// As it must.
    Passed,
    /// With this error.
    Failed(String),
    /// It could not run: `needs ...`.
    Skipped(String),
    /// It failed, for this reason that is written down.
    Known(&'static str),
}

/// All verdicts so far.
#[derive(Debug, Default)]
pub(crate) struct Report {
    results: Vec<(&'static str, &'static str, String, Verdict)>,
}

impl Report {
    /// Takes a verdict, and says so.
    pub(crate) fn add(
        &mut self,
        suite: &'static str,
        case: &'static str,
        runtime: &str,
        verdict: Verdict,
        took: Duration,
    ) {
        let (word, more) = match &verdict {
            Verdict::Passed => ("ok", String::new()),
            Verdict::Failed(error) => {
                ("FAILED", format!("\n    {}", error.replace('\n', "\n    ")))
            }
            Verdict::Skipped(reason) => ("SKIPPED", format!("\n    SKIPPED: {reason}")),
            Verdict::Known(reason) => ("known", format!("\n    known difference: {reason}")),
        };
        println!("{suite:<7} {runtime:<13} {word:<8} {:>6.2} s  {case}{more}", took.as_secs_f64());
        self.results.push((suite, case, runtime.to_owned(), verdict));
    }

    /// Says that there is a case.
    pub(crate) fn list(&mut self, suite: &str, case: &'static str) {
        if !self.results.iter().any(|(_, name, ..)| *name == case) {
            println!("{suite:<7} {case}");
        }
        self.results.push(("", case, String::new(), Verdict::Passed));
    }

    /// Says something about the run.
    #[expect(clippy::unused_self, reason = "only who has the report may print")]
    pub(crate) fn say(&mut self, line: &str) {
        println!("{line}");
    }

    /// Whether there is no verdict yet.
    pub(crate) fn is_empty(&self) -> bool {
        self.results.is_empty()
    }

    /// Prints the table, the failures and the closing line.
    pub(crate) fn close(&self) {
        let runtimes: BTreeSet<_> = self
            .results
            .iter()
            .map(|(_, _, runtime, _)| runtime)
            .filter(|name| *name != "all")
            .collect();
        let runtimes: Vec<_> = runtimes.into_iter().rev().collect();
        if runtimes.len() > 1 {
            print!("\n{:<7} {:<66}", "suite", "case");
            let row = |words: Vec<&str>| {
                words.iter().fold(String::new(), |line, word| format!("{line} {word:<13}"))
            };
            println!("{}", row(runtimes.iter().map(|name| name.as_str()).collect()));
            let mut shown = BTreeSet::new();
            for (suite, case, ..) in &self.results {
                if shown.insert((suite, case)) {
                    let words = runtimes.iter().map(|runtime| self.word(suite, case, runtime));
                    println!("{suite:<7} {case:<66}{}", row(words.collect()));
                }
            }
        }
        let count = |test: fn(&Verdict) -> bool| {
            self.results.iter().filter(|(.., verdict)| test(verdict)).count()
        };
        let known = count(|verdict| matches!(verdict, Verdict::Known(_)));
        println!();
        for (suite, case, runtime, verdict) in &self.results {
            if let Verdict::Failed(error) = verdict {
                println!(
                    "FAILED: {suite}, {runtime}: {case}: {}",
                    error.lines().next().unwrap_or("")
                );
            }
        }
        if known > 0 {
            println!("of the skipped, {known} are known differences: docs/compatibility.md");
        }
        println!(
            "{} passed, {} failed, {} skipped",
            count(|verdict| *verdict == Verdict::Passed),
            count(|verdict| matches!(verdict, Verdict::Failed(_))),
            count(|verdict| matches!(verdict, Verdict::Skipped(_))) + known
        );
    }

    /// Whether nothing failed.
    pub(crate) fn succeeded(&self) -> bool {
        !self.results.iter().any(|(.., verdict)| matches!(verdict, Verdict::Failed(_)))
    }

    fn word(&self, suite: &str, case: &str, runtime: &str) -> &'static str {
        let result = self
            .results
            .iter()
            .find(|(of, name, by, _)| *of == suite && *name == case && by == runtime);
        match result {
            Some((.., Verdict::Passed)) => "ok",
            Some((.., Verdict::Failed(_))) => "FAILED",
            Some((.., Verdict::Skipped(_))) => "skipped",
            Some((.., Verdict::Known(_))) => "known",
            None => "-",
        }
    }
}

/// Says why nothing could be run.
pub(crate) fn complain(error: &anyhow::Error) {
    eprintln!("suites: {error:#}");
}
