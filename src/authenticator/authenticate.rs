//! The engine without HTTP: takes a key and returns an [`AuthContext`] or a [`Denial`].

use std::{fmt, net::IpAddr, sync::Arc, time::Duration};

use super::{
    health::Health,
    resolver::{Cached, LookupFuture, Resolver},
    settings::Settings,
};
use crate::{
    context::AuthContext,
    denial::{Denial, Forbidden},
    key::{KeyDigest, KeyScheme, PresentedKey, token},
    runtime::Clock,
    store::{DynKeyStore, KeyStore},
    telemetry,
};

/// Authenticates keys. The layer applies it to HTTP requests; use it directly for sockets and queues.
///
/// Cheap to clone. Clones, and layers created from them, share the cache, the look-ups and the background tasks.
/// Building an authenticator requires no runtime. A look-up requires a Tokio runtime with a timer (`enable_all`).
///
/// ```
/// use tower_api_key::{ApiKeyAuthLayer, Authenticator, Denial, MemoryStore};
///
/// # async fn run() -> Result<(), Denial> {
/// let authenticator = Authenticator::new(MemoryStore::new());
/// let layer = ApiKeyAuthLayer::from(authenticator.clone());
///
/// let caller = authenticator.authenticate("tak_live_…").await?;
/// println!("{}", caller.user().email);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Authenticator(Arc<Resolver>);

impl Authenticator {
    /// Creates an authenticator over `store` with the default settings and the default [`KeyScheme`].
    pub fn new(store: impl KeyStore) -> Self {
        Self::builder(store).build()
    }

    /// Creates a builder of an authenticator over `store`.
    pub fn builder(store: impl KeyStore) -> AuthenticatorBuilder {
        AuthenticatorBuilder {
            store: DynKeyStore::new(store),
            scheme: KeyScheme::default(),
            settings: Settings::default(),
        }
    }

    /// Authenticates `key`.
    ///
    /// Endpoint rules are not checked, because there is no endpoint: see [`AuthContext::can_access_endpoint`]. A key
    /// with address rules is denied; use [`Authenticator::authenticate_from`] for such keys.
    ///
    /// # Errors
    ///
    /// Returns the reason for which the key is denied, or `Unavailable` if it could not be checked.
    pub async fn authenticate(&self, key: &str) -> Result<AuthContext, Denial> {
        self.authenticate_key(key, None).await
    }

    /// Authenticates `key`, which a peer at `address` presents.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`Authenticator::authenticate`].
    pub async fn authenticate_from(
        &self,
        key: &str,
        address: IpAddr,
    ) -> Result<AuthContext, Denial> {
        self.authenticate_key(key, Some(address)).await
    }

    async fn authenticate_key(
        &self,
        key: &str,
        address: Option<IpAddr>,
    ) -> Result<AuthContext, Denial> {
        let outcome = match token(key.as_bytes()) {
            Ok(token) => {
                let digest = KeyDigest::of(token.as_bytes());
                match self.cached(&digest) {
                    Cached::Hit(caller) => Ok(caller),
                    Cached::Negative(reason) => Err(reason.into()),
                    Cached::Miss => match self.parse(token, digest) {
                        Ok(key) => self.look_up(key, address).await,
                        Err(denial) => Err(denial),
                    },
                }
            }
            Err(malformed) => Err(malformed.into()),
        };
        let outcome = outcome.and_then(|caller| {
            let known_address = || {
                if address.is_none() {
                    self.log_unknown_address("call authenticate_from with the address of the peer");
                }
                address
            };
            check_address(&caller, known_address)?;
            caller.count_request();
            Ok(caller)
        });
        outcome.inspect_err(Denial::log)
    }

    /// Invalidates the entries of the keys under a lookup id in the local cache. This node also ignores copies in
    /// shared caches from before the call. Use it for changes made outside the store's knowledge. Revoking through a
    /// [`KeyManager`](crate::KeyManager) or in the database does not require it.
    pub fn invalidate(&self, prefix: &str) {
        self.0.invalidate(prefix);
    }

