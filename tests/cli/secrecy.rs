//! Every command in every form of output, on each database and with Redis: a secret is printed once, by the command that
//! makes it, and no hash is printed.

use std::{collections::BTreeSet, fmt::Write};

use tower_api_key::key::KeyHash;

use crate::{
    program::{Program, Run},
    support::{
        database::connect,
        leaks::{Marked, values_of_file, values_of_redis, values_of_server},
        servers::{Postgres, Redis},
        with_wrong_secret,
    },
};

const PEPPER: &str = "marked-pepper-of-many-bytes-0123456789";
const MINT: &str = "marked-mint-secret-of-many-bytes";
const LEGACY: &str = "legacy01-MarkedSecretOfBcrypt";
const FORMS: [&str; 4] = ["", "-o json", "-o jsonl", "-o id"];

/// A program, what it printed, and which commands were run.
struct Session {
    program: Program,
    marked: Marked,
    printed: String,
    commands: BTreeSet<String>,
}

impl Session {
    fn at(program: Program) -> Self {
        let program = program
            .with("TOWER_API_KEY_PEPPER", PEPPER)
            .with("TOWER_API_KEY_MINT_SECRET", MINT)
            .with("TOWER_API_KEY_LEGACY_PREFIX_LENGTH", "8");
        let mut marked = Marked::default();
        [PEPPER, MINT, "MarkedPassword"].iter().for_each(|secret| marked.secret(secret));
        Self { program, marked, printed: String::new(), commands: BTreeSet::new() }
    }

    /// Takes what a run printed.
    fn take(&mut self, line: &str, run: &Run) {
        let words: Vec<_> = line.split(' ').collect();
        let is_group = matches!(words[0], "user" | "key");
        self.commands.insert(words[..=usize::from(is_group)].join(" "));
        writeln!(self.printed, "{line}\n{}\n{}", run.out, run.err).unwrap();
    }

    /// Runs a line in each form, with an input.
    fn forms(&mut self, line: &str, input: &str, codes: &[i32]) {
        for form in FORMS {
            let line = format!("{line} {form}");
            let run = self.program.run_with_input(line.trim_end(), input);
            assert!(codes.contains(&run.code), "{line}: {run:?}");
            self.take(&line, &run);
        }
    }

    fn run(&mut self, line: &str) {
        self.forms(line, "", &[0, 1, 2, 3, 4, 5, 6]);
    }

    /// Runs a line that makes a secret, in each form. `prepare` is run before each. Returns the last secret.
    fn secrets(&mut self, prepare: &str, line: &str) -> String {
        let mut secret = String::new();
        for form in ["-o secret", "-o json", "-o jsonl", ""] {
            if !prepare.is_empty() {
                self.run(prepare);
            }
            let run = self.program.run(format!("{line} {form}").trim_end());
            let at = run.out.find("tak_live_").unwrap_or_else(|| panic!("{line}: {run:?}"));
            let is_part = |c: char| c == '_' || c.is_ascii_alphanumeric();
            secret = run.out[at..].chars().take_while(|c| is_part(*c)).collect();
            self.marked.key(&secret);
            assert_eq!(run.out.matches(&secret).count(), 1, "{line} {form}");
            // What is printed beside the secret.
            let rest = Run { out: run.out.replace(&secret, ""), ..run };
            self.take(line, &rest);
        }
        secret
    }

