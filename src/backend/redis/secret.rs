//! The secret that entries are authenticated with: [`Secrets`].

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use super::RedisCache;
use crate::{
    runtime::Background,
    store::{CacheSecret, KeyStore},
    telemetry,
};

/// The secret that was given, or the store's. Until that is known Redis is not asked.
pub(super) struct Secrets {
    given: Option<CacheSecret>,
    /// Empty if there is none.
    namespace: String,
    found: Mutex<Found>,
    is_outdated: AtomicBool,
    asking: Background,
}

#[derive(Default)]
struct Found {
    secret: Option<CacheSecret>,
    asked_at: Option<Instant>,
}

/// A store that could not be asked is asked again after this.
const PAUSE: Duration = Duration::from_millis(500);
/// No secret is asked for more often because of entries under another one.
const ASKED_EVERY: Duration = Duration::from_secs(10);

/// Derived once, and not for each request.
fn within(namespace: &str, secret: CacheSecret) -> CacheSecret {
    if namespace.is_empty() { secret } else { secret.with_scope(&format!("namespace:{namespace}")) }
}

impl Secrets {
    pub(super) fn new(given: Option<CacheSecret>, namespace: String) -> Self {
        Self {
            given: given.map(|secret| within(&namespace, secret)),
            namespace,
            found: Mutex::default(),
            is_outdated: AtomicBool::new(false),
            asking: Background::default(),
        }
    }

    /// The secret, if it is known yet; if not, it is asked for.
    pub(super) fn current<S: KeyStore>(&self, cache: &RedisCache<S>) -> Option<CacheSecret> {
        if let Some(given) = &self.given {
            return Some(given.clone());
        }
        let secret = self.found.lock().unwrap_or_else(PoisonError::into_inner).secret.clone();
        if secret.is_none() || self.is_outdated.load(Ordering::Relaxed) {
            let weak = std::sync::Arc::downgrade(&cache.0);
            self.asking.ensure(|| async move {
                while let Some(tier) = weak.upgrade() {
                    match tier.store.cache_secret().await {
                        Ok(secret) => {
                            let namespace = &tier.secrets.namespace;
                            let secret = secret.map(|secret| within(namespace, secret));
                            if secret.is_none() {
                                telemetry::no_cache_secret();
                            }
                            let found = Found { secret, asked_at: Some(Instant::now()) };
                            *tier.secrets.found.lock().unwrap_or_else(PoisonError::into_inner) =
                                found;
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

    /// An entry was written under another secret: the store may have a new one.
    pub(super) fn ask_again<S: KeyStore>(&self, cache: &RedisCache<S>) {
        let asked_at = self.found.lock().unwrap_or_else(PoisonError::into_inner).asked_at;
        if asked_at.is_some_and(|asked| asked.elapsed() > ASKED_EVERY) {
            self.is_outdated.store(true, Ordering::Relaxed);
            // Whoever comes next finds it out.
            let _ = self.current(cache);
        }
    }
}
