//! Import of keys of another service.

use std::{fmt::Write, io::Read};

use tower_api_key::{
    Authenticator, KeyScheme, SqliteStore,
    key::{KeyFormat, KeyHash},
};

use crate::{
    program::Program,
    support::{eventually::eventually, servers::Postgres},
};

/// A bcrypt hash that no key needs to match.
const HASH: &str = "$2b$04$K9q0lq1oU9hQ4n5u0mQ3UuXyV0b3h7i1c2Zs8w9y0A1B2C3D4E5F6";

fn csv(rows: std::ops::Range<u32>) -> String {
    let mut text = "key_prefix,key_hash,user,name\n".to_owned();
    for n in rows {
        writeln!(text, "p{n:07},{HASH},1,key {n}").unwrap();
    }
    text
}

fn count(program: &Program) -> usize {
    program.run("key list --all -o id").ok().lines().count()
}

#[tokio::test]
async fn an_imported_key_works() {
    let program = Program::with_user();
    let hash = KeyHash::bcrypt("abcd1234-of-ada", 4).unwrap().expose_hash();
    let line = serde_json::json!({ "key_prefix": "abcd1234", "key_hash": hash, "user": "ada@example.com", "scopes": ["a"] });
    let imported =
        program.run_with_input("key import - --input-format jsonl -o json", &line.to_string());
    assert_eq!(imported.json()["stored"], 1);
    let scheme = KeyScheme::builder().format(KeyFormat::structured("tak", "live").unwrap());
    let scheme = scheme.format(KeyFormat::first_chars(8).unwrap()).build().unwrap();
    let store = SqliteStore::open(program.database()).unwrap();
    let node = Authenticator::builder(store).scheme(scheme).build();
    assert!(node.authenticate("abcd1234-of-ada").await.unwrap().has_scope("a"));
    // A key in a legacy format becomes a structured one.
    let rotated = program.run("key rotate 1 --legacy-prefix-length 8 -o secret").ok();
    assert!(node.authenticate(rotated.trim_end()).await.is_ok());
    assert!(node.authenticate("abcd1234-of-ada").await.is_ok());
}

#[test]
fn broken_rows_are_reported_and_the_others_are_stored_once() {
    let program = Program::with_user();
    let text = format!(
        "key_prefix,key_hash,user,allowed_ips,expires_at\n\
         good1,{HASH},1,10.0.0.0/8,2030-01-01\n\
         bad1,not-a-hash,1,,\n\
         bad2,{HASH},1,10.0.0.0/40,\n\
         bad3,{HASH},99,,\n\
         bad4,{HASH},nobody@example.com,,\n\
         bad5,{HASH},1\n\
         bad6,{HASH},1,,soon\n\
         good2,{HASH},ada@example.com,,\n"
    );
    let file = program.file("keys.csv", &text);
    let import = format!("key import {} -o json", file.display());
    let dry = program.run(&format!("{import} --dry-run"));
    assert_eq!(dry.code, 1, "{dry:?}");
    assert!(dry.out.contains("\"rejected\": 6"), "{dry:?}");
    assert_eq!(count(&program), 0);

    let strict = program.run(&format!("{import} --all-or-nothing"));
    assert_eq!(strict.code, 1, "{strict:?}");
    assert!(strict.err.contains("6 of 8 rows are broken: nothing was imported"), "{strict:?}");
    assert_eq!(count(&program), 0);

    let run = program.run(&import);
    assert_eq!(run.code, 1, "{run:?}");
    for line in ["line 3:", "line 4:", "line 5:", "line 6:", "line 7:", "line 8:"] {
        assert!(run.err.contains(line), "{line} {run:?}");
    }
    assert!(!run.err.contains("not-a-hash") && !run.err.contains(HASH), "{run:?}");
    assert!(run.out.contains("\"stored\": 2"), "{run:?}");
    let again = program.run(&import);
    assert!(
        again.out.contains("\"duplicates\": 2") && again.out.contains("\"stored\": 0"),
        "{again:?}"
    );
    assert_eq!(count(&program), 2);
    assert_eq!(program.run("audit -o id").ok().lines().count(), 3);

    let text: Vec<_> =
        text.lines().enumerate().filter(|(at, _)| [0, 1, 8].contains(at)).map(|it| it.1).collect();
    let fresh = Program::with_user();
    let input = "key import - --input-format csv --all-or-nothing -o json";
    let run = fresh.run_with_input(input, &text.join("\n"));
    assert_eq!(run.json()["stored"], 2);
}

