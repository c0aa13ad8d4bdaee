//! A shared cache in front of a store: [`RedisCache`].

mod builder;
mod copies;
mod entry;
mod flush;
mod keys;
mod names;
mod pub_sub;
mod reads;
mod repository;
mod script;
mod secret;
mod tombstones;

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::sync::Semaphore;

pub use self::builder::{RedisCacheBuilder, RedisCacheError};
use self::{
    copies::CacheRead, names::Names, reads::EntryReads, secret::Secrets, tombstones::TombstoneQueue,
};
use crate::{
    coherence::Age,
    error::StoreError,
    record::UserId,
    redis::{Link, RedisServers, RedisState},
    runtime::Clock,
    store::{
        Answer, CacheSecret, ChangeStream, KeySelection, KeyStore, KeysRead, Lease, LeaseRequest,
        Lookup, ReadOwner, ReplicaStatus, Source, UsageBatch,
    },
    telemetry,
};

/// Redis, or Valkey, in front of a store. An answer that one node has read saves the other nodes a query and a slow
/// hash check.
///
/// A cache in front of a store is a store. A hit is one round trip, or one for up to 64 look-ups while many wait. If Redis rejects a command, hangs or returns
/// invalid data, the store below is used. Data that Redis loses, rolls back or receives from an attacker with write
/// access does not make a revoked key valid again: entries are authenticated, and each node receives changes from the
/// store itself. Neither keys nor their hashes are stored there; names, e-mail addresses and limits of their owners
/// are.
///
/// Entries are bound to the database: to PostgreSQL's system identifier, the id of the database, the timeline and the
/// schema of the table `api_keys`, or to the path of an SQLite file. Other databases on the same Redis have entries of
/// their own, also one that was made with `CREATE DATABASE … TEMPLATE` or from a dump.
///
/// A copy of a whole server can have the same identifiers: a snapshot of its disk, a cloned volume, a restored base
/// backup, one of two standbys that were both promoted. So can an SQLite file at the same path on another machine. Nodes
/// on such a copy that use the Redis of the original need a [`namespace`](RedisCacheBuilder::namespace) of their own, or
/// two new rows in the copy's `api_key_cache_secrets` before the first of them is started. Otherwise a key that was
/// revoked in the one can be accepted from entries of the other.
///
/// ```no_run
/// # #[cfg(feature = "postgres")]
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// use tower_api_key::{ApiKeyAuthLayer, PostgresStore, RedisCache};
///
/// let postgres = PostgresStore::new("postgres://app@db.internal/app?sslmode=verify-full")?;
/// postgres.migrate().await?;
/// let store = RedisCache::new(postgres, "rediss://:password@redis.internal")?;
/// let layer = ApiKeyAuthLayer::new(store);
/// # Ok(())
/// # }
/// ```
pub struct RedisCache<S>(Arc<Tier<S>>);

struct Tier<S> {
    store: S,
    link: Arc<Link>,
    secrets: Secrets,
    tombstones: Arc<TombstoneQueue>,
    reads: Arc<EntryReads>,
    /// Permits of the writes that wait or are under way.
    fills: Arc<Semaphore>,
    /// Permits of the writes that are under way.
    writes: Arc<Semaphore>,
    clock: Arc<dyn Clock>,
}

/// Lifetime of an entry of keys. A look-up reads the store at least once in this time.
const KEYS_LIFETIME: Duration = Duration::from_secs(300);
/// Lifetime of an entry for a verified key.
const VERIFIED_LIFETIME: Duration = Duration::from_secs(3600);

impl<S: KeyStore> RedisCache<S> {
    /// Creates a cache in front of `store` with the default settings.
    ///
    /// # Errors
    ///
    /// The errors of [`RedisCacheBuilder::build`].
    pub fn new(store: S, servers: impl Into<RedisServers>) -> Result<Self, RedisCacheError> {
        Self::builder(store, servers).build()
    }

