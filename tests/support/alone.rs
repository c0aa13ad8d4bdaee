//! Tests that need a process of their own, because they measure what all the threads of a process share.

use std::process::Command;

/// Returns whether this process runs this test alone. If not, runs it in a child process, where it has to pass. `test` is
/// the name by which the binary lists the test.
pub fn is_alone(test: &str) -> bool {
    const ALONE: &str = "TOWER_API_KEY_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output = child.args(["--exact", test, "--nocapture"]).env(ALONE, "1").output().unwrap();
    let [stdout, stderr] =
        [output.stdout, output.stderr].map(|it| String::from_utf8_lossy(&it).into_owned());
    assert!(output.status.success() && stdout.contains("1 passed"), "{test}: {stdout}{stderr}");
    false
}
