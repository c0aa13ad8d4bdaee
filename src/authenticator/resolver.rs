//! Resolves keys from the local cache, or by one look-up for all concurrent requests: [`Resolver`].

mod judge;
mod recheck;

use std::{
    cell::OnceCell,
    fmt,
    future::Future,
    net::IpAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::runtime::Handle;

use super::{
    admission::Admission,
    change_feed::{FeedState, follow},
    health::Health,
    local_cache::{CacheEntry, LocalCache},
    settings::Settings,
    single_flight::{Finished, Joined, Outcome, SharedLookup, SingleFlight},
};
use crate::{
    coherence::{Age, Seen, Subject, View},
    context::{AuthContext, Origin},
    denial::{Denial, InvalidKey},
    error::{StoreError, StoreErrorKind},
    key::{HashFingerprint, KeyDigest, KeyScheme, PresentedKey},
    metering::Recorder,
    runtime::{Background, Moment, within},
    store::{Answer, DynKeyStore, KeyStore, Lookup, LookupKey, Priority, Proof, Source},
    telemetry::{self, FirstTime, PreviousSecretLog},
};

/// Tiers of one node, from the local cache down.
pub(crate) struct Resolver {
    pub(crate) store: DynKeyStore,
    pub(crate) scheme: KeyScheme,
    pub(crate) settings: Settings,
    pub(crate) origin: Origin,
    /// Whether an unknown client address was logged.
    pub(crate) unknown_address: FirstTime,
    view: Arc<View>,
    cache: LocalCache,
    single_flight: Arc<SingleFlight>,
    admission: Admission,
    feed: Background,
    feed_state: Arc<FeedState>,
    usage: Arc<Recorder>,
    /// Whether the store failed at the last look-up.
    is_store_failing: AtomicBool,
    /// Whether a missing capability of the store was logged.
    warned: FirstTime,
    previous_secrets: PreviousSecretLog,
}

/// Result of a probe of the local cache.
pub(crate) enum Cached {
    Hit(AuthContext),
    Negative(InvalidKey),
    /// There is no entry that may be served: a look-up is required.
    Miss,
}

/// Look-up in progress.
pub(crate) type LookupFuture = Pin<Box<dyn Future<Output = Outcome> + Send>>;

/// Deadline of a call of the store. A store that exceeds it is failing, whatever deadlines it has itself.
const LOOKUP_DEADLINE: Duration = Duration::from_secs(15);
/// Deadline of a request that waits for a look-up on a task. While a request polls its look-up, only the deadline of the
/// call of the store applies.
const WAITING_DEADLINE: Duration = Duration::from_secs(20);
/// Pauses before the attempts of a look-up. It is retried if the answer is older than a known change, because a
/// replica then lags behind.
const RETRIES: [Duration; 4] = [
    Duration::ZERO,
    Duration::from_millis(20),
    Duration::from_millis(100),
    Duration::from_millis(400),
];

impl Resolver {
    pub(crate) fn new(store: DynKeyStore, scheme: KeyScheme, settings: Settings) -> Arc<Self> {
        let view = View::new(settings.max_staleness, settings.stale_if_error);
        Arc::new(Self {
            usage: Recorder::new(
                store.clone(),
                Arc::clone(&settings.clock),
                settings.usage_interval,
                settings.lease_lifetime,
            ),
            store,
            scheme,
            origin: Origin::default(),
            unknown_address: FirstTime::default(),
            view: Arc::clone(&view),
            feed_state: FeedState::new(view),
            cache: LocalCache::new(&settings),
            single_flight: Arc::default(),
            admission: Admission::new(settings.max_lookups),
            feed: Background::default(),
            is_store_failing: AtomicBool::new(false),
            warned: FirstTime::default(),
            previous_secrets: PreviousSecretLog::default(),
            settings,
        })
    }

    /// Returns the local cache's result for a key. No lock, no I/O, and no allocation.
    #[inline]
    pub(crate) fn cached(&self, key: &KeyDigest) -> Cached {
        if let Some(entry) = self.cache.valid(key) {
            let is_fresh = entry.age(&self.view, self.now()) == Age::Fresh;
            return if is_fresh { Cached::Hit(entry.caller) } else { Cached::Miss };
        }
        match self.cache.negative(key) {
            Some(entry) => self.servable(CacheEntry::Negative(entry)),
            None => Cached::Miss,
        }
    }

    fn servable(&self, entry: CacheEntry) -> Cached {
        match entry {
            CacheEntry::Valid(entry) if entry.age(&self.view, self.now()) == Age::Fresh => {
                Cached::Hit(entry.caller)
            }
            CacheEntry::Negative(it) if it.is_servable(&self.view, self.now()) => {
                Cached::Negative(it.reason)
            }
            CacheEntry::Valid(_) | CacheEntry::Negative(_) => Cached::Miss,
        }
    }

    /// Looks up a key in the store. Concurrent look-ups of one key share one flight.
    pub(crate) fn look_up(
        self: &Arc<Self>,
        key: PresentedKey,
        address: Option<IpAddr>,
    ) -> LookupFuture {
        self.look_up_key(LookupKey::Presented(Arc::new(key)), address)
    }

    fn look_up_key(self: &Arc<Self>, key: LookupKey, address: Option<IpAddr>) -> LookupFuture {
        let resolver = Arc::clone(self);
        Box::pin(async move {
            if Handle::try_current().is_err() {
                return Err(StoreError::unavailable("not called within a Tokio runtime").into());
            }
            resolver.ensure_tasks();
            let digest = key.cache_digest();
            loop {
                let waiter = match resolver.join(&key, address) {
                    Ok(Joined::Wait(waiter)) => waiter,
                    Ok(Joined::Cached(outcome)) => return outcome,
                    Err(error) => {
                        return resolver
                            .context_while_failing(&digest)
                            .ok_or(Denial::Unavailable(error));
                    }
                };
                if resolver.is_store_failing.load(Ordering::Relaxed) {
                    // It may be answered at once, which shows that the store has recovered.
                    waiter.begin().await;
                    if resolver.is_store_failing.load(Ordering::Relaxed)
                        && let Some(caller) = resolver.context_while_failing(&digest)
                    {
                        // The look-up continues on a task. Its result shows when the store has recovered.
                        return Ok(caller);
                    }
                }
                match waiter.outcome(WAITING_DEADLINE).await {
                    Some(Err(Denial::Unavailable(error))) => {
                        return resolver
                            .context_while_failing(&digest)
                            .ok_or(Denial::Unavailable(error));
                    }
                    Some(outcome) => return outcome,
                    None => {}
                }
            }
        })
    }

    /// Invalidates the entries of the keys under `prefix` in the local cache, and ignores copies in shared caches
    /// from before the call.
    pub(crate) fn invalidate(&self, prefix: &str) {
        // A replica keeps its entries for longer than the view keeps the minimum revision.
        self.store.invalidate(prefix);
        self.view.invalidate(prefix, self.now());
    }

    /// Stops following the change feed permanently, and writes the pending usage.
    pub(crate) async fn stop(&self) {
        self.feed.stop();
        self.usage.stop().await;
    }

    pub(crate) fn health(&self) -> Health {
        let now = self.now();
        Health {
            cached_keys: self.cache.len(),
            lookups_under_way: self.single_flight.len(),
            is_store_failing: self.is_store_failing.load(Ordering::Relaxed),
            last_sync: self.view.freshness.last_sync().map(|sync| now.since(sync)),
            synced_to: self.view.freshness.synced_to(),
            feed: self.feed_state.status(),
            replica: self.store.replica_status(),
        }
    }

    fn now(&self) -> Moment {
        self.settings.clock.read()
    }

    /// Starts the tasks that follow the change feed and write usage, if they do not run.
    fn ensure_tasks(&self) {
        self.usage.ensure_tasks();
        self.feed.ensure(|| {
            let clock = Arc::clone(&self.settings.clock);
            follow(self.store.clone(), Arc::downgrade(&self.feed_state), clock)
        });
    }

    /// Returns the context of a valid key that may be served because the store fails.
    fn context_while_failing(&self, key: &KeyDigest) -> Option<AuthContext> {
        let entry = self.cache.valid(key)?;
        (entry.age(&self.view, self.now()) != Age::Expired).then_some(entry.caller)
    }

    fn join(
        self: &Arc<Self>,
        key: &LookupKey,
        address: Option<IpAddr>,
    ) -> Result<Joined, StoreError> {
        let prefix = Subject::Prefix(key.id().into());
        let generation = self.view.minimum_revisions.generation(&prefix);
        let digest = key.cache_digest();
        // The only probe of the cache on this way: a look-up may have finished since the one before it.
        let entry = OnceCell::new();
        let entry = || entry.get_or_init(|| self.cache.entry(&digest)).as_ref();
        let cached = || match self.servable(entry()?.clone()) {
            Cached::Hit(caller) => Some(Ok(caller)),
            Cached::Negative(reason) => Some(Err(reason.into())),
            Cached::Miss => None,
        };
        let admit = |under_way| {
            let LookupKey::Presented(key) = key else {
                return self.admission.admit_verified(under_way);
            };
            let is_known = entry().is_some_and(CacheEntry::was_verified);
            let now = self.now().monotonic();
            self.admission.admit(&self.scheme, (key, is_known), address, now, under_way)
        };
        self.single_flight.join(
            (key.lookup_digest(), generation),
            &self.view,
            cached,
            admit,
            |seen, priority, leader| {
                let (resolver, key) = (Arc::clone(self), key.clone());
                let proof = entry().and_then(CacheEntry::proof);
                Box::pin(async move {
                    let look_up = resolver.look_up_in_store(
                        (key, proof),
                        prefix,
                        address,
                        seen,
                        priority,
                        leader.lookup(),
                    );
                    let finished = look_up.await;
                    if priority != Priority::Known {
                        let now = resolver.now().monotonic();
                        resolver.admission.count(&finished.outcome, address, now);
                    }
                    leader.finish_with(finished);
                })
            },
        )
    }

    /// Reads the store, checks what does not depend on the request, and caches the answer.
    async fn look_up_in_store(
        self: &Arc<Self>,
        (key, proof): (LookupKey, Option<HashFingerprint>),
        prefix: Subject,
        address: Option<IpAddr>,
        mut seen: Seen,
        priority: Priority,
        shared: &Arc<SharedLookup>,
    ) -> Finished {
        let mut proofs: Vec<_> = proof.map(Proof::Seen).into_iter().collect();
        if let LookupKey::Verified(key) = &key {
            proofs.extend(key.proof.clone());
        }
        for (attempt, pause) in RETRIES.into_iter().enumerate() {
            if attempt > 0 {
                tokio::time::sleep(pause).await;
                seen = self.view.minimum_revisions.seen();
            }
            let mut lookup = Lookup::new(
                key.clone(),
                self.scheme.clone(),
                Arc::clone(&self.settings.clock),
                address,
                Arc::clone(&self.view),
            )
            .with_waiters(priority, Arc::clone(shared) as _);
            for proof in &proofs {
                lookup = lookup.with_proof(proof.clone());
            }
            if attempt > 0 || !lookup.is_presented() {
                lookup = lookup.without_copies();
            }
            let answer = match self.resolve_in_store(&lookup).await {
                Ok(answer) => answer,
                Err(denial) => return Finished { outcome: Err(denial), judged: None },
            };
            // Taken before the answer is judged: the outcome need not include later changes.
            let judged = Some(self.view.minimum_revisions.seen());
            if let Some(outcome) = self.judge(answer, &lookup, &prefix, seen) {
                return Finished { outcome, judged };
            }
        }
        let lagging = "the answer is older than known changes: a replica lags behind";
        Finished { outcome: Err(StoreError::unavailable(lagging).into()), judged: None }
    }

    async fn resolve_in_store(&self, lookup: &Lookup) -> Result<Answer, Denial> {
        let answer = within(LOOKUP_DEADLINE, self.store.resolve(lookup)).await;
        let answer = answer.unwrap_or_else(|| Err(StoreError::timeout(LOOKUP_DEADLINE)));
        match &answer {
            Ok(answer) => match answer.source() {
                Source::Store | Source::Replica => {
                    self.is_store_failing.store(false, Ordering::Relaxed);
                }
                Source::Fallback => self.is_store_failing.store(true, Ordering::Relaxed),
                Source::Copy => {}
            },
            Err(error) if error.kind() == StoreErrorKind::BadRow => {
                lookup.log_bad_row(error);
            }
            Err(error) if error.kind() == StoreErrorKind::Unsupported => {
                telemetry::unsupported(error, &self.warned);
            }
            Err(error) => {
                let is_failing = error.kind() != StoreErrorKind::Overloaded;
                self.is_store_failing.store(is_failing, Ordering::Relaxed);
            }
        }
        let answer = answer?;
        if !answer.answers(lookup) {
            let mismatch = "the key store returned the answer to another look-up";
            return Err(StoreError::rejected(mismatch).into());
        }
        Ok(answer)
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").field("health", &self.health()).finish_non_exhaustive()
    }
}
