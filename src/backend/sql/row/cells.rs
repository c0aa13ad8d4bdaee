//! The values of a row: [`Cells`].

use std::borrow::Cow;

use serde_json::{Map, Value};

use super::{Fault, READ, fault};

/// The values of [`READ`], and the order in which they are taken.
pub(super) struct Cells<'a> {
    values: Values<'a>,
    /// Position after the last column that was taken. The decoder takes most of them in their order.
    next: usize,
}

enum Values<'a> {
    Json {
        /// `None` for a column that is missing from the result, or was taken.
        values: Vec<Option<Value>>,
        /// The first column, for messages, because it may have been taken.
        id: String,
    },
    /// Shorter than [`READ`] if columns are missing from the result. `None` for NULL.
    #[cfg_attr(not(feature = "postgres"), expect(dead_code))]
    Texts(Vec<Option<&'a [u8]>>),
}

/// The value of a column.
pub(super) enum Cell<'a> {
    Null,
    Json(Value),
    /// An integer or a flag as its text, a list or a time stamp as JSON, or any other value as it is.
    Text(&'a str),
}

impl<'a> Cells<'a> {
    pub(super) fn from_json(mut columns: Map<String, Value>) -> Self {
        let values = READ.iter().map(|(name, _)| columns.get_mut(*name).map(Value::take));
        let values: Vec<_> = values.collect();
        let id = values.first().and_then(Option::as_ref).map(Value::to_string);
        Self { values: Values::Json { values, id: id.unwrap_or_default() }, next: 0 }
    }

    #[cfg(feature = "postgres")]
    pub(super) fn from_texts(texts: Vec<Option<&'a [u8]>>) -> Self {
        Self { values: Values::Texts(texts), next: 0 }
    }

    /// Returns the id of the row for a message. It is the first column, and may have been taken.
    pub(super) fn id(&self) -> Cow<'_, str> {
        match &self.values {
            Values::Json { id, .. } => id.into(),
            Values::Texts(texts) => {
                String::from_utf8_lossy(texts.first().copied().flatten().unwrap_or_default())
            }
        }
    }

    /// Takes a column. A column that is missing from the result is an error: read as NULL, an allow-list would allow
    /// everything.
    pub(super) fn take(&mut self, column: &'static str) -> Result<Cell<'a>, Fault> {
        let columns = READ.as_slice();
        let is_next = columns.get(self.next).is_some_and(|(name, _)| is_same(name, column));
        let at = match is_next {
            true => Some(self.next),
            false => columns.iter().position(|(name, _)| *name == column),
        };
        self.next = at.map_or(0, |at| at + 1);
        let cell = at.and_then(|at| self.cell(at));
        cell.ok_or_else(|| fault(column, "is missing from the result"))?
            .map_err(|_| fault(column, "is not UTF-8"))
    }

    fn cell(&mut self, at: usize) -> Option<Result<Cell<'a>, std::str::Utf8Error>> {
        match &mut self.values {
            Values::Json { values, .. } => Some(Ok(match values.get_mut(at)?.take()? {
                Value::Null => Cell::Null,
                value => Cell::Json(value),
            })),
            Values::Texts(texts) => Some(match texts.get(at)? {
                None => Ok(Cell::Null),
                Some(text) => str::from_utf8(text).map(Cell::Text),
            }),
        }
    }
}

/// Compares addresses first: nearly always, both names are of the same column.
fn is_same(name: &str, column: &str) -> bool {
    std::ptr::eq(name, column) || name == column
}
