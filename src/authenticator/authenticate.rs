//! The engine, free of HTTP: a key in, an [`AuthContext`] or a [`Denial`] out.

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
    store::{DynKeyStore, KeyStore},
    telemetry,
};

/// Finds out whose a key is. The layer is this over HTTP; use it directly for sockets and queues.
///
/// Cheap to clone; clones, and layers made from them, share everything. Building one needs no runtime;
/// a look-up needs a Tokio runtime with its timer (`enable_all`).
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
    /// An authenticator over `store` with the default settings and the default [`KeyScheme`].
    pub fn new(store: impl KeyStore) -> Self {
        Self::builder(store).build()
    }

    /// An authenticator over `store` with settings of your own.
    pub fn builder(store: impl KeyStore) -> AuthenticatorBuilder {
        AuthenticatorBuilder {
            store: DynKeyStore::new(store),
            scheme: KeyScheme::default(),
            settings: Settings::default(),
        }
    }

    /// Finds out whose `key` is.
    ///
    /// Endpoint rules are not asked, because there is no endpoint: see
    /// [`AuthContext::can_access_endpoint`]. A key with address rules is refused; for one, use
    /// [`Authenticator::authenticate_from`].
    ///
    /// # Errors
    ///
    /// Why the key is refused, or that it could not be checked.
    pub async fn authenticate(&self, key: &str) -> Result<AuthContext, Denial> {
        self.find_out(key, None).await
    }

    /// Finds out whose `key` is that a peer at `address` presents.
    ///
    /// # Errors
    ///
    /// Those of [`Authenticator::authenticate`].
    pub async fn authenticate_from(
        &self,
        key: &str,
        address: IpAddr,
    ) -> Result<AuthContext, Denial> {
        self.find_out(key, Some(address)).await
    }

    async fn find_out(&self, key: &str, address: Option<IpAddr>) -> Result<AuthContext, Denial> {
        let outcome = match token(key.as_bytes()) {
            Ok(token) => match self.cached(token) {
                Cached::Hit(caller) => Ok(caller),
                Cached::Negative(reason) => Err(reason.into()),
                Cached::Miss => match self.parse(token) {
                    Ok(key) => self.look_up(key, address).await,
                    Err(denial) => Err(denial),
                },
            },
            Err(malformed) => Err(malformed.into()),
        };
        let outcome = outcome.and_then(|caller| {
            let known_address = || {
                if address.is_none() {
                    self.address_is_unknown("call authenticate_from with the address of the peer");
                }
                address
            };
            check_address(&caller, known_address)?;
            caller.count_request();
            Ok(caller)
        });
        outcome.inspect_err(Denial::log)
    }

    /// Forgets what this node remembers of the keys under a lookup prefix, and trusts no copy of them
    /// from before. For callers who know of a change that the store does not say: revoking through a
    /// [`KeyManager`](crate::KeyManager) or in the database needs no such word.
    pub fn invalidate(&self, prefix: &str) {
        self.0.invalidate(prefix);
    }

    /// How the caches stand, for a health check or a dashboard.
    pub fn health(&self) -> Health {
        self.0.health()
    }

    /// Ends the work in the background: writes the usage that is not written yet and hands back the leases of
    /// budgets, within 10 s (what the store does not take until then is lost, and the log says of how many keys),
    /// and stops listening to the store. Requests are still answered, from then on like those of a node that is cut
    /// off from changes, and no longer counted; nothing can be reserved. Without this, the work ends with the last
    /// clone, and the usage of the last interval is lost.
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

    /// Whose key it is, if that is remembered. No lock, no I/O, and no allocation.
    #[inline]
    pub(crate) fn cached_context(&self, key: &[u8]) -> Option<AuthContext> {
        self.0.cached_context(&KeyDigest::of(key))
    }

    /// What is remembered of the key in `token`.
    #[inline]
    pub(crate) fn cached(&self, token: &str) -> Cached {
        self.0.cached(token)
    }

    /// Parses a token of visible ASCII. Nothing is looked up before this.
    pub(crate) fn parse(&self, token: &str) -> Result<PresentedKey, Denial> {
        Ok(self.0.scheme.parse(token)?)
    }

    /// Whether `text` is a key of a structured format: its brand and its check are right.
    pub(crate) fn has_structured_key(&self, text: &str) -> bool {
        self.0.scheme.parse(text).is_ok_and(|key| key.is_structured)
    }

    /// A key with address rules is denied because the address of its caller is not known. `remedy` is what makes
    /// it known; it is logged once.
    pub(crate) fn address_is_unknown(&self, remedy: &'static str) {
        telemetry::address_unknown(remedy, &self.0.unknown_address);
    }

    /// Asks the store, together with everybody else who wants to know the same.
    pub(crate) fn look_up(&self, key: PresentedKey, address: Option<IpAddr>) -> LookupFuture {
        self.0.look_up(key, address)
    }

    /// Whether this authenticator made the context.
    pub(crate) fn made(&self, caller: &AuthContext) -> bool {
        caller.is_from(&self.0.origin)
    }

    /// The same store with another scheme. Shares nothing else.
    pub(crate) fn with_scheme(&self, scheme: KeyScheme) -> Self {
        let Resolver { store, settings, .. } = &*self.0;
        AuthenticatorBuilder { store: store.clone(), scheme, settings: *settings }.build()
    }
}

