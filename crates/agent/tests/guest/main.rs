//! The agent in a real guest, asked as the host asks it.
//!
//! `cargo test -p agent --test guest [words of a test's name]`. Needs root, QEMU, busybox and a guest image with the
//! agent to be tested: the one that `KATA_IMAGE` names, else the source tree's, else the installed one.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "it is its own test harness")]

mod facts;
mod guest;

use std::env;
use std::process::ExitCode;

use guest::Guest;

/// What a test says when a fact is not as it should be.
type Outcome = Result<(), Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        // The driver starts this program again for the machine's device process.
        ["device", config] => serve_devices(config),
        ["--list", ..] => ExitCode::SUCCESS,
        _ => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.expect("the host has epoll");
            runtime.block_on(run(&words))
        }
    }
}

fn serve_devices(config: &str) -> ExitCode {
    let served = serde_json::from_str(config)
        .map_err(|error| error.to_string())
        .and_then(|config| device::serve(config).map_err(|error| error.to_string()));
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(words: &[&str]) -> ExitCode {
    let spec = match guest::machine() {
        Ok(spec) => spec,
        Err(need) => {
            println!("SKIPPED: needs {need}");
            return ExitCode::SUCCESS;
        }
    };
    let guest = match Guest::boot(spec).await {
        Ok(guest) => guest,
        Err(error) => {
            println!("the guest did not boot: {error}");
            return ExitCode::FAILURE;
        }
    };
    let wanted = |name: &str| {
        let mut filter = words.iter().filter(|word| !word.starts_with('-')).peekable();
        filter.peek().is_none() || filter.any(|word| name.contains(word))
    };
    let mut good = true;
    for (name, outcome) in facts::all(&guest, &wanted).await {
        good &= outcome.is_ok();
        match outcome {
            Ok(()) => println!("{name}: ok"),
            Err(error) => println!("{name}: FAILED: {error}"),
        }
    }
    match guest.shut_down().await {
        Ok(()) => println!("a shutdown powers the guest off: ok"),
        Err(error) => {
            println!("a shutdown powers the guest off: FAILED: {error}");
            good = false;
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
