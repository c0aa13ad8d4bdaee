//! What this crate keeps in a database, and how [`migrate`] makes what is missing of it.

use diesel::{
    Connection, QueryResult, QueryableByName, RunQueryDsl,
    connection::SimpleConnection,
    migration::{Migration, MigrationSource},
    pg::Pg,
    sql_query,
    sql_types::{BigInt, Nullable, Text},
};
use diesel_migrations::{EmbeddedMigrations, MigrationHarness, embed_migrations};

use super::adopt::{self, BlockingConnection, COLUMNS};
use crate::{
    error::StoreError,
    store::{MigrateError, fault::Failure},
    telemetry,
};

const MIGRATIONS: EmbeddedMigrations = embed_migrations!("schema/postgres");
/// The functions and triggers, on the tables that the migrations have made.
const TRIGGERS: &str = include_str!("../../../schema/triggers/postgres.sql");
/// The number in the comment that [`TRIGGERS`] leaves. One more whenever a file of the schema changes: a database
/// with a lower one is brought up to date, one with a higher one is left to the newer nodes.
const VERSION: i64 = 1;

/// Nodes that start at once wait for each other under this advisory lock ("tower-ap" in ASCII).
const LOCK: i64 = 0x746f_7765_722d_6170;

/// Brings the schema up to date, in one transaction. Returns whether a table of keys was adopted.
pub(super) fn migrate(connection: &mut BlockingConnection) -> Result<bool, MigrateError> {
    let outcome = connection.transaction(|connection| {
        // Behind a pooler, the connection has neither from its start.
        connection.batch_execute(&format!(
            "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = {}",
            adopt::STATEMENT_TIMEOUT.as_millis()
        ))?;
        // Before the lock on a table, which would keep its writers waiting while this waits.
        sql_query(format!("SELECT pg_advisory_xact_lock({LOCK})")).execute(connection)?;
        connection.batch_execute("SET LOCAL lock_timeout = '10s'")?;
        connection.batch_execute(GO_HOME)?;
        let faults = adopt::faults(connection)?;
        if !faults.is_empty() {
            return Err(Failure(MigrateError::NotAdoptable(faults)));
        }
        let missing = missing(connection)?;
        if missing.is_empty() {
            return Ok(false);
        }
        let is_missing = |table: &str| missing.iter().any(|it| it.strip_prefix("table ") == Some(table));
        let is_adopted = is_missing("api_key_changes") && !is_missing("api_keys");
        make(connection).map_err(|error| Failure(StoreError::rejected(error).into()))?;
        telemetry::schema_made(&missing);
        Ok(is_adopted)
    });
    outcome.map_err(|Failure(error)| error)
}

type MigrationError = Box<dyn std::error::Error + Send + Sync>;

/// Runs every migration, also those that were run before: they make what is not there, and nothing else.
fn make(connection: &mut BlockingConnection) -> Result<(), MigrationError> {
    connection.run_pending_migrations(MIGRATIONS)?;
    let migrations: Vec<Box<dyn Migration<Pg>>> = MIGRATIONS.migrations()?;
    for migration in migrations {
        migration.run(connection)?;
    }
    Ok(connection.batch_execute(TRIGGERS)?)
}

/// What is made goes where the adopted tables are, which need not be the first schema of the `search_path`: the
/// triggers run with a path of their own.
const GO_HOME: &str = "SELECT set_config('search_path', (
        SELECT string_agg(quote_ident(name), ', ' ORDER BY rank) FROM (
            SELECT name, min(rank) AS rank FROM (
                SELECT relnamespace::regnamespace::name AS name, 0::bigint AS rank
                    FROM pg_class WHERE oid = coalesce(to_regclass('api_keys'), to_regclass('users'))
                UNION ALL SELECT name, rank FROM unnest(current_schemas(false)) WITH ORDINALITY AS s (name, rank)
            ) AS schemas GROUP BY name
        ) AS schemas
    ), true)";

const TABLES: [&str; 8] = [
    "users",
    "api_keys",
    "api_key_changes",
    "api_key_horizons",
    "api_key_cache_secrets",
    "api_key_usage",
    "api_key_usage_writers",
    "api_key_leases",
];

/// Columns that the tables have beside those that are read from them.
const OWN_COLUMNS: [(&str, &str); 5] = [
    ("users", "api_key_revision"),
    ("api_keys", "api_key_revision"),
    ("api_keys", "fast_hash"),
    ("api_keys", "fast_hash_of"),
    ("api_keys", "total_cost_rest"),
];

/// The triggers that changes depend on: table, name, events as in `pg_trigger.tgtype`, and function.
const CHANGE_TRIGGERS: [(&str, &str, u8, &str); 8] = [
    ("api_keys", "zzz_api_key_revision", 23, "api_key_revise_key"),
    ("api_keys", "api_key_note_new", 13, "api_key_note_key"),
    ("api_keys", "api_key_note", 17, "api_key_note_key"),
    ("api_keys", "api_key_note_all", 32, "api_key_note_all"),
    ("users", "zzz_api_key_revision", 19, "api_key_revise_user"),
    ("users", "api_key_note_gone", 9, "api_key_note_user"),
    ("users", "api_key_note", 17, "api_key_note_user"),
    ("users", "api_key_note_all", 32, "api_key_note_all"),
];

