//! Migrations, and the check whether existing tables can be adopted.

use diesel::{
    QueryResult, QueryableByName, RunQueryDsl, SqliteConnection,
    connection::SimpleConnection,
    migration::{Migration, MigrationSource},
    sql_query,
    sql_types::{BigInt, Bool, Text},
    sqlite::Sqlite,
};
use diesel_migrations::{EmbeddedMigrations, MigrationHarness, embed_migrations};

use super::{schema_version, triggers};
use crate::{
    backend::sql::{
        columns::KEY_COLUMNS,
        fault::Failure,
        health::SchemaVersion,
        migrate::{ColumnFault, MigrateError},
    },
    error::StoreError,
    telemetry,
};

const MIGRATIONS: EmbeddedMigrations = embed_migrations!("schema/sqlite");

/// Returns whether a table of keys was adopted.
pub(super) fn migrate(connection: &mut SqliteConnection) -> Result<bool, MigrateError> {
    // IMMEDIATE acquires the write lock first, so that only one of several processes migrates.
    let outcome = connection.immediate_transaction(|connection| {
        // Newer programs maintain these objects. This one would create older ones.
        if schema_version::read(connection)? == SchemaVersion::Newer {
            return Ok(false);
        }
        let tables = foreign_tables(connection)?;
        let faults = faults(&tables, &columns(connection)?);
        if !faults.is_empty() {
            return Err(Failure(MigrateError::NotAdoptable(faults)));
        }
        note_adopted(connection, &tables)?;
        // Before the migrations, which make indexes on the columns, and after them for the tables that they created.
        add_columns(connection)?;
        stop_cascade(connection)?;
        make(connection).map_err(|error| Failure(StoreError::rejected(error).into()))?;
        add_columns(connection)?;
        let made = triggers::make(connection)?;
        if !made.is_empty() {
            telemetry::schema_made(&made);
        }
        schema_version::write(connection)?;
        Ok(tables.iter().any(|table| table.name == "api_keys"))
    });
    outcome.map_err(|Failure(error)| error)
}

/// Runs every migration, including those that were run before. A migration creates only what is missing.
fn make(connection: &mut SqliteConnection) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    connection.run_pending_migrations(MIGRATIONS)?;
    let migrations: Vec<Box<dyn Migration<Sqlite>>> = MIGRATIONS.migrations()?;
    for migration in migrations {
        migration.run(connection)?;
    }
    Ok(())
}

/// The table as the first migration creates it.
const ADOPTED: &str = "CREATE TABLE IF NOT EXISTS api_key_adopted (name TEXT PRIMARY KEY)";

/// The columns that an adopted table must have.
const REQUIRED: [(&str, &str); 6] = [
    ("users", "id"),
    ("users", "email"),
    ("api_keys", "id"),
    ("api_keys", "user_id"),
    ("api_keys", "key_prefix"),
    ("api_keys", "key_hash"),
];

/// The columns that are added if the tables lack them, besides those of [`KEY_COLUMNS`]. All have a default or may be
/// NULL, so that other writers are not affected.
const ADDED: [(&str, &str, &str); 6] = [
    ("users", "role", "TEXT DEFAULT 'user'"),
    ("users", "is_active", "BOOLEAN NOT NULL DEFAULT TRUE"),
    ("users", "created_at", "TEXT"),
    ("users", "updated_at", "TEXT"),
    ("users", "api_key_revision", "INTEGER NOT NULL DEFAULT 0"),
    // The revision at which the key was assigned to its owner.
    ("api_keys", "api_key_owned_since", "INTEGER NOT NULL DEFAULT 0"),
];

#[derive(QueryableByName)]
struct Table {
    #[diesel(sql_type = Text)]
    name: String,
    #[diesel(sql_type = Bool)]
    is_table: bool,
}

#[derive(QueryableByName)]
struct Column {
    #[diesel(sql_type = Text)]
    in_table: String,
    #[diesel(sql_type = Text)]
    name: String,
    #[diesel(sql_type = Text)]
    shown_type: String,
    /// Whether this column alone is the primary key.
    #[diesel(sql_type = Bool)]
    is_key: bool,
}

#[derive(QueryableByName)]
struct Number {
    #[diesel(sql_type = BigInt)]
    number: i64,
}

/// Returns the tables with this crate's names in a database where this crate was not used before.
fn foreign_tables(connection: &mut SqliteConnection) -> QueryResult<Vec<Table>> {
    sql_query(
        "SELECT lower(name) AS name, type = 'table' AS is_table FROM sqlite_master
        WHERE lower(name) IN ('users', 'api_keys') AND type IN ('table', 'view')
        AND NOT EXISTS (SELECT 1 FROM sqlite_master WHERE name = 'api_key_adopted')",
    )
    .load(connection)
}