    /// Creates a builder.
    pub fn builder(store: S, servers: impl Into<RedisServers>) -> RedisCacheBuilder<S> {
        RedisCacheBuilder::new(store, servers.into())
    }

    /// Returns the store behind the cache.
    pub fn get_ref(&self) -> &S {
        &self.0.store
    }

    /// Returns the state of Redis, for a health check. Keys are checked in every state.
    pub fn state(&self) -> RedisState {
        self.0.link.state()
    }
}

impl<S: KeyStore> KeyStore for RedisCache<S> {
    /// What a hit does not need is boxed, because thousands of look-ups may wait for Redis.
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        let tier = &self.0;
        if !lookup.is_presented() {
            // The name of the entry for a verified key is derived from the key itself.
            return Box::pin(tier.store.resolve(lookup)).await;
        }
        let Some(secret) = tier.secrets.current(self) else {
            return Box::pin(tier.store.resolve(lookup)).await;
        };
        let names = Names::new(lookup, &secret);
        let mut read = CacheRead::default();
        if !lookup.skips_copies() && lookup.view().minimum_revisions.is_caught_up() {
            read = self.find(lookup, &names, &secret).await;
        }
        if let Some((answer, Age::Fresh)) = read.answer {
            telemetry::redis_hit(true);
            return Ok(answer);
        }
        telemetry::redis_hit(false);
        Box::pin(self.resolve_below(lookup, names, secret, read)).await
    }

    fn changes(&self, since: SystemTime) -> ChangeStream {
        pub_sub::changes(self, since)
    }

    async fn record_usage(&self, batch: &UsageBatch) -> Result<(), StoreError> {
        self.0.store.record_usage(batch).await
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Lease, StoreError> {
        self.0.store.lease(request).await
    }

    fn can_read_keys(&self) -> bool {
        self.0.store.can_read_keys()
    }

    async fn read_keys(&self, selection: &KeySelection) -> Result<KeysRead, StoreError> {
        self.0.store.read_keys(selection).await
    }

    async fn read_owners(&self, owners: &[UserId]) -> Result<Vec<ReadOwner>, StoreError> {
        self.0.store.read_owners(owners).await
    }

    fn invalidate(&self, lookup_id: &str) {
        self.0.store.invalidate(lookup_id);
    }

    fn replica_status(&self) -> Option<ReplicaStatus> {
        self.0.store.replica_status()
    }

    fn has_cache_secret(&self) -> bool {
        self.0.store.has_cache_secret()
    }

    async fn cache_secret(&self) -> Result<Option<CacheSecret>, StoreError> {
        self.0.store.cache_secret().await
    }
}

impl<S: KeyStore> RedisCache<S> {
    /// Resolves a look-up that Redis has no fresh answer to, and writes the answer to Redis.
    async fn resolve_below(
        &self,
        lookup: &Lookup,
        names: Names,
        secret: CacheSecret,
        read: CacheRead,
    ) -> Result<Answer, StoreError> {
        let store = &self.0.store;
        let below = match read.proof {
            Some(proof) => store.resolve(&lookup.clone().with_proof(proof)).await,
            None => store.resolve(lookup).await,
        };
        match (below, read.answer) {
            (Ok(answer), _) => {
                self.fill(lookup, &names, &secret, &answer, read.rejected_tail);
                Ok(answer)
            }
            (Err(error), Some((answer, Age::Stale)))
                if error.is_transient() && lookup.grants_access(&answer) =>
            {
                Ok(answer.with_source(Source::Fallback))
            }
            (Err(error), _) => Err(error),
        }
    }
}

impl<S> Clone for RedisCache<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S: fmt::Debug> fmt::Debug for RedisCache<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisCache")
            .field("store", &self.0.store)
            .field("servers", self.0.link.connector())
            .field("state", &self.0.link.state())
            .finish_non_exhaustive()
    }
}
