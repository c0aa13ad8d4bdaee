//! The columns of `api_keys` in one table, [`KEY_COLUMNS`], from which both SQL stores make their statements and the
//! decoder.

use std::sync::LazyLock;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

pub(in crate::backend) use super::column::{ColumnKind, KeyColumn, Written};
use super::row::fault;
use crate::{
    key::KeyHash,
    record::KeyId,
    store::{SecretHash, StoredKey},
};

/// The names of the columns that the insertion of a key writes.
pub(in crate::backend) static INSERTED: LazyLock<Vec<&'static str>> = LazyLock::new(|| {
    let inserted = KEY_COLUMNS.iter().filter(|column| column.written != Written::Elsewhere);
    inserted.map(|column| column.name).collect()
});

/// Returns the columns that an edit writes, and their new values.
pub(in crate::backend) fn edited(
    old: &StoredKey,
    new: &StoredKey,
) -> impl Iterator<Item = (&'static str, Value)> {
    let columns = KEY_COLUMNS.iter().filter(|column| column.written == Written::OnEdit);
    columns.filter_map(|column| {
        let value = column.encode(new);
        (value != column.encode(old)).then_some((column.name, value))
    })
}

/// The columns of `api_keys` that are read. A column that is added here is selected, inserted, updated, decoded and
/// checked on adoption; the triggers of SQLite are made from it. The list in `schema/triggers/postgres.sql` is held
/// against it by a test.
pub(in crate::backend) static KEY_COLUMNS: [KeyColumn; 41] = {
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
        .inserted(|key| json!(key.record.user.id.as_i64())),
        KeyColumn::new("key_prefix", PlainText, |row, at, key| {
            key.record.prefix = row.text(at)?.unwrap_or_default();
            Ok(())
        })
        .edited(|key| json!(key.record.prefix)),
        KeyColumn::new("key_hash", PlainText, |row, at, key| {
            key.hash = Some(row.hash(at)?.ok_or_else(|| fault(at, "is null"))?);
            Ok(())
        })
        .edited(|key| exposed(Some(&key.hash))),
        // Selected only while it belongs to the current hash.
        KeyColumn::new("fast_hash", PlainText, |row, at, key| {
            key.fast_hash = row.hash(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| exposed(key.upgraded.as_ref()))
        .no_change(),
        KeyColumn::unread("fast_hash_of", PlainText)
            .defined("TEXT")
            .edited(|key| exposed(key.upgraded.as_ref().map(|_| &key.hash)))
            .no_change(),
        KeyColumn::new("previous_key_prefix", PlainText, |row, at, key| {
            key.previous.prefix = row.text(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| json!(key.record.grace.as_ref().map(|grace| &grace.prefix))),
        KeyColumn::new("previous_key_hash", PlainText, |row, at, key| {
            key.previous.hash = row.hash(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| exposed(key.previous.as_ref().map(|previous| &previous.hash))),
        // Selected only while it belongs to the previous hash.
        KeyColumn::new("previous_fast_hash", PlainText, |row, at, key| {
            key.previous.fast_hash = row.hash(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| exposed(key.previous.as_ref().and_then(|it| it.upgraded.as_ref())))
        .no_change(),
        KeyColumn::unread("previous_fast_hash_of", PlainText)
            .defined("TEXT")
            .edited(|key| exposed(key.previous.as_ref().and_then(hash_of_upgrade)))
            .no_change(),
        KeyColumn::new("previous_expires_at", Time, |row, at, key| {
            key.previous.ends_at = row.instant(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| instant(key.record.grace.as_ref().map(|grace| grace.ends_at)))
        .restricts(),
        KeyColumn::new("previous_last_used_at", Time, |row, at, key| {
            key.previous.last_used_at = row.instant(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| instant(key.record.grace.as_ref().and_then(|grace| grace.last_used_at)))
        .no_change(),
        KeyColumn::new("is_active", Flag, |row, at, key| {
            key.record.is_active = row.flag(at)?;
            Ok(())
        })
        .defined("BOOLEAN NOT NULL DEFAULT TRUE")
        .edited(|key| json!(key.record.is_active))
        .restricts(),
        KeyColumn::new("revoked_at", Time, |row, at, key| {
            key.record.revoked_at = row.instant(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| instant(key.record.revoked_at)),
        KeyColumn::new("revoked_by", Word, |row, at, key| {
            key.record.revoked_by = row.text(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| json!(key.record.revoked_by)),
        KeyColumn::new("revoke_reason", Word, |row, at, key| {
            key.record.revoke_reason = row.text(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| json!(key.record.revoke_reason)),
        KeyColumn::new("created_by", Word, |row, at, key| {
            key.record.created_by = row.text(at)?;
            Ok(())
        })
        .defined("TEXT")
        .inserted(|key| json!(key.record.created_by)),
        KeyColumn::new("created_by_key", Integer, |row, at, key| {
            key.record.created_by_key = row.integer(at)?.map(KeyId::from);
            Ok(())
        })
        .defined("INTEGER")
        .inserted(|key| json!(key.record.created_by_key.as_ref().and_then(KeyId::as_i64))),
        KeyColumn::new("name", Word, |row, at, key| {
            key.record.name = row.text(at)?.unwrap_or_default();
            Ok(())
        })
        .defined("TEXT DEFAULT ''")
        .edited(|key| json!(key.record.name)),
        KeyColumn::new("description", Word, |row, at, key| {
            key.record.description = row.text(at)?.unwrap_or_default();
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| json!(key.record.description)),
        KeyColumn::new("permissions", List, |row, at, key| {
            key.record.permissions = row.grants(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| json!(key.record.permissions)),
        KeyColumn::new("scopes", List, |row, at, key| {
            key.record.scopes = row.grants(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| json!(key.record.scopes)),
        KeyColumn::new("rate_limit_per_minute", Integer, |row, at, key| {
            key.record.rate_limits.per_minute = row.limit(at)?;
            Ok(())
        })
        .defined("INTEGER")
        .edited(|key| json!(key.record.rate_limits.per_minute))
        .restricts(),
        KeyColumn::new("rate_limit_per_hour", Integer, |row, at, key| {
            key.record.rate_limits.per_hour = row.limit(at)?;
            Ok(())
        })
        .defined("INTEGER")
        .edited(|key| json!(key.record.rate_limits.per_hour))
        .restricts(),
        KeyColumn::new("rate_limit_per_day", Integer, |row, at, key| {
            key.record.rate_limits.per_day = row.limit(at)?;
            Ok(())
        })
        .defined("INTEGER")
        .edited(|key| json!(key.record.rate_limits.per_day))
        .restricts(),
        KeyColumn::new("allowed_models", List, |row, at, key| {
            key.record.allowed_models = row.texts(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| json!(key.record.allowed_models))
        .restricts(),
        KeyColumn::new("allowed_endpoints", List, |row, at, key| {
            key.record.allowed_endpoints = row.parsed(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| displayed(&key.record.allowed_endpoints))
        .restricts(),
        KeyColumn::new("allowed_ips", List, |row, at, key| {
            key.record.allowed_ips = row.parsed(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| displayed(&key.record.allowed_ips))
        .restricts(),
        KeyColumn::new("is_unlimited", Flag, |row, at, key| {
            key.record.is_unlimited = row.flag(at)?;
            Ok(())
        })
        .defined("BOOLEAN NOT NULL DEFAULT FALSE")
        .edited(|key| json!(key.record.is_unlimited)),
        KeyColumn::new("budget_limit_cents", Integer, |row, at, key| {
            key.record.budget = row.budget(at, "budget_type")?;
            Ok(())
        })
        .defined("INTEGER")
        .edited(|key| json!(key.record.budget.map(|budget| budget.limit_cents)))
        .restricts(),
        // Decoded with the limit.
        KeyColumn::new("budget_type", Word, |_, _, _| Ok(()))
            .defined("TEXT")
            .edited(|key| json!(key.record.budget.map(|budget| budget.period.name())))
            .restricts(),
        KeyColumn::new("expires_at", Time, |row, at, key| {
            key.record.expires_at = row.instant(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| instant(key.record.expires_at))
        .restricts(),
        KeyColumn::new("not_before", Time, |row, at, key| {
            key.record.not_before = row.instant(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| instant(key.record.not_before))
        .restricts(),
        KeyColumn::new("metadata", Json, |row, at, key| {
            key.record.metadata = row.metadata(at)?;
            Ok(())
        })
        .defined("TEXT")
        .edited(|key| key.record.metadata.clone()),
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
        .edited(|key| instant(key.record.last_used_at))
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

/// Encodes a hash for storage.
fn exposed(hash: Option<&KeyHash>) -> Value {
    json!(hash.map(KeyHash::expose_hash))
}

/// Returns the slow hash of a secret that has a fast hash.
fn hash_of_upgrade(secret: &SecretHash) -> Option<&KeyHash> {
    secret.upgraded.as_ref().map(|_| &secret.hash)
}

fn displayed<T: ToString>(list: &[T]) -> Value {
    list.iter().map(T::to_string).collect()
}

/// Encodes a time stamp as text in UTC.
fn instant(time: Option<DateTime<Utc>>) -> Value {
    json!(time.map(|time| time.to_rfc3339_opts(chrono::SecondsFormat::Micros, true)))
}