    /// Runs every command.
    fn exercise(&mut self) -> String {
        self.run("doctor");
        self.run("migrate --check");
        self.run("migrate --dry-run");
        self.run("migrate");
        self.run("migrate");
        self.forms("user create ada@example.com --role admin", "", &[0, 4]);
        self.run("user create bob@example.com");
        let key = self.secrets("", "key issue --user 1 --name laptop --scope chat:write");
        let wrong = with_wrong_secret(&key);
        for input in [&key, &wrong, LEGACY, "no key"] {
            let mut bad = Marked::default();
            bad.secret(&wrong[wrong.len() - 20..]);
            let before = self.printed.len();
            self.forms("key inspect", input, &[0, 1, 2]);
            bad.assert_hidden("the output of inspect", &self.printed[before..]);
        }
        let hash = KeyHash::bcrypt(LEGACY, 4).unwrap();
        self.marked.key(LEGACY);
        self.marked.hash(&hash);
        let row = |id: &str, hash: &str| serde_json::json!({ "key_prefix": id, "key_hash": hash, "user": 1, "name": "old" });
        // A good row, one with a text that is no hash, and one with a key in place of the hash.
        let good = row("legacy01", &hash.expose_hash());
        let other = row("legacy02", &hash.expose_hash());
        let rows = format!("{good}\n{other}\n{}\n{}\n", row("bad", LEGACY), row(LEGACY, "x"));
        for options in ["--dry-run", "--all-or-nothing", "", ""] {
            let line = format!("key import - --input-format jsonl {options}");
            self.forms(line.trim_end(), &rows, &[0, 1, 2]);
        }
        for line in [
            "user list",
            "user show 1",
            "user show 99",
            "user update 2 --role auditor",
            "user deactivate 2",
            "user reactivate 2",
            "user delete 1 --yes",
            "user delete 2 --yes",
            "key list --all",
            "key list --contains laptop --active",
            "key show 1",
            "key show 99",
            "key update 1 --name new --description text",
            "key update 1 --name new --if-revision 1",
            "key usage 1",
            "explain --key-id 1 --method GET --path /v1 --ip 1.2.3.4",
        ] {
            self.run(line);
        }
        self.secrets("key end-grace 1 --yes", "key rotate 1 --grace 24h");
        self.secrets("key end-grace 5 --yes", "key rotate 5 --grace 24h");
        for line in [
            "key rotate 1",
            "key revoke 1 --reason lost --yes",
            "key reactivate 1",
            "key revoke --owner 1 --yes",
            "key reactivate 5",
            "key delete 2 --yes",
            "key list --revoked",
            "audit --all",
            "audit --key 1",
            "audit --prune-before 1d --yes",
            "doctor",
            "completions bash",
            "man",
        ] {
            self.run(line);
        }
        self.secrets("key end-grace 5 --yes", "key rotate 5 --grace 24h")
    }

    /// Asserts that every command that the help lists was run, and that nothing that was printed shows a secret.
    fn check(&self) {
        for group in ["", "user ", "key "] {
            let help = self.program.run(&format!("{group}--help")).ok();
            let commands = help.split("Commands:\n").nth(1).unwrap();
            let names = commands.lines().take_while(|line| line.starts_with("  "));
            let names = names.filter(|line| !line.starts_with("   "));
            let names: Vec<_> = names.filter_map(|it| it.split_whitespace().next()).collect();
            assert!(names.len() > 6, "{help}");
            for name in names.iter().filter(|name| !["help", "user", "key"].contains(name)) {
                let command = format!("{group}{name}");
                assert!(self.commands.contains(&command), "{command} was not run");
            }
        }
        self.marked.assert_hidden("the output", &self.printed);
        assert!(self.printed.contains("laptop") && self.printed.contains("sha"));
    }
}

#[tokio::test]
async fn no_command_prints_a_secret_or_a_hash_on_sqlite_with_redis() {
    let redis = Redis::with_settings(&["requirepass=MarkedPassword"]);
    let program = Program::at_new_file().with("REDIS_URL", redis.url());
    let mut session = Session::at(program);
    session.exercise();
    session.check();
    let values = values_of_file(&session.program.database());
    assert!(session.marked.assert_stored_as_hashes(&values) > 0);
    session.marked.assert_hidden("Redis", values_of_redis(&redis.url()).await);
}

#[tokio::test]
async fn no_command_prints_a_secret_or_a_hash_on_postgres() {
    let server = Postgres::start();
    let url = server.url();
    let with_password = url.replacen("app@", "app:MarkedPassword@", 1);
    let mut session = Session::at(Program::at(&with_password));
    session.exercise();
    session.check();
    let values = values_of_server(&connect(&url).await).await;
    assert!(session.marked.assert_stored_as_hashes(&values) > 0);
    session.marked.assert_hidden("the log of PostgreSQL", server.log());
}
