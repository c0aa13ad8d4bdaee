//! Keys in PostgreSQL: [`PostgresStore`].

mod adopt;
mod connect;
mod feed;
mod hosts;
mod repository;
mod schema;
mod session;
mod sqlstate;
mod tls;
mod usage;

use std::{
    fmt,
    future::Future,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use diesel::{
    QueryableByName,
    pg::Pg,
    result::{DatabaseErrorKind, Error},
    sql_types::{BigInt, Nullable, Text},
};
use diesel_async::{
    AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection,
    pooled_connection::{
        PoolableConnection,
        deadpool::{Object, Pool},
    },
};

use self::connect::Target;
pub use self::connect::{PostgresStoreBuilder, PostgresUrlError};
use super::{
    Answer, CacheSecret, ChangeStream, KeyReview, KeyStore, Lease, LeaseAsk, Lookup, MigrateError,
    MigrationReport, UsageBatch,
    fault::store_error,
    lookup::MAX_CANDIDATES,
    row,
    statement::{Bind, Statement, TextRow},
};
use crate::{deadline::within, error::StoreError, record::Revision, telemetry};

/// Keys in PostgreSQL 13 or newer, over a pool of connections: what a fleet needs.
///
/// TLS is as the URL's `sslmode` says. Queries name the tables without a schema, so that the
/// `search_path` decides where they are. At the log level `debug`, tokio-postgres shows the values that
/// statements are sent with, lookup ids and hashes among them (never a key): keep it at `info`.
///
/// ```no_run
/// use tower_api_key::{ApiKeyAuthLayer, PostgresStore};
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let store = PostgresStore::new("postgres://app@db.internal/app?sslmode=verify-full")?;
/// store.migrate().await?;
/// let layer = ApiKeyAuthLayer::new(store);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct PostgresStore(Arc<Inner>);

struct Inner {
    pool: Pool<AsyncPgConnection>,
    target: Target,
    deadline: Duration,
    poll_interval: Duration,
    statement_timeout: Duration,
}

impl PostgresStore {
    /// A store on the database at `url`, with the default settings. Connects at first use.
    ///
    /// # Errors
    ///
    /// If the URL can't be read. The error never shows the URL.
    pub fn new(url: &str) -> Result<Self, PostgresUrlError> {
        Self::builder(url).build()
    }

    /// Settings of your own for the database at `url`.
    pub fn builder(url: &str) -> PostgresStoreBuilder {
        PostgresStoreBuilder::new(url)
    }

    /// Brings the schema up to date, and adopts tables `users` and `api_keys` that are already there.
    /// Safe when many nodes do it at once: one does, the others wait.
    ///
    /// # Errors
    ///
    /// If tables can't be adopted, or the database fails. Nothing is changed then. After a timeout (60 s)
    /// the migration may still end well; calling this again tells.
    pub async fn migrate(&self) -> Result<MigrationReport, MigrateError> {
        let has_adopted_keys = adopt::migrate(&self.0.target, self.0.deadline).await?;
        Ok(match has_adopted_keys {
            true => MigrationReport::of_adopted(self.review_keys().await),
            false => MigrationReport::default(),
        })
    }

    /// Lists the keys that fail, and those that change their meaning: for a team that adopted its tables, before it
    /// switches. Reads all keys, 1,000 at once.
    ///
    /// # Errors
    ///
    /// If the database fails. A key that can't be decoded is a finding.
    pub async fn review_keys(&self) -> Result<KeyReview, StoreError> {
        let (mut review, mut after) = (KeyReview::default(), Some(i64::MIN));
        while let Some(last) = after {
            after = review.add(&self.reviewed(last).await?);
        }
        Ok(review)
    }

    /// Runs a statement that may be sent twice: once more if the connection turns out to be dead.
    async fn load<R>(&self, statement: &Statement) -> Result<Vec<R>, StoreError>
    where
        R: QueryableByName<Pg> + Send + 'static,
    {
        self.load_in(Isolation::Any, statement).await
    }

    async fn load_in<R>(
        &self,
        isolation: Isolation,
        statement: &Statement,
    ) -> Result<Vec<R>, StoreError>
    where
        R: QueryableByName<Pg> + Send + 'static,
    {
        self.in_time(async {
            match self.attempt(isolation, statement).await {
                // It was in the pool when the server went away, and the others with it.
                Err(Attempt { was_broken: true, .. }) => {
                    self.0.pool.retain(|_, _| false);
                    self.attempt(isolation, statement).await
                }
                outcome => outcome,
            }
        })
        .await
    }

    /// Runs a statement that must not be sent twice, because the first may have been carried out.
    async fn insert(&self, statement: &Statement) -> Result<Option<TextRow>, StoreError> {
        Ok(self.in_time(self.attempt(Isolation::Any, statement)).await?.pop())
    }

    async fn in_time<T>(
        &self,
        attempts: impl Future<Output = Result<T, Attempt>>,
    ) -> Result<T, StoreError> {
        match within(self.0.deadline, attempts).await {
            Some(outcome) => outcome.map_err(|attempt| attempt.error),
            None => Err(StoreError::timeout(self.0.deadline)),
        }
    }

    async fn attempt<R>(
        &self,
        isolation: Isolation,
        statement: &Statement,
    ) -> Result<Vec<R>, Attempt>
    where
        R: QueryableByName<Pg> + Send + 'static,
    {
        let failed = |error| Attempt { error: StoreError::unavailable(error), was_broken: false };
        let mut checkout = Checkout(Some(self.0.pool.get().await.map_err(failed)?));
        let Some(connection) = &mut checkout.0 else { unreachable!("it was just put there") };
        let began = Instant::now();
        let result = if isolation == Isolation::ReadCommitted && self.0.target.is_pooled() {
            let settings = session::local_settings(self.0.statement_timeout);
            let work = async |connection: &mut AsyncPgConnection| {
                connection.batch_execute(&settings).await?;
                RunQueryDsl::load(statement, connection).await
            };
            connection.build_transaction().read_committed().run(work).await
        } else {
            RunQueryDsl::load(statement, connection).await
        };
        let elapsed = began.elapsed();
        let mut limit = None;
        let was_broken = match &result {
            // A primary that became a standby is of no more use than a dead one.
            Err(Error::DatabaseError(DatabaseErrorKind::ReadOnlyTransaction, _)) => true,
            // A server that shuts down says so before the connection is closed, and diesel does not
            // pass on the SQLSTATE (57P01, nor those of time limits). Whether it was that, the next statement
            // tells.
            Err(Error::DatabaseError(DatabaseErrorKind::Unknown, _)) => {
                match RunQueryDsl::load::<TextRow>(&Statement::new(LIMITS, []), connection).await {
                    Ok(rows) => {
                        limit = shortest_limit(&rows).filter(|limit| elapsed >= *limit);
                        false
                    }
                    Err(_) => true,
                }
            }
            _ => connection.is_broken(),
        };
        if !was_broken {
            checkout.put_back();
        }
        result.map_err(|error| {
            let error = match limit {
                _ if was_broken => StoreError::unavailable(error),
                Some(limit) => StoreError::timeout(limit).caused_by(error),
                None => store_error(error),
            };
            Attempt { error, was_broken }
        })
    }
}

/// How long the server lets a statement run, wait for a lock or be in a deadlock, in milliseconds. 0 is no limit.
const LIMITS: &str = "SELECT coalesce(json_agg(setting), '[]')::text AS row FROM pg_settings
    WHERE name IN ('statement_timeout', 'lock_timeout', 'deadlock_timeout')";

/// A statement that took less was not ended by any of the limits. One that took longer may have been: by the time
/// alone, because the message is in the server's language.
fn shortest_limit(rows: &[TextRow]) -> Option<Duration> {
    let settings: Vec<String> = serde_json::from_str(&rows.first()?.row).ok()?;
    let limits = settings.iter().filter_map(|setting| setting.parse().ok());
    limits.filter(|millis| *millis > 0).min().map(Duration::from_millis)
}

/// What a statement needs of its transaction.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Isolation {
    Any,
    /// It reads what was committed while it waited for a lock.
    ReadCommitted,
}

