//! Settings of a cache: [`RedisCacheBuilder`].

use std::{fmt, sync::Arc, time::Duration};

use tokio::sync::Semaphore;

use super::{RedisCache, Tier, reads::EntryReads, secret::Secrets, tombstones::TombstoneQueue};
use crate::{
    redis::{Connector, Link, RedisServers, RedisUrlError},
    runtime::{Clock, SystemClock},
    store::{CacheSecret, KeyStore},
};

/// Maximum number of answers that wait to be written, or are being written: the default maximum of look-ups. Beyond it,
/// an answer is not written.
const MAX_FILLS: usize = 4096;
/// Maximum number of writes under way. With more, the last ones would exceed the limit of the link.
const MAX_WRITES: usize = 32;

/// Builds a [`RedisCache`].
pub struct RedisCacheBuilder<S> {
    store: S,
    servers: RedisServers,
    timeout: Duration,
    secret: Option<CacheSecret>,
    namespace: String,
    clock: Arc<dyn Clock>,
}

impl<S: KeyStore> RedisCacheBuilder<S> {
    pub(super) fn new(store: S, servers: RedisServers) -> Self {
        Self {
            store,
            servers,
            timeout: Duration::from_millis(100),
            secret: None,
            namespace: String::new(),
            clock: Arc::new(SystemClock),
        }
    }

    /// Sets the maximum time that a request waits for Redis: 100 ms by default.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Sets a namespace, which separates the entries of this cache from those of others on the same Redis. All nodes of
    /// a service need the same namespace. None by default: entries are bound to the database that they were read from,
    /// which is sufficient unless it is a storage-level copy of another one (see [`RedisCache`]).
    #[must_use]
    pub fn namespace(self, namespace: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), ..self }
    }

    /// Sets the secret that authenticates entries, for a store that has none. All nodes need the same secret. It is not
    /// bound to a database: services with secrets of their own on one Redis need a [`namespace`](Self::namespace) each.
    #[must_use]
    pub fn secret(self, secret: CacheSecret) -> Self {
        Self { secret: Some(secret), ..self }
    }

    /// Sets the clock, which decides when tombstones expire and when the secret may be queried again:
    /// [`SystemClock`] by default. Use the same clock for the
    /// [`Authenticator`](crate::Authenticator), whose clock decides for entries.
    #[must_use]
    pub fn clock(self, clock: Arc<dyn Clock>) -> Self {
        Self { clock, ..self }
    }

    /// Builds the cache. It needs no runtime, and connects at first use.
    ///
    /// # Errors
    ///
    /// If a URL can't be parsed, or the store has no secret and none was given.
    pub fn build(self) -> Result<RedisCache<S>, RedisCacheError> {
        let Self { store, servers, timeout, secret, namespace, clock } = self;
        if secret.is_none() && !store.has_cache_secret() {
            return Err(RedisCacheError::NoSecret);
        }
        let link = Link::new(Connector::new(servers).map_err(RedisCacheError::Url)?, timeout);
        let reads = EntryReads::new(Arc::clone(&link));
        Ok(RedisCache(Arc::new(Tier {
            store,
            tombstones: TombstoneQueue::new(Arc::clone(&link), Arc::clone(&clock)),
            link,
            secrets: Secrets::new(secret, namespace),
            reads,
            fills: Arc::new(Semaphore::new(MAX_FILLS)),
            writes: Arc::new(Semaphore::new(MAX_WRITES)),
            clock,
        })))
    }
}

impl<S: fmt::Debug> fmt::Debug for RedisCacheBuilder<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisCacheBuilder")
            .field("store", &self.store)
            .field("servers", &self.servers)
            .finish_non_exhaustive()
    }
}

/// The reason why a [`RedisCache`] can't be built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RedisCacheError {
    /// A URL can't be used.
    Url(RedisUrlError),
    /// The store has no secret to authenticate entries with, and none was given. Without it, write access to Redis
    /// would grant access to the service.
    NoSecret,
}

impl fmt::Display for RedisCacheError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(error) => error.fmt(f),
            Self::NoSecret => f.write_str(
                "the store has no cache secret (KeyStore::has_cache_secret): set one with RedisCacheBuilder::secret",
            ),
        }
    }
}

impl std::error::Error for RedisCacheError {}