/// A key with address rules is refused where the address is not known.
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
    /// Sets how keys look and are hashed, and the clock.
    #[must_use]
    pub fn scheme(self, scheme: KeyScheme) -> Self {
        Self { scheme, ..self }
    }

    /// How many valid keys are remembered: 100,000 by default, at about 1 KiB each; 0 for none.
    #[must_use]
    pub fn cache_capacity(mut self, keys: usize) -> Self {
        self.settings.capacity = keys;
        self
    }

    /// Sets how many look-ups may be under way: 4,096 by default, at about 3 KiB each. Past that, a key that
    /// is not in the local cache is answered 503.
    ///
    /// The last quarter is kept for keys that this node has verified before. Half is the most that clients
    /// may take up whose network presents keys that don't exist: beyond 10 at once and one in two seconds
    /// for an IPv4 address or an IPv6 /64, beyond 4 times as many for a /24 or /56, 8 times for a /48 and 32
    /// times for an IPv6 /32. Where look-ups wait for the store, theirs go last, one at a time. Behind a
    /// proxy, set [`trusted_proxies`](crate::ApiKeyAuthLayer::trusted_proxies), or all clients are one.
    #[must_use]
    pub fn max_lookups(mut self, lookups: usize) -> Self {
        self.settings.max_lookups = lookups.max(1);
        self
    }

    /// For how long an answer is served after it was read, or after this node was last in sync with the
    /// store's changes: 30 s by default. A node in sync goes on serving it; a node that is cut off from
    /// changes, or whose store has no feed, asks again after this. Less than the interval at which the feed
    /// is polled (5 s in PostgreSQL) makes idle nodes ask between polls.
    #[must_use]
    pub fn max_staleness(mut self, limit: Duration) -> Self {
        self.settings.max_staleness = limit;
        self
    }

    /// For how much longer a valid key is served while the store fails: 60 s by default, 0 turns it off. A
    /// node that is cut off from everything serves a revoked key for `max_staleness + stale_if_error` at
    /// most. The first request after `max_staleness` waits until the store's own timeout shows that it
    /// fails, so that a time shorter than that is of no use.
    #[must_use]
    pub fn stale_if_error(mut self, limit: Duration) -> Self {
        self.settings.stale_if_error = limit;
        self
    }

    /// How often usage is written to the store: every second by default. When the process is killed, what was
    /// used since the last write is lost: one interval at most, or all since the store went away.
    #[must_use]
    pub fn usage_interval(mut self, interval: Duration) -> Self {
        self.settings.usage_interval = Some(interval);
        self
    }

    /// For how long this node may spend a slice of a budget without a word of the store: 30 s by default. So long
    /// holds go on while the store is away, and so long what a killed node had leased is lost to the others. Between
    /// a second and a day.
    #[must_use]
    pub fn lease_lifetime(mut self, lifetime: Duration) -> Self {
        const DAY: Duration = Duration::from_secs(86_400);
        self.settings.lease_lifetime = lifetime.clamp(Duration::from_secs(1), DAY);
        self
    }

    /// Records no usage: neither requests, tokens and cost, nor when a key was last used. A reservation
    /// for a key with a budget is [`Denial::Unsupported`] then, 500.
    #[must_use]
    pub fn without_usage(mut self) -> Self {
        self.settings.usage_interval = None;
        self
    }

    /// Builds the authenticator. Needs no runtime.
    pub fn build(self) -> Authenticator {
        let Self { store, scheme, settings } = self;
        Authenticator(Resolver::new(store, scheme, settings))
    }
}
