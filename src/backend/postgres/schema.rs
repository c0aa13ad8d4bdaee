//! The crate's objects in a database, and [`migrate`], which creates those that are missing.

pub(super) mod pending;

use diesel::{
    Connection, QueryResult, QueryableByName, RunQueryDsl,
    connection::SimpleConnection,
    migration::{Migration, MigrationSource},
    pg::Pg,
    sql_query,
    sql_types::{BigInt, Nullable, Text},
};
use diesel_migrations::{EmbeddedMigrations, MigrationHarness, embed_migrations};

use super::adopt::{self, BlockingConnection};
use crate::{
    backend::sql::{fault::Failure, migrate::MigrateError},
    error::StoreError,
    telemetry,
};

const MIGRATIONS: EmbeddedMigrations = embed_migrations!("schema/postgres");
/// The functions and triggers on the tables of the migrations.
const TRIGGERS: &str = include_str!("../../../schema/triggers/postgres.sql");
/// Version in the comment on `api_key_changes`. Increment it whenever a file of the schema changes: a database with a
/// lower version is brought up to date, and one with a higher version is left to the newer nodes.
const VERSION: i64 = 3;

/// Advisory lock ("tower-ap" in ASCII) under which nodes that start at the same time wait for each other.
const LOCK: i64 = 0x746f_7765_722d_6170;

/// Brings the schema up to date, in one transaction. Returns whether a table of keys was adopted.
pub(super) fn migrate(connection: &mut BlockingConnection) -> Result<bool, MigrateError> {
    let outcome = connection.transaction(|connection| {
        // Behind a pooler, the connection does not have these settings from its start.
        connection.batch_execute(&format!(
            "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = {}",
            adopt::STATEMENT_TIMEOUT.as_millis()
        ))?;
        // This lock comes before the lock on a table, which would block its writers while this one waits.
        sql_query(format!("SELECT pg_advisory_xact_lock({LOCK})")).execute(connection)?;
        connection.batch_execute("SET LOCAL lock_timeout = '10s'")?;
        connection.batch_execute(SET_SEARCH_PATH)?;
        let faults = adopt::faults(connection)?;
        if !faults.is_empty() {
            return Err(Failure(MigrateError::NotAdoptable(faults)));
        }
        let missing = missing(connection)?;
        if missing.is_empty() {
            return Ok(false);
        }
        let is_missing =
            |table: &str| missing.iter().any(|it| it.strip_prefix("table ") == Some(table));
        let is_adopted = is_missing("api_key_changes") && !is_missing("api_keys");
        if missing.iter().any(|what| !what.starts_with("version ")) {
            connection.batch_execute(LOCK_TABLES)?;
        }
        make(connection).map_err(|error| Failure(StoreError::rejected(error).into()))?;
        telemetry::schema_made(&missing);
        Ok(is_adopted)
    });
    outcome.map_err(|Failure(error)| error)
}

/// Locks the tables of the other service. Each attempt takes less than its `deadlock_timeout` (1 s by default): a
/// transaction that writes both tables in the other order continues, and this one waits.
const LOCK_TABLES: &str = "DO $lock$
    DECLARE
        deadline TIMESTAMPTZ := clock_timestamp() + INTERVAL '10 s';
        names    TEXT := (SELECT string_agg(name, ', ') FROM unnest(ARRAY['users', 'api_keys']) AS t (name)
            WHERE to_regclass(name) IS NOT NULL);
    BEGIN
        WHILE names IS NOT NULL LOOP
            BEGIN
                PERFORM set_config('lock_timeout', '300ms', TRUE);
                EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', names);
                EXIT;
            EXCEPTION WHEN lock_not_available THEN
                IF clock_timestamp() > deadline THEN
                    RAISE;
                END IF;
                PERFORM pg_sleep(0.05);
            END;
        END LOOP;
        PERFORM set_config('lock_timeout', '10s', TRUE);
    END $lock$";

