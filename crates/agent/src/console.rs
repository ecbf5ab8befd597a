//! The words that this binary says to people: on the guest's console, or to who runs it by hand.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "the one module that prints")]

/// Says a line on the standard output.
pub(crate) fn out(line: &str) {
    println!("{line}");
}

/// Says a line on the standard error output; PID 1's is the guest's console.
pub(crate) fn err(line: &str) {
    eprintln!("{line}");
}
