//! Import of keys of another service, in batches.

mod lanes;
mod reader;
mod row;

use std::{
    collections::HashMap,
    fs::File,
    io::{self, IsTerminal, Read, Seek},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tower_api_key::{management::ImportedKey, record::UserId, store::KeyRepository};

use self::{
    lanes::Lanes,
    reader::{RowError, Rows},
    row::parse,
};
use super::Session;
use crate::{
    args::{ImportArgs, InputFormat},
    failure::{Exit, Failure},
    output::{count, note},
    values::UserRef,
};

/// Number of rows that are read at once.
const ROWS: usize = 500;
/// Maximum number of broken rows that are shown.
const MAX_SHOWN: u64 = 100;
/// Maximum number of users whose ids are kept.
const MAX_USERS: usize = 10_000;

/// What a pass over the rows does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Check,
    Store,
}

/// What became of the rows.
#[derive(Debug, Default)]
struct Summary {
    rows: u64,
    stored: u64,
    duplicates: u64,
    rejected: u64,
    is_interrupted: bool,
}

impl Summary {
    fn reject(&mut self, error: &RowError, progress: &ProgressBar) {
        self.rejected += 1;
        if self.rejected <= MAX_SHOWN {
            progress.suspend(|| note(format_args!("line {}: {}", error.line, error.reason)));
        } else if self.rejected == MAX_SHOWN + 1 {
            progress.suspend(|| note(format_args!("more rows are broken; they are only counted")));
        }
    }
}

impl<R: KeyRepository + Clone> Session<R> {
    pub(super) async fn import(&mut self, args: &ImportArgs) -> Result<(), Failure> {
        let format = format_of(args)?;
        let mut file = open(&args.file, args.all_or_nothing && !args.dry_run)?;
        let interrupted = interruption();
        let owner = match &args.user {
            Some(user) => Some(self.find_user(user).await?.id),
            None => None,
        };
        if args.all_or_nothing && !args.dry_run {
            let checked =
                self.pass(&mut file, format, owner.as_ref(), Mode::Check, &interrupted).await?;
            if checked.is_interrupted {
                return Err(Failure::failed("interrupted: nothing was imported"));
            }
            if checked.rejected > 0 {
                return Err(Failure::failed(format!(
                    "{} of {} are broken: nothing was imported",
                    checked.rejected,
                    count(checked.rows, "row")
                )));
            }
            file.rewind()?;
        }
        let mode = if args.dry_run { Mode::Check } else { Mode::Store };
        let summary = self.pass(&mut file, format, owner.as_ref(), mode, &interrupted).await?;
        self.summarize(&summary, mode)
    }

    fn summarize(&mut self, summary: &Summary, mode: Mode) -> Result<(), Failure> {
        let Summary { rows, stored, duplicates, rejected, is_interrupted } = summary;
        match (self.output.is_table(), mode) {
            (true, Mode::Check) => {
                self.output.line(&format!(
                    "{}: {} can be imported, {rejected} broken. Nothing was stored.",
                    count(*rows, "row"),
                    rows - rejected
                ))?;
            }
            (true, Mode::Store) => {
                self.output.line(&format!(
                    "{}: {stored} stored, {duplicates} stored before, {rejected} rejected.",
                    count(*rows, "row")
                ))?;
            }
            (false, _) => self.output.value(
                &stored.to_string(),
                &json!({
                    "rows": rows,
                    "stored": stored,
                    "duplicates": duplicates,
                    "rejected": rejected,
                    "dry_run": mode == Mode::Check,
                    "interrupted": is_interrupted,
                }),
            )?,
        }
        if *is_interrupted {
            return Err(Failure::failed(
                "interrupted: repeat the command to import the other rows",
            ));
        }
        match rejected {
            0 => Ok(()),
            _ => Err(Failure::failed(format!(
                "{} rejected: repair the lines that are named above, and import them again",
                count(*rejected, "row")
            ))),
        }
    }

    /// Reads all rows once. What is stored is stored in batches, each in one transaction.
    async fn pass(
        &self,
        file: &mut Input,
        format: InputFormat,
        owner: Option<&UserId>,
        mode: Mode,
        interrupted: &AtomicBool,
    ) -> Result<Summary, Failure> {
        let progress = progress(file);
        let mut rows = Rows::new(progress.wrap_read(file), format)?;
        let mut summary = Summary::default();
        let mut users = HashMap::new();
        let mut lanes = Lanes::new(&self.manager);
        let outcome = loop {
            let batch = match read_batch(&mut rows, owner, &mut summary, &progress) {
                Ok(batch) => batch,
                Err(failure) => break Err(failure),
            };
            let keys = self.with_owners(batch.rows, &mut users, mode, &mut summary, &progress);
            let keys = match keys.await {
                Ok(keys) => keys,
                Err(failure) => break Err(failure),
            };
            if mode == Mode::Check {
                self.check(keys, &mut summary, &progress);
            } else if let Err(failure) =
                lanes.store(keys, batch.is_end, &mut summary, &progress).await
            {
                break Err(failure);
            }
            if batch.is_end {
                break Ok(());
            }
            if interrupted.load(Ordering::Relaxed) {
                summary.is_interrupted = true;
                break Ok(());
            }
        };
        let stored = lanes.finish(&mut summary, &progress).await;
        progress.finish_and_clear();
        outcome.and(stored).map(|()| summary)
    }

