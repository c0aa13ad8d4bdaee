//! The columns of `api_keys` in one table, [`KEY_COLUMNS`], from which both SQL stores make their statements and the
//! decoder.

use std::sync::LazyLock;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use super::row::{Fault, Row, RowParts, fault};
use crate::record::KeyRecord;

/// A column of `api_keys` that is part of a [`StoredKey`](crate::store::StoredKey).
pub(in crate::backend) struct KeyColumn {
    pub(in crate::backend) name: &'static str,
    pub(in crate::backend) kind: ColumnKind,
    /// Definition with which SQLite adds the column to a table without it; `None` if there is no possible default.
    /// PostgreSQL adds it in a migration.
    pub(in crate::backend) definition: Option<&'static str>,
    pub(in crate::backend) written: Written,
    /// Whether an update of the column is a change, which gets a revision and a change event.
    pub(in crate::backend) is_change: bool,
    /// Whether the column restricts the key. If such a column were recreated with a default, its restrictions would be
    /// lost: a revoked key would be accepted again.
    pub(in crate::backend) is_restriction: bool,
    encode: fn(&KeyRecord) -> Value,
    decode: fn(&mut Row, &'static str, &mut RowParts) -> Result<(), Fault>,
}

/// The statements of this crate that write a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::backend) enum Written {
    /// Statements of their own, or the database.
    Elsewhere,
    /// The insertion of a key. The totals are included because an ORM may apply its defaults only in the application.
    OnInsert,
    /// The insertion and an edit. `is_active` is not among these: an edit of a record that was read before a revocation
    /// would undo the revocation.
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
    const fn new(
        name: &'static str,
        kind: ColumnKind,
        decode: fn(&mut Row, &'static str, &mut RowParts) -> Result<(), Fault>,
    ) -> Self {
        let (definition, written) = (None, Written::Elsewhere);
        let encode: fn(&KeyRecord) -> Value = |_| Value::Null;
        Self {
            name,
            kind,
            definition,
            written,
            is_change: true,
            is_restriction: false,
            encode,
            decode,
        }
    }

    const fn defined(self, definition: &'static str) -> Self {
        Self { definition: Some(definition), ..self }
    }

    const fn inserted(self, encode: fn(&KeyRecord) -> Value) -> Self {
        Self { written: Written::OnInsert, encode, ..self }
    }

    const fn edited(self, encode: fn(&KeyRecord) -> Value) -> Self {
        Self { written: Written::OnEdit, encode, ..self }
    }

    const fn restricts(self) -> Self {
        Self { is_restriction: true, ..self }
    }

    /// Excludes updates of the column from the changes.
    const fn no_change(self) -> Self {
        Self { is_change: false, ..self }
    }

    /// Encodes the column's value of a record. A hash is no part of a record.
    pub(in crate::backend) fn encode(&self, record: &KeyRecord) -> Value {
        (self.encode)(record)
    }

    /// Decodes the column into `parts`.
    pub(in crate::backend) fn decode(
        &self,
        row: &mut Row,
        parts: &mut RowParts,
    ) -> Result<(), Fault> {
        (self.decode)(row, self.name, parts)
    }
}

/// Returns the columns that an edit writes.
pub(in crate::backend) fn edited() -> impl Iterator<Item = &'static KeyColumn> {
    KEY_COLUMNS.iter().filter(|column| column.written == Written::OnEdit)
}

/// The names of the columns that an edit writes.
pub(in crate::backend) static EDITED: LazyLock<Vec<&'static str>> =
    LazyLock::new(|| edited().map(|column| column.name).collect());

/// The names of the columns that the insertion of a key writes.
pub(in crate::backend) static INSERTED: LazyLock<Vec<&'static str>> = LazyLock::new(|| {
    let inserted = KEY_COLUMNS.iter().filter(|column| column.written != Written::Elsewhere);
    inserted.map(|column| column.name).collect()
});

