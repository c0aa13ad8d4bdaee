//! The secret that authenticates entries: [`Secrets`].

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use super::RedisCache;
use crate::{
    runtime::{Background, Moment},
    store::{CacheSecret, KeyStore},
    telemetry,
};

/// The configured secret, or the store's. Redis is not used until it is known.
pub(super) struct Secrets {
    given: Option<CacheSecret>,
    /// The namespace; empty if there is none.
    namespace: String,
    cached: Mutex<CachedSecret>,
    is_outdated: AtomicBool,
    querying: Background,
}

#[derive(Default)]
struct CachedSecret {
    secret: Option<CacheSecret>,
    queried_at: Option<Moment>,
}

/// Pause before a failed query is retried.
const PAUSE: Duration = Duration::from_millis(500);
/// Minimum interval of queries that entries under another secret cause.
const QUERY_INTERVAL: Duration = Duration::from_secs(10);

/// Binds the secret to the namespace. It is derived once, not for each request.
fn within(namespace: &str, secret: CacheSecret) -> CacheSecret {
    if namespace.is_empty() { secret } else { secret.with_scope(&format!("namespace:{namespace}")) }
}

impl Secrets {
    pub(super) fn new(given: Option<CacheSecret>, namespace: String) -> Self {
        Self {
            given: given.map(|secret| within(&namespace, secret)),
            namespace,
            cached: Mutex::default(),
            is_outdated: AtomicBool::new(false),
            querying: Background::default(),
        }
    }

    /// Returns the secret, if it is known. Otherwise it starts a query.
    pub(super) fn current<S: KeyStore>(&self, cache: &RedisCache<S>) -> Option<CacheSecret> {
        if let Some(given) = &self.given {
            return Some(given.clone());
        }
        let secret = self.cached.lock().unwrap_or_else(PoisonError::into_inner).secret.clone();
        if secret.is_none() || self.is_outdated.load(Ordering::Relaxed) {
            let weak = std::sync::Arc::downgrade(&cache.0);
            self.querying.ensure(|| async move {
                while let Some(tier) = weak.upgrade() {
                    match tier.store.cache_secret().await {
                        Ok(secret) => {
                            let namespace = &tier.secrets.namespace;
                            let secret = secret.map(|secret| within(namespace, secret));
                            if secret.is_none() {
                                telemetry::no_cache_secret();
                            }
                            let queried_at = Some(tier.clock.read());
                            let cached = CachedSecret { secret, queried_at };
                            *tier.secrets.cached.lock().unwrap_or_else(PoisonError::into_inner) =
                                cached;
                            tier.secrets.is_outdated.store(false, Ordering::Relaxed);
                            return;
                        }
                        Err(error) => telemetry::cache_secret_unknown(&error),
                    }
                    drop(tier);
                    tokio::time::sleep(PAUSE).await;
                }
            });
        }
        secret
    }

    /// Queries the secret again, because an entry was written under another secret.
    pub(super) fn refresh<S: KeyStore>(&self, cache: &RedisCache<S>) {
        let queried_at = self.cached.lock().unwrap_or_else(PoisonError::into_inner).queried_at;
        if queried_at.is_some_and(|queried| cache.0.clock.read().since(queried) > QUERY_INTERVAL) {
            self.is_outdated.store(true, Ordering::Relaxed);
            // This starts the query; the next look-up gets the secret.
            let _ = self.current(cache);
        }
    }
}
