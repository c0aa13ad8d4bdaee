//! A store in PostgreSQL: [`PostgresStore`].

mod adopt;
mod audit;
mod batch;
mod bulk;
mod connect;
mod connections;
mod feed;
mod found;
mod health;
mod hosts;
mod keys_read;
mod read_connections;
mod repository;
mod schema;
mod select;
mod session;
mod sqlstate;
mod tls;
mod usage;
mod users;

use std::{
    fmt,
    future::Future,
    sync::Arc,
    time::{Duration, SystemTime},
};

use diesel::{QueryableByName, pg::Pg};

pub use self::connect::{PostgresStoreBuilder, PostgresUrlError};
use self::{
    connect::Target,
    connections::{Connections, Isolation},
    read_connections::ReadConnections,
};
use super::sql::{
    found::FoundKeys,
    gate::LookupGate,
    migrate::{MigrateError, MigrationReport},
    review::KeyReview,
    statement::{Bind, Statement, TextRow},
};
use crate::{
    error::StoreError,
    record::UserId,
    runtime::{Clock, within},
    store::{
        Answer, CacheSecret, ChangeStream, HashUpgrade, KeySelection, KeyStore, KeysRead, Lease,
        LeaseRequest, Lookup, ReadOwner, UsageBatch,
    },
    telemetry,
};

/// A store in PostgreSQL 13 or newer, with pools of connections. It suits a fleet of nodes.
///
/// The URL's `sslmode` sets TLS. Queries name the tables without a schema, so that the `search_path` decides where they
/// are. At the log level `debug`, tokio-postgres logs the values of statements, lookup ids and hashes among them (never
/// a key): keep it at `info`.
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
    /// Connections for look-ups only, behind the gate.
    lookups: ReadConnections,
    gate: Arc<LookupGate>,
    /// Connections for a replica's reads of keys, so that no number of look-ups delays them.
    replica_reads: ReadConnections,
    /// Connections for usage, leases and upgraded hashes.
    accounting: Connections,
    /// Connections for management, the cache secret and a replica's reads of owners.
    management: Connections,
    target: Target,
    deadline: Duration,
    poll_interval: Duration,
    clock: Arc<dyn Clock>,
}

impl PostgresStore {
    /// Creates a store on the database at `url` with the default settings. It connects at first use.
    ///
    /// # Errors
    ///
    /// If the URL can't be parsed. The error never shows the URL.
    pub fn new(url: &str) -> Result<Self, PostgresUrlError> {
        Self::builder(url).build()
    }

    /// Creates a builder for the database at `url`.
    pub fn builder(url: &str) -> PostgresStoreBuilder {
        PostgresStoreBuilder::new(url)
    }

    /// Brings the schema up to date, and adopts existing tables `users` and `api_keys`. Many nodes may call it at once:
    /// one of them migrates, and the others wait.
    ///
    /// # Errors
    ///
    /// If tables can't be adopted, or the database fails. Nothing is changed then. After a timeout (60 s) the migration
    /// may still succeed; call this again to check.
    pub async fn migrate(&self) -> Result<MigrationReport, MigrateError> {
        let has_adopted_keys = adopt::migrate(&self.0.target, self.0.deadline).await?;
        Ok(match has_adopted_keys {
            true => MigrationReport::of_adopted(self.review_keys().await),
            false => MigrationReport::default(),
        })
    }

    /// Lists the keys that fail, and those that change their meaning, for a service that adopted its tables, before it
    /// switches. Reads all keys, in pages of 1,000.
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

    async fn store_upgrade(&self, upgrade: &HashUpgrade) {
        let stored = self.load::<TextRow>(&self.0.accounting, &upgrade.statement()).await;
        if let Err(error) = stored {
            telemetry::upgrade_failed(&error);
        }
    }

    /// Runs an idempotent statement. It is retried once if the connection was dead.
    async fn load<R>(&self, pool: &Connections, statement: &Statement) -> Result<Vec<R>, StoreError>
    where
        R: QueryableByName<Pg> + Send + 'static,
    {
        self.load_in(pool, Isolation::Any, statement).await
    }

    async fn load_in<R>(
        &self,
        pool: &Connections,
        isolation: Isolation,
        statement: &Statement,
    ) -> Result<Vec<R>, StoreError>
    where
        R: QueryableByName<Pg> + Send + 'static,
    {
        self.in_time(pool.load(isolation, statement)).await
    }

