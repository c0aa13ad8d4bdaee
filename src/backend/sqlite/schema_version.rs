//! The version of the schema in a file. It is in a table of this crate: `PRAGMA user_version` and the table of diesel's
//! migrations may belong to another service.

use diesel::{
    QueryResult, QueryableByName, RunQueryDsl, SqliteConnection, connection::SimpleConnection,
    sql_query, sql_types::BigInt,
};

use crate::backend::sql::health::SchemaVersion;

/// Version of the migrations and triggers. Increment it whenever one of them changes: a file with a lower version is
/// brought up to date, and one with a higher version is left to the newer program. Files of version 1 have no table of
/// the version.
const VERSION: i64 = 2;

#[derive(QueryableByName)]
struct Number {
    #[diesel(sql_type = BigInt)]
    number: i64,
}

fn numbers(connection: &mut SqliteConnection, select: &str) -> QueryResult<Vec<i64>> {
    let rows = sql_query(select).load::<Number>(connection)?;
    Ok(rows.into_iter().map(|row| row.number).collect())
}

/// Returns the number that is stored in the file, if there is one.
pub(super) fn stored(connection: &mut SqliteConnection) -> QueryResult<Option<i64>> {
    let exists =
        "SELECT 1 AS number FROM sqlite_master WHERE type = 'table' AND name = 'api_key_schema'";
    if numbers(connection, exists)?.is_empty() {
        return Ok(None);
    }
    Ok(numbers(connection, "SELECT version AS number FROM api_key_schema")?.into_iter().next())
}

/// Compares the version of the file with that of this crate.
pub(super) fn read(connection: &mut SqliteConnection) -> QueryResult<SchemaVersion> {
    if let Some(stored) = stored(connection)? {
        return Ok(SchemaVersion::of(stored, VERSION));
    }
    let exists =
        "SELECT 1 AS number FROM sqlite_master WHERE type = 'table' AND name = 'api_key_changes'";
    let is_empty = numbers(connection, exists)?.is_empty();
    Ok(if is_empty { SchemaVersion::None } else { SchemaVersion::Older })
}

/// Returns what a migration writes, in the words of its list.
pub(super) fn label() -> String {
    format!("version {VERSION} of the schema")
}

/// Stores the version of this crate.
pub(super) fn write(connection: &mut SqliteConnection) -> QueryResult<()> {
    store(connection, VERSION)
}

/// Stores a version. It writes only if the version differs, so that a repeated migration wakes no watcher of the file.
pub(super) fn store(connection: &mut SqliteConnection, version: i64) -> QueryResult<()> {
    connection.batch_execute(&format!(
        "INSERT INTO api_key_schema (id, version) VALUES (1, {version})
        ON CONFLICT (id) DO UPDATE SET version = excluded.version WHERE version IS NOT excluded.version"
    ))
}
