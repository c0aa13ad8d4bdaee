//! Instruction counts of what every request runs, as a guard: wall clock on a shared machine can't show 5 %.
//!
//! `.ci/counts` installs valgrind and gungraun's runner, counts the instructions of each case, prints them beside
//! `benches/counts.json`, and fails if one has grown by more than 3 %. `.ci/counts --write` rewrites the table, which
//! belongs into the commit that changes a count on purpose.
//!
//! A count is the mean of 100 calls. Those of the layer are the same in every run, and those of rows and entries differ by
//! less than 0.5 %: keys, hash tables with one entry and the clock are fixed, and neither glibc nor SHA-256, which the
//! cases of the layer leave out, uses instructions that only some processors have. Another compiler makes other code, so
//! the table names the compiler that it is from. `SystemClock` can't be used under valgrind: rustix reads the
//! address of the vDSO from the kernel, and valgrind does not map it.

#[path = "../call/mod.rs"]
mod call;
#[allow(unreachable_pub, reason = "gungraun's macros make functions public")]
mod cases;
#[path = "../../tests/support/servers/mod.rs"]
#[allow(dead_code, unused_imports, unreachable_pub)]
mod servers;

use std::{
    collections::BTreeMap,
    env, fs,
    process::{Command, ExitCode, Stdio},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use servers::Redis;

/// Number of calls of a case.
const CALLS: u64 = 100;
/// Set in the processes that measure: the URL of a Redis.
const REDIS_URL: &str = "COUNTS_REDIS_URL";
const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/counts.json");
/// Growth of a count at which the check fails.
const MAX_GROWTH: f64 = 0.03;

/// The committed table.
#[derive(Serialize, Deserialize)]
struct Table {
    /// The compiler that made the measured code.
    rustc: String,
    /// Instructions a call, by case.
    counts: BTreeMap<String, u64>,
}

fn main() -> ExitCode {
    let has = |option: &str| env::args().any(|argument| argument == option);
    if env::var_os(REDIS_URL).is_some() || has("--gungraun-run") {
        cases::run();
        return ExitCode::SUCCESS;
    }
    let table = Table { rustc: compiler(), counts: measure() };
    let committed = fs::read_to_string(TABLE).ok();
    let committed: Option<Table> = committed.map(|text| serde_json::from_str(&text).unwrap());
    let is_within = print(&table, committed.as_ref());
    if has("--write") {
        fs::write(TABLE, serde_json::to_string_pretty(&table).unwrap() + "\n").unwrap();
        println!("{TABLE} is written");
    } else if has("--check") && !is_within {
        eprintln!(
            "A count has grown by more than {:.0} %. Make the code cheaper, or run \
             `.ci/counts --write` and say in the commit why it has grown.",
            MAX_GROWTH * 100.0
        );
        return ExitCode::FAILURE;
    }
    println!("{}", serde_json::to_string(&table.counts).unwrap());
    ExitCode::SUCCESS
}

fn compiler() -> String {
    let version = Command::new("rustc").arg("--version").output().unwrap();
    String::from_utf8(version.stdout).unwrap().trim().to_owned()
}

/// Runs gungraun in a child process, and reads the counts from its output.
fn measure() -> BTreeMap<String, u64> {
    let redis = Redis::start();
    let child = Command::new(env::current_exe().unwrap())
        // Without `--bench`, gungraun takes the call for one by `cargo test`, and does nothing.
        .args(["--output-format=json", "--bench"])
        .env(REDIS_URL, redis.url())
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(child.status.success(), "gungraun has failed; .ci/counts installs what it needs");
    let output = String::from_utf8(child.stdout).unwrap();
    output.lines().map(|line| count(&serde_json::from_str(line).unwrap())).collect()
}

/// Returns the case of a summary, and its instructions a call.
fn count(summary: &Value) -> (String, u64) {
    let name = summary["function_name"].as_str().unwrap().to_owned();
    let instructions = "/profiles/0/data/total/metrics/Ir/values/new";
    let count = summary.pointer(instructions).and_then(Value::as_u64).unwrap() / CALLS;
    assert!(count > 0, "{name} counts nothing: a function that it names was renamed or inlined");
    (name, count)
}

/// Prints the counts beside the committed ones, and returns whether none has grown too much. Counts of another compiler
/// are not compared.
fn print(table: &Table, committed: Option<&Table>) -> bool {
    let other = committed.filter(|committed| committed.rustc != table.rustc);
    if let Some(other) = other {
        println!(
            "SKIPPED: the table is from {}, this is {}: write it anew",
            other.rustc, table.rustc
        );
    }
    let is_gone = |name: &&String| !table.counts.contains_key(*name);
    let gone = committed.into_iter().flat_map(|committed| committed.counts.keys()).find(is_gone);
    if let Some(gone) = gone {
        println!("{gone} is in the table, and is no longer measured: write the table anew.");
    }
    println!("{:<24} {:>12} {:>12} {:>8}", "instructions a call", "table", "now", "change");
    let mut is_within = gone.is_none();
    for (name, &now) in &table.counts {
        let Some(&then) = committed.and_then(|committed| committed.counts.get(name)) else {
            println!("{name:<24} {:>12} {now:>12}", "-");
            is_within = false;
            continue;
        };
        let change = now as f64 / then as f64 - 1.0;
        is_within &= change <= MAX_GROWTH;
        println!("{name:<24} {then:>12} {now:>12} {:>+7.1}%", change * 100.0);
    }
    is_within || other.is_some()
}
