//! A key's row as one JSON object, the form in which both SQL stores read and write rows.
//!
//! The tables may belong to another service, whose ORM chose `json` or `jsonb`, `integer` or `bigint`, a timestamp with
//! or without a time zone. The databases convert all of these to JSON and back, so that one decoder handles all of them
//! and names the columns that it can't decode.

use chrono::{DateTime, NaiveDateTime, Utc};
use serde_json::{Map, Value, json};

use super::values;
use crate::{
    error::StoreError,
    key::KeyHash,
    record::{Budget, KeyId, KeyRecord, RateLimits, Revision, Revisions, UsageTotals, User},
    store::StoredKey,
};

/// The columns of `api_keys` that an edit writes. `is_active` is not one of them: an edit of a record that was read
/// before a revocation would undo the revocation.
pub(in crate::backend) const EDITED: [&str; 14] = [
    "name",
    "permissions",
    "scopes",
    "rate_limit_per_minute",
    "rate_limit_per_hour",
    "rate_limit_per_day",
    "allowed_models",
    "allowed_endpoints",
    "allowed_ips",
    "is_unlimited",
    "budget_limit_cents",
    "budget_type",
    "expires_at",
    "metadata",
];

/// The columns of `api_keys` that a new key writes in addition. The totals are included because an ORM may apply its
/// defaults only in the application.
pub(in crate::backend) const INSERTED: [&str; 7] = [
    "user_id",
    "key_prefix",
    "key_hash",
    "is_active",
    "total_requests",
    "total_tokens",
    "total_cost",
];

/// Encodes a record as the values of [`EDITED`] and [`INSERTED`].
pub(in crate::backend) fn encode(record: &KeyRecord) -> Map<String, Value> {
    let texts = |list: &[String]| json!(list);
    let instant = |time: DateTime<Utc>| time.to_rfc3339_opts(chrono::SecondsFormat::Micros, true);
    let row = json!({
        "user_id": record.user.id.as_i64(),
        "key_prefix": record.prefix,
        "name": record.name,
        "is_active": record.is_active,
        "permissions": texts(&record.permissions),
        "scopes": texts(&record.scopes),
        "rate_limit_per_minute": record.rate_limits.per_minute,
        "rate_limit_per_hour": record.rate_limits.per_hour,
        "rate_limit_per_day": record.rate_limits.per_day,
        "allowed_models": texts(&record.allowed_models),
        "allowed_endpoints": texts(&displayed(&record.allowed_endpoints)),
        "allowed_ips": texts(&displayed(&record.allowed_ips)),
        "is_unlimited": record.is_unlimited,
        "budget_limit_cents": record.budget.map(|budget| budget.limit_cents),
        "budget_type": record.budget.map(|budget| budget.period.name()),
        "expires_at": record.expires_at.map(instant),
        "metadata": record.metadata,
        "total_requests": 0,
        "total_tokens": 0,
        "total_cost": 0,
    });
    if let Value::Object(row) = row { row } else { Map::new() }
}

fn displayed<T: ToString>(list: &[T]) -> Vec<String> {
    list.iter().map(T::to_string).collect()
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
    let id = columns.get("id").map(Value::to_string).unwrap_or_default();
    Row(columns).decode().map_err(|Fault { column, reason }| {
        StoreError::bad_row(format!("api_keys row {id}, column {column}: {reason}"))
    })
}

pub(in crate::backend) struct Row(pub(in crate::backend) Map<String, Value>);

/// The column of a row that can't be decoded, and the reason.
pub(in crate::backend) struct Fault {
    pub(in crate::backend) column: &'static str,
    pub(in crate::backend) reason: String,
}

