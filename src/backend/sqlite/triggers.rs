//! The triggers that record changes, and the check whether they exist.
//!
//! `REPLACE` and `UPDATE OR REPLACE` delete conflicting rows without firing a trigger
//! (<https://sqlite.org/lang_conflict.html>), so that a trigger before the statement records them, by the unique
//! indexes of the table. No trigger of one table names the other one: SQLite rejects renaming a rebuilt table while a
//! trigger names a missing table, and ORMs alter tables in this way.

use diesel::{
    QueryResult, QueryableByName, RunQueryDsl, SqliteConnection,
    connection::SimpleConnection,
    sql_query,
    sql_types::{Bool, Nullable, Text},
};

use crate::backend::sql::columns::KEY_COLUMNS;

#[derive(QueryableByName)]
struct Trigger {
    #[diesel(sql_type = Text)]
    name: String,
    #[diesel(sql_type = Text)]
    sql: String,
}

/// A column of a unique index.
#[derive(QueryableByName)]
struct IndexColumn {
    #[diesel(sql_type = Text)]
    index_name: String,
    /// `None` for an expression.
    #[diesel(sql_type = Nullable<Text>)]
    column: Option<String>,
    #[diesel(sql_type = Text)]
    collation: String,
    #[diesel(sql_type = Nullable<Text>)]
    definition: Option<String>,
}

#[derive(QueryableByName)]
struct Word {
    #[diesel(sql_type = Text)]
    text: String,
}

#[derive(QueryableByName)]
struct Flag {
    #[diesel(sql_type = Bool)]
    is_so: bool,
}

/// Returns the names of the triggers that are missing or different. Without them, changes may be missing.
pub(super) fn missing(connection: &mut SqliteConnection) -> QueryResult<Vec<String>> {
    let present = present(connection)?;
    let is_missing = |wanted: &&Trigger| {
        !present.iter().any(|it| it.name == wanted.name && it.sql == wanted.sql)
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
        let differs = |column: &&str| format!("OLD.{column} IS NOT NEW.{column}");
        columns.iter().map(differs).collect::<Vec<_>>().join(" OR ")
    };
    // Records the lookup id of a deleted or moved row; NULL means none.
    let note_key = |row: &str, filter: &str| {
        format!(
            "INSERT INTO api_key_changes (key_prefix, api_key_id)
                SELECT {row}.key_prefix, {row}.id WHERE {row}.key_prefix IS NOT NULL AND {filter};"
        )
    };
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
                    {}
                    {revise_key}, api_key_owned_since = (SELECT max(revision) FROM api_key_changes) WHERE id = NEW.id;
                END",
                note_key("NEW", "TRUE")
            ),
        ),
        trigger(
            "api_key_note_gone",
            format!("AFTER DELETE ON api_keys BEGIN {} {} END", note_key("OLD", "TRUE"), keys.retire_usage()),
        ),
        trigger(
            "api_key_note",
            format!(
                "AFTER UPDATE ON api_keys WHEN {} BEGIN
                    {} {}
                    {revise_key}, api_key_owned_since = CASE WHEN OLD.user_id IS NEW.user_id THEN api_key_owned_since
                        ELSE (SELECT max(revision) FROM api_key_changes) END WHERE id = NEW.id;
                END",
                is_changed(&key_columns),
                note_key("OLD", "OLD.key_prefix IS NOT NEW.key_prefix"),
                note_key("NEW", "TRUE"),
            ),
        ),
        trigger("api_key_note_replaced", format!("BEFORE INSERT ON api_keys BEGIN {} END", keys.note_replaced(false))),
        trigger(
            "api_key_note_overwritten",
            format!(
                "BEFORE UPDATE OF {} ON api_keys BEGIN {} END",
                keys.unique_columns(),
                keys.note_replaced(true)
            ),
        ),
        trigger(
            "api_key_note_user_new",
            format!(
                "AFTER INSERT ON users BEGIN
                    INSERT INTO api_key_changes (user_id, is_new_user) VALUES (NEW.id, TRUE);
                    {revise_user} WHERE id = NEW.id;
                    {DELETED_LATELY}
                END"
            ),
        ),
        trigger(
            "api_key_note_user",
            format!(
                "AFTER UPDATE ON users WHEN {} BEGIN
                    INSERT INTO api_key_changes (user_id) SELECT OLD.id WHERE OLD.id IS NOT NEW.id;
                    INSERT INTO api_key_changes (user_id) VALUES (NEW.id);
                    {revise_user} WHERE id = NEW.id;
                    {DELETED_LATELY}
                END",
                is_changed(&["id", "email", "role", "is_active"])
            ),
        ),
        trigger(
            "api_key_note_user_gone",
            format!(
                "AFTER DELETE ON users BEGIN
                    INSERT INTO api_key_changes (user_id) VALUES (OLD.id);
                    {DELETED_LATELY}
                END"
            ),
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
    ])
}

