//! What is printed: tables for people, JSON for programs, a secret alone.

mod shown;

use std::{
    fmt,
    io::{self, BufWriter, Stdout, Write},
};

use comfy_table::Table;
use serde_json::{Value, json};
use tower_api_key::management::IssuedKey;

pub(crate) use self::shown::{Shown, key_json};
use crate::{args::Form, failure::Failure};

/// Standard output in one of the forms.
pub(crate) struct Output {
    form: Option<Form>,
    out: BufWriter<Stdout>,
}

/// Returns a number with its noun.
pub(crate) fn count(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// Prints a line for people on standard error, where it is not in the way of the output.
pub(crate) fn note(text: fmt::Arguments<'_>) {
    // It is not read if standard error is closed.
    let _ = writeln!(io::stderr(), "{text}");
}

impl Output {
    pub(crate) fn new(form: Option<Form>) -> Self {
        Self { form, out: BufWriter::new(io::stdout()) }
    }

    /// Returns whether the output is for people.
    pub(crate) fn is_table(&self) -> bool {
        self.form.is_none()
    }

    pub(crate) fn form(&self) -> Option<Form> {
        self.form
    }

    /// Prints an item.
    pub(crate) fn item<T: Shown>(&mut self, item: &T) -> Result<(), Failure> {
        match self.form {
            None => self.table(&[], item.details()),
            _ => self.value(&item.id(), &item.json()),
        }
    }

    /// Prints an item, and for people only what was done.
    pub(crate) fn done<T: Shown>(&mut self, what: &str, item: &T) -> Result<(), Failure> {
        match self.form {
            None => self.line(what),
            _ => self.value(&item.id(), &item.json()),
        }
    }

    /// Prints a value of which `id` is the id.
    pub(crate) fn value(&mut self, id: &str, value: &Value) -> Result<(), Failure> {
        match self.form {
            Some(Form::Id) => self.line(id),
            Some(Form::Jsonl) => self.line(&value.to_string()),
            Some(Form::Json) | None => self.line(&format!("{value:#}")),
            Some(Form::Secret) => Err(no_secret()),
        }
    }

    /// Prints a new key. For people, the secret is the last line.
    pub(crate) fn issued(&mut self, what: &str, issued: &IssuedKey) -> Result<(), Failure> {
        let record = issued.record();
        let printed = match self.form {
            None => self.table(&[], record.details()).and_then(|()| self.line("")).and_then(|()| {
                self.line("The key, which can't be shown again:")?;
                self.line(issued.expose_secret())
            }),
            Some(Form::Secret) => {
                note(format_args!("{what}"));
                self.line(issued.expose_secret())
            }
            Some(_) => {
                let mut value = key_json(record);
                if let Some(fields) = value.as_object_mut() {
                    fields.insert("secret".to_owned(), json!(issued.expose_secret()));
                }
                self.value(&record.id.to_string(), &value)
            }
        };
        // There is no other copy of the secret.
        printed.map_err(|failure| {
            Failure::failed(format!(
                "{what}, but the secret could not be printed ({failure}): rotate the key with --grace 0"
            ))
        })
    }

    /// Begins a list.
    pub(crate) fn list(&mut self) -> Result<List<'_>, Failure> {
        match self.form {
            Some(Form::Secret) => return Err(no_secret()),
            Some(Form::Json) => self.out.write_all(b"[")?,
            _ => {}
        }
        Ok(List { output: self, count: 0 })
    }

    /// Prints rows below a header, aligned. Without a header, the first column has the names.
    pub(crate) fn table(
        &mut self,
        header: &[&str],
        rows: impl IntoIterator<Item = impl IntoIterator<Item = String>>,
    ) -> Result<(), Failure> {
        let mut table = Table::new();
        table.load_style(comfy_table::presets::NOTHING);
        if !header.is_empty() {
            table.set_header(header.iter().copied());
        }
        for row in rows {
            table.add_row(row.into_iter().map(|cell| printable(&cell)));
        }
        for line in table.lines() {
            writeln!(self.out, "{}", line.trim_end().strip_prefix(' ').unwrap_or(line.trim_end()))?;
        }
        Ok(self.out.flush()?)
    }

    /// Prints text as it is.
    pub(crate) fn text(&mut self, text: &[u8]) -> Result<(), Failure> {
        self.out.write_all(text)?;
        Ok(self.out.flush()?)
    }

    /// Prints a line.
    pub(crate) fn line(&mut self, text: &str) -> Result<(), Failure> {
        writeln!(self.out, "{text}")?;
        Ok(self.out.flush()?)
    }
}

/// A list that is printed page by page.
pub(crate) struct List<'a> {
    output: &'a mut Output,
    count: usize,
}

impl List<'_> {
    /// Prints a page.
    pub(crate) fn page<T: Shown>(&mut self, items: &[T]) -> Result<(), Failure> {
        if self.output.is_table() {
            // An empty table still shows its columns, once.
            if items.is_empty() && self.count > 0 {
                return Ok(());
            }
            self.count += items.len().max(1);
            return self.output.table(T::HEADER, items.iter().map(Shown::cells));
        }
        for item in items {
            match self.output.form {
                Some(Form::Id) => writeln!(self.output.out, "{}", item.id())?,
                Some(Form::Jsonl) => writeln!(self.output.out, "{}", item.json())?,
                _ => {
                    let separator = if self.count == 0 { "\n" } else { ",\n" };
                    write!(self.output.out, "{separator}{}", item.json())?;
                }
            }
            self.count += 1;
        }
        Ok(self.output.out.flush()?)
    }

    /// Ends the list.
    pub(crate) fn end(self) -> Result<(), Failure> {
        if self.output.form == Some(Form::Json) {
            self.output.out.write_all(if self.count == 0 { b"]\n" } else { b"\n]\n" })?;
        }
        Ok(self.output.out.flush()?)
    }
}

fn no_secret() -> Failure {
    Failure::usage("-o secret is for key issue and key rotate: no other command makes a secret")
}

/// Replaces control characters, which could change what a terminal shows.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Rejects `-o secret` before anything is done, for commands that make no secret.
pub(crate) fn reject_secret(form: Option<Form>) -> Result<(), Failure> {
    if form == Some(Form::Secret) { Err(no_secret()) } else { Ok(()) }
}