fn columns(connection: &mut SqliteConnection) -> QueryResult<Vec<Column>> {
    sql_query(
        "SELECT lower(m.name) AS in_table, lower(c.name) AS name, c.type AS shown_type,
            c.pk = 1 AND (SELECT max(pk) FROM pragma_table_info(m.name)) = 1 AS is_key
        FROM sqlite_master AS m JOIN pragma_table_info(m.name) AS c
        WHERE lower(m.name) IN ('users', 'api_keys')",
    )
    .load(connection)
}

fn find<'a>(columns: &'a [Column], table: &str, name: &str) -> Option<&'a Column> {
    columns.iter().find(|column| column.in_table == table && column.name == name)
}

/// Returns all reasons why the existing tables can't be adopted.
fn faults(tables: &[Table], columns: &[Column]) -> Vec<ColumnFault> {
    let mut faults = Vec::new();
    let has = |name: &str| tables.iter().any(|table| table.name == name);
    if has("api_keys") && !has("users") {
        faults.push(ColumnFault::new("users", "", "is missing, although a table api_keys exists"));
    }
    for table in tables.iter().filter(|table| !table.is_table) {
        faults.push(ColumnFault::new(&table.name, "", "is not a table"));
    }
    for (table, name) in REQUIRED.into_iter().filter(|(table, _)| has(table)) {
        match find(columns, table, name) {
            None => {
                let reason = "is missing, and has no possible default";
                faults.push(ColumnFault::new(table, name, reason));
            }
            // Only such a column is the row id, which SQLite assigns: https://sqlite.org/lang_createtable.html#rowid
            Some(column)
                if name == "id"
                    && !(column.is_key && column.shown_type.eq_ignore_ascii_case("INTEGER")) =>
            {
                let reason = "must be INTEGER and the primary key";
                faults.push(ColumnFault::new(table, name, reason));
            }
            // The rule for integer affinity: https://sqlite.org/datatype3.html#determination_of_column_affinity
            Some(column)
                if name == "user_id" && !column.shown_type.to_uppercase().contains("INT") =>
            {
                let reason = format!("is {}, but must be an integer", column.shown_type);
                faults.push(ColumnFault::new(table, name, reason));
            }
            Some(_) => {}
        }
    }
    faults
}

/// Records which tables were adopted and must not be dropped.
fn note_adopted(connection: &mut SqliteConnection, tables: &[Table]) -> QueryResult<()> {
    if !tables.is_empty() {
        connection.batch_execute(ADOPTED)?;
    }
    for Table { name, .. } in tables {
        let adopted = format!("INSERT OR IGNORE INTO api_key_adopted (name) VALUES ('{name}')");
        connection.batch_execute(&adopted)?;
    }
    Ok(())
}

/// Adds the columns that the tables lack: adopted tables, and those that another service has recreated.
fn add_columns(connection: &mut SqliteConnection) -> QueryResult<()> {
    let columns = columns(connection)?;
    let of_keys =
        KEY_COLUMNS.iter().filter_map(|column| Some(("api_keys", column.name, column.definition?)));
    let exists = |table: &str| columns.iter().any(|column| column.in_table == table);
    let added = ADDED.into_iter().chain(of_keys).filter(|(table, _, _)| exists(table));
    for (table, name, definition) in added {
        if find(&columns, table, name).is_none() {
            let add = format!("ALTER TABLE {table} ADD COLUMN {name} {definition}");
            connection.batch_execute(&add)?;
        }
    }
    Ok(())
}

/// Changes the table of keys that an older version of this crate made: deleting a user no longer deletes the keys. An
/// adopted table is left as it is.
///
/// The definition is edited in place, as SQLite recommends for the removal of a constraint
/// (<https://sqlite.org/lang_altertable.html#otheralter>). So the rows, the sequence of ids, indexes and triggers are
/// kept as they are, whatever the size of the table.
fn stop_cascade(connection: &mut SqliteConnection) -> QueryResult<()> {
    const CLAUSE: &str =
        "user_id               INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE";
    let is_made = format!(
        "type = 'table' AND name = 'api_keys' AND instr(sql, '{CLAUSE}') > 0
            AND NOT EXISTS (SELECT 1 FROM api_key_adopted AS a WHERE a.name = 'api_keys')"
    );
    // A new database has no table of adopted ones yet.
    connection.batch_execute(ADOPTED)?;
    let made = format!("SELECT count(*) AS number FROM sqlite_master WHERE {is_made}");
    if sql_query(made).get_result::<Number>(connection)?.number == 0 {
        return Ok(());
    }
    let kept = CLAUSE.trim_end_matches(" ON DELETE CASCADE");
    connection.batch_execute(&format!(
        "PRAGMA writable_schema = ON;
        UPDATE sqlite_master SET sql = replace(sql, '{CLAUSE}', '{kept}') WHERE {is_made};
        PRAGMA writable_schema = RESET"
    ))?;
    // Another version of the schema makes every connection read it again.
    let version = sql_query("SELECT schema_version + 1 AS number FROM pragma_schema_version");
    let Number { number } = version.get_result(connection)?;
    connection.batch_execute(&format!("PRAGMA schema_version = {number}"))
}