type MigrationError = Box<dyn std::error::Error + Send + Sync>;

/// Runs every migration, including those that were run before. A migration creates only what is missing.
fn make(connection: &mut BlockingConnection) -> Result<(), MigrationError> {
    connection.run_pending_migrations(MIGRATIONS)?;
    let migrations: Vec<Box<dyn Migration<Pg>>> = MIGRATIONS.migrations()?;
    for migration in migrations {
        migration.run(connection)?;
    }
    connection.batch_execute(TRIGGERS)?;
    Ok(connection.batch_execute(&tag())?)
}

/// Sets the `search_path` to the schema of the adopted tables, which need not be its first one. The triggers run with a
/// path of their own.
const SET_SEARCH_PATH: &str = "SELECT set_config('search_path', (
        SELECT string_agg(quote_ident(name), ', ' ORDER BY rank) FROM (
            SELECT name, min(rank) AS rank FROM (
                SELECT relnamespace::regnamespace::name AS name, 0::bigint AS rank
                    FROM pg_class WHERE oid = coalesce(to_regclass('api_keys'), to_regclass('users'))
                UNION ALL SELECT name, rank FROM unnest(current_schemas(false)) WITH ORDINALITY AS s (name, rank)
            ) AS schemas GROUP BY name
        ) AS schemas
    ), true)";

const TABLES: [&str; 9] = [
    "users",
    "api_keys",
    "api_key_changes",
    "api_key_horizons",
    "api_key_cache_secrets",
    "api_key_usage",
    "api_key_usage_writers",
    "api_key_leases",
    "api_key_audit",
];

/// Columns of the crate in these tables, besides those that look-ups read.
const OWN_COLUMNS: [(&str, &str); 2] =
    [("users", "api_key_revision"), ("api_keys", "total_cost_rest")];

/// The triggers that record changes and write the audit: table, name, events as in `pg_trigger.tgtype`, function, and
/// mode as in `pg_trigger.tgenabled`. Of the two on inserted keys, one is for statements (`O`), the other for the rows of
/// replication (`R`), which fires no triggers of statements.
const CHANGE_TRIGGERS: [(&str, &str, u8, &str, char); 13] = [
    ("api_keys", "zzz_api_key_revision", 23, "api_key_revise_key", 'A'),
    ("api_keys", "api_key_note_added", 4, "api_key_note_added", 'O'),
    ("api_keys", "api_key_note_new", 5, "api_key_note_key", 'R'),
    ("api_keys", "api_key_note_gone", 9, "api_key_note_key", 'A'),
    ("api_keys", "api_key_note", 17, "api_key_note_key", 'A'),
    ("api_keys", "api_key_note_all", 32, "api_key_note_all", 'A'),
    ("users", "zzz_api_key_revision", 19, "api_key_revise_user", 'A'),
    ("users", "api_key_audit_new", 5, "api_key_audit_user", 'A'),
    ("users", "api_key_audit", 17, "api_key_audit_user", 'A'),
    ("users", "zzz_api_key_audit", 11, "api_key_audit_user", 'A'),
    ("users", "api_key_note_gone", 9, "api_key_note_user", 'A'),
    ("users", "api_key_note", 17, "api_key_note_user", 'A'),
    ("users", "api_key_note_all", 32, "api_key_note_all", 'A'),
];