    /// Adds the ids of owners that are named by e-mail address. A check also looks for those that are named by id.
    async fn with_owners(
        &self,
        batch: Vec<row::ParsedRow>,
        users: &mut HashMap<String, Option<UserId>>,
        mode: Mode,
        summary: &mut Summary,
        progress: &ProgressBar,
    ) -> Result<Vec<(u64, ImportedKey)>, Failure> {
        let mut keys = Vec::with_capacity(batch.len());
        for row in batch {
            let id = match (&row.owner, mode) {
                (UserRef::Id(id), Mode::Store) => Some(id.clone()),
                (owner, _) => {
                    let name = match owner {
                        UserRef::Id(id) => id.to_string(),
                        UserRef::Email(email) => email.clone(),
                    };
                    match users.get(&name) {
                        Some(known) => known.clone(),
                        None => {
                            let found = self.find_user(owner).await;
                            let id = match found {
                                Ok(user) => Some(user.id),
                                Err(failure) if failure.exit == Exit::NotFound => None,
                                Err(failure) => return Err(failure),
                            };
                            if users.len() == MAX_USERS {
                                users.clear();
                            }
                            users.insert(name, id.clone());
                            id
                        }
                    }
                }
            };
            let line = row.line;
            match id {
                Some(id) => keys.push((line, row.key(id))),
                None => {
                    let reason = "there is no such user: create the user first".to_owned();
                    summary.reject(&RowError { line, reason }, progress);
                }
            }
        }
        Ok(keys)
    }

    fn check(&self, keys: Vec<(u64, ImportedKey)>, summary: &mut Summary, progress: &ProgressBar) {
        for (line, key) in keys {
            if let Err(error) = self.manager.check_import(&key) {
                summary.reject(&RowError { line, reason: error.to_string() }, progress);
            }
        }
    }
}

/// Rows that were read, and whether they are the last ones.
struct Batch {
    rows: Vec<row::ParsedRow>,
    is_end: bool,
}

fn read_batch<I: Read>(
    rows: &mut Rows<I>,
    owner: Option<&UserId>,
    summary: &mut Summary,
    progress: &ProgressBar,
) -> Result<Batch, Failure> {
    let mut batch = Batch { rows: Vec::with_capacity(ROWS), is_end: false };
    while batch.rows.len() < ROWS {
        let Some(row) = rows.next()? else {
            batch.is_end = true;
            break;
        };
        summary.rows += 1;
        match row.and_then(|row| parse(row, owner)) {
            Ok(row) => batch.rows.push(row),
            Err(error) => summary.reject(&error, progress),
        }
    }
    Ok(batch)
}

/// The rows, and their size if it is known.
struct Input {
    reader: InputReader,
    size: Option<u64>,
}

enum InputReader {
    File(File),
    Stdin(io::Stdin),
}

impl Input {
    fn rewind(&mut self) -> Result<(), Failure> {
        if let InputReader::File(file) = &mut self.reader {
            let rewound = file.rewind();
            rewound.map_err(|error| {
                Failure::failed(format!("the input can't be read again: {error}"))
            })?;
        }
        Ok(())
    }
}

impl Read for &mut Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.reader {
            InputReader::File(file) => file.read(buffer),
            InputReader::Stdin(stdin) => stdin.read(buffer),
        }
    }
}

fn format_of(args: &ImportArgs) -> Result<InputFormat, Failure> {
    let extension = args.file.extension().and_then(|it| it.to_str()).map(str::to_ascii_lowercase);
    match (args.input_format, extension.as_deref()) {
        (Some(format), _) => Ok(format),
        (None, Some("csv")) => Ok(InputFormat::Csv),
        (None, Some("jsonl" | "ndjson")) => Ok(InputFormat::Jsonl),
        _ => Err(Failure::usage(
            "the format of the rows is unknown: give --input-format csv or jsonl",
        )),
    }
}

/// Opens the input. Standard input that is read twice is copied to a file without a name, which only this process can
/// read.
fn open(path: &Path, is_read_twice: bool) -> Result<Input, Failure> {
    if path == Path::new("-") {
        if !is_read_twice {
            return Ok(Input { reader: InputReader::Stdin(io::stdin()), size: None });
        }
        let failed = |error: io::Error| {
            Failure::failed(format!("standard input can't be copied to a temporary file: {error}"))
        };
        let mut copy = tempfile::tempfile().map_err(failed)?;
        let size = io::copy(&mut io::stdin(), &mut copy).map_err(failed)?;
        copy.rewind().map_err(failed)?;
        return Ok(Input { reader: InputReader::File(copy), size: Some(size) });
    }
    let failed = |error| Failure::usage(format!("{} can't be read: {error}", path.display()));
    let file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?;
    if size.is_dir() {
        return Err(Failure::usage(format!("{} is a directory", path.display())));
    }
    // A pipe has no size, and can't be read twice.
    if is_read_twice && !size.is_file() {
        return Err(Failure::usage("--all-or-nothing reads the file twice: give a file, or -"));
    }
    Ok(Input { reader: InputReader::File(file), size: Some(size.len()).filter(|_| size.is_file()) })
}

/// Returns a progress bar on the terminal; hidden if there is none.
fn progress(input: &Input) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let (bar, template) = match input.size {
        Some(size) => (ProgressBar::new(size), "{bar:40} {bytes}/{total_bytes} {eta}"),
        None => (ProgressBar::no_length(), "{spinner} {bytes} {bytes_per_sec}"),
    };
    // The templates are fixed; without one, the bar has its default form.
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Returns a flag that the first Ctrl-C sets. The second one ends the process. A thread of its own waits for them, because
/// a read of standard input blocks the runtime.
fn interruption() -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = Arc::clone(&flag);
    let wait = async move {
        while tokio::signal::ctrl_c().await.is_ok() {
            if set.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
            note(format_args!("interrupted: the import ends after this batch"));
        }
    };
    std::thread::spawn(move || {
        // Without the runtime, Ctrl-C ends the process between two transactions.
        if let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() {
            runtime.block_on(wait);
        }
    });
    flag
}
