//! The statements of the triggers that write the audit.
//!
//! They run for every writer, and so they must not fail: SQLite accepts bytes in any column, which JSON can't contain.

use crate::backend::sql::columns::{ColumnKind, KEY_COLUMNS};

/// The columns of a key in the audit: those of [`audited_key`](crate::store::audited_key).
const AUDITED: [&str; 27] = [
    "id",
    "user_id",
    "key_prefix",
    "previous_key_prefix",
    "previous_expires_at",
    "name",
    "description",
    "is_active",
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
    "not_before",
    "metadata",
    "created_by",
    "created_by_key",
    "revoked_at",
    "revoked_by",
    "revoke_reason",
];

/// Returns the statements that audit a new key, and the keys that it replaced.
pub(super) fn insert_key() -> String {
    let action = "coalesce(r.action, 'issue')";
    let new = select(
        ["NEW.id", "NEW.user_id", "r.\"before\"", &key("NEW")],
        action,
        "LEFT JOIN api_key_replaced AS r ON NOT r.is_user AND r.id = NEW.id",
    );
    let replaced =
        "r.id IS NOT NEW.id AND NOT EXISTS (SELECT 1 FROM api_keys AS k WHERE k.id = r.id)";
    let replaced = select(
        ["r.id", "r.user_id", "r.\"before\"", "NULL"],
        "'delete'",
        &format!("JOIN api_key_replaced AS r ON NOT r.is_user WHERE {replaced}"),
    );
    format!(
        "{} {} {FORGET_KEYS}
        INSERT INTO api_key_owners (user_id) SELECT NEW.user_id WHERE NEW.user_id IS NOT NULL
            AND NOT EXISTS (SELECT 1 FROM api_key_owners WHERE user_id = NEW.user_id);",
        insert(&format!("{replaced} UNION ALL {new}")),
        disown("user_id IN (SELECT user_id FROM api_key_replaced WHERE NOT is_user)"),
    )
}

/// Returns the statements that audit a changed key.
pub(super) fn update_key() -> String {
    let values = ["NEW.id", "NEW.user_id", &key("OLD"), &key("NEW")];
    format!(
        "{} {}
        INSERT INTO api_key_owners (user_id) SELECT NEW.user_id
            WHERE NEW.user_id IS NOT NULL AND NEW.user_id IS NOT OLD.user_id
            AND NOT EXISTS (SELECT 1 FROM api_key_owners WHERE user_id = NEW.user_id);",
        write(values, &edit("OLD"), ""),
        disown("user_id = OLD.user_id AND OLD.user_id IS NOT NEW.user_id"),
    )
}

/// Returns the statements that audit a deleted key.
pub(super) fn delete_key() -> String {
    format!(
        "{} {} DELETE FROM api_key_replaced WHERE NOT is_user AND id = OLD.id;",
        write(["OLD.id", "OLD.user_id", &key("OLD"), "NULL"], "'delete'", ""),
        disown("user_id = OLD.user_id"),
    )
}

/// Returns the statements that audit the keys that `UPDATE OR REPLACE` deleted.
pub(super) fn overwrite_key() -> String {
    format!(
        "{} {} {FORGET_KEYS}",
        delete_overwritten_keys(),
        disown("user_id IN (SELECT user_id FROM api_key_replaced WHERE NOT is_user)")
    )
}

/// Returns the statements that note the keys `o` that a statement is about to replace.
pub(super) fn stage_key(is_replaced: &str) -> String {
    format!(
        "{FORGET_KEYS} INSERT INTO api_key_replaced (is_user, id, action, user_id, \"before\")
            SELECT FALSE, o.id, {}, o.user_id, {} FROM api_keys AS o WHERE {is_replaced};",
        edit("o"),
        key("o"),
    )
}

/// Returns the statements that audit a new user, and the users that it replaced.
pub(super) fn insert_user() -> String {
    let action = "CASE WHEN r.id IS NULL THEN 'create_user' ELSE 'update_user' END";
    let new = write(
        ["NULL", "NEW.id", "r.\"before\"", &user("NEW")],
        action,
        &format!(
            "LEFT JOIN api_key_replaced AS r ON r.is_user AND r.id = NEW.id
            WHERE r.id IS NOT NULL OR {}",
            is_audited("NEW.id")
        ),
    );
    format!("{} {new} {FORGET_USERS}", delete_replaced_users())
}