struct Attempt {
    error: StoreError,
    was_broken: bool,
}

/// A connection on loan. If it is dropped in the middle of a query, because the caller has gone or the
/// deadline is over, it leaves the pool and is closed: an answer may still be on its way to it.
struct Checkout(Option<Object<AsyncPgConnection>>);

impl Checkout {
    fn put_back(&mut self) {
        drop(self.0.take());
    }
}

impl Drop for Checkout {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            drop(Object::take(connection));
        }
    }
}

#[derive(QueryableByName)]
struct FoundRow {
    /// The database's time in microseconds since the Unix epoch.
    #[diesel(sql_type = BigInt)]
    as_of: i64,
    /// The last change under the prefix: of a key that is no longer there, too.
    #[diesel(sql_type = BigInt)]
    latest: i64,
    #[diesel(sql_type = Nullable<Text>)]
    row: Option<String>,
}

/// A key's row, joined with its owner's, as `row` decodes it. PostgreSQL turns every type that a
/// column may have into JSON, time stamps into ISO 8601.
const KEY_COLUMNS: &str = "SELECT
        k.id, k.name, k.key_prefix, k.key_hash,
        CASE WHEN k.fast_hash_of = k.key_hash THEN k.fast_hash END AS fast_hash,
        k.is_active, k.permissions, k.scopes,
        k.rate_limit_per_minute, k.rate_limit_per_hour, k.rate_limit_per_day,
        k.allowed_models, k.allowed_endpoints, k.allowed_ips, k.is_unlimited,
        k.budget_limit_cents, k.budget_type, k.expires_at,
        k.total_requests, k.total_tokens, 
        CASE k.total_cost_rest WHEN 0 THEN k.total_cost::text
            ELSE (coalesce(k.total_cost, 0)::numeric + k.total_cost_rest::numeric / 1000000)::text END AS total_cost,
        k.last_used_at, k.metadata::text AS metadata, k.created_at, k.updated_at, k.api_key_revision,
        greatest(u.api_key_revision, (SELECT max(c.revision) FROM api_key_changes c WHERE c.user_id = u.id))
            AS user_revision,
        u.id AS user_id, u.email AS user_email, u.role AS user_role, u.is_active AS user_is_active";

