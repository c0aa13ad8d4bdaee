//! A column of a key: [`KeyColumn`].

use serde_json::Value;

use super::row::{Fault, Row, RowParts};
use crate::store::StoredKey;

/// A column of `api_keys` that is part of a [`StoredKey`](crate::store::StoredKey).
pub(in crate::backend) struct KeyColumn {
    pub(in crate::backend) name: &'static str,
    pub(in crate::backend) kind: ColumnKind,
    /// Definition with which SQLite adds the column to a table without it; `None` if there is no possible default.
    /// PostgreSQL adds it in a migration.
    pub(in crate::backend) definition: Option<&'static str>,
    pub(in crate::backend) written: Written,
    /// Whether an update of the column is a change, which gets a revision and a change event.
    #[cfg_attr(not(any(feature = "sqlite", test)), expect(dead_code))]
    pub(in crate::backend) is_change: bool,
    /// Whether the column restricts the key. If such a column were recreated with a default, its restrictions would be
    /// lost: a revoked key would be accepted again.
    #[cfg_attr(not(feature = "postgres"), expect(dead_code))]
    pub(in crate::backend) is_restriction: bool,
    /// Whether the column is selected and decoded.
    pub(in crate::backend) is_read: bool,
    encode: fn(&StoredKey) -> Value,
    decode: fn(&mut Row<'_>, &'static str, &mut RowParts) -> Result<(), Fault>,
}

/// The statements of this crate that write a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::backend) enum Written {
    /// Statements of their own, or the database.
    Elsewhere,
    /// The insertion of a key. The totals are included because an ORM may apply its defaults only in the application.
    OnInsert,
    /// The insertion, and an edit that changes the value. Values that are not changed are not written: an adopted table
    /// may have another representation of them.
    OnEdit,
}

/// The type that a column must have so that it can be read and written unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::backend) enum ColumnKind {
    Integer,
    Number,
    Flag,
    /// Text that is compared in an index.
    PlainText,
    /// Text or an enum.
    Word,
    /// JSON, an array of text, or JSON in text.
    List,
    /// JSON, or JSON in text.
    Json,
    Time,
}

impl KeyColumn {
    pub(super) const fn new(
        name: &'static str,
        kind: ColumnKind,
        decode: fn(&mut Row<'_>, &'static str, &mut RowParts) -> Result<(), Fault>,
    ) -> Self {
        let (definition, written) = (None, Written::Elsewhere);
        let encode: fn(&StoredKey) -> Value = |_| Value::Null;
        Self {
            name,
            kind,
            definition,
            written,
            is_change: true,
            is_restriction: false,
            is_read: true,
            encode,
            decode,
        }
    }

    pub(super) const fn defined(self, definition: &'static str) -> Self {
        Self { definition: Some(definition), ..self }
    }

    pub(super) const fn inserted(self, encode: fn(&StoredKey) -> Value) -> Self {
        Self { written: Written::OnInsert, encode, ..self }
    }

    pub(super) const fn edited(self, encode: fn(&StoredKey) -> Value) -> Self {
        Self { written: Written::OnEdit, encode, ..self }
    }

    pub(super) const fn restricts(self) -> Self {
        Self { is_restriction: true, ..self }
    }

    /// Creates a column that is written, and that only statements compare.
    pub(super) const fn unread(name: &'static str, kind: ColumnKind) -> Self {
        Self { is_read: false, ..Self::new(name, kind, |_, _, _| Ok(())) }
    }

    /// Excludes updates of the column from the changes.
    pub(super) const fn no_change(self) -> Self {
        Self { is_change: false, ..self }
    }

    /// Encodes the column's value of a key.
    pub(in crate::backend) fn encode(&self, key: &StoredKey) -> Value {
        (self.encode)(key)
    }

    /// Decodes the column into `parts`.
    pub(in crate::backend) fn decode(
        &self,
        row: &mut Row<'_>,
        parts: &mut RowParts,
    ) -> Result<(), Fault> {
        (self.decode)(row, self.name, parts)
    }
}