/// Returns an SQL expression: why changes may be missing, or NULL. It checks the tables that look-ups read, and the
/// tables that the functions write to: after a change of the `search_path` they may be in different schemas.
pub(super) fn incompleteness() -> String {
    let wanted: Vec<_> = CHANGE_TRIGGERS
        .iter()
        .map(|(table, name, events, function, mode)| {
            format!("('{table}', '{name}', {events}, '{function}', '{mode}')")
        })
        .collect();
    let columns = column_list();
    format!(
        "(SELECT string_agg(fault, '; ') FROM (
            SELECT format('trigger %s on %s is missing, disabled or not %s', w.name, w.in_table, CASE w.mode
                WHEN 'A' THEN 'ENABLE ALWAYS' WHEN 'R' THEN 'ENABLE REPLICA' ELSE 'ENABLE' END) AS fault
            FROM (VALUES {}) AS w (in_table, name, events, function, mode)
            WHERE NOT EXISTS (
                SELECT FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
                WHERE t.tgrelid = to_regclass(w.in_table) AND t.tgname = w.name AND t.tgtype = w.events
                    AND t.tgenabled = w.mode AND p.proname = w.function AND p.pronamespace = (
                        SELECT relnamespace FROM pg_class WHERE oid = to_regclass('api_key_changes')))
            UNION ALL
            SELECT 'trigger api_key_note_new on users is missing or disabled'
            WHERE NOT EXISTS (
                SELECT FROM pg_trigger t WHERE t.tgrelid = to_regclass('users') AND t.tgname = 'api_key_note_new'
                    -- Only for replication, which checks no foreign key, if there is one.
                    AND (t.tgenabled = 'A' OR t.tgenabled = 'R' AND EXISTS (
                        SELECT FROM pg_constraint c WHERE c.conrelid = to_regclass('api_keys')
                            AND c.confrelid = t.tgrelid AND c.contype = 'f' AND c.convalidated)))
            UNION ALL
            SELECT format('%s is not a plain table any more, so that rows can change without its triggers', relname)
            FROM pg_class c WHERE oid IN (to_regclass('users'), to_regclass('api_keys'))
                AND (relkind <> 'r' OR EXISTS (SELECT FROM pg_inherits WHERE inhparent = c.oid))
            UNION ALL
            SELECT format('column %s.%s is missing, so that its changes are not seen', in_table, name)
            FROM (VALUES {columns}) AS w (in_table, name)
            WHERE NOT EXISTS (
                SELECT FROM pg_attribute
                WHERE attrelid = to_regclass(in_table) AND attname = name AND NOT attisdropped)
        ) AS faults)",
        wanted.join(", ")
    )
}

/// Returns the columns that look-ups read, as rows of SQL: table and name.
fn column_list() -> String {
    let columns = adopt::read_columns().map(|column| (column.table, column.name));
    let columns = columns.chain(OWN_COLUMNS);
    columns.map(|(table, name)| format!("('{table}', '{name}')")).collect::<Vec<_>>().join(", ")
}

/// An SQL expression: a digest of all inputs of [`incompleteness`].
pub(super) const SHAPE: &str = "md5(concat_ws('|',
    (SELECT string_agg(
            concat_ws(' ', t.oid, t.xmin, t.tgname, t.tgenabled, p.proname, p.pronamespace), ',' ORDER BY t.oid)
        FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
        WHERE t.tgrelid IN (to_regclass('users'), to_regclass('api_keys')) AND NOT t.tgisinternal),
    (SELECT string_agg(concat_ws(' ', attrelid, attname), ',' ORDER BY attrelid, attnum) FROM pg_attribute
        WHERE attrelid IN (to_regclass('users'), to_regclass('api_keys')) AND attnum > 0 AND NOT attisdropped),
    (SELECT string_agg(concat_ws(' ', oid, relkind, relnamespace), ',' ORDER BY oid) FROM pg_class
        WHERE oid IN (to_regclass('users'), to_regclass('api_keys'), to_regclass('api_key_changes'))),
    (SELECT count(*) FROM pg_inherits WHERE inhparent IN (to_regclass('users'), to_regclass('api_keys'))),
    (SELECT string_agg(concat_ws(' ', oid, convalidated), ',' ORDER BY oid) FROM pg_constraint
        WHERE conrelid = to_regclass('api_keys') AND contype = 'f')))";

/// An SQL expression that changes whenever a trigger is created, altered or dropped, even if it is restored later.
pub(super) const TRIGGER_STATE: &str = "(
    SELECT md5(string_agg(concat_ws(' ', oid, xmin, tgenabled), ',' ORDER BY oid)) FROM pg_trigger
    WHERE tgrelid IN (to_regclass('users'), to_regclass('api_keys')) AND NOT tgisinternal)";

