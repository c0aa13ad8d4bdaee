//! Another check of a key whose request was let in: [`AuthContext::recheck`].

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Weak},
};

use super::AuthContext;
use crate::{denial::Denial, error::StoreError, metering::Recorder, store::VerifiedKey};

/// The key that was verified, and the engine that did it.
pub(crate) struct Verified {
    pub(crate) key: Arc<VerifiedKey>,
    pub(crate) engine: Weak<dyn Engine>,
}

/// The engine above this module, as far as a context needs it.
pub(crate) trait Engine: Send + Sync {
    /// Checks a key again that this engine has verified.
    fn recheck(self: Arc<Self>, key: Arc<VerifiedKey>) -> RecheckFuture;

    /// Where usage goes.
    fn recorder(&self) -> &Arc<Recorder>;
}

pub(crate) type RecheckFuture = Pin<Box<dyn Future<Output = Result<AuthContext, Denial>> + Send>>;

impl AuthContext {
    /// Checks the key again, without the key: for a stream, a WebSocket or a long job, which outlive the check of
    /// their request. Returns the context as it is now; end the stream at any error.
    ///
    /// While the local cache has a fresh entry of the key, this is a hit, without I/O. Otherwise it is a look-up in
    /// the store by the lookup id, past shared caches, and the row must have the hash that the key has matched. If
    /// `key_hash` has changed, also to another hash of the same key, the result is `InvalidKey`, and the client has to
    /// present the key again. Concurrent rechecks of one key are one look-up.
    ///
    /// The first call after this node learns of a revocation returns the error. The bounds are those of a new
    /// request, plus the interval of the calls: milliseconds where the store notifies, `poll_interval` (5 s) where it
    /// is polled, `max_staleness` (30 s) without a feed, `max_staleness + stale_if_error` (90 s) on a node that is cut
    /// off.
    ///
    /// This checks that the key and its owner are active, and the expiry by the clock. It counts no request, and
    /// checks neither endpoint nor address rules; for these, the returned context has
    /// [`can_access_endpoint`](Self::can_access_endpoint) and [`can_access_from`](Self::can_access_from). A context
    /// made by [`AuthContext::unverified`] returns itself.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tower_api_key::{AuthContext, Denial};
    ///
    /// async fn push_events(caller: AuthContext) -> Result<(), Denial> {
    ///     let mut ticks = tokio::time::interval(Duration::from_secs(1));
    ///     loop {
    ///         ticks.tick().await;
    ///         let caller = caller.recheck().await?;
    ///         send_event(&caller).await;
    ///     }
    /// }
    /// # async fn send_event(_: &AuthContext) {}
    /// ```
    ///
    /// # Errors
    ///
    /// `InvalidKey` if the key is no longer valid or its hash has changed. `Unavailable` if the store fails for longer
    /// than `stale_if_error` allows, too many look-ups are under way, or the authenticator was dropped. `Unsupported` if the entry is no longer fresh
    /// and the store verifies keys elsewhere ([`Lookup::assume_verified`](crate::Lookup::assume_verified)): it needs the key itself.
    pub async fn recheck(&self) -> Result<AuthContext, Denial> {
        let Some(verified) = &self.0.verified else { return Ok(self.clone()) };
        self.engine()?.recheck(Arc::clone(&verified.key)).await
    }

    /// The key that was verified; `None` for a context that no authenticator made.
    pub(crate) fn verified_key(&self) -> Option<&Arc<VerifiedKey>> {
        self.0.verified.as_ref().map(|it| &it.key)
    }

    /// The engine that made the context.
    ///
    /// # Errors
    ///
    /// `Unavailable` if it was dropped.
    pub(super) fn engine(&self) -> Result<Arc<dyn Engine>, Denial> {
        let engine = self.0.verified.as_ref().and_then(|it| it.engine.upgrade());
        let dropped = "the authenticator that made the context was dropped";
        engine.ok_or_else(|| StoreError::unavailable(dropped).into())
    }
}
