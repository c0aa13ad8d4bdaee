//! State of the database and its change feed, for operators.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use diesel::{
    Connection, QueryResult, QueryableByName, RunQueryDsl, SqliteConnection,
    connection::{InstrumentationEvent, SimpleConnection},
    sql_query,
    sql_types::Text,
};

use super::{MIGRATION_DEADLINE, SqliteStore, adopt, schema_version};
use crate::{
    backend::sql::{
        fault::store_error,
        health::{DatabaseHealth, FeedCheck, SchemaVersion, check_feed},
        migrate::MigrateError,
        statement::{Bind, Statement},
    },
    error::{StoreError, StoreErrorKind},
    store::KeyStore,
};

/// An object of the schema.
#[derive(QueryableByName, PartialEq, Clone)]
struct Object {
    #[diesel(sql_type = Text)]
    kind: String,
    #[diesel(sql_type = Text)]
    name: String,
    #[diesel(sql_type = Text)]
    sql: String,
}

#[derive(QueryableByName)]
struct Word {
    #[diesel(sql_type = Text)]
    word: String,
}

/// What a migration depends on.
struct DatabaseCopy {
    objects: Vec<Object>,
    /// Names in the list of adopted tables.
    adopted: Vec<String>,
    version: Option<i64>,
}

/// The result of a migration of a copy of the schema.
struct Rehearsal {
    /// What the migration created or altered.
    pending: Vec<String>,
    /// The statements that wrote.
    sql: Vec<String>,
}

impl SqliteStore {
    /// Returns what [`migrate`](Self::migrate) would create or alter; empty if the schema is up to date. It changes
    /// nothing. A schema of a newer version of this crate is up to date ([`SchemaVersion::Newer`]).
    ///
    /// # Errors
    ///
    /// If the tables can't be adopted, or the database fails.
    pub async fn pending_migrations(&self) -> Result<Vec<String>, MigrateError> {
        Ok(self.rehearsed().await?.pending)
    }

    /// Returns the SQL that [`migrate`](Self::migrate) would run, without running it.
    ///
    /// # Errors
    ///
    /// The errors of [`pending_migrations`](Self::pending_migrations).
    pub async fn migration_sql(&self) -> Result<String, MigrateError> {
        let Rehearsal { pending, sql } = self.rehearsed().await?;
        let none = || "-- The schema is up to date.\n".to_owned();
        Ok(if pending.is_empty() { none() } else { format!("{}\n", sql.join("\n")) })
    }

    /// Migrates a copy of the schema in memory. Neither the rows nor the locks of the database are touched.
    async fn rehearsed(&self) -> Result<Rehearsal, MigrateError> {
        let threads = self.0.readers.as_ref().unwrap_or(&self.0.writer);
        let rehearse = |connection: &mut SqliteConnection| {
            let state = DatabaseCopy {
                objects: objects(connection).map_err(store_error)?,
                adopted: adopted(connection).map_err(store_error)?,
                version: schema_version::stored(connection).map_err(store_error)?,
            };
            Ok(rehearse(state))
        };
        threads.run(MIGRATION_DEADLINE, rehearse).await?
    }

    /// Compares the version of the schema with that of this crate.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn schema_version(&self) -> Result<SchemaVersion, StoreError> {
        self.0.run(|connection| schema_version::read(connection).map_err(store_error)).await
    }

    /// Reads the state of the database.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn health(&self) -> Result<DatabaseHealth, StoreError> {
        let rows = self.read(Statement::new("SELECT sqlite_version() AS row", [])).await?;
        let version = rows.first().map(|row| row.row.clone()).unwrap_or_default();
        let schema = self.schema_version().await?;
        // The write is rolled back by its error.
        let written = self.in_silent_transaction(|connection| {
            let create = connection.batch_execute("CREATE TABLE api_key_write_check (x)");
            create.map_err(store_error)?;
            Err::<(), _>(StoreError::conflict("rolled back"))
        });
        let is_written = written.await.is_err_and(|it| it.kind() == StoreErrorKind::Conflict);
        Ok(DatabaseHealth {
            server: format!("SQLite {version}"),
            clock: None,
            is_read_only: !is_written,
            is_encrypted: None,
            missing_privileges: Vec::new(),
            can_migrate: is_written,
            schema,
        })
    }

    /// Checks the change feed from end to end. It writes a change event of its own, for a lookup id that no key can have,
    /// and waits at most `limit` until the feed reports it.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn check_feed(&self, limit: Duration) -> Result<FeedCheck, StoreError> {
        let insert = |probe: String| async move {
            let insert = "INSERT INTO api_key_changes (key_prefix) VALUES ($1) RETURNING '' AS row";
            self.write(Statement::new(insert, [Bind::Text(probe)])).await.map(|_| true)
        };
        check_feed(self.changes(self.0.clock.now()), limit, insert).await
    }
}

