//! A key's row, as one JSON object or as a list of texts, and its decoder.
//!
//! The tables may belong to another service, whose ORM chose `json` or `jsonb`, `integer` or `bigint`, a timestamp with
//! or without a time zone. The databases convert all of these to JSON or to text, so that one decoder handles all of
//! them and names the columns that it can't decode. Rows are written and listed as JSON; look-ups in PostgreSQL read
//! texts, which cost the server and this side less.

mod cells;

use std::{str::FromStr, sync::LazyLock};

use chrono::{DateTime, NaiveDateTime, Utc};
#[cfg(feature = "postgres")]
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Map, Value};

use self::cells::{Cell, Cells};
#[cfg(any(feature = "postgres", test))]
use super::columns::Written;
use super::{
    columns::{ColumnKind, KEY_COLUMNS},
    values,
};
use crate::{
    error::StoreError,
    key::KeyHash,
    record::{Budget, GracePeriod, KeyRecord, Revision, Revisions, User},
    store::StoredKey,
};

/// Encodes a key as the values of the columns that an insertion writes.
#[cfg(any(feature = "postgres", test))]
pub(in crate::backend) fn encode(key: &StoredKey) -> Map<String, Value> {
    let written = KEY_COLUMNS.iter().filter(|column| column.written != Written::Elsewhere);
    written.map(|column| (column.name.to_owned(), column.encode(key))).collect()
}

/// A key that is serialized as an object of its columns, without those that are NULL.
#[cfg(feature = "postgres")]
pub(in crate::backend) struct EncodedKey<'a>(pub(in crate::backend) &'a StoredKey);

#[cfg(feature = "postgres")]
impl Serialize for EncodedKey<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut columns = serializer.serialize_map(None)?;
        for column in KEY_COLUMNS.iter().filter(|column| column.written != Written::Elsewhere) {
            match column.encode(self.0) {
                Value::Null => {}
                value => columns.serialize_entry(column.name, &value)?,
            }
        }
        columns.end()
    }
}

/// Decodes a key's row, joined with its owner's row.
///
/// # Errors
///
/// `BadRow`, with the row's id and the column. It contains no value other than a rule or a network.
pub(in crate::backend) fn decode(row: &str) -> Result<StoredKey, StoreError> {
    let Ok(Value::Object(columns)) = serde_json::from_str(row) else {
        return Err(StoreError::bad_row("a row of api_keys is not a JSON object"));
    };
    Row::from_json(columns).decode_or_name()
}

/// Decodes a key's row from the texts of [`READ`]: integers and flags as their texts, lists and time stamps as JSON, and
/// the rest as it is.
///
/// # Errors
///
/// As [`decode`].
#[cfg(feature = "postgres")]
pub(in crate::backend) fn decode_texts(texts: Vec<Option<&[u8]>>) -> Result<StoredKey, StoreError> {
    Row(Cells::from_texts(texts)).decode_or_name()
}

/// The columns that the decoder takes: those of the key that are read, and those of its owner.
pub(in crate::backend) static READ: LazyLock<Vec<(&'static str, ColumnKind)>> =
    LazyLock::new(|| {
        let key = KEY_COLUMNS.iter().filter(|column| column.is_read);
        let owner = [
            ("user_email", ColumnKind::Word),
            ("user_role", ColumnKind::Word),
            ("user_is_active", ColumnKind::Flag),
            ("user_revision", ColumnKind::Integer),
        ];
        key.map(|column| (column.name, column.kind)).chain(owner).collect()
    });

/// The values of [`READ`].
pub(in crate::backend) struct Row<'a>(Cells<'a>);

/// The column of a row that can't be decoded, and the reason.
pub(in crate::backend) struct Fault {
    pub(in crate::backend) column: &'static str,
    pub(in crate::backend) reason: String,
}

/// The decoded columns of a row.
pub(in crate::backend) struct RowParts {
    pub(super) record: KeyRecord,
    pub(super) hash: Option<KeyHash>,
    pub(super) fast_hash: Option<KeyHash>,
    pub(super) previous: PreviousParts,
    pub(super) revisions: Revisions,
}

/// The decoded columns of the previous secret.
#[derive(Default)]
pub(in crate::backend) struct PreviousParts {
    pub(super) prefix: Option<String>,
    pub(super) hash: Option<KeyHash>,
    pub(super) fast_hash: Option<KeyHash>,
    pub(super) ends_at: Option<DateTime<Utc>>,
    pub(super) last_used_at: Option<DateTime<Utc>>,
}