    /// Returns the state of the caches, for a health check or a dashboard.
    pub fn health(&self) -> Health {
        self.0.health()
    }

    /// Stops the background tasks within 10 s: writes the pending usage, returns the budget leases, and stops
    /// following the change feed. Usage that the store does not accept in this time is lost, and the number of its
    /// keys is logged. Requests are still answered afterwards, like on a node that is cut off from changes. They are
    /// no longer counted, and budgets can't be reserved. Without this call, the tasks end when the last clone is
    /// dropped, and the usage of the last interval is lost.
    ///
    /// ```
    /// # async fn run(app: axum::Router, authenticator: tower_api_key::Authenticator) -> std::io::Result<()> {
    /// let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
    /// let stopped = async { drop(tokio::signal::ctrl_c().await) };
    /// axum::serve(listener, app).with_graceful_shutdown(stopped).await?;
    /// authenticator.shutdown().await;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn shutdown(&self) {
        self.0.stop().await;
    }

    /// Returns the local cache's result for a key. No lock, no I/O, and no allocation.
    #[inline]
    pub(crate) fn cached(&self, key: &KeyDigest) -> Cached {
        self.0.cached(key)
    }

    /// Parses a token of visible ASCII with this digest. Only parsed keys are looked up.
    pub(crate) fn parse(&self, token: &str, digest: KeyDigest) -> Result<PresentedKey, Denial> {
        Ok(self.0.scheme.parse(token, digest)?)
    }

    /// Returns whether `text` is a key of any format.
    pub(crate) fn has_key(&self, text: &str) -> bool {
        self.0.scheme.parse(text, KeyDigest::of(text.as_bytes())).is_ok()
    }

    /// Returns whether `text` is a key of a structured format, with a valid brand and checksum.
    pub(crate) fn has_structured_key(&self, text: &str) -> bool {
        let key = self.0.scheme.parse(text, KeyDigest::of(text.as_bytes()));
        key.is_ok_and(|key| key.is_structured)
    }

    /// Logs once that a key with address rules is denied because its caller's address is unknown. `remedy` describes
    /// how to configure the address.
    pub(crate) fn log_unknown_address(&self, remedy: &'static str) {
        telemetry::address_unknown(remedy, &self.0.unknown_address);
    }

    /// Looks up a key in the store. Concurrent look-ups of one key share one flight.
    pub(crate) fn look_up(&self, key: PresentedKey, address: Option<IpAddr>) -> LookupFuture {
        self.0.look_up(key, address)
    }

    /// Returns whether this authenticator created the context.
    pub(crate) fn is_origin_of(&self, caller: &AuthContext) -> bool {
        caller.is_from(&self.0.origin)
    }

    /// Creates an authenticator over the same store with another scheme. Nothing else is shared.
    pub(crate) fn with_scheme(&self, scheme: KeyScheme) -> Self {
        let Resolver { store, settings, .. } = &*self.0;
        AuthenticatorBuilder { store: store.clone(), scheme, settings: settings.clone() }.build()
    }
}

/// Checks the address rules of a key. A key with address rules is denied if the address is unknown.
pub(crate) fn check_address(
    caller: &AuthContext,
    address: impl FnOnce() -> Option<IpAddr>,
) -> Result<(), Forbidden> {
    let is_allowed = caller.allowed_ips().is_empty()
        || address().is_some_and(|address| caller.can_access_from(address));
    if is_allowed { Ok(()) } else { Err(Forbidden::Address) }
}

impl fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authenticator").field("scheme", &self.0.scheme).finish_non_exhaustive()
    }
}

/// Builds an [`Authenticator`].
#[derive(Debug, Clone)]
pub struct AuthenticatorBuilder {
    store: DynKeyStore,
    scheme: KeyScheme,
    settings: Settings,
}

