//! Statements that read keys.

use std::sync::LazyLock;

use crate::backend::sql::columns::{ColumnKind, KEY_COLUMNS, KeyColumn};

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
    let columns = KEY_COLUMNS.iter().map(|column| format!("'{}', {}", column.name, read(column)));
    format!(
        "SELECT k.id AS id, json_object({},
            'user_revision', max(u.api_key_revision, coalesce(
                (SELECT max(c.revision) FROM api_key_changes c WHERE c.user_id = u.id), 0)),
            'user_email', {}, 'user_role', {}, 'user_is_active', {}
        ) AS row FROM api_keys k",
        columns.collect::<Vec<_>>().join(", "),
        text("u.email"),
        text("u.role"),
        number("u.is_active"),
    )
});

/// Returns the SQL for the value of a column.
fn read(column: &KeyColumn) -> String {
    let name = format!("k.{}", column.name);
    match (column.name, column.kind) {
        ("user_id", _) => "u.id".to_owned(),
        ("fast_hash", _) => {
            format!("CASE WHEN k.fast_hash_of = k.key_hash THEN {} END", text(&name))
        }
        (_, ColumnKind::Number) => format!("printf('%.6f', {name})"),
        (_, ColumnKind::Integer | ColumnKind::Flag) => number(&name),
        _ => text(&name),
    }
}

/// Returns the SQL for a text column. SQLite accepts bytes in any column, and interprets some of them as binary JSON.
fn text(column: &str) -> String {
    format!("CAST({column} AS TEXT)")
}

fn number(column: &str) -> String {
    format!("CASE typeof({column}) WHEN 'blob' THEN 'bytes' ELSE {column} END")
}