#[derive(QueryableByName)]
struct Missing {
    #[diesel(sql_type = Text)]
    what: String,
}

#[derive(QueryableByName)]
struct SchemaVersion {
    #[diesel(sql_type = Nullable<BigInt>)]
    version: Option<i64>,
    /// Whether the functions are unchanged since the comment was written.
    #[diesel(sql_type = Nullable<diesel::sql_types::Bool>)]
    is_intact: Option<bool>,
}

const FUNCTIONS: [&str; 19] = [
    "api_key_audit_user",
    "api_key_audited",
    "api_key_cluster",
    "api_key_horizon",
    "api_key_lease",
    "api_key_next_revision",
    "api_key_note_added",
    "api_key_note_all",
    "api_key_note_key",
    "api_key_note_row",
    "api_key_note_user",
    "api_key_notify",
    "api_key_prune",
    "api_key_renumber",
    "api_key_revise_key",
    "api_key_revise_user",
    "api_key_skip_foreign",
    "api_key_try",
    "api_key_write_audit",
];

/// Returns an SQL expression: a digest of the current definitions of the crate's functions, without other functions of
/// the schema.
fn digest() -> String {
    let names = FUNCTIONS.map(|name| format!("'{name}'")).join(", ");
    format!(
        "(SELECT md5(string_agg(concat_ws(' ', p.proname, p.prosrc, p.prosecdef, p.proconfig), ',' ORDER BY p.proname))
        FROM pg_proc p
        WHERE p.pronamespace = current_schema()::regnamespace AND p.proname IN ({names}))"
    )
}

/// Returns the statement that records the version of the functions and their digest.
fn tag() -> String {
    format!(
        "DO $tag$ BEGIN
            EXECUTE format('COMMENT ON TABLE api_key_changes IS %L', 'tower-api-key {VERSION} ' || {});
        END $tag$",
        digest()
    )
}

fn select_version() -> String {
    format!(
        r"SELECT split_part(tag, ' ', 2)::bigint AS version, split_part(tag, ' ', 3) = {} AS is_intact
        FROM (SELECT obj_description(to_regclass('api_key_changes'), 'pg_class') AS tag) AS s
        WHERE tag ~ '^tower-api-key \d+ \w+$'",
        digest()
    )
}

/// Returns a row if the role may read the audit.
const CAN_READ_AUDIT: &str = "SELECT '' AS what
    WHERE has_table_privilege(to_regclass('api_key_audit'), 'SELECT')
        AND has_sequence_privilege(to_regclass('api_key_audit_ids'), 'SELECT')";

/// Returns a row if the restoration of a dump has set the sequence back.
const AUDIT_IDS: &str = "SELECT 'sequence api_key_audit_ids' AS what
    WHERE (SELECT max(id) FROM api_key_audit) > (SELECT last_value FROM api_key_audit_ids)";

