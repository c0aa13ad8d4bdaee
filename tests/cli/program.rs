//! The program, with an environment of its own.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use diesel::{Connection, SqliteConnection, connection::SimpleConnection};
use serde_json::Value;
use tempfile::TempDir;

/// The program at one database.
pub(crate) struct Program {
    folder: TempDir,
    variables: Vec<(String, String)>,
}

/// What a run printed, and its exit code.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Program {
    /// At an SQLite file that does not exist yet.
    pub(crate) fn at_new_file() -> Self {
        let program = Self { folder: tempfile::tempdir().unwrap(), variables: Vec::new() };
        let url = format!("sqlite:{}", program.database().display());
        program.with("DATABASE_URL", url)
    }

    /// At an SQLite file with the tables and the user 1.
    pub(crate) fn with_user() -> Self {
        let program = Self::at_new_file();
        program.run("migrate").ok();
        program.run("user create ada@example.com").ok();
        program
    }

    pub(crate) fn at(url: &str) -> Self {
        let program = Self { folder: tempfile::tempdir().unwrap(), variables: Vec::new() };
        program.with("DATABASE_URL", url)
    }

    #[must_use]
    pub(crate) fn with(mut self, variable: &str, value: impl Into<String>) -> Self {
        self.variables.retain(|(name, _)| name != variable);
        self.variables.push((variable.to_owned(), value.into()));
        self
    }

    /// The file of the SQLite database.
    pub(crate) fn database(&self) -> PathBuf {
        self.folder.path().join("keys.db")
    }

    /// Runs statements in the SQLite database, as an operator.
    pub(crate) fn sql(&self, statements: &str) {
        let path = self.database();
        let mut connection = SqliteConnection::establish(path.to_str().unwrap()).unwrap();
        connection.batch_execute(statements).unwrap();
    }

    /// A file with this content.
    pub(crate) fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Runs a line of words that are separated by spaces.
    pub(crate) fn run(&self, line: &str) -> Run {
        self.run_words(&line.split(' ').collect::<Vec<_>>(), "")
    }

    pub(crate) fn run_with_input(&self, line: &str, input: &str) -> Run {
        self.run_words(&line.split(' ').collect::<Vec<_>>(), input)
    }

    pub(crate) fn run_words(&self, words: &[&str], input: &str) -> Run {
        let mut process = self.start(words);
        let mut to_process = process.stdin.take().unwrap();
        let input = input.to_owned();
        // On a thread of its own: the program may print before it has read everything.
        let writer = std::thread::spawn(move || drop(to_process.write_all(input.as_bytes())));
        let output = process.wait_with_output().unwrap();
        writer.join().unwrap();
        Run {
            code: output.status.code().expect("no signal ended the program"),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    pub(crate) fn start(&self, words: &[&str]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tower-api-key"));
        command.args(words).env_clear().env("USER", "tester").current_dir(self.folder());
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }
}

impl Run {
    /// Asserts that the run succeeded, and returns what it printed.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.out
    }

    /// Asserts that the run failed with this exit code, and one sentence with this text.
    #[track_caller]
    pub(crate) fn fails(self, code: i32, text: &str) {
        assert_eq!(self.code, code, "{self:?}");
        assert!(self.err.contains(text), "{text:?} is not in {self:?}");
        assert!(!self.err.contains("panicked"), "{self:?}");
        assert_eq!(self.out, "", "{self:?}");
    }

    #[track_caller]
    pub(crate) fn json(self) -> Value {
        serde_json::from_str(&self.ok()).unwrap()
    }
}