impl Row {
    pub(in crate::backend) fn decode(mut self) -> Result<StoredKey, Fault> {
        let user = User {
            id: self.integer("user_id")?.ok_or_else(|| fault("user_id", "is null"))?.into(),
            email: self.text("user_email")?.unwrap_or_default(),
            role: self.text("user_role")?.unwrap_or_else(|| "user".to_owned()),
            is_active: self.flag("user_is_active")?,
        };
        let id: KeyId = self.integer("id")?.ok_or_else(|| fault("id", "is null"))?.into();
        let record = KeyRecord {
            id,
            name: self.text("name")?.unwrap_or_default(),
            prefix: self.text("key_prefix")?.unwrap_or_default(),
            is_active: self.flag("is_active")?,
            permissions: self.grants("permissions")?,
            scopes: self.grants("scopes")?,
            rate_limits: RateLimits {
                per_minute: self.limit("rate_limit_per_minute")?,
                per_hour: self.limit("rate_limit_per_hour")?,
                per_day: self.limit("rate_limit_per_day")?,
            },
            allowed_models: self.texts("allowed_models")?,
            allowed_endpoints: self.parsed("allowed_endpoints")?,
            allowed_ips: self.parsed("allowed_ips")?,
            is_unlimited: self.flag("is_unlimited")?,
            budget: self.budget()?,
            expires_at: self.instant("expires_at")?,
            usage: UsageTotals {
                requests: self.total("total_requests")?,
                tokens: self.total("total_tokens")?,
                cost_micro_cents: self.micro_cents("total_cost")?,
            },
            last_used_at: self.instant("last_used_at")?,
            created_at: self.instant("created_at")?.unwrap_or_default(),
            updated_at: self.instant("updated_at")?.unwrap_or_default(),
            metadata: self.metadata()?,
            revision: Revision(0),
            user,
        };
        let hash = self.hash("key_hash")?.ok_or_else(|| fault("key_hash", "is null"))?;
        let revisions = Revisions {
            key: self.revision("api_key_revision")?,
            owner: self.revision("user_revision")?,
        };
        let key = StoredKey::new(record, hash).with_revisions(revisions);
        Ok(match self.hash("fast_hash")? {
            Some(fast) => key.with_upgrade(fast),
            None => key,
        })
    }

    /// Takes a column. A column that is missing from the result is an error: read as NULL, an allow-list would allow
    /// everything.
    fn take(&mut self, column: &'static str) -> Result<Value, Fault> {
        let value = self.0.get_mut(column).map(Value::take);
        value.ok_or_else(|| fault(column, "is missing from the result"))
    }

    /// Takes a JSON column, which is JSON or, for a text column, text that contains JSON.
    fn json(&mut self, column: &'static str) -> Result<Value, Fault> {
        match self.take(column)? {
            Value::String(text) => {
                serde_json::from_str(&text).map_err(|_| fault(column, "is not JSON"))
            }
            value => Ok(value),
        }
    }

    /// Takes the column `metadata`, which both databases return as JSON text whatever its type is, so that a JSON text
    /// in it is not parsed a second time.
    fn metadata(&mut self) -> Result<Value, Fault> {
        let Some(text) = self.text("metadata")? else { return Ok(Value::Null) };
        serde_json::from_str(&text).map_err(|_| fault("metadata", "is not JSON"))
    }

