//! State of the database and its change feed, for operators.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::Deserialize;
use tokio::{task::spawn_blocking, time::timeout};
use tokio_postgres::AsyncMessage;

use super::{
    PostgresStore,
    adopt::{BlockingConnection, STATEMENT_TIMEOUT},
    schema,
    sqlstate::statement_error,
};
use crate::{
    backend::sql::{
        health::{
            ClockReading, DatabaseHealth, FeedCheck, MissingPrivilege, SchemaVersion, check_feed,
        },
        migrate::MigrateError,
        statement::{Statement, TextRow},
    },
    error::StoreError,
    store::KeyStore,
};

/// The rights on the tables: right, table, and what needs it. Tables that are missing need a migration first.
const PRIVILEGES: &str = "
    ('SELECT', 'users', 'check'), ('SELECT', 'api_keys', 'check'), ('SELECT', 'api_key_changes', 'check'),
    ('SELECT', 'api_key_cache_secrets', 'check'), ('UPDATE', 'api_keys', 'usage'),
    ('SELECT', 'api_key_usage', 'usage'), ('INSERT', 'api_key_usage', 'usage'),
    ('UPDATE', 'api_key_usage', 'usage'), ('SELECT', 'api_key_usage_writers', 'usage'),
    ('INSERT', 'api_key_usage_writers', 'usage'), ('UPDATE', 'api_key_usage_writers', 'usage'),
    ('SELECT', 'api_key_leases', 'usage'), ('INSERT', 'api_key_leases', 'usage'),
    ('UPDATE', 'api_key_leases', 'usage'), ('DELETE', 'api_key_leases', 'usage'),
    ('INSERT', 'users', 'manage'), ('UPDATE', 'users', 'manage'), ('DELETE', 'users', 'manage'),
    ('INSERT', 'api_keys', 'manage'), ('UPDATE', 'api_keys', 'manage'), ('DELETE', 'api_keys', 'manage'),
    ('SELECT', 'api_key_audit', 'manage')";

/// Maximum delay of a notification, which takes milliseconds.
const NOTIFICATION_LIMIT: Duration = Duration::from_secs(2);

#[derive(Deserialize)]
struct State {
    server: String,
    now: DateTime<Utc>,
    is_read_only: bool,
    is_encrypted: Option<bool>,
    missing_privileges: Vec<MissingPrivilege>,
    can_migrate: bool,
    version: Option<i64>,
}

impl PostgresStore {
    /// Returns what [`migrate`](Self::migrate) would create; empty if the schema is up to date. It changes nothing, and
    /// needs only the right to read. A schema of a newer version of this crate is up to date
    /// ([`SchemaVersion::Newer`]).
    ///
    /// # Errors
    ///
    /// If the tables can't be adopted, or the database fails.
    pub async fn pending_migrations(&self) -> Result<Vec<String>, MigrateError> {
        let (target, deadline) = (&self.0.target, self.0.deadline);
        let connection = target.connect(STATEMENT_TIMEOUT, deadline).await;
        let connection = connection.map_err(StoreError::from)?;
        let pending = spawn_blocking(move || {
            schema::pending::pending(&mut BlockingConnection::from(connection))
        });
        let limit = STATEMENT_TIMEOUT.saturating_add(deadline);
        let pending = timeout(limit, pending).await.map_err(|_| StoreError::timeout(limit))?;
        pending.map_err(StoreError::unavailable)?
    }

    /// Returns the SQL of [`migrate`](Self::migrate), which creates only what is missing. It does not depend on the
    /// database.
    pub fn migration_sql() -> String {
        schema::pending::script()
    }