/// The columns of `api_keys` that are read. A column that is added here is selected, inserted, updated, decoded and
/// checked on adoption; the triggers of SQLite are made from it. The list in `schema/triggers/postgres.sql` is held
/// against it by a test.
pub(in crate::backend) static KEY_COLUMNS: [KeyColumn; 27] = {
    use ColumnKind::{Flag, Integer, Json, List, Number, PlainText, Time, Word};
    [
        KeyColumn::new("id", Integer, |row, at, key| {
            key.record.id = row.required_integer(at)?.into();
            Ok(())
        }),
        KeyColumn::new("user_id", Integer, |row, at, key| {
            key.record.user.id = row.required_integer(at)?.into();
            Ok(())
        })
        .inserted(|key| json!(key.user.id.as_i64())),
        KeyColumn::new("key_prefix", PlainText, |row, at, key| {
            key.record.prefix = row.text(at)?.unwrap_or_default();
            Ok(())
        })
        .inserted(|key| json!(key.prefix)),
        KeyColumn::new("key_hash", PlainText, |row, at, key| {
            key.hash = Some(row.hash(at)?.ok_or_else(|| fault(at, "is null"))?);
            Ok(())
        })
        .inserted(|_| Value::Null),
        // Selected only while it belongs to the current hash.
        KeyColumn::new("fast_hash", PlainText, |row, at, key| {
            key.fast_hash = row.hash(at)?;
            Ok(())
        })
        .defined("TEXT")
        .no_change(),
        KeyColumn::new("is_active", Flag, |row, at, key| {
            key.record.is_active = row.flag(at)?;
            Ok(())
        })
        .defined("BOOLEAN NOT NULL DEFAULT TRUE")
        .inserted(|key| json!(key.is_active))
        .restricts(),
        KeyColumn::new("name", Word, |row, at, key| {
            key.record.name = row.text(at)?.unwrap_or_default();
            Ok(())
        })
        .defined("TEXT DEFAULT ''")
        .edited(|key| json!(key.name)),
        KeyColumn::new("permissions", List, |row, at, key| {
            key.record.permissions = row.grants(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| json!(key.permissions)),
        KeyColumn::new("scopes", List, |row, at, key| {
            key.record.scopes = row.grants(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| json!(key.scopes)),
        KeyColumn::new("rate_limit_per_minute", Integer, |row, at, key| {
            key.record.rate_limits.per_minute = row.limit(at)?;
            Ok(())
        })
        .defined("INTEGER")
        .edited(|key| json!(key.rate_limits.per_minute))
        .restricts(),
        KeyColumn::new("rate_limit_per_hour", Integer, |row, at, key| {
            key.record.rate_limits.per_hour = row.limit(at)?;
            Ok(())
        })
        .defined("INTEGER")
        .edited(|key| json!(key.rate_limits.per_hour))
        .restricts(),
        KeyColumn::new("rate_limit_per_day", Integer, |row, at, key| {
            key.record.rate_limits.per_day = row.limit(at)?;
            Ok(())
        })
        .defined("INTEGER")
        .edited(|key| json!(key.rate_limits.per_day))
        .restricts(),
        KeyColumn::new("allowed_models", List, |row, at, key| {
            key.record.allowed_models = row.texts(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| json!(key.allowed_models))
        .restricts(),
        KeyColumn::new("allowed_endpoints", List, |row, at, key| {
            key.record.allowed_endpoints = row.parsed(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| displayed(&key.allowed_endpoints))
        .restricts(),
        KeyColumn::new("allowed_ips", List, |row, at, key| {
            key.record.allowed_ips = row.parsed(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| displayed(&key.allowed_ips))
        .restricts(),
        KeyColumn::new("is_unlimited", Flag, |row, at, key| {
            key.record.is_unlimited = row.flag(at)?;
            Ok(())
        })
        .defined("BOOLEAN NOT NULL DEFAULT FALSE")
        .edited(|key| json!(key.is_unlimited)),
        KeyColumn::new("budget_limit_cents", Integer, |row, at, key| {
            key.record.budget = row.budget(at, "budget_type")?;
            Ok(())
        })
        .defined("INTEGER")
        .edited(|key| json!(key.budget.map(|budget| budget.limit_cents)))
        .restricts(),
        // Decoded with the limit.
        KeyColumn::new("budget_type", Word, |_, _, _| Ok(()))
            .defined("TEXT")
            .edited(|key| json!(key.budget.map(|budget| budget.period.name())))
            .restricts(),
        KeyColumn::new("expires_at", Time, |row, at, key| {
            key.record.expires_at = row.instant(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| instant(key.expires_at))
        .restricts(),
        KeyColumn::new("metadata", Json, |row, at, key| {
            key.record.metadata = row.metadata(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| key.metadata.clone()),
        KeyColumn::new("total_requests", Integer, |row, at, key| {
            key.record.usage.requests = row.total(at)?;
            Ok(())
        })
        .defined("INTEGER NOT NULL DEFAULT 0")
        .inserted(|_| json!(0))
        .no_change(),
        KeyColumn::new("total_tokens", Integer, |row, at, key| {
            key.record.usage.tokens = row.total(at)?;
            Ok(())
        })
        .defined("INTEGER NOT NULL DEFAULT 0")
        .inserted(|_| json!(0))
        .no_change(),
        KeyColumn::new("total_cost", Number, |row, at, key| {
            key.record.usage.cost_micro_cents = row.micro_cents(at)?;
            Ok(())
        })
        .defined("REAL NOT NULL DEFAULT 0")
        .inserted(|_| json!(0))
        .no_change(),
        KeyColumn::new("last_used_at", Time, |row, at, key| {
            key.record.last_used_at = row.instant(at)?;
            Ok(())
        })
        .defined("TEXT")
        .no_change(),
        KeyColumn::new("created_at", Time, |row, at, key| {
            key.record.created_at = row.instant(at)?.unwrap_or_default();
            Ok(())
        })
        .defined("TEXT")
        .no_change(),
        KeyColumn::new("updated_at", Time, |row, at, key| {
            key.record.updated_at = row.instant(at)?.unwrap_or_default();
            Ok(())
        })
        .defined("TEXT")
        .no_change(),
        KeyColumn::new("api_key_revision", Integer, |row, at, key| {
            key.revisions.key = row.revision(at)?;
            Ok(())
        })
        .defined("INTEGER NOT NULL DEFAULT 0")
        .no_change(),
    ]
};

fn displayed<T: ToString>(list: &[T]) -> Value {
    list.iter().map(T::to_string).collect()
}

/// Encodes a time stamp as text in UTC.
fn instant(time: Option<DateTime<Utc>>) -> Value {
    json!(time.map(|time| time.to_rfc3339_opts(chrono::SecondsFormat::Micros, true)))
}
