//! Statements on a connection of a thread.

use std::borrow::Cow;

use diesel::{QueryableByName, RunQueryDsl, SqliteConnection, sql_types::Binary, sqlite::Sqlite};

use crate::{
    backend::sql::{
        fault::{Failure, store_error},
        statement::{Statement, TextRow},
    },
    error::StoreError,
};

/// A row in JSON, as bytes: SQLite accepts texts that are not UTF-8, and diesel would fail the whole result.
#[derive(QueryableByName)]
pub(super) struct BytesRow {
    #[diesel(sql_type = Binary)]
    pub(super) row: Vec<u8>,
}

impl BytesRow {
    /// Returns the JSON, with replacement characters for what is not UTF-8.
    pub(super) fn json(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.row)
    }
}

/// Runs `work` in one transaction. IMMEDIATE acquires the write lock first, so that what is read stays current.
pub(super) fn immediately<T>(
    connection: &mut SqliteConnection,
    work: impl FnOnce(&mut SqliteConnection) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let outcome = connection.immediate_transaction(|it| work(it).map_err(Failure));
    outcome.map_err(|Failure(error)| error)
}

/// Runs a statement that returns no rows. Returns the number of changed rows, without those that triggers changed.
pub(super) fn execute(
    connection: &mut SqliteConnection,
    statement: &Statement,
) -> Result<usize, StoreError> {
    statement.execute(connection).map_err(store_error)
}

pub(super) fn load(
    connection: &mut SqliteConnection,
    statement: &Statement,
) -> Result<Vec<TextRow>, StoreError> {
    load_rows(connection, statement)
}

/// Runs a statement that returns rows other than texts.
pub(super) fn load_rows<R: QueryableByName<Sqlite> + 'static>(
    connection: &mut SqliteConnection,
    statement: &Statement,
) -> Result<Vec<R>, StoreError> {
    statement.load(connection).map_err(store_error)
}

/// Returns the query plan of a statement, a line for each step.
#[cfg(test)]
pub(super) fn plan(connection: &mut SqliteConnection, statement: &Statement) -> String {
    #[derive(QueryableByName)]
    struct Step {
        #[diesel(sql_type = diesel::sql_types::Text)]
        detail: String,
    }
    let steps: Vec<Step> = load_rows(connection, &statement.explained()).unwrap();
    steps.iter().map(|step| step.detail.as_str()).collect::<Vec<_>>().join("\n")
}