/// Returns the statement that audits a changed user.
pub(super) fn update_user() -> String {
    let condition = format!("WHERE {} OR {}", is_audited("OLD.id"), is_audited("NEW.id"));
    let values = ["NULL", "NEW.id", &user("OLD"), &user("NEW")];
    write(values, "'update_user'", &condition)
}

/// Returns the statements that audit a deleted user. The user was noted before: its keys may have been deleted with it.
pub(super) fn delete_user() -> String {
    let condition = "JOIN api_key_replaced AS r ON r.is_user AND r.id = OLD.id";
    let delete = write(["NULL", "OLD.id", "r.\"before\"", "NULL"], "'delete_user'", condition);
    format!("{delete} DELETE FROM api_key_replaced WHERE is_user AND id = OLD.id;")
}

/// Returns the statements that audit the users that `UPDATE OR REPLACE` deleted.
pub(super) fn overwrite_user() -> String {
    format!("{} {FORGET_USERS}", delete_overwritten_users())
}

/// Returns the statements that note the users `row` of `from` that a statement is about to delete.
pub(super) fn stage_user(row: &str, from: &str, condition: &str) -> String {
    format!(
        "{FORGET_USERS} INSERT INTO api_key_replaced (is_user, id, user_id, \"before\")
            SELECT TRUE, {row}.id, {row}.id, {} FROM {from} WHERE ({condition}) AND ({});",
        user(row),
        is_audited_by(&format!("{row}.id"), "EXISTS (SELECT 1 FROM api_key_attribution)"),
    )
}

const FORGET_KEYS: &str = "DELETE FROM api_key_replaced WHERE NOT is_user;";
const FORGET_USERS: &str = "DELETE FROM api_key_replaced WHERE is_user;";

/// Returns the statement that audits the noted keys that an insertion deleted. One with the id of the new key became
/// that key.
fn delete_replaced_users() -> String {
    let is_deleted = "r.id IS NOT NEW.id
        AND NOT EXISTS (SELECT 1 FROM users AS k WHERE k.id = r.id)";
    delete_noted(["NULL", "r.id"], "'delete_user'", "r.is_user", is_deleted)
}

/// Returns the statement that audits the noted keys that an update deleted. The updated key is not noted: one with its
/// new id was another key.
fn delete_overwritten_keys() -> String {
    let is_deleted = "(r.id IS NEW.id
        OR NOT EXISTS (SELECT 1 FROM api_keys AS k WHERE k.id = r.id))";
    delete_noted(["r.id", "r.user_id"], "'delete'", "NOT r.is_user", is_deleted)
}

fn delete_overwritten_users() -> String {
    let is_deleted = "(r.id IS NEW.id
        OR NOT EXISTS (SELECT 1 FROM users AS k WHERE k.id = r.id))";
    delete_noted(["NULL", "r.id"], "'delete_user'", "r.is_user", is_deleted)
}

fn delete_noted([key, user]: [&str; 2], action: &str, table: &str, is_deleted: &str) -> String {
    let joins = format!("JOIN api_key_replaced AS r ON {table} WHERE {is_deleted}");
    write([key, user, "r.\"before\"", "NULL"], action, &joins)
}

/// Returns the statement that removes the owners for whom `condition` is true, and who own no key any more.
fn disown(condition: &str) -> String {
    format!(
        "DELETE FROM api_key_owners WHERE {condition}
            AND NOT EXISTS (SELECT 1 FROM api_keys AS k WHERE k.user_id = api_key_owners.user_id);"
    )
}

/// Returns whether a change of a user is audited: one by this crate (`a`), or of a user who owns keys.
fn is_audited(id: &str) -> String {
    is_audited_by(id, "a.id IS NOT NULL")
}

fn is_audited_by(id: &str, is_attributed: &str) -> String {
    format!("{is_attributed} OR EXISTS (SELECT 1 FROM api_key_owners AS w WHERE w.user_id = {id})")
}

