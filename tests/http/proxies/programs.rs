//! Programs that run the stock clients.

use std::{path::PathBuf, process::Stdio, time::Duration};

use tokio::{process::Command, time::timeout};

/// A path in the folder of the crate.
pub(crate) fn in_crate(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The interpreter of the environment that tests/run creates, which has more client libraries, or the system's.
pub(crate) fn python() -> PathBuf {
    let own = in_crate("target/python/bin/python");
    if own.exists() { own } else { "python3".into() }
}

/// Runs a program to its end, and returns the lines that it printed.
pub(crate) async fn lines(command: &mut Command) -> Vec<String> {
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = timeout(Duration::from_secs(60), output).await;
    let output = output.expect("the program ends within a minute").unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.is_empty(), "{command:?}: {errors}");
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// Returns whether a program succeeds. If not, prints that what needs it is skipped.
pub(crate) async fn is_there(program: impl Into<PathBuf>, arguments: &[&str]) -> bool {
    let program = program.into();
    let mut command = Command::new(&program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let is_there = command.status().await.is_ok_and(|status| status.success());
    if !is_there {
        println!("SKIPPED: {} {} fails", program.display(), arguments.join(" "));
    }
    is_there
}