    fn text(&mut self, column: &'static str) -> Result<Option<String>, Fault> {
        match self.take(column)? {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(text)),
            _ => Err(fault(column, "is not a text")),
        }
    }

    /// Takes a boolean. NULL is false: without a value, a key is neither active nor unlimited.
    fn flag(&mut self, column: &'static str) -> Result<bool, Fault> {
        match self.take(column)? {
            Value::Null => Ok(false),
            Value::Bool(flag) => Ok(flag),
            Value::Number(number) if number.as_i64() == Some(0) => Ok(false),
            Value::Number(number) if number.as_i64() == Some(1) => Ok(true),
            _ => Err(fault(column, "is not a boolean")),
        }
    }

    fn integer(&mut self, column: &'static str) -> Result<Option<i64>, Fault> {
        match self.take(column)? {
            Value::Null => Ok(None),
            value => value.as_i64().map(Some).ok_or_else(|| fault(column, "is not an integer")),
        }
    }

    fn limit(&mut self, column: &'static str) -> Result<Option<u64>, Fault> {
        values::limit(self.integer(column)?).map_err(|reason| fault(column, reason))
    }

    fn revision(&mut self, column: &'static str) -> Result<Revision, Fault> {
        let revision = self.integer(column)?.map(u64::try_from).transpose();
        let revision = revision.map_err(|_| fault(column, "is negative"))?;
        Ok(Revision(revision.unwrap_or(0)))
    }

    /// Takes a total. It decides nothing, so that an invalid one does not fail the key.
    fn total(&mut self, column: &'static str) -> Result<u64, Fault> {
        Ok(self.integer(column)?.and_then(|total| u64::try_from(total).ok()).unwrap_or(0))
    }

    /// Takes an amount in cents, which is text, because JSON numbers lose digits.
    fn micro_cents(&mut self, column: &'static str) -> Result<i64, Fault> {
        let cents = self.text(column)?.unwrap_or_default();
        // It is exact up to 2⁵³ micro-cents, which are 90 million dollars.
        Ok((cents.parse::<f64>().unwrap_or(0.0) * 1e6).round() as i64)
    }

    /// Takes a list of texts. NULL is empty, and so is `{}`, which is the default of some ORMs.
    fn texts(&mut self, column: &'static str) -> Result<Vec<String>, Fault> {
        let value = self.json(column)?;
        Self::list(column, value)
    }

    fn grants(&mut self, column: &'static str) -> Result<Vec<String>, Fault> {
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

    fn parsed<T>(&mut self, column: &'static str) -> Result<Vec<T>, Fault>
    where
        T: std::str::FromStr<Err: std::fmt::Display>,
    {
        let parse = |entry: String| entry.parse().map_err(|error: T::Err| fault(column, error));
        self.texts(column)?.into_iter().map(parse).collect()
    }

    fn budget(&mut self) -> Result<Option<Budget>, Fault> {
        let limit_cents = self.integer("budget_limit_cents")?;
        let period = self.text("budget_type")?;
        let budget = values::budget(limit_cents, period.as_deref());
        budget.map_err(|(column, reason)| fault(column, reason))
    }

    /// Takes a time stamp. One without a time zone is UTC.
    fn instant(&mut self, column: &'static str) -> Result<Option<DateTime<Utc>>, Fault> {
        let Some(text) = self.text(column)? else { return Ok(None) };
        let instant = match text.as_str() {
            "infinity" => Some(DateTime::<Utc>::MAX_UTC),
            "-infinity" => Some(DateTime::<Utc>::MIN_UTC),
            text => {
                DateTime::parse_from_rfc3339(text).map(|time| time.to_utc()).ok().or_else(|| {
                    let without_zone = ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f"];
                    let parse = |form: &&str| NaiveDateTime::parse_from_str(text, form).ok();
                    without_zone.iter().find_map(parse).map(|time| time.and_utc())
                })
            }
        };
        instant.map(Some).ok_or_else(|| fault(column, "is not a time stamp"))
    }

    fn hash(&mut self, column: &'static str) -> Result<Option<KeyHash>, Fault> {
        let Some(text) = self.text(column)? else { return Ok(None) };
        text.parse().map(Some).map_err(|error| fault(column, error))
    }
}

fn fault(column: &'static str, reason: impl ToString) -> Fault {
    Fault { column, reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a row as the stores select it.
    fn row() -> Map<String, Value> {
        let mut row = encode(&KeyRecord::new(7, "prefix", User::new(1, "")));
        let hash = KeyHash::sha256("secret").expose_hash();
        let rest = json!({
            "id": 7, "user_id": 1, "user_email": "a@b.c", "user_role": "user", "user_is_active": true,
            "total_cost": "0", "key_hash": hash, "fast_hash": null, "metadata": null, "last_used_at": null,
            "created_at": null, "updated_at": null, "api_key_revision": 1, "user_revision": 1,
        });
        row.extend(rest.as_object().cloned().unwrap());
        row
    }

    #[test]
    fn a_column_that_is_absent_from_a_result_is_an_error_that_names_it() {
        assert!(decode(&Value::Object(row()).to_string()).is_ok());
        for column in row().keys() {
            let mut lacking = row();
            lacking.remove(column);
            let error = decode(&Value::Object(lacking).to_string()).unwrap_err().to_string();
            assert!(error.contains(&format!("column {column}: ")), "{column}: {error}");
        }
    }
}