/// Where the columns come from.
const KEY_TABLES: &str = "FROM api_keys k JOIN users u ON u.id = k.user_id";

impl KeyStore for PostgresStore {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        // One row at least, because "unknown" has an as-of too. OFFSET 0 keeps the planner from
        // walking the primary key for the sake of ORDER BY … LIMIT where it has no statistics.
        let sql = format!(
            "SELECT (extract(epoch FROM statement_timestamp()) * 1000000)::bigint AS as_of,
                coalesce((SELECT max(revision) FROM api_key_changes WHERE key_prefix = $1), 0) AS latest,
                row_to_json(found)::text AS row
            FROM (VALUES (1)) AS one LEFT JOIN (
                SELECT * FROM ({KEY_COLUMNS} {KEY_TABLES} WHERE k.key_prefix = $1 OFFSET 0) AS keys
                ORDER BY id LIMIT {}
            ) AS found ON TRUE",
            MAX_CANDIDATES + 1
        );
        let statement = Statement::new(sql, [Bind::Text(lookup.id().to_owned())]);
        let rows = self.load::<FoundRow>(&statement).await?;
        let number = |of: fn(&FoundRow) -> i64| {
            rows.as_slice().first().map_or(0, |found| u64::try_from(of(found)).unwrap_or(0))
        };
        let as_of = SystemTime::UNIX_EPOCH + Duration::from_micros(number(|found| found.as_of));
        let latest = Revision(number(|found| found.latest));
        let keys = rows.iter().filter_map(|found| found.row.as_deref()).map(row::decode);
        let answer = lookup.verify_rows(keys).await?;
        if let Some(upgrade) = answer.upgrade()
            && let Err(error) = self.load::<TextRow>(&upgrade.statement()).await
        {
            telemetry::upgrade_failed(&error);
        }
        Ok(answer.with_key_revision(latest).with_as_of(as_of))
    }

    fn changes(&self, since: SystemTime) -> ChangeStream {
        feed::changes(self, since)
    }

    async fn record_usage(&self, batch: &UsageBatch) -> Result<(), StoreError> {
        self.count_usage(batch).await
    }

    async fn lease(&self, ask: &LeaseAsk) -> Result<Lease, StoreError> {
        let Some(key) = ask.key.as_i64() else { return Ok(Lease::none(SystemTime::now())) };
        let select =
            "SELECT json_build_array(granted, (extract(epoch FROM expires) * 1000)::bigint,
                (extract(epoch FROM resets) * 1000)::bigint)::text AS row
            FROM api_key_lease($1, $2, $3, $4, $5, $6)";
        let life = u64::try_from(ask.lifetime.as_millis()).unwrap_or(u64::MAX);
        let binds = [
            Bind::Integer(key),
            Bind::Text(ask.holder.clone()),
            Bind::number(ask.sequence),
            Bind::Integer(ask.amount_micro_cents.max(0)),
            Bind::Integer(ask.needed_micro_cents.max(0)),
            Bind::number(life),
        ];
        let statement = Statement::new(select, binds);
        let rows = self.load_in::<TextRow>(Isolation::ReadCommitted, &statement).await?;
        Lease::from_row(rows.as_slice().first().map(|row| row.row.as_str()))
    }

    async fn cache_secret(&self) -> Result<Option<CacheSecret>, StoreError> {
        // Whoever polls once to hear that there is none needs no runtime for that.
        tokio::task::yield_now().await;
        // With the timeline: what was cached before a failover may be of commits that it lost.
        let select = "SELECT json_build_array(id, encode(secret, 'hex'), json_build_array(
                'postgres', api_key_cluster(),
                CASE WHEN NOT pg_is_in_recovery() THEN left(pg_walfile_name(pg_current_wal_lsn()), 8) END,
                (SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                    WHERE c.oid = to_regclass('api_keys'))
            )::text)::text AS row
            FROM api_key_cache_secrets ORDER BY created_at DESC, id DESC LIMIT 2";
        let rows = self.load::<TextRow>(&Statement::new(select, [])).await?;
        CacheSecret::from_rows(rows.iter().map(|row| row.row.as_str()))
    }
}

impl fmt::Debug for PostgresStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresStore").field("target", &self.0.target).finish_non_exhaustive()
    }
}