/// Returns the statement that writes a row of the audit with the ids of key and user, and the row before and after.
fn write(values: [&str; 4], action: &str, joins: &str) -> String {
    insert(&select(values, action, joins))
}

fn insert(selected: &str) -> String {
    format!(
        "INSERT INTO api_key_audit
            (at, action, actor, actor_key, api_key_id, user_id, \"before\", \"after\", reason, request_id)
            {selected};"
    )
}

fn select([key, user, before, after]: [&str; 4], action: &str, joins: &str) -> String {
    format!(
        "SELECT coalesce(a.at, strftime('%Y-%m-%d %H:%M:%f') || '000'), {action}, a.actor, a.actor_key,
            {key}, {user}, {before}, {after}, a.reason, a.request_id
            FROM (SELECT 1) LEFT JOIN api_key_attribution AS a ON TRUE {joins}"
    )
}

/// Returns the action that turns the key `old` into `NEW`, by the rule of
/// [`AuditAction::of_edit`](crate::store::AuditAction).
fn edit(old: &str) -> String {
    let has_grace = |row: &str| {
        format!(
            "({row}.previous_key_prefix IS NOT NULL AND {row}.previous_key_hash IS NOT NULL
                AND {row}.previous_expires_at IS NOT NULL)"
        )
    };
    format!(
        "CASE WHEN {old}.key_hash IS NOT NEW.key_hash COLLATE BINARY THEN 'rotate'
            WHEN {old}.is_active AND NOT coalesce(NEW.is_active, FALSE) THEN 'revoke'
            WHEN NOT coalesce({old}.is_active, FALSE) AND NEW.is_active THEN 'reactivate'
            WHEN {} AND NOT {} THEN 'end_grace' ELSE 'update' END",
        has_grace(old),
        has_grace("NEW"),
    )
}

/// Returns the key in a row as JSON.
fn key(row: &str) -> String {
    let columns = AUDITED.map(|name| {
        let kind = KEY_COLUMNS.iter().find(|column| column.name == name);
        let kind = kind.map_or(ColumnKind::Word, |column| column.kind);
        format!("'{name}', {}", value(kind, &format!("{row}.{name}")))
    });
    format!("json_object({})", columns.join(", "))
}

/// Returns the user in a row as JSON.
fn user(row: &str) -> String {
    let text = |name: &str| value(ColumnKind::Word, &format!("{row}.{name}"));
    format!(
        "json_object('id', {row}.id, 'email', {}, 'role', {}, 'is_active', {})",
        text("email"),
        text("role"),
        value(ColumnKind::Flag, &format!("{row}.is_active")),
    )
}

/// Returns the value of a column for a JSON object.
fn value(kind: ColumnKind, column: &str) -> String {
    let number = format!("CASE typeof({column}) WHEN 'blob' THEN hex({column}) ELSE {column} END");
    let text = format!("CAST({column} AS TEXT)");
    match kind {
        ColumnKind::Integer | ColumnKind::Number => number,
        ColumnKind::Flag => format!(
            "CASE {column} WHEN 1 THEN json('true') WHEN 0 THEN json('false') ELSE {number} END"
        ),
        ColumnKind::List | ColumnKind::Json => {
            // Most lists are empty, and need not be parsed.
            format!(
                "CASE WHEN {column} IS NULL THEN NULL WHEN {column} = '[]' THEN json('[]')
                WHEN json_valid({text}) THEN json({text}) ELSE {text} END"
            )
        }
        ColumnKind::PlainText | ColumnKind::Word | ColumnKind::Time => text,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{
        record::{KeyRecord, User},
        store::audited_key,
    };

    #[test]
    fn the_audit_has_the_columns_of_an_audited_key() {
        let key = audited_key(&KeyRecord::new(1, "a", User::new(1, "a@b.c")));
        let expected: BTreeSet<_> = key.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(BTreeSet::from(AUDITED), expected);
        assert!(AUDITED.iter().all(|name| KEY_COLUMNS.iter().any(|it| it.name == *name)));
    }
}
