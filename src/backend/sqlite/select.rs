//! Statements that read keys.

use std::sync::LazyLock;

/// Returns the statement that reads the keys for which `filter` is true, each joined with its owner (`k` and `u`), as
/// the JSON that `row` decodes. A key of a deleted owner has no owner, even if another user has got the id since.
pub(super) fn keys_where(filter: &str) -> String {
    format!("{} JOIN {OWNERS} WHERE {filter}", *KEYS)
}

/// Returns the same statement, including keys without an owner.
pub(super) fn keys_and_orphans_where(filter: &str) -> String {
    format!("{} LEFT JOIN {OWNERS} WHERE {filter}", *KEYS)
}

/// The join with the owner. It excludes a user who got the id after the key was assigned to it.
const OWNERS: &str = "users u ON u.id = k.user_id AND NOT EXISTS (
    SELECT 1 FROM api_key_deleted_users d WHERE d.user_id = k.user_id AND d.revision > k.api_key_owned_since)";

static KEYS: LazyLock<String> = LazyLock::new(|| {
    let texts = TEXTS.map(|column| format!("'{column}', {}", text(&format!("k.{column}"))));
    let numbers = NUMBERS.map(|column| format!("'{column}', {}", number(&format!("k.{column}"))));
    format!(
        "SELECT k.id AS id, json_object({}, {},
            'fast_hash', CASE WHEN k.fast_hash_of = k.key_hash THEN {} END,
            'user_revision', max(u.api_key_revision, coalesce(
                (SELECT max(c.revision) FROM api_key_changes c WHERE c.user_id = u.id), 0)),
            'total_cost', printf('%.6f', k.total_cost),
            'user_id', u.id, 'user_email', {}, 'user_role', {}, 'user_is_active', {}
        ) AS row FROM api_keys k",
        texts.join(", "),
        numbers.join(", "),
        text("k.fast_hash"),
        text("u.email"),
        text("u.role"),
        number("u.is_active"),
    )
});

/// Columns of `api_keys` that contain text, some of it JSON or time stamps.
const TEXTS: [&str; 14] = [
    "name",
    "key_prefix",
    "key_hash",
    "permissions",
    "scopes",
    "allowed_models",
    "allowed_endpoints",
    "allowed_ips",
    "budget_type",
    "expires_at",
    "last_used_at",
    "metadata",
    "created_at",
    "updated_at",
];

/// Columns of `api_keys` that contain numbers, some of them booleans.
const NUMBERS: [&str; 10] = [
    "id",
    "api_key_revision",
    "is_active",
    "rate_limit_per_minute",
    "rate_limit_per_hour",
    "rate_limit_per_day",
    "is_unlimited",
    "budget_limit_cents",
    "total_requests",
    "total_tokens",
];

/// Returns the SQL for a text column. SQLite accepts bytes in any column, and interprets some of them as binary JSON.
fn text(column: &str) -> String {
    format!("CAST({column} AS TEXT)")
}

fn number(column: &str) -> String {
    format!("CASE typeof({column}) WHEN 'blob' THEN 'bytes' ELSE {column} END")
}