impl AuthenticatorBuilder {
    /// Sets the formats and hashes of keys.
    #[must_use]
    pub fn scheme(self, scheme: KeyScheme) -> Self {
        Self { scheme, ..self }
    }

    /// Sets the clock, which decides expiry, freshness, when budget leases end, and the waiting times of the failure
    /// limiter: [`SystemClock`](crate::clock::SystemClock) by default. Set the same clock for the store, as far as it has one.
    #[must_use]
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.settings.clock = clock;
        self
    }

    /// Sets the capacity of the local cache in valid keys: 100,000 by default, at about 1 KiB each; 0 disables it.
    #[must_use]
    pub fn cache_capacity(mut self, keys: usize) -> Self {
        self.settings.capacity = keys;
        self
    }

    /// Sets the maximum number of concurrent look-ups: 4,096 by default, at about 4 KiB each. When it is reached, a
    /// request whose key is not in the local cache is answered with 503.
    ///
    /// The last quarter is reserved for keys that this node has verified before. Clients whose network exceeds its
    /// allowance of keys that don't exist may use at most half. The allowance of an IPv4 address or an IPv6 /64 is 10
    /// at once and one in two seconds; that of a /24 or /56 is 4 times as large, of a /48 8 times, and of an IPv6 /32
    /// 32 times. While look-ups wait for the store, the look-ups of such clients go last, one at a time. Behind a
    /// proxy, set [`trusted_proxies`](crate::ApiKeyAuthLayer::trusted_proxies); otherwise all clients count as one.
    #[must_use]
    pub fn max_lookups(mut self, lookups: usize) -> Self {
        self.settings.max_lookups = lookups.max(1);
        self
    }

    /// Sets how long an answer is served after it was read, or after this node was last in sync with the change feed:
    /// 30 s by default. A node in sync continues to serve it. A node that is cut off from changes, or whose store has
    /// no feed, reads the store again after this time. If it is less than the interval at which the feed is polled (5
    /// s in PostgreSQL), idle nodes read the store between polls.
    #[must_use]
    pub fn max_staleness(mut self, limit: Duration) -> Self {
        self.settings.max_staleness = limit;
        self
    }

    /// Sets how much longer a valid key is served while the store fails: 60 s by default; 0 disables it. A node that
    /// is cut off from the store and the feed serves a revoked key for at most `max_staleness + stale_if_error`. The
    /// first request after `max_staleness` waits for the store's own timeout, so a shorter time has no effect.
    #[must_use]
    pub fn stale_if_error(mut self, limit: Duration) -> Self {
        self.settings.stale_if_error = limit;
        self
    }

    /// Sets the interval at which usage is written to the store: one second by default. If the process is killed, the
    /// usage since the last write is lost: at most one interval, or everything since the store became unavailable.
    #[must_use]
    pub fn usage_interval(mut self, interval: Duration) -> Self {
        self.settings.usage_interval = Some(interval);
        self
    }

    /// Sets the lifetime of a budget lease: 30 s by default, clamped to between one second and one day. While the
    /// store is unavailable, reservations succeed from the lease for this time. The leased amount of a killed node is
    /// unavailable to other nodes for this time.
    #[must_use]
    pub fn lease_lifetime(mut self, lifetime: Duration) -> Self {
        const DAY: Duration = Duration::from_secs(86_400);
        self.settings.lease_lifetime = lifetime.clamp(Duration::from_secs(1), DAY);
        self
    }

    /// Disables usage recording: requests, tokens, cost, and when a key was last used. A reservation for a key with a
    /// budget then fails with [`Denial::Unsupported`] (500).
    #[must_use]
    pub fn without_usage(mut self) -> Self {
        self.settings.usage_interval = None;
        self
    }

    /// Builds the authenticator. No runtime is required.
    pub fn build(self) -> Authenticator {
        let Self { store, scheme, settings } = self;
        Authenticator(Resolver::new(store, scheme, settings))
    }
}