    /// Runs a change without a retry, because the first attempt may have been carried out. Returns its row.
    async fn change(&self, statement: &Statement) -> Result<Option<String>, StoreError> {
        let rows: Vec<TextRow> = self.in_time(self.0.management.load_once(statement)).await?;
        Ok(rows.into_iter().next().map(|found| found.row))
    }

    /// Runs an idempotent change. It is retried once if the connection was dead. Returns its row.
    async fn repeatable(&self, statement: &Statement) -> Result<Option<String>, StoreError> {
        let loaded = self.load_in(&self.0.management, Isolation::ReadCommitted, statement).await;
        let rows: Vec<TextRow> = loaded?;
        Ok(rows.into_iter().next().map(|found| found.row))
    }

    async fn in_time<T>(
        &self,
        work: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let deadline = self.0.deadline;
        within(deadline, work).await.unwrap_or_else(|| Err(StoreError::timeout(deadline)))
    }
}

impl KeyStore for PostgresStore {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        let FoundKeys { as_of, latest, keys } = self.look_up(lookup).await?;
        let answer = lookup.verify_rows(keys).await?;
        if let Some(upgrade) = answer.upgrade() {
            Box::pin(self.store_upgrade(upgrade)).await;
        }
        Ok(answer.with_key_revision(latest).with_as_of(as_of))
    }

    fn changes(&self, since: SystemTime) -> ChangeStream {
        feed::changes(self, since)
    }

    async fn record_usage(&self, batch: &UsageBatch) -> Result<(), StoreError> {
        self.count_usage(batch).await
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Lease, StoreError> {
        let Some(key) = request.key.as_i64() else { return Ok(Lease::none(self.0.clock.now())) };
        let select =
            "SELECT json_build_array(granted, (extract(epoch FROM expires) * 1000)::bigint,
                (extract(epoch FROM resets) * 1000)::bigint)::text AS row
            FROM api_key_lease($1, $2, $3, $4, $5, $6)";
        let life = u64::try_from(request.lifetime.as_millis()).unwrap_or(u64::MAX);
        let binds = [
            Bind::Integer(key),
            Bind::Text(request.holder.clone()),
            Bind::number(request.sequence),
            Bind::Integer(request.amount_micro_cents.max(0)),
            Bind::Integer(request.needed_micro_cents.max(0)),
            Bind::number(life),
        ];
        let statement = Statement::new(select, binds);
        let leased = self.load_in(&self.0.accounting, Isolation::ReadCommitted, &statement).await;
        let rows: Vec<TextRow> = leased?;
        Lease::from_row(rows.as_slice().first().map(|row| row.row.as_str()))
    }

    fn can_read_keys(&self) -> bool {
        true
    }

    async fn read_keys(&self, selection: &KeySelection) -> Result<KeysRead, StoreError> {
        keys_read::keys(self, selection).await
    }

    async fn read_owners(&self, owners: &[UserId]) -> Result<Vec<ReadOwner>, StoreError> {
        keys_read::owners(self, owners).await
    }

    fn has_cache_secret(&self) -> bool {
        true
    }

    async fn cache_secret(&self) -> Result<Option<CacheSecret>, StoreError> {
        // It must not be ready at the first poll: a cache that polls once to detect a store without a secret has no
        // runtime.
        tokio::task::yield_now().await;
        // The timeline is part of the scope: entries from before a failover may be of commits that it lost.
        let select = "SELECT json_build_array(id, encode(secret, 'hex'), json_build_array(
                'postgres', api_key_cluster(),
                CASE WHEN NOT pg_is_in_recovery() THEN left(pg_walfile_name(pg_current_wal_lsn()), 8) END,
                (SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                    WHERE c.oid = to_regclass('api_keys'))
            )::text)::text AS row
            FROM api_key_cache_secrets ORDER BY created_at DESC, id DESC LIMIT 2";
        let rows = self.load::<TextRow>(&self.0.management, &Statement::new(select, [])).await?;
        CacheSecret::from_rows(rows.iter().map(|row| row.row.as_str()))
    }
}

impl fmt::Debug for PostgresStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresStore").field("target", &self.0.target).finish_non_exhaustive()
    }
}