#[test]
fn at_most_a_hundred_broken_rows_are_shown() {
    let program = Program::with_user();
    let text = csv(0..150).replace(HASH, "broken");
    let run = program.run_with_input("key import - --input-format csv", &text);
    assert_eq!(run.code, 1);
    assert_eq!(run.err.matches("\nline ").count() + 1, 100, "{}", run.err);
    assert!(run.err.contains("150 rows rejected"), "{}", run.err);
}

#[test]
fn files_that_can_not_be_imported_are_reported() {
    let program = Program::with_user();
    program.run("key import nothing.csv").fails(2, "can't be read");
    program.run("key import .").fails(2, "--input-format");
    program.run("key import . --input-format csv").fails(2, "is a directory");
    let import = "key import - --input-format csv";
    program.run_with_input(import, "key_prefix,key_hash,scope\n").fails(2, "\"scope\" is unknown");
    program.run_with_input(import, "key_prefix,user\n").fails(2, "key_hash is missing");
    program.run_with_input(import, "").fails(2, "key_prefix is missing");
    let long = format!("key_prefix,key_hash,user,name\na,{HASH},1,{}\n", "x".repeat(10_000_000));
    let run = program.run_with_input(import, &long);
    assert!(run.err.contains("line 2: name has more than 255 bytes"), "{}", run.err);
    program.run_with_input(&format!("{import} --user 99"), &csv(0..1)).fails(3, "no such user");
}

#[tokio::test]
async fn an_interrupted_import_is_complete_after_a_repetition() {
    let program = Program::with_user();
    let rows = 40_000;
    let file = program.file("keys.csv", &csv(0..rows));
    let words = ["key", "import", file.to_str().unwrap(), "-o", "json"];
    let mut process = program.start(&words);
    eventually("a batch is stored", async || {
        let run = program.run("key list --limit 1 -o id");
        run.code == 0 && !run.out.is_empty()
    })
    .await;
    let interrupt = format!("kill -INT {}", process.id());
    assert!(std::process::Command::new("sh").args(["-c", &interrupt]).status().unwrap().success());
    let (mut out, mut err) = (String::new(), String::new());
    process.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    process.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert_eq!(process.wait().unwrap().code(), Some(1), "{err}");
    assert!(err.contains("repeat the command"), "{err}");
    let summary: serde_json::Value = serde_json::from_str(&out).unwrap();
    let stored = summary["stored"].as_u64().unwrap();
    assert!(stored > 0 && stored < u64::from(rows), "{summary}");
    let rest = program.run_words(&words, "").json();
    assert_eq!(rest["duplicates"].as_u64(), Some(stored), "{rest}");
    assert_eq!(rest["stored"].as_u64(), Some(u64::from(rows) - stored), "{rest}");
}

#[test]
fn rows_are_imported_into_postgres_once() {
    let server = Postgres::start();
    let program = Program::at(&server.url());
    program.run("migrate").ok();
    program.run("user create ada@example.com").ok();
    let file = program.file("keys.csv", &csv(0..12_000));
    let import = format!("key import {} -o json", file.display());
    let first = program.run(&import).json();
    assert_eq!((&first["stored"], &first["rejected"]), (&12_000.into(), &0.into()), "{first}");
    let again = program.run(&import).json();
    assert_eq!((&again["stored"], &again["duplicates"]), (&0.into(), &12_000.into()), "{again}");
    assert_eq!(count(&program), 12_000);
}
