//! How long the command line imports a million bcrypt hashes, and how much memory it uses.
//!
//! `cargo bench --features cli --bench import` writes a CSV file, imports it into a PostgreSQL of its own with default
//! settings and into an SQLite file, and prints the seconds and the peak of the memory after a quarter of the time and at
//! the end. Then it kills an import of a part of the file with SIGKILL halfway, repeats it, and checks that each key is
//! stored once. The number of keys can be given as an argument. The last line is JSON.

#[path = "../tests/support/servers/mod.rs"]
#[allow(dead_code, unused_imports, unreachable_pub)]
mod servers;

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use servers::Postgres;

const PROGRAM: &str = env!("CARGO_BIN_EXE_tower-api-key");
const KEYS: usize = 1_000_000;
/// Alphabet of bcrypt's base64.
const LETTERS: &[u8; 64] = b"./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";

/// Writes rows as another service would export them: a lookup id of 8 letters and a bcrypt hash of cost 12.
fn write_csv(path: &Path, keys: usize) {
    let mut file = BufWriter::new(File::create(path).unwrap());
    writeln!(file, "key_prefix,key_hash,user,name,scopes").unwrap();
    // SplitMix64.
    let mut seed = 1_u64;
    let mut letters = |count: usize| -> String {
        let mut text = String::with_capacity(count);
        while text.len() < count {
            seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut bits = seed;
            bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            bits ^= bits >> 31;
            text.push(LETTERS[(bits % 64) as usize] as char);
        }
        text
    };
    for n in 0..keys {
        // The last letters of salt and hash have unused bits, which are zero.
        let (id, salt, hash) = (letters(8).replace(['.', '/'], "x"), letters(21), letters(30));
        writeln!(file, "{id},$2b$12${salt}O{hash}u,1,key {n},chat:write").unwrap();
    }
    file.flush().unwrap();
}

fn command(url: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).env("DATABASE_URL", url).env_remove("REDIS_URL").stdin(Stdio::null());
    command
}

fn run(url: &str, arguments: &[&str]) -> String {
    let output = command(url, arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Peak of the resident memory of a process in MiB; 0 where there is no `/proc`.
fn peak(process: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0)
        / 1024.0
}

/// Returns the seconds of an import, and the peaks of its memory.
fn import(url: &str, file: &str) -> (f64, f64, f64) {
    let begin = Instant::now();
    let mut process = command(url, &["key", "import", file]).stdout(Stdio::null()).spawn().unwrap();
    let mut peaks = Vec::new();
    let status = loop {
        match process.try_wait().unwrap() {
            Some(status) => break status,
            None => peaks.push(peak(process.id())),
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    let seconds = begin.elapsed().as_secs_f64();
    assert!(status.success(), "the import failed");
    peaks.retain(|peak| *peak > 0.0);
    let at = |index: usize| peaks.get(index).copied().unwrap_or(0.0);
    (seconds, at(peaks.len() / 4), at(peaks.len().saturating_sub(1)))
}

/// Kills an import halfway, repeats it, and returns how many keys were stored before.
fn interrupted(url: &str, file: &str, keys: usize, seconds: f64) -> u64 {
    let mut process = command(url, &["key", "import", file]).stdout(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_secs_f64(seconds / 2.0));
    process.kill().unwrap();
    process.wait().unwrap();
    let again = run(url, &["key", "import", file, "-o", "json"]);
    let again: Value = serde_json::from_str(&again).unwrap();
    let (stored, before) =
        (again["stored"].as_u64().unwrap(), again["duplicates"].as_u64().unwrap());
    assert_eq!(stored + before, keys as u64, "{again}");
    let repeated = run(url, &["key", "import", file, "-o", "json"]);
    let repeated: Value = serde_json::from_str(&repeated).unwrap();
    assert_eq!(repeated["duplicates"].as_u64(), Some(keys as u64), "{repeated}");
    before
}

fn measure(name: &str, url: &str, folder: &Path, keys: usize) -> Value {
    let user = ["user", "create", "ada@example.com"];
    run(url, &["migrate"]);
    run(url, &user);
    let part = keys / 5;
    let (whole, half) = (folder.join("keys.csv"), folder.join("part.csv"));
    let (seconds, early, peak) = import(url, whole.to_str().unwrap());
    let text = fs::read_to_string(&whole).unwrap();
    // Other lookup ids, so that none of them is stored yet.
    let row = |(n, row): (usize, &str)| if n == 0 { row.to_owned() } else { format!("y{row}") };
    let rows: Vec<_> = text.lines().take(part + 1).enumerate().map(row).collect();
    fs::write(&half, rows.join("\n")).unwrap();
    let before = interrupted(url, half.to_str().unwrap(), part, seconds / 5.0);
    println!(
        "{name:>10}: {keys} keys in {seconds:.1} s, {:.1} µs a key; memory {early:.0} MiB after a quarter, {peak:.0} MiB \
         at the end; {before} of {part} keys were stored when the second import was killed",
        seconds * 1e6 / keys as f64
    );
    json!({
        "seconds": (seconds * 10.0).round() / 10.0,
        "early_mib": early.round(),
        "peak_mib": peak.round(),
    })
}

fn main() {
    let keys = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(KEYS);
    let folder = tempfile::tempdir().unwrap();
    write_csv(&folder.path().join("keys.csv"), keys);
    // The defaults of PostgreSQL, which the servers of the tests change.
    let server = Postgres::with_settings(&["fsync=on", "shared_buffers=128MB"]);
    let postgres = measure("PostgreSQL", &server.url(), folder.path(), keys);
    let url = format!("sqlite:{}", folder.path().join("keys.db").display());
    let sqlite = measure("SQLite", &url, folder.path(), keys);
    println!("{}", json!({ "keys": keys, "postgres": postgres, "sqlite": sqlite }));
}
