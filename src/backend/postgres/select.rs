//! The SELECT of a key's row.

use std::sync::LazyLock;

use crate::backend::sql::columns::{ColumnKind, KEY_COLUMNS, KeyColumn};

/// Selects a key's row, joined with its owner's row, in the form that `row` decodes. PostgreSQL converts every possible
/// type of a column to JSON, and time stamps to ISO 8601.
pub(super) static SELECT_KEY: LazyLock<String> = LazyLock::new(|| {
    let columns: Vec<_> = KEY_COLUMNS.iter().map(read).collect();
    format!(
        "SELECT {},
            greatest(u.api_key_revision, (SELECT max(c.revision) FROM api_key_changes c WHERE c.user_id = u.id))
                AS user_revision,
            u.email AS user_email, u.role AS user_role, u.is_active AS user_is_active",
        columns.join(", ")
    )
});

/// The tables of these columns.
pub(super) const KEY_TABLES: &str = "FROM api_keys k JOIN users u ON u.id = k.user_id";

/// Returns the SQL for a column.
fn read(column: &KeyColumn) -> String {
    let name = column.name;
    match (name, column.kind) {
        ("user_id", _) => "u.id AS user_id".to_owned(),
        ("fast_hash", _) => {
            "CASE WHEN k.fast_hash_of = k.key_hash THEN k.fast_hash END AS fast_hash".to_owned()
        }
        ("total_cost", _) => "CASE k.total_cost_rest WHEN 0 THEN k.total_cost::text ELSE
            (coalesce(k.total_cost, 0)::numeric + k.total_cost_rest::numeric / 1000000)::text END AS total_cost"
            .to_owned(),
        (_, ColumnKind::Json) => format!("k.{name}::text AS {name}"),
        _ => format!("k.{name}"),
    }
}
