//! Time is read in `runtime::clock` only: every decision uses the injected clock.

use std::{fs, path::Path};

use crate::imports::{rust_files, without_comments};

/// The file that may read the wall clock of the machine.
const ALLOWED: &str = "src/runtime/clock.rs";
/// Readings of the wall clock. `Instant` is for timeouts, pauses and measured durations, which are no decisions.
const READINGS: [&str; 5] =
    ["SystemTime::now", "Utc::now", "Local::now", "UNIX_EPOCH.elapsed", "OffsetDateTime::now"];

/// Returns the lines that read the wall clock, outside of comments and test modules.
fn readings(source: &str) -> Vec<(usize, &'static str)> {
    let code = without_comments(source);
    let mut found = Vec::new();
    let mut lines = code.lines().enumerate();
    while let Some((at, line)) = lines.next() {
        if line.trim() == "#[cfg(test)]" {
            skip_item(&mut lines);
            continue;
        }
        let readings = READINGS.into_iter().filter(|reading| line.contains(reading));
        found.extend(readings.map(|reading| (at + 1, reading)));
    }
    found
}

/// Skips an item, up to its semicolon or its closing brace. The source is formatted, so that the brace has the
/// indentation of the first line.
fn skip_item<'a>(lines: &mut impl Iterator<Item = (usize, &'a str)>) {
    let Some((_, first)) = lines.next() else { return };
    if first.ends_with([';', '}']) {
        return;
    }
    let end = format!("{}}}", &first[..first.len() - first.trim_start().len()]);
    lines.find(|(_, line)| *line == end);
}

#[test]
fn the_wall_clock_is_read_only_by_the_system_clock() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = String::new();
    for file in rust_files(&root.join("src")) {
        let name = file.strip_prefix(root).unwrap().to_str().unwrap();
        let readings = readings(&fs::read_to_string(&file).unwrap());
        if name == ALLOWED {
            assert!(!readings.is_empty(), "{ALLOWED} reads the clock of other platforms");
            continue;
        }
        for (line, reading) in readings {
            found.push_str(&format!("\n{name}:{line}: `{reading}`: use the injected clock"));
        }
    }
    assert!(found.is_empty(), "{found}");
}

#[test]
fn a_reading_is_found_in_code_and_not_in_tests_or_comments() {
    let source = "\
//! Calls `SystemTime::now()`.
fn f() -> SystemTime { SystemTime::now() }
#[cfg(test)]
use chrono::Utc::now;
#[cfg(test)]
mod tests {
    fn f() {
        SystemTime::now();
    }
}
let times = keys.map(|_| chrono::Utc::now()); // Local::now()
let since = times.map_or_else(SystemTime::now, Into::into);
";
    assert_eq!(
        readings(source),
        [(2, "SystemTime::now"), (11, "Utc::now"), (12, "SystemTime::now")]
    );
}