/// Records the deleted users among the users of the last changes.
const DELETED_LATELY: &str = "INSERT INTO api_key_deleted_users (user_id, revision)
    SELECT c.user_id, max(c.revision) FROM api_key_changes c
    WHERE c.revision > (SELECT max(revision) FROM api_key_changes) - 100 AND c.user_id IS NOT NULL
        AND NOT EXISTS (SELECT 1 FROM users u WHERE u.id = c.user_id)
    GROUP BY c.user_id
    ON CONFLICT (user_id) DO UPDATE SET revision = excluded.revision;";

/// The properties of a table that its triggers depend on.
struct Table {
    name: &'static str,
    columns: Vec<String>,
    /// For each unique index the condition under which a row `o` conflicts with `NEW`.
    conflicts: Vec<String>,
    /// Whether ids of deleted rows are assigned again.
    reuses_ids: bool,
}

impl Table {
    fn read(name: &'static str, connection: &mut SqliteConnection) -> QueryResult<Self> {
        let columns = format!("SELECT name AS text FROM pragma_table_info('{name}')");
        let columns = sql_query(columns).load::<Word>(connection)?;
        let columns: Vec<_> = columns.into_iter().map(|column| quoted(&column.text)).collect();
        let reuses_ids = sql_query(format!(
            "SELECT sql NOT LIKE '%AUTOINCREMENT%' AS is_so FROM sqlite_master
            WHERE type = 'table' AND lower(name) = '{name}'"
        ))
        .load::<Flag>(connection)?;
        let mut table = Self {
            name,
            columns,
            conflicts: vec!["o.id = NEW.id".to_owned()],
            reuses_ids: reuses_ids.iter().any(|flag| flag.is_so),
        };
        let indexed = sql_query(format!(
            "SELECT l.name AS index_name, x.name AS \"column\", x.coll AS collation, m.sql AS definition
            FROM pragma_index_list('{name}') AS l, pragma_index_xinfo(l.name) AS x
            LEFT JOIN sqlite_master AS m ON m.type = 'index' AND m.name = l.name
            WHERE l.\"unique\" AND x.key ORDER BY l.name, x.seqno"
        ))
        .load::<IndexColumn>(connection)?;
        for index in indexed.chunk_by(|a, b| a.index_name == b.index_name) {
            table.conflicts.push(table.conflict(index));
        }
        Ok(table)
    }

    fn conflict(&self, index: &[IndexColumn]) -> String {
        let equals = |it: &IndexColumn| {
            let column = quoted(it.column.as_deref()?);
            Some(format!("o.{column} = NEW.{column} COLLATE {}", quoted(&it.collation)))
        };
        if let Some(columns) = index.iter().map(equals).collect::<Option<Vec<_>>>() {
            return columns.join(" AND ");
        }
        // For an index on an expression, its value for the existing row is compared with that for the new one.
        let definition = index.first().and_then(|it| it.definition.as_deref());
        match definition.and_then(indexed_expressions) {
            Some(expressions) => {
                let new: Vec<_> =
                    self.columns.iter().map(|column| format!("NEW.{column} AS {column}")).collect();
                format!("({expressions}) = (SELECT {expressions} FROM (SELECT {}))", new.join(", "))
            }
            // The expression can't be parsed, so that every row may conflict.
            None => "TRUE".to_owned(),
        }
    }