/// Returns the tables of keys and users and the objects of this crate, with everything on them. Tables come first.
fn objects(connection: &mut SqliteConnection) -> QueryResult<Vec<Object>> {
    sql_query(
        "SELECT type AS kind, name, sql FROM sqlite_master
        WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'
            AND (lower(tbl_name) IN ('users', 'api_keys', '__diesel_schema_migrations')
                OR lower(tbl_name) LIKE 'api\\_key\\_%' ESCAPE '\\')
        ORDER BY CASE type WHEN 'table' THEN 0 WHEN 'view' THEN 1 WHEN 'index' THEN 2 ELSE 3 END, rowid",
    )
    .load(connection)
}

/// Returns the names in the list of adopted tables.
fn adopted(connection: &mut SqliteConnection) -> QueryResult<Vec<String>> {
    let has_list = "SELECT name AS word FROM sqlite_master WHERE name = 'api_key_adopted'";
    if sql_query(has_list).load::<Word>(connection)?.is_empty() {
        return Ok(Vec::new());
    }
    let names = sql_query("SELECT name AS word FROM api_key_adopted").load::<Word>(connection)?;
    Ok(names.into_iter().map(|name| name.word).collect())
}

fn rehearse(state: DatabaseCopy) -> Result<Rehearsal, MigrateError> {
    let DatabaseCopy { objects: before, adopted, version } = state;
    let mut copy = SqliteConnection::establish(":memory:").map_err(StoreError::unavailable)?;
    for object in &before {
        copy.batch_execute(&object.sql).map_err(store_error)?;
    }
    for name in &adopted {
        let insert = sql_query("INSERT INTO api_key_adopted (name) VALUES ($1)");
        insert.bind::<Text, _>(name).execute(&mut copy).map_err(store_error)?;
    }
    if let Some(version) = version {
        schema_version::store(&mut copy, version).map_err(store_error)?;
    }
    let version_before = schema_version::read(&mut copy).map_err(store_error)?;
    let columns_before = columns(&mut copy).map_err(store_error)?;
    let statements = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&statements);
    copy.set_instrumentation(move |event: InstrumentationEvent<'_>| {
        if let InstrumentationEvent::StartQuery { query, .. } = event {
            log.lock().unwrap_or_else(PoisonError::into_inner).push(query.to_string());
        }
    });
    adopt::migrate(&mut copy)?;
    let sql = std::mem::take(&mut *statements.lock().unwrap_or_else(PoisonError::into_inner));
    let after = objects(&mut copy).map_err(store_error)?;
    let columns_after = columns(&mut copy).map_err(store_error)?;

    let is_new = |object: &&Object| {
        !before.iter().any(|it| (&it.kind, &it.name) == (&object.kind, &object.name))
    };
    let is_altered = |object: &&Object| {
        let same = |it: &&Object| (&it.kind, &it.name) == (&object.kind, &object.name);
        before.iter().find(same).is_some_and(|it| it.sql != object.sql)
    };
    let new = after.iter().filter(is_new).map(|it| format!("{} {}", it.kind, it.name));
    let mut pending: Vec<_> = new.collect();
    for object in after.iter().filter(is_altered) {
        let of_table = format!("{}.", object.name.to_lowercase());
        let added = columns_after.iter().filter(|it| !columns_before.contains(it));
        let added: Vec<_> = added.filter(|it| it.starts_with(&of_table)).collect();
        match added.as_slice() {
            [] => pending.push(format!("another definition of {} {}", object.kind, object.name)),
            added => pending.extend(added.iter().map(|column| format!("column {column}"))),
        }
    }
    if version_before == SchemaVersion::Older {
        pending.push(schema_version::label());
    }
    Ok(Rehearsal { pending, sql: sql.into_iter().filter_map(|sql| written(&sql)).collect() })
}

fn columns(connection: &mut SqliteConnection) -> QueryResult<Vec<String>> {
    let select = "SELECT lower(m.name) || '.' || lower(c.name) AS word
        FROM sqlite_master AS m JOIN pragma_table_info(m.name) AS c WHERE m.type = 'table'";
    let columns = sql_query(select).load::<Word>(connection)?;
    Ok(columns.into_iter().map(|column| column.word).collect())
}

/// Returns a statement as it was run, if it writes.
fn written(statement: &str) -> Option<String> {
    // diesel shows the bound values after the statement.
    let (sql, binds) = statement.rsplit_once(" -- binds: ").unwrap_or((statement, "[]"));
    let mut sql = sql.trim().to_owned();
    // The only bound value is the version of a migration, which has no quotes.
    if let Some(version) = binds.split('"').nth(1) {
        sql = sql.replacen('?', &format!("'{version}'"), 1);
    }
    let lines = sql.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with("--"));
    let word = lines?.split_whitespace().next()?.to_ascii_uppercase();
    let only_reads = match &*word {
        "PRAGMA" => !sql.contains('='),
        word => matches!(word, "SELECT" | "WITH" | "SAVEPOINT" | "RELEASE"),
    };
    let end = if sql.ends_with(';') { "" } else { ";" };
    (!only_reads).then(|| format!("{sql}{end}"))
}