/// Returns what is missing or different. It only reads, so that a role that owns nothing can call it.
fn missing(connection: &mut BlockingConnection) -> QueryResult<Vec<String>> {
    let tables = TABLES.map(|table| format!("('{table}')")).join(", ");
    // A table or an index of the same name in a later schema belongs to another installation.
    let select = format!(
        "SELECT 'table ' || name AS what FROM (VALUES {tables}) AS t (name)
        WHERE to_regclass(name) IS NULL
            OR name LIKE 'api\\_key\\_%'
                AND to_regclass(name) IS DISTINCT FROM to_regclass(format('%I.%I', current_schema(), name))
        UNION ALL
        SELECT 'index ' || name FROM (VALUES
            ('api_key_changes_xid', 'api_key_changes'), ('api_key_changes_prefix', 'api_key_changes'),
            ('api_key_changes_user', 'api_key_changes'), ('api_key_audit_key', 'api_key_audit'),
            ('api_key_audit_user', 'api_key_audit'), ('api_key_audit_actor', 'api_key_audit'),
            ('api_key_audit_time', 'api_key_audit'), ('api_keys_previous_lookup', 'api_keys'),
            ('api_keys_created_by_key', 'api_keys'), ('api_keys_expiring', 'api_keys'),
            ('api_keys_revoked', 'api_keys')) AS i (name, in_table)
        WHERE NOT EXISTS (
            SELECT FROM pg_index WHERE indrelid = to_regclass(in_table) AND indexrelid = to_regclass(name))
        UNION ALL
        SELECT 'index api_keys_prefix' FROM pg_attribute
        WHERE attrelid = to_regclass('api_keys') AND attname = 'key_prefix' AND atttypid = 'text'::regtype
            AND attcollation = 'pg_catalog.default'::regcollation
            AND obj_description(attrelid, 'pg_class') = 'made by tower-api-key'
            AND NOT EXISTS (SELECT FROM pg_index WHERE indrelid = attrelid AND indexrelid = to_regclass('api_keys_prefix'))
        UNION ALL
        SELECT 'index on api_keys.' || name FROM (VALUES ('key_prefix'), ('user_id')) AS i (name)
        WHERE NOT EXISTS (
            SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
            WHERE i.indrelid = to_regclass('api_keys') AND i.indpred IS NULL AND a.attname = name)
        UNION ALL
        SELECT 'sequence ' || name FROM (VALUES
            ('api_key_revisions', 'api_key_changes'), ('api_key_audit_ids', 'api_key_audit')) AS s (name, in_table)
        WHERE NOT EXISTS (
            SELECT FROM pg_attrdef d JOIN pg_depend p ON p.classid = 'pg_attrdef'::regclass AND p.objid = d.oid
            WHERE d.adrelid = to_regclass(in_table) AND p.refobjid = to_regclass(name))
        UNION ALL
        SELECT 'trigger ' || name FROM (VALUES
            ('api_key_skip_foreign', 'api_key_changes'), ('api_key_renumber', 'api_key_audit')) AS t (name, in_table)
        WHERE NOT EXISTS (
            SELECT FROM pg_trigger WHERE tgrelid = to_regclass(in_table) AND tgname = name AND tgenabled = 'A')
        UNION ALL
        SELECT fault FROM (SELECT {} AS fault) AS f WHERE fault IS NOT NULL",
        incompleteness(),
    );
    let rows = sql_query(select).load::<Missing>(connection)?;
    let mut missing: Vec<_> = rows.into_iter().map(|row| row.what).collect();
    if !sql_query(CAN_READ_AUDIT).load::<Missing>(connection)?.is_empty() {
        missing.extend(
            sql_query(AUDIT_IDS).load::<Missing>(connection)?.into_iter().map(|row| row.what),
        );
    }
    match sql_query(select_version()).load::<SchemaVersion>(connection)?.first() {
        // Newer nodes maintain these objects. This node would create older ones.
        Some(SchemaVersion { version: Some(version), .. }) if *version > VERSION => {
            return Ok(Vec::new());
        }
        Some(SchemaVersion { version: Some(VERSION), is_intact: Some(true) }) => {}
        _ => missing.push(format!("version {VERSION} of the functions")),
    }
    Ok(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_function_of_the_schema_is_part_of_its_version() {
        let files = [
            TRIGGERS,
            include_str!("../../../schema/postgres/2026-11-23-000003_usage/up.sql"),
            include_str!("../../../schema/postgres/2026-11-23-000004_budgets/up.sql"),
        ];
        let made =
            files.into_iter().flat_map(|file| file.split("CREATE OR REPLACE FUNCTION ").skip(1));
        let mut made: Vec<_> = made.filter_map(|rest| rest.split('(').next()).collect();
        made.sort_unstable();
        assert_eq!(made, FUNCTIONS);
    }
}