/// An SQL expression: why changes can't be complete, or NULL. It looks at the tables that look-ups read, and at
/// where the functions write: the two need not be of one schema after a change of the `search_path`.
pub(super) fn incompleteness() -> String {
    let wanted: Vec<_> = CHANGE_TRIGGERS
        .iter()
        .map(|(table, name, events, function)| {
            format!("('{table}', '{name}', {events}, '{function}')")
        })
        .collect();
    format!(
        "(SELECT string_agg(fault, '; ') FROM (
            SELECT format('trigger %s on %s is missing, disabled or not ENABLE ALWAYS', w.name, w.in_table) AS fault
            FROM (VALUES {}) AS w (in_table, name, events, function)
            WHERE NOT EXISTS (
                SELECT FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
                WHERE t.tgrelid = to_regclass(w.in_table) AND t.tgname = w.name AND t.tgtype = w.events
                    AND t.tgenabled = 'A' AND p.proname = w.function AND p.pronamespace = (
                        SELECT relnamespace FROM pg_class WHERE oid = to_regclass('api_key_changes')))
            UNION ALL
            SELECT 'trigger api_key_note_new on users is missing or disabled, and no foreign key makes it needless'
            WHERE NOT EXISTS (
                SELECT FROM pg_trigger WHERE tgrelid = to_regclass('users') AND tgname = 'api_key_note_new'
                    AND tgenabled = 'A'
            ) AND NOT EXISTS (
                SELECT FROM pg_constraint c WHERE c.conrelid = to_regclass('api_keys')
                    AND c.confrelid = to_regclass('users') AND c.contype = 'f' AND c.convalidated)
            UNION ALL
            SELECT format('%s is not a plain table any more, so that rows can change without its triggers', relname)
            FROM pg_class c WHERE oid IN (to_regclass('users'), to_regclass('api_keys'))
                AND (relkind <> 'r' OR EXISTS (SELECT FROM pg_inherits WHERE inhparent = c.oid))
        ) AS faults)",
        wanted.join(", ")
    )
}

/// An SQL expression that changes whenever a trigger was made, altered or dropped, even if it was put back since.
pub(super) const TRIGGER_STATE: &str = "(
    SELECT md5(string_agg(concat_ws(' ', oid, xmin, tgenabled), ',' ORDER BY oid)) FROM pg_trigger
    WHERE tgrelid IN (to_regclass('users'), to_regclass('api_keys')) AND NOT tgisinternal)";

#[derive(QueryableByName)]
struct Missing {
    #[diesel(sql_type = Text)]
    what: String,
}

#[derive(QueryableByName)]
struct Stamp {
    #[diesel(sql_type = Nullable<BigInt>)]
    version: Option<i64>,
    /// Whether the functions are as they were when the comment was made.
    #[diesel(sql_type = Nullable<diesel::sql_types::Bool>)]
    is_intact: Option<bool>,
}

const STAMP: &str = r"
    SELECT split_part(stamp, ' ', 2)::bigint AS version, split_part(stamp, ' ', 3) = (
        SELECT md5(string_agg(p.prosrc, '' ORDER BY p.proname)) FROM pg_proc p
        WHERE p.pronamespace = current_schema()::regnamespace AND p.proname LIKE 'api\_key\_%'
    ) AS is_intact
    FROM (SELECT obj_description(to_regclass('api_key_changes'), 'pg_class') AS stamp) AS s
    WHERE stamp ~ '^tower-api-key \d+ \w+$'";

/// What is not there, or not as it should be. Only reads, so that a role that owns nothing can call it.
fn missing(connection: &mut BlockingConnection) -> QueryResult<Vec<String>> {
    let tables = TABLES.map(|table| format!("('{table}')")).join(", ");
    let columns = COLUMNS.iter().map(|(table, name, ..)| (table, name));
    let columns = columns.chain(OWN_COLUMNS.iter().map(|(table, name)| (table, name)));
    let columns: Vec<_> = columns.map(|(table, name)| format!("('{table}', '{name}')")).collect();
    let select = format!(
        "SELECT 'table ' || name AS what FROM (VALUES {tables}) AS t (name) WHERE to_regclass(name) IS NULL
        UNION ALL
        SELECT 'column ' || in_table || '.' || name FROM (VALUES {}) AS c (in_table, name)
        WHERE NOT EXISTS (
            SELECT FROM pg_attribute
            WHERE attrelid = to_regclass(in_table) AND attname = name AND NOT attisdropped)
        UNION ALL
        SELECT 'index ' || name FROM (VALUES 
            ('api_key_changes_xid'), ('api_key_changes_prefix'), ('api_key_changes_user')) AS i (name)
        WHERE to_regclass(name) IS NULL
        UNION ALL
        SELECT fault FROM (SELECT {} AS fault) AS f WHERE fault IS NOT NULL",
        columns.join(", "),
        incompleteness(),
    );
    let rows = sql_query(select).load::<Missing>(connection)?;
    let mut missing: Vec<_> = rows.into_iter().map(|row| row.what).collect();
    match sql_query(STAMP).load::<Stamp>(connection)?.first() {
        // Newer nodes see to it; what this one would make is older.
        Some(Stamp { version: Some(version), .. }) if *version > VERSION => return Ok(Vec::new()),
        Some(Stamp { version: Some(VERSION), is_intact: Some(true) }) => {}
        _ => missing.push(format!("version {VERSION} of the functions")),
    }
    Ok(missing)
}
