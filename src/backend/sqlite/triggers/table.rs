//! The properties of a table that its triggers depend on: its unique indexes, and whether it assigns ids again.

use diesel::{
    QueryResult, QueryableByName, RunQueryDsl, SqliteConnection, sql_query,
    sql_types::{Bool, Nullable, Text},
};

use super::audit;

/// The properties of a table that its triggers depend on.
pub(super) struct Table {
    name: &'static str,
    columns: Vec<String>,
    /// For each unique index the condition under which a row `o` conflicts with `NEW`.
    conflicts: Vec<String>,
    /// Whether ids of deleted rows are assigned again.
    reuses_ids: bool,
}

impl Table {
    pub(super) fn read(name: &'static str, connection: &mut SqliteConnection) -> QueryResult<Self> {
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
    pub(super) fn unique_columns(&self) -> String {
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
        if is_update {
            format!("({conflicts}) AND o.id IS NOT OLD.id")
        } else {
            format!("({conflicts})")
        }
    }

    /// Returns the condition under which an insertion replaces keys, or one that was ignored would have.
    pub(super) fn replaces(&self) -> String {
        format!(
            "EXISTS (SELECT 1 FROM {} AS o WHERE {}) OR EXISTS (SELECT 1 FROM api_key_replaced WHERE NOT is_user)",
            self.name,
            self.is_replaced(false)
        )
    }

    /// Returns the statements that record the rows that a statement is about to replace.
    pub(super) fn note_replaced(&self, is_update: bool) -> String {
        let is_replaced = self.is_replaced(is_update);
        if self.name == "users" {
            return format!(
                "INSERT INTO api_key_changes (user_id) SELECT o.id FROM users AS o WHERE {is_replaced};
                {}",
                audit::stage_user("o", "users AS o", &is_replaced)
            );
        }
        let note = |id: &str| {
            format!(
                "INSERT INTO api_key_changes (key_prefix, api_key_id)
                    SELECT o.{id}, o.id FROM api_keys AS o WHERE o.{id} IS NOT NULL AND ({is_replaced});"
            )
        };
        let [current, previous] = ["key_prefix", "previous_key_prefix"].map(note);
        format!("{current} {previous} {}", audit::stage_key(&is_replaced))
    }

    /// Returns the statements that move the cost of a deleted key to the negative id, if ids may be assigned again.
    pub(super) fn retire_usage(&self) -> &'static str {
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
