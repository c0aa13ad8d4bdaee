//! Bounds of the fields that people write.

use chrono::{DateTime, Utc};

use super::error::ManageError;
use crate::record::KeyRecord;

const MAX_NAME_BYTES: usize = 255;
const MAX_DESCRIPTION_BYTES: usize = 4096;
/// Maximum length of an e-mail address (RFC 5321 §4.5.3.1: 64 and 255 bytes with an `@`).
const MAX_EMAIL_BYTES: usize = 320;
/// Maximum number of entries in a list.
const MAX_ENTRIES: usize = 1_000;
const MAX_ENTRY_BYTES: usize = 1_024;
const MAX_METADATA_BYTES: usize = 64 * 1024;
/// Limits are stored as 64-bit integers.
const MAX_LIMIT: u64 = i64::MAX as u64;

/// Checks a record that is about to be stored. `old` is the record before an edit, whose times may be in the past.
pub(super) fn check_record(
    record: &KeyRecord,
    old: Option<&KeyRecord>,
    now: DateTime<Utc>,
) -> Result<(), ManageError> {
    check_text("name", &record.name, MAX_NAME_BYTES)?;
    check_text("description", &record.description, MAX_DESCRIPTION_BYTES)?;
    for (field, list) in [
        ("permissions", &record.permissions),
        ("scopes", &record.scopes),
        ("allowed_models", &record.allowed_models),
    ] {
        check_count(field, list.len())?;
        for entry in list {
            if entry.is_empty() {
                return Err(ManageError::invalid(field, "has an empty entry"));
            }
            check_text(field, entry, MAX_ENTRY_BYTES)?;
        }
    }
    check_count("allowed_endpoints", record.allowed_endpoints.len())?;
    check_count("allowed_ips", record.allowed_ips.len())?;
    let limits = &record.rate_limits;
    for (field, limit) in [
        ("rate_limit_per_minute", limits.per_minute),
        ("rate_limit_per_hour", limits.per_hour),
        ("rate_limit_per_day", limits.per_day),
        ("budget_limit_cents", record.budget.map(|budget| budget.limit_cents)),
    ] {
        if limit.is_some_and(|limit| limit > MAX_LIMIT) {
            return Err(ManageError::invalid(field, format!("is more than {MAX_LIMIT}")));
        }
    }
    let is_changed = old.is_none_or(|old| old.expires_at != record.expires_at);
    if is_changed && record.expires_at.is_some_and(|expiry| expiry <= now) {
        return Err(ManageError::invalid("expires_at", "is in the past: revoke the key instead"));
    }
    if let (Some(start), Some(expiry)) = (record.not_before, record.expires_at)
        && expiry <= start
    {
        return Err(ManageError::invalid("expires_at", "is not after not_before"));
    }
    // PostgreSQL's JSON has no NUL character.
    let metadata = record.metadata.to_string();
    if metadata.len() > MAX_METADATA_BYTES {
        let reason = format!("has more than {MAX_METADATA_BYTES} bytes");
        return Err(ManageError::invalid("metadata", reason));
    }
    if metadata.contains("\\u0000") {
        return Err(ManageError::invalid("metadata", "contains a NUL character"));
    }
    Ok(())
}

/// Checks the e-mail address of a user. It is an identifier, so that only its shape is checked.
pub(super) fn check_email(email: &str) -> Result<(), ManageError> {
    check_text("email", email, MAX_EMAIL_BYTES)?;
    let is_address = email.split_once('@').is_some_and(|(local, domain)| {
        !local.is_empty() && !domain.is_empty() && !domain.contains('@')
    });
    if !is_address || email.chars().any(char::is_whitespace) {
        return Err(ManageError::invalid("email", "is not an e-mail address"));
    }
    Ok(())
}

/// Checks the role of a user.
pub(super) fn check_role(role: &str) -> Result<(), ManageError> {
    if role.is_empty() {
        return Err(ManageError::invalid("role", "is empty"));
    }
    check_text("role", role, MAX_NAME_BYTES)
}

/// Checks the lookup id of an imported key.
pub(super) fn check_lookup_id(id: &str) -> Result<(), ManageError> {
    if id.is_empty() {
        return Err(ManageError::invalid("key_prefix", "is empty"));
    }
    check_text("key_prefix", id, MAX_NAME_BYTES)
}

fn check_count(field: &'static str, count: usize) -> Result<(), ManageError> {
    if count > MAX_ENTRIES {
        return Err(ManageError::invalid(field, format!("has more than {MAX_ENTRIES} entries")));
    }
    Ok(())
}

fn check_text(field: &'static str, text: &str, max_bytes: usize) -> Result<(), ManageError> {
    if text.len() > max_bytes {
        return Err(ManageError::invalid(field, format!("has more than {max_bytes} bytes")));
    }
    let is_allowed =
        |c: char| !c.is_control() || (field == "description" && matches!(c, '\n' | '\t'));
    if !text.chars().all(is_allowed) {
        return Err(ManageError::invalid(field, "contains a control character"));
    }
    Ok(())
}
