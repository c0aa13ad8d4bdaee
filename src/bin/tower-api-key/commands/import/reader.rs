//! Rows of CSV and of JSON lines: [`Rows`].

use std::io::{BufRead, BufReader, Read};

use csv::{ByteRecord, ErrorKind};
use serde_json::{Map, Value};

use super::row::COLUMNS;
use crate::{args::InputFormat, failure::Failure};

/// Maximum length of a line of JSON.
const MAX_LINE_BYTES: u64 = 1024 * 1024;

/// A row: the line that it begins on, and its fields.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) line: u64,
    pub(super) fields: Map<String, Value>,
}

/// A row that is broken. The reason contains no hash.
#[derive(Debug)]
pub(super) struct RowError {
    pub(super) line: u64,
    pub(super) reason: String,
}

/// The rows of an input, one at a time.
pub(super) enum Rows<R> {
    Csv { reader: Box<csv::Reader<R>>, header: Vec<String> },
    Jsonl { reader: BufReader<R>, line: u64 },
}

impl<R: Read> Rows<R> {
    /// Reads the header. An unknown column is an error: a restriction with a wrong name must not be ignored.
    pub(super) fn new(input: R, format: InputFormat) -> Result<Self, Failure> {
        if format == InputFormat::Jsonl {
            return Ok(Self::Jsonl { reader: BufReader::new(input), line: 0 });
        }
        let mut reader = csv::ReaderBuilder::new().flexible(false).from_reader(input);
        let header = reader.headers().map_err(unreadable)?;
        let header: Vec<_> = header
            .iter()
            .map(|name| name.trim_start_matches('\u{feff}').trim().to_owned())
            .collect();
        if let Some(unknown) = header.iter().find(|name| !COLUMNS.contains(&name.as_str())) {
            return Err(Failure::usage(format!(
                "the column {unknown:?} is unknown; the first line names the columns, which are {}",
                COLUMNS.join(", ")
            )));
        }
        for (at, name) in header.iter().enumerate() {
            if header[..at].contains(name) {
                return Err(Failure::usage(format!("the column {name} occurs twice")));
            }
        }
        for required in ["key_prefix", "key_hash"] {
            if !header.iter().any(|name| name == required) {
                return Err(Failure::usage(format!("the column {required} is missing")));
            }
        }
        Ok(Self::Csv { reader: Box::new(reader), header })
    }

    /// Returns the next row; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<Result<Row, RowError>>, Failure> {
        match self {
            Self::Csv { reader, header } => next_record(reader, header),
            Self::Jsonl { reader, line } => next_line(reader, line),
        }
    }
}

fn next_record<R: Read>(
    reader: &mut csv::Reader<R>,
    header: &[String],
) -> Result<Option<Result<Row, RowError>>, Failure> {
    let mut record = ByteRecord::new();
    let line = reader.position().line();
    match reader.read_byte_record(&mut record) {
        Ok(false) => return Ok(None),
        Ok(true) => {}
        Err(error) => {
            return match error.kind() {
                ErrorKind::UnequalLengths { pos, expected_len, len } => {
                    let line = pos.as_ref().map_or(line, csv::Position::line);
                    let reason = format!("the row has {len} fields instead of {expected_len}");
                    Ok(Some(Err(RowError { line, reason })))
                }
                _ => Err(unreadable(error)),
            };
        }
    }
    let line = record.position().map_or(line, csv::Position::line);
    let mut fields = Map::new();
    for (name, value) in header.iter().zip(&record) {
        let Ok(value) = std::str::from_utf8(value) else {
            return Ok(Some(Err(RowError { line, reason: format!("{name} is not UTF-8") })));
        };
        // CSV has no NULL: an empty field is an absent one.
        if !value.is_empty() {
            fields.insert(name.clone(), Value::String(value.to_owned()));
        }
    }
    Ok(Some(Ok(Row { line, fields })))
}

fn next_line<R: Read>(
    reader: &mut BufReader<R>,
    line: &mut u64,
) -> Result<Option<Result<Row, RowError>>, Failure> {
    loop {
        let mut bytes = Vec::new();
        let read = reader.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut bytes);
        let read =
            read.map_err(|error| Failure::failed(format!("the input can't be read: {error}")))?;
        if read == 0 {
            return Ok(None);
        }
        *line += 1;
        let line = *line;
        let broken = |reason: String| Ok(Some(Err(RowError { line, reason })));
        if bytes.len() as u64 == MAX_LINE_BYTES && bytes.last() != Some(&b'\n') {
            let skipped = reader.skip_until(b'\n');
            skipped
                .map_err(|error| Failure::failed(format!("the input can't be read: {error}")))?;
            return broken(format!("the line is longer than {MAX_LINE_BYTES} bytes"));
        }
        if bytes.trim_ascii().is_empty() {
            continue;
        }
        return match serde_json::from_slice::<Map<String, Value>>(&bytes) {
            Ok(mut fields) => {
                fields.retain(|_, value| !value.is_null());
                Ok(Some(Ok(Row { line, fields })))
            }
            // The error shows a position, and no value.
            Err(error) if error.is_data() => broken("the line is not a JSON object".to_owned()),
            Err(error) => broken(format!("the line is not JSON (column {})", error.column())),
        };
    }
}

fn unreadable(error: csv::Error) -> Failure {
    Failure::failed(format!("the input can't be read: {error}"))
}
