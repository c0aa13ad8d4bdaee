//! What is printed, and where.

use std::io::Read;

use crate::program::Program;

#[test]
fn a_new_secret_is_shown_once_to_people_and_with_the_key_to_programs() {
    let program = Program::with_user();
    let shown = program.run("key issue --user 1 --name laptop").ok();
    assert!(shown.lines().last().unwrap().starts_with("tak_live_"), "{shown}");
    assert_eq!(shown.matches("tak_live_").count(), 1);
    let json = program.run("key issue --user 1 --name laptop -o json").json();
    assert!(json["secret"].as_str().unwrap().starts_with("tak_live_"));
    for line in ["key show 1", "key list -o json", "audit --all -o json"] {
        assert!(!program.run(line).ok().contains("tak_live_"), "{line}");
    }
    program.run("key list -o secret").fails(2, "-o secret");
    program.run("key revoke 1 --yes -o secret").fails(2, "-o secret");
    assert_eq!(program.run("key show 1 -o json").json()["is_active"], true);
}

#[test]
fn a_closed_pipe_ends_a_list_without_a_message() {
    let program = Program::with_user();
    for n in 0..20 {
        program.run(&format!("key issue --user 1 --name key-{n} -o id")).ok();
    }
    let mut process = program.start(&["key", "list", "--all", "-o", "jsonl"]);
    drop(process.stdout.take());
    let mut messages = String::new();
    process.stderr.take().unwrap().read_to_string(&mut messages).unwrap();
    assert_eq!((process.wait().unwrap().code(), &*messages), (Some(0), ""));
}

#[test]
fn a_secret_that_can_not_be_printed_is_an_error() {
    let program = Program::with_user();
    let words = ["key", "issue", "--user", "1", "--name", "laptop", "-o", "secret"];
    let mut process = program.start(&words);
    drop(process.stdout.take());
    let mut messages = String::new();
    process.stderr.take().unwrap().read_to_string(&mut messages).unwrap();
    assert_eq!(process.wait().unwrap().code(), Some(1));
    assert!(messages.contains("rotate"), "{messages}");
    assert!(!messages.contains("tak_live_"), "{messages}");
}

#[test]
fn control_characters_of_stored_names_do_not_reach_the_terminal() {
    let program = Program::with_user();
    program.run("key issue --user 1 --name laptop -o id").ok();
    program.sql("UPDATE api_keys SET name = 'a' || char(27) || '[2J'");
    let table = program.run("key list").ok();
    assert!(!table.contains('\u{1b}'), "{table:?}");
    // JSON escapes them.
    assert!(!program.run("key list -o json").ok().contains('\u{1b}'));
}

#[test]
fn completions_and_man_pages_are_printed_without_a_database() {
    let program = Program::at("");
    assert!(program.run("completions bash").ok().contains("complete -F"));
    assert!(program.run("completions fish").ok().contains("tower-api-key"));
    let page = program.run("man").ok();
    assert!(page.contains(".SH \"EXIT STATUS\"") || page.contains(".SH EXIT STATUS"), "{page}");
    for command in ["migrate", "user", "key", "audit", "doctor", "explain"] {
        assert!(page.contains(command), "{command}");
    }
    assert!(program.run("man key issue").ok().contains("budget"));
    program.run("man nothing").fails(2, "no command");
}

#[test]
fn nothing_is_coloured_without_a_terminal() {
    let program = Program::at_new_file().with("NO_COLOR", "1");
    for line in ["--help", "nonsense", "migrate --check"] {
        let run = program.run(line);
        assert!(!format!("{}{}", run.out, run.err).contains('\u{1b}'), "{run:?}");
    }
}

/// The words of a line, without those that differ in each run: keys, lookup ids, times, versions.
fn words(line: &str) -> Vec<&str> {
    let is_fixed = |word: &&str| {
        let is_lookup_id =
            word.len() == 10 && word.bytes().all(|byte| byte.is_ascii_alphanumeric());
        !is_lookup_id
            && !word.starts_with("tak_live_")
            && !word.bytes().any(|byte| byte.is_ascii_digit())
    };
    line.split_whitespace().filter(is_fixed).collect()
}

#[test]
fn the_transcript_of_the_readme_is_what_the_program_prints() {
    let readme = include_str!("../../README.md");
    let transcript = readme.split("```console\n").nth(1).unwrap().split("```").next().unwrap();
    let program = Program::at_new_file().with("USER", "ada");
    let mut runs = 0;
    for part in transcript.split("$ ").filter(|part| part.starts_with("tower-api-key ")) {
        let (line, expected) = part.split_once('\n').unwrap();
        let run = program.run(line.strip_prefix("tower-api-key ").unwrap());
        assert!(matches!(run.code, 0 | 5), "{line}: {run:?}");
        let lines =
            |text: &str| text.trim_end().lines().map(|it| words(it).join(" ")).collect::<Vec<_>>();
        assert_eq!(lines(&run.out), lines(expected), "{line}");
        runs += 1;
    }
    assert_eq!(runs, 9);
}