impl Row<'_> {
    pub(in crate::backend) fn from_json(columns: Map<String, Value>) -> Self {
        Self(Cells::from_json(columns))
    }

    fn decode_or_name(mut self) -> Result<StoredKey, StoreError> {
        self.decode().map_err(|Fault { column, reason }| {
            let id = self.0.id();
            StoreError::bad_row(format!("api_keys row {id}, column {column}: {reason}"))
        })
    }

    /// Decodes only some of the columns.
    pub(super) fn decode_some(mut self, columns: &[&str]) -> Result<KeyRecord, Fault> {
        Ok(self.parts(|name| columns.contains(&name))?.record)
    }

    fn parts(&mut self, is_decoded: impl Fn(&str) -> bool) -> Result<RowParts, Fault> {
        let (email, role) = (String::new(), String::new());
        let user = User { id: 0.into(), email, role, is_active: false };
        let record = KeyRecord::new(0, "", user);
        let revisions = Revisions::default();
        let previous = PreviousParts::default();
        let mut key = RowParts { record, hash: None, fast_hash: None, previous, revisions };
        let columns = KEY_COLUMNS.iter().filter(|column| column.is_read);
        for column in columns.filter(|column| is_decoded(column.name)) {
            column.decode(self, &mut key)?;
        }
        Ok(key)
    }

    pub(in crate::backend) fn decode(&mut self) -> Result<StoredKey, Fault> {
        let mut key = self.parts(|_| true)?;
        let user = &mut key.record.user;
        user.email = self.text("user_email")?.unwrap_or_default();
        user.role = self.text("user_role")?.unwrap_or_else(|| "user".to_owned());
        user.is_active = self.flag("user_is_active")?;
        key.revisions.owner = self.revision("user_revision")?;

        // Without all of lookup id, hash and end, no previous secret is accepted.
        let PreviousParts { prefix, hash: previous, fast_hash, ends_at, last_used_at } =
            key.previous;
        let previous = previous.zip(prefix.zip(ends_at)).map(|(hash, (prefix, ends_at))| {
            key.record.grace =
                Some(GracePeriod { last_used_at, ..GracePeriod::new(prefix, ends_at) });
            hash
        });
        let hash = key.hash.ok_or_else(|| fault("key_hash", "is null"))?;
        let mut stored = StoredKey::new(key.record, hash).with_revisions(key.revisions);
        if let Some(fast) = key.fast_hash {
            stored = stored.with_upgrade(fast);
        }
        Ok(match previous {
            Some(hash) => stored.with_previous(hash, fast_hash),
            None => stored,
        })
    }

    /// Takes a JSON column, which is JSON or, for a text column, text that contains JSON.
    fn json(&mut self, column: &'static str) -> Result<Value, Fault> {
        let not_json = |_| fault(column, "is not JSON");
        let value = match self.0.take(column)? {
            Cell::Null => Value::Null,
            Cell::Json(value) => value,
            Cell::Text("[]") => Value::Array(Vec::new()),
            Cell::Text(text) => serde_json::from_str(text).map_err(not_json)?,
        };
        match value {
            Value::String(text) => serde_json::from_str(&text).map_err(not_json),
            value => Ok(value),
        }
    }

    /// Takes the column `metadata`, which both databases return as JSON text whatever its type is, so that a JSON text
    /// in it is not parsed a second time.
    pub(super) fn metadata(&mut self, column: &'static str) -> Result<Value, Fault> {
        let value = self.parsed_text(column, |text| match text {
            "{}" => Ok(Value::Object(Map::new())),
            text => serde_json::from_str(text).map_err(|_| fault(column, "is not JSON")),
        });
        Ok(value?.unwrap_or(Value::Null))
    }

    pub(super) fn text(&mut self, column: &'static str) -> Result<Option<String>, Fault> {
        match self.0.take(column)? {
            Cell::Null => Ok(None),
            Cell::Json(Value::String(text)) => Ok(Some(text)),
            Cell::Text(text) => Ok(Some(text.to_owned())),
            Cell::Json(_) => Err(fault(column, "is not a text")),
        }
    }

    /// Takes a text and parses it.
    fn parsed_text<T>(
        &mut self,
        column: &'static str,
        parse: impl FnOnce(&str) -> Result<T, Fault>,
    ) -> Result<Option<T>, Fault> {
        match self.0.take(column)? {
            Cell::Null => Ok(None),
            Cell::Json(Value::String(text)) => parse(&text).map(Some),
            Cell::Text(text) => parse(text).map(Some),
            Cell::Json(_) => Err(fault(column, "is not a text")),
        }
    }

    /// Takes a boolean. NULL is false: without a value, a key is neither active nor unlimited.
    pub(super) fn flag(&mut self, column: &'static str) -> Result<bool, Fault> {
        match self.0.take(column)? {
            Cell::Null | Cell::Text("false") => Ok(false),
            Cell::Text("true") => Ok(true),
            Cell::Json(Value::Bool(flag)) => Ok(flag),
            Cell::Json(Value::Number(number)) if number.as_i64() == Some(0) => Ok(false),
            Cell::Json(Value::Number(number)) if number.as_i64() == Some(1) => Ok(true),
            _ => Err(fault(column, "is not a boolean")),
        }
    }

    pub(super) fn required_integer(&mut self, column: &'static str) -> Result<i64, Fault> {
        self.integer(column)?.ok_or_else(|| fault(column, "is null"))
    }

    pub(super) fn integer(&mut self, column: &'static str) -> Result<Option<i64>, Fault> {
        let integer = match self.0.take(column)? {
            Cell::Null => return Ok(None),
            Cell::Json(value) => value.as_i64(),
            Cell::Text(text) => text.parse().ok(),
        };
        integer.map(Some).ok_or_else(|| fault(column, "is not an integer"))
    }

    pub(super) fn limit(&mut self, column: &'static str) -> Result<Option<u64>, Fault> {
        values::limit(self.integer(column)?).map_err(|reason| fault(column, reason))
    }

    pub(super) fn revision(&mut self, column: &'static str) -> Result<Revision, Fault> {
        let revision = self.integer(column)?.map(u64::try_from).transpose();
        let revision = revision.map_err(|_| fault(column, "is negative"))?;
        Ok(Revision(revision.unwrap_or(0)))
    }

    /// Takes a total. It decides nothing, so that an invalid one does not fail the key.
    pub(super) fn total(&mut self, column: &'static str) -> Result<u64, Fault> {
        Ok(self.integer(column)?.and_then(|total| u64::try_from(total).ok()).unwrap_or(0))
    }

    /// Takes an amount in cents, which is text, because JSON numbers lose digits.
    pub(super) fn micro_cents(&mut self, column: &'static str) -> Result<i64, Fault> {
        let cents = self.parsed_text(column, |text| Ok(text.parse().unwrap_or(0.0)))?;
        // It is exact up to 2⁵³ micro-cents, which are 90 million dollars.
        Ok((cents.unwrap_or(0.0_f64) * 1e6).round() as i64)
    }

    /// Takes a list of texts. NULL is empty, and so is `{}`, which is the default of some ORMs.
    pub(super) fn texts(&mut self, column: &'static str) -> Result<Vec<String>, Fault> {
        let value = self.json(column)?;
        Self::list(column, value)
    }

    pub(super) fn grants(&mut self, column: &'static str) -> Result<Vec<String>, Fault> {
        let granted = values::grants(self.json(column)?);
        granted.ok_or_else(|| fault(column, "is neither a list of texts nor an object"))
    }

    fn list(column: &'static str, value: Value) -> Result<Vec<String>, Fault> {
        let no_list = || fault(column, "is not a list of texts");
        let entries = match value {
            Value::Null => Vec::new(),
            Value::Array(entries) => entries,
            Value::Object(entries) if entries.is_empty() => Vec::new(),
            _ => return Err(no_list()),
        };
        let text = |entry| if let Value::String(text) = entry { Ok(text) } else { Err(no_list()) };
        entries.into_iter().map(text).collect()
    }

    pub(super) fn parsed<T>(&mut self, column: &'static str) -> Result<Vec<T>, Fault>
    where
        T: FromStr<Err: std::fmt::Display>,
    {
        let parse = |entry: String| entry.parse().map_err(|error: T::Err| fault(column, error));
        self.texts(column)?.into_iter().map(parse).collect()
    }

    pub(super) fn budget(
        &mut self,
        limit: &'static str,
        period: &'static str,
    ) -> Result<Option<Budget>, Fault> {
        let limit_cents = self.integer(limit)?;
        let period = self.text(period)?;
        let budget = values::budget(limit_cents, period.as_deref());
        budget.map_err(|(column, reason)| fault(column, reason))
    }

    /// Takes a time stamp. One without a time zone is UTC.
    pub(super) fn instant(&mut self, column: &'static str) -> Result<Option<DateTime<Utc>>, Fault> {
        self.parsed_text(column, |text| {
            // As JSON, it is in quotes.
            let quoted = text.strip_prefix('"').and_then(|text| text.strip_suffix('"'));
            instant(quoted.unwrap_or(text)).ok_or_else(|| fault(column, "is not a time stamp"))
        })
    }

    pub(super) fn hash(&mut self, column: &'static str) -> Result<Option<KeyHash>, Fault> {
        self.parsed_text(column, |text| text.parse().map_err(|error| fault(column, error)))
    }
}

fn instant(text: &str) -> Option<DateTime<Utc>> {
    match text {
        "infinity" => Some(DateTime::<Utc>::MAX_UTC),
        "-infinity" => Some(DateTime::<Utc>::MIN_UTC),
        text => DateTime::parse_from_rfc3339(text).map(|time| time.to_utc()).ok().or_else(|| {
            let without_zone = ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f"];
            let parse = |form: &&str| NaiveDateTime::parse_from_str(text, form).ok();
            without_zone.iter().find_map(parse).map(|time| time.and_utc())
        }),
    }
}

pub(super) fn fault(column: &'static str, reason: impl ToString) -> Fault {
    Fault { column, reason: reason.to_string() }
}

#[cfg(test)]
mod tests;
