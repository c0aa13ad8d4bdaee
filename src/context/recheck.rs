//! Rechecks a key whose request was let in: [`AuthContext::recheck`].

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, Weak},
};

use super::AuthContext;
use crate::{
    denial::Denial,
    error::StoreError,
    key::KeyDigest,
    metering::Recorder,
    record::KeyRecord,
    store::{Proof, VerifiedKey},
};

/// What a recheck needs, and the engine that verified the key.
pub(crate) struct Verified {
    /// The lookup id, if it is not that of the record.
    pub(crate) id: Option<Box<str>>,
    /// Digest under which the local cache stores the key.
    pub(crate) digest: KeyDigest,
    /// `None` if the store verifies keys elsewhere.
    pub(crate) proof: Option<Proof>,
    pub(crate) engine: Weak<dyn Engine>,
}

/// Functions of the engine that a context needs. The engine is in a module above this one.
pub(crate) trait Engine: Send + Sync {
    /// Rechecks a key that this engine has verified.
    fn recheck(self: Arc<Self>, key: VerifiedKey) -> RecheckFuture;

    /// Logs and counts a request with the previous secret of a key.
    fn note_previous_secret(&self, key: &KeyRecord);

    /// Returns the recorder of usage.
    fn recorder(&self) -> &Arc<Recorder>;
}

pub(crate) type RecheckFuture = Pin<Box<dyn Future<Output = Result<AuthContext, Denial>> + Send>>;

impl AuthContext {
    /// Checks the key again, without the key itself: for streams, WebSockets and long jobs, which outlive the check
    /// of their request. Returns the current context. End the stream on any error.
    ///
    /// If the local cache has a fresh entry of the key, this is a cache hit without I/O. Otherwise the key is looked
    /// up in the store by its lookup id, without shared caches, and the row must have the hash that the key has
    /// matched. If `key_hash` has changed, even to another hash of the same key, the result is `InvalidKey`, and the
    /// client has to present the key again. Concurrent rechecks of one key share one look-up.
    ///
    /// The first call after this node has received a revocation returns the error. The bounds are those of a new
    /// request, plus the interval of the calls: milliseconds if the store notifies, `poll_interval` (5 s) if it is
    /// polled, `max_staleness` (30 s) without a feed, `max_staleness + stale_if_error` (90 s) on a node that is cut
    /// off.
    ///
    /// This checks that the key and its owner are active, and the expiry by the clock. It does not count a request,
    /// and does not check endpoint and address rules; use [`can_access_endpoint`](Self::can_access_endpoint) and
    /// [`can_access_from`](Self::can_access_from) of the returned context. A context that was created by
    /// [`AuthContext::unverified`] returns a clone of itself.
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
    /// `InvalidKey` if the key is no longer valid or its hash has changed. `Unavailable` if the store fails for
    /// longer than `stale_if_error` allows, too many look-ups are in progress, or the authenticator was dropped.
    /// `Unsupported` if the entry is no longer fresh and the store verifies keys elsewhere
    /// ([`Lookup::assume_verified`](crate::store::Lookup::assume_verified)), which requires the key itself.
    pub async fn recheck(&self) -> Result<AuthContext, Denial> {
        let Some(Verified { id, digest, proof, .. }) = &self.0.verified else {
            return Ok(self.clone());
        };
        let id = id.as_deref().unwrap_or(&self.0.record.prefix).into();
        let key = VerifiedKey { id, digest: *digest, proof: proof.clone() };
        self.engine()?.recheck(key).await
    }

    /// Returns the proof of the match; `None` for a context that was not created by an authenticator, or if the store
    /// verifies keys elsewhere.
    pub(crate) fn verified_by(&self) -> Option<&Proof> {
        self.0.verified.as_ref()?.proof.as_ref()
    }

    /// Returns the engine that created the context.
    ///
    /// # Errors
    ///
    /// `Unavailable` if the engine was dropped.
    pub(super) fn engine(&self) -> Result<Arc<dyn Engine>, Denial> {
        let engine = self.0.verified.as_ref().and_then(|it| it.engine.upgrade());
        let dropped = "the authenticator that created the context was dropped";
        engine.ok_or_else(|| StoreError::unavailable(dropped).into())
    }
}