    /// Returns the columns whose change may cause a conflict.
    fn unique_columns(&self) -> String {
        let is_used = |column: &&String| {
            let bare = column.trim_matches('"');
            bare == "id" || self.conflicts.iter().any(|it| it == "TRUE" || it.contains(bare))
        };
        self.columns.iter().filter(is_used).cloned().collect::<Vec<_>>().join(", ")
    }

    /// Returns the condition under which a statement that replaces rows deletes a row `o`.
    fn is_replaced(&self, is_update: bool) -> String {
        let conflicts: Vec<_> = self.conflicts.iter().map(|it| format!("({it})")).collect();
        let conflicts = conflicts.join(" OR ");
        if is_update { format!("({conflicts}) AND o.id IS NOT OLD.id") } else { conflicts }
    }

    fn note_replaced(&self, is_update: bool) -> String {
        let (subject, is_known) = match self.name {
            "users" => ("user_id) SELECT o.id", "TRUE"),
            _ => ("key_prefix, api_key_id) SELECT o.key_prefix, o.id", "o.key_prefix IS NOT NULL"),
        };
        format!(
            "INSERT INTO api_key_changes ({subject} FROM {} AS o WHERE {is_known} AND ({});",
            self.name,
            self.is_replaced(is_update)
        )
    }

    /// Returns the statements that move the cost of a deleted key to the negative id, if ids may be assigned again.
    fn retire_usage(&self) -> &'static str {
        if !self.reuses_ids {
            return "";
        }
        "INSERT INTO api_key_usage (api_key_id, day, requests, tokens, cost_micro_cents)
            SELECT -api_key_id, day, requests, tokens, cost_micro_cents FROM api_key_usage WHERE api_key_id = OLD.id
            ON CONFLICT (api_key_id, day) DO UPDATE SET requests = requests + excluded.requests,
                tokens = tokens + excluded.tokens, cost_micro_cents = cost_micro_cents + excluded.cost_micro_cents;
        DELETE FROM api_key_usage WHERE api_key_id = OLD.id;
        DELETE FROM api_key_leases WHERE api_key_id = OLD.id;"
    }
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Returns the terms between the parentheses of `CREATE INDEX … ON table (…)`, without the order.
fn indexed_expressions(definition: &str) -> Option<String> {
    let inner = definition.split_once('(')?.1;
    let (mut depth, mut terms, mut begin) = (0_u32, Vec::new(), 0);
    for (at, character) in inner.char_indices() {
        match character {
            '(' => depth += 1,
            ',' | ')' if depth == 0 => {
                terms.push(without_order(&inner[begin..at]));
                begin = at + 1;
                if character == ')' {
                    return Some(terms.join(", "));
                }
            }
            ')' => depth -= 1,
            _ => {}
        }
    }
    None
}

fn without_order(term: &str) -> &str {
    let term = term.trim();
    let strip = |suffix: &str| {
        let at = term.len().checked_sub(suffix.len())?;
        term.get(at..)?.eq_ignore_ascii_case(suffix).then(|| term[..at].trim_end())
    };
    strip(" ASC").or_else(|| strip(" DESC")).unwrap_or(term)
}

#[cfg(test)]
mod tests {
    use super::indexed_expressions;

    #[test]
    fn the_expressions_of_an_index_are_read_from_its_definition() {
        for (definition, expected) in [
            ("CREATE UNIQUE INDEX a ON users (lower(email))", Some("lower(email)")),
            (
                "CREATE UNIQUE INDEX a ON users(substr(a, 1, 2) DESC, b ) WHERE c > (1)",
                Some("substr(a, 1, 2), b"),
            ),
            ("CREATE UNIQUE INDEX a ON users (lower(email)", None),
        ] {
            assert_eq!(indexed_expressions(definition).as_deref(), expected, "{definition}");
        }
    }
}
