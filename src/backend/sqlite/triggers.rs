//! The triggers that record changes and write the audit, and the check whether they exist.
//!
//! `REPLACE` and `UPDATE OR REPLACE` delete conflicting rows without firing a trigger
//! (<https://sqlite.org/lang_conflict.html>), so that a trigger before the statement records them, by the unique
//! indexes of the table. The audit must not contain a row that the statement then keeps (`INSERT OR IGNORE`, an
//! upsert): the trigger before the statement notes the row in `api_key_replaced`, and the one after it audits those
//! that are deleted.
//!
//! No trigger of one table names the other one: SQLite rejects renaming a rebuilt table while a trigger names a missing
//! table, and ORMs alter tables in this way.

mod audit;
mod table;

use diesel::{
    QueryResult, QueryableByName, RunQueryDsl, SqliteConnection, connection::SimpleConnection,
    sql_query, sql_types::Text,
};

use self::table::Table;
use super::schema_version;
use crate::backend::sql::{columns::KEY_COLUMNS, health::SchemaVersion};

#[derive(QueryableByName)]
struct Trigger {
    #[diesel(sql_type = Text)]
    name: String,
    #[diesel(sql_type = Text)]
    sql: String,
}

/// Returns the names of the triggers that are missing or different. Without them, changes may be missing.
pub(super) fn missing(connection: &mut SqliteConnection) -> QueryResult<Vec<String>> {
    let present = present(connection)?;
    // The triggers of a newer version record what those of this version do, and more.
    let is_newer = schema_version::read(connection)? == SchemaVersion::Newer;
    let is_missing = |wanted: &&Trigger| {
        let is_same = |it: &Trigger| it.name == wanted.name && (is_newer || it.sql == wanted.sql);
        !present.iter().any(is_same)
    };
    let wanted = wanted(connection)?;
    Ok(wanted.iter().filter(is_missing).map(|trigger| trigger.name.clone()).collect())
}

/// Creates the triggers that are missing or different, and returns their names. Every node then reads everything again,
/// because changes while a trigger was missing are unknown.
pub(super) fn make(connection: &mut SqliteConnection) -> QueryResult<Vec<String>> {
    let made = missing(connection)?;
    for Trigger { name, sql } in wanted(connection)? {
        if made.contains(&name) {
            connection.batch_execute(&format!("DROP TRIGGER IF EXISTS {name}; {sql};"))?;
        }
    }
    if !made.is_empty() {
        // A new database contains only its first row.
        connection.batch_execute(
            "INSERT INTO api_key_changes (key_prefix)
            SELECT NULL WHERE (SELECT max(revision) FROM api_key_changes) > 1",
        )?;
    }
    Ok(made)
}

fn present(connection: &mut SqliteConnection) -> QueryResult<Vec<Trigger>> {
    sql_query(
        "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND name LIKE 'api\\_key\\_%' ESCAPE '\\'",
    )
    .load(connection)
}