    /// Compares the version of the schema with that of this crate.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn schema_version(&self) -> Result<SchemaVersion, StoreError> {
        let select = format!("SELECT ({})::text AS row", schema::pending::STORED_VERSION);
        let select = format!("SELECT coalesce(row, '') AS row FROM ({select}) AS s");
        let rows: Vec<TextRow> = self.load(&self.0.management, &Statement::new(select, [])).await?;
        Ok(schema::pending::schema_version(rows.first().and_then(|row| row.row.parse().ok())))
    }

    /// Reads the state of the database: version, clock, TLS, rights.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn health(&self) -> Result<DatabaseHealth, StoreError> {
        let before = self.0.clock.now();
        let select = format!(
            "SELECT json_build_object(
                'server', 'PostgreSQL ' || current_setting('server_version'),
                'now', to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'),
                'is_read_only', pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on',
                'is_encrypted', CASE WHEN inet_client_addr() IS NOT NULL
                        AND NOT inet_client_addr() <<= '127.0.0.0/8'::inet AND inet_client_addr() <> '::1'::inet
                    THEN coalesce((SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()), FALSE) END,
                'missing_privileges', coalesce((
                    SELECT json_agg(json_build_object('privilege', privilege, 'table', name, 'purpose', purpose))
                    FROM (VALUES {PRIVILEGES}) AS wanted (privilege, name, purpose)
                    WHERE to_regclass(name) IS NOT NULL
                        AND NOT has_table_privilege(to_regclass(name), privilege)), '[]'),
                'can_migrate', coalesce(has_schema_privilege(current_schema(), 'CREATE'), FALSE) AND NOT EXISTS (
                    SELECT FROM pg_class WHERE NOT pg_has_role(relowner, 'USAGE')
                        AND oid IN (to_regclass('users'), to_regclass('api_keys'), to_regclass('api_key_changes'))),
                'version', {}
            )::text AS row",
            schema::pending::STORED_VERSION
        );
        let rows: Vec<TextRow> = self.load(&self.0.management, &Statement::new(select, [])).await?;
        let after = self.0.clock.now();
        let row = rows.first().map(|row| row.row.as_str()).unwrap_or_default();
        let state: State = serde_json::from_str(row).map_err(StoreError::rejected)?;
        let (before, after) = (before.into(), after.into());
        Ok(DatabaseHealth {
            server: state.server,
            clock: Some(ClockReading { before, database: state.now, after }),
            is_read_only: state.is_read_only,
            is_encrypted: state.is_encrypted,
            missing_privileges: state.missing_privileges,
            can_migrate: state.can_migrate,
            schema: schema::pending::schema_version(state.version),
        })
    }

    /// Checks the change feed from end to end. It writes a change event of its own, for a lookup id that no key can have,
    /// and waits at most `limit` until the feed reports it. It also checks whether notifications arrive, which a pooler
    /// such as PgBouncer drops: nodes then notice changes only at the next poll.
    ///
    /// # Errors
    ///
    /// If the database fails.
    pub async fn check_feed(&self, limit: Duration) -> Result<FeedCheck, StoreError> {
        let insert = |probe: String| async move {
            let select = "SELECT (has_table_privilege('api_key_changes', 'INSERT')
                AND has_sequence_privilege('api_key_revisions', 'USAGE')
                AND has_database_privilege(current_database(), 'TEMPORARY'))::text AS row";
            let rows: Vec<TextRow> =
                self.load(&self.0.management, &Statement::new(select, [])).await?;
            let may_insert = rows.first().is_some_and(|row| row.row == "true");
            if may_insert {
                self.run_raw(&insert_probe(&probe), limit).await?;
            }
            Ok(may_insert)
        };
        let check = check_feed(self.changes(self.0.clock.now()), limit, insert).await?;
        let is_notified = self.are_notifications_received(limit).await?;
        Ok(FeedCheck { is_notified, ..check })
    }

    /// Returns whether a notification returns on the connection that listens; `None` if the triggers send none.
    async fn are_notifications_received(
        &self,
        limit: Duration,
    ) -> Result<Option<bool>, StoreError> {
        let select = "SELECT current_setting('max_prepared_transactions') AS row";
        let rows: Vec<TextRow> = self.load(&self.0.management, &Statement::new(select, [])).await?;
        if rows.first().is_some_and(|row| row.row != "0") {
            return Ok(None);
        }
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|error| StoreError::unavailable(error.to_string()))?;
        let channel = format!("api_key_check_{:016x}", u64::from_ne_bytes(random));
        let (client, mut connection) = self.0.target.connect_raw(self.0.deadline).await?;
        let (arrived, mut arrival) = tokio::sync::mpsc::channel(1);
        // The task ends when the client is dropped.
        tokio::spawn(async move {
            while let Some(Ok(message)) =
                std::future::poll_fn(|cx| connection.poll_message(cx)).await
            {
                if matches!(message, AsyncMessage::Notification(_)) {
                    let _ = arrived.try_send(());
                }
            }
        });
        let listens = timeout(limit, client.batch_execute(&format!("LISTEN {channel}"))).await;
        listens.map_err(|_| StoreError::timeout(limit))?.map_err(statement_error)?;
        // On another connection: a pooler passes on what a statement of the same client notifies.
        self.run_raw(&format!("NOTIFY {channel}"), limit).await?;
        let received = timeout(limit.min(NOTIFICATION_LIMIT), arrival.recv()).await;
        // The session may be that of a pooler.
        let _ = timeout(limit, client.batch_execute(&format!("UNLISTEN {channel}"))).await;
        Ok(Some(matches!(received, Ok(Some(())))))
    }

    /// Runs statements as one transaction, on a connection of their own.
    async fn run_raw(&self, sql: &str, limit: Duration) -> Result<(), StoreError> {
        let (client, connection) = self.0.target.connect_raw(self.0.deadline).await?;
        tokio::spawn(connection);
        let ran = timeout(limit, client.batch_execute(sql)).await;
        ran.map_err(|_| StoreError::timeout(limit))?.map_err(statement_error)
    }
}

/// Returns the statements that write a change event for a lookup id, which has no quotes. Only rows that a trigger writes
/// are kept in the table of changes, and a trigger on a table of keys or users would need a change of one.
fn insert_probe(lookup_id: &str) -> String {
    format!(
        "CREATE TEMPORARY TABLE api_key_probe (key_prefix TEXT) ON COMMIT DROP;
        CREATE FUNCTION pg_temp.api_key_probe() RETURNS TRIGGER LANGUAGE plpgsql AS $body$
        BEGIN
            INSERT INTO api_key_changes (key_prefix) VALUES (NEW.key_prefix);
            PERFORM api_key_notify();
            RETURN NULL;
        END
        $body$;
        CREATE TRIGGER api_key_probe AFTER INSERT ON api_key_probe
            FOR EACH ROW EXECUTE FUNCTION pg_temp.api_key_probe();
        INSERT INTO api_key_probe VALUES ('{lookup_id}');
        DROP TRIGGER api_key_probe ON api_key_probe;
        DROP FUNCTION pg_temp.api_key_probe()"
    )
}