fn wanted(connection: &mut SqliteConnection) -> QueryResult<Vec<Trigger>> {
    let (keys, users) = (Table::read("api_keys", connection)?, Table::read("users", connection)?);
    let trigger = |name: &str, body: String| Trigger {
        name: name.to_owned(),
        sql: format!("CREATE TRIGGER {name} {body}"),
    };
    let is_changed = |columns: &[&str]| {
        // A column of an adopted table may compare without case.
        let differs = |column: &&str| format!("OLD.{column} IS NOT NEW.{column} COLLATE BINARY");
        columns.iter().map(differs).collect::<Vec<_>>().join(" OR ")
    };
    // Selects a lookup id of a row; NULL means none.
    let select_key = |id: &str, filter: &str| {
        let row = &id[..3];
        format!("SELECT {id}, {row}.id WHERE {id} IS NOT NULL AND {filter}")
    };
    // Records two of them. Each statement takes its time, also if it writes nothing.
    let note_keys = |one: String, other: String| {
        format!("INSERT INTO api_key_changes (key_prefix, api_key_id) {one} UNION ALL {other};")
    };
    // A lookup id that is recorded once is not recorded again as another one of the same row.
    let is_other = |id: &str, others: &[&str]| {
        let differs = others.iter().map(|other| format!("{id} IS NOT {other} COLLATE BINARY"));
        differs.collect::<Vec<_>>().join(" AND ")
    };
    let [old, old_previous] = ["OLD.key_prefix", "OLD.previous_key_prefix"];
    let [new, new_previous] = ["NEW.key_prefix", "NEW.previous_key_prefix"];
    let note_old = note_keys(
        select_key(old, "TRUE"),
        select_key(old_previous, &is_other(old_previous, &[old])),
    );
    let note_new = note_keys(
        select_key(new, "TRUE"),
        select_key(new_previous, &is_other(new_previous, &[new])),
    );
    let note_lost = note_keys(
        select_key(old, &is_other(old, &[new, new_previous])),
        select_key(old_previous, &is_other(old_previous, &[old, new, new_previous])),
    );
    let revise_key =
        "UPDATE api_keys SET api_key_revision = (SELECT max(revision) FROM api_key_changes)";
    let revise_user =
        "UPDATE users SET api_key_revision = (SELECT max(revision) FROM api_key_changes)";
    let changes = KEY_COLUMNS.iter().filter(|column| column.is_change);
    let key_columns: Vec<_> = changes.map(|column| column.name).collect();
    Ok(vec![
        trigger(
            "api_key_note_new",
            format!(
                "AFTER INSERT ON api_keys BEGIN
                    {note_new} {}
                    {revise_key}, api_key_owned_since = (SELECT max(revision) FROM api_key_changes) WHERE id = NEW.id;
                END",
                audit::insert_key()
            ),
        ),
        trigger(
            "api_key_note_gone",
            format!(
                "AFTER DELETE ON api_keys BEGIN {note_old} {} {} END",
                keys.retire_usage(),
                audit::delete_key()
            ),
        ),
        trigger(
            "api_key_note",
            format!(
                "AFTER UPDATE ON api_keys WHEN {} BEGIN
                    {note_lost} {note_new} {}
                    {revise_key}, api_key_owned_since = CASE WHEN OLD.user_id IS NEW.user_id THEN api_key_owned_since
                        ELSE (SELECT max(revision) FROM api_key_changes) END WHERE id = NEW.id;
                END",
                is_changed(&key_columns),
                audit::update_key(),
            ),
        ),
        trigger(
            "api_key_note_replaced",
            format!(
                "BEFORE INSERT ON api_keys WHEN {} BEGIN {} END",
                keys.replaces(),
                keys.note_replaced(false)
            ),
        ),
        trigger(
            "api_key_note_overwritten",
            format!(
                "BEFORE UPDATE OF {} ON api_keys BEGIN {} END",
                keys.unique_columns(),
                keys.note_replaced(true)
            ),
        ),
        trigger(
            "api_key_audit_overwritten",
            format!(
                "AFTER UPDATE OF {} ON api_keys BEGIN {} END",
                keys.unique_columns(),
                audit::overwrite_key()
            ),
        ),
        trigger(
            "api_key_note_user_new",
            format!(
                "AFTER INSERT ON users BEGIN
                    INSERT INTO api_key_changes (user_id, is_new_user) VALUES (NEW.id, TRUE);
                    {} {revise_user} WHERE id = NEW.id;
                    {DELETED_LATELY}
                END",
                audit::insert_user()
            ),
        ),
        trigger(
            "api_key_note_user",
            format!(
                "AFTER UPDATE ON users WHEN {} BEGIN
                    INSERT INTO api_key_changes (user_id) SELECT OLD.id WHERE OLD.id IS NOT NEW.id;
                    INSERT INTO api_key_changes (user_id) VALUES (NEW.id);
                    {} {revise_user} WHERE id = NEW.id;
                    {DELETED_LATELY}
                END",
                is_changed(&["id", "email", "role", "is_active"]),
                audit::update_user()
            ),
        ),
        trigger(
            "api_key_note_user_gone",
            format!(
                "AFTER DELETE ON users BEGIN
                    INSERT INTO api_key_changes (user_id) VALUES (OLD.id);
                    {DELETED_LATELY} {}
                END",
                audit::delete_user()
            ),
        ),
        trigger(
            "api_key_audit_user_going",
            format!("BEFORE DELETE ON users BEGIN {} END", audit::stage_user("OLD", "(SELECT 1)", "TRUE")),
        ),
        trigger(
            "api_key_note_user_replaced",
            format!("BEFORE INSERT ON users BEGIN {} END", users.note_replaced(false)),
        ),
        trigger(
            "api_key_note_user_overwritten",
            format!(
                "BEFORE UPDATE OF {} ON users BEGIN {} END",
                users.unique_columns(),
                users.note_replaced(true)
            ),
        ),
        trigger(
            "api_key_audit_user_overwritten",
            format!(
                "AFTER UPDATE OF {} ON users BEGIN {} END",
                users.unique_columns(),
                audit::overwrite_user()
            ),
        ),
    ])
}

/// Records the deleted users among the users of the last changes.
const DELETED_LATELY: &str = "INSERT INTO api_key_deleted_users (user_id, revision)
    SELECT c.user_id, max(c.revision) FROM api_key_changes c
    WHERE c.revision > (SELECT max(revision) FROM api_key_changes) - 100 AND c.user_id IS NOT NULL
        AND NOT EXISTS (SELECT 1 FROM users u WHERE u.id = c.user_id)
    GROUP BY c.user_id
    ON CONFLICT (user_id) DO UPDATE SET revision = excluded.revision;";
