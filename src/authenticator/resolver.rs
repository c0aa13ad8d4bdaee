//! Resolver to keys, remembered or looked up once for all who ask: [`Resolver`].

mod judge;
mod recheck;

use std::{
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
    local_cache::LocalCache,
    settings::Settings,
    single_flight::{Finished, Outcome, SingleFlight, Waiter, Waiters},
};
use crate::{
    coherence::{Age, Seen, Subject, View},
    context::{AuthContext, Origin},
    denial::{Denial, InvalidKey},
    error::{StoreError, StoreErrorKind},
    key::{KeyDigest, KeyScheme, PresentedKey},
    metering::Recorder,
    runtime::{Background, Moment, within},
    store::{Answer, DynKeyStore, KeyStore, Lookup, LookupKey, Priority, Proof, Source},
    telemetry::{self, FirstTime},
};

/// The tiers of one node, from the local cache down.
pub(crate) struct Resolver {
    pub(crate) store: DynKeyStore,
    pub(crate) scheme: KeyScheme,
    pub(crate) settings: Settings,
    pub(crate) origin: Origin,
    /// Whether it was logged that a client's address is not known.
    pub(crate) unknown_address: FirstTime,
    view: Arc<View>,
    cache: LocalCache,
    single_flight: Arc<SingleFlight>,
    admission: Admission,
    feed: Background,
    feed_state: Arc<FeedState>,
    usage: Arc<Recorder>,
    /// Whether the store failed when it was last asked.
    is_store_failing: AtomicBool,
    /// Whether a capability that the store lacks was logged.
    warned: FirstTime,
}

/// What is remembered of a key.
pub(crate) enum Cached {
    Hit(AuthContext),
    Negative(InvalidKey),
    /// Nothing that may be served: the store has to be asked.
    Miss,
}

/// A look-up on its way.
pub(crate) type LookupFuture = Pin<Box<dyn Future<Output = Outcome> + Send>>;

/// A store that has not answered by then counts as failing, whatever deadlines it has itself.
const LOOKUP_DEADLINE: Duration = Duration::from_secs(15);
/// Longer than that of the look-up itself with its retries.
const WAITING_DEADLINE: Duration = Duration::from_secs(20);
/// An answer that is older than a change which is known is asked for again so often, after so long: what
/// answered is a copy of the database that has not caught up.
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
                scheme.clone(),
                settings.usage_interval,
                settings.lease_lifetime,
            ),
            store,
            scheme,
            settings,
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
        })
    }

    /// What is remembered of the key in `token`. No lock, no I/O, and no allocation.
    #[inline]
    pub(crate) fn cached(&self, token: &str) -> Cached {
        self.cached_digest(&KeyDigest::of(token.as_bytes()))
    }

    /// Whose key it is, if that is remembered and may be served.
    #[inline]
    pub(crate) fn cached_context(&self, key: &KeyDigest) -> Option<AuthContext> {
        self.cache.known(key).filter(|caller| self.age(caller) == Age::Fresh)
    }

    #[inline]
    fn cached_digest(&self, key: &KeyDigest) -> Cached {
        if let Some(caller) = self.cached_context(key) {
            return Cached::Hit(caller);
        }
        match self.cache.refused(key) {
            Some(it) if it.holds(&self.view, self.now()) => Cached::Negative(it.reason),
            _ => Cached::Miss,
        }
    }

    /// Asks the store, together with everybody else who wants to know the same.
    pub(crate) fn look_up(
        self: &Arc<Self>,
        key: PresentedKey,
        address: Option<IpAddr>,
    ) -> LookupFuture {
        self.look_up_key(LookupKey::Presented(Arc::new(key)), address)
    }

    fn look_up_key(self: &Arc<Self>, key: LookupKey, address: Option<IpAddr>) -> LookupFuture {
        let inner = Arc::clone(self);
        Box::pin(async move {
            if Handle::try_current().is_err() {
                return Err(StoreError::unavailable("there is no Tokio runtime here").into());
            }
            inner.listen();
            let digest = key.cache_digest();
            loop {
                let waiter = match inner.join(&key, address) {
                    Ok(waiter) => waiter,
                    Err(error) => {
                        return inner.while_failing(&digest).ok_or(Denial::Unavailable(error));
                    }
                };
                if inner.is_store_failing.load(Ordering::Relaxed)
                    && let Some(caller) = inner.while_failing(&digest)
                {
                    // The look-up goes on in the background if it need not wait; its answer shows when the store is back.
                    return Ok(caller);
                }
                match waiter.outcome(WAITING_DEADLINE).await {
                    Some(Err(Denial::Unavailable(error))) => {
                        return inner.while_failing(&digest).ok_or(Denial::Unavailable(error));
                    }
                    Some(outcome) => return outcome,
                    None => {}
                }
            }
        })
    }

    /// Forgets what is remembered of the keys under `prefix`, and trusts no copy of them from before.
    pub(crate) fn invalidate(&self, prefix: &str) {
        self.view.invalidate(prefix, self.now());
    }

    /// Stops listening, for good, and writes what was used.
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
            feed: self.feed_state.status(),
        }
    }

    fn now(&self) -> Moment {
        Moment::now(self.scheme.clock())
    }

    #[inline]
    fn age(&self, caller: &AuthContext) -> Age {
        let provenance = caller.provenance();
        provenance.map_or(Age::Expired, |it| it.tag.age(&self.view, self.now()))
    }

    /// Sees to it that somebody listens to the store, and tells it what was used.
    fn listen(&self) {
        self.usage.ensure_work();
        self.feed.ensure(|| {
            let scheme = self.scheme.clone();
            let now = move || Moment::now(scheme.clock());
            follow(self.store.clone(), Arc::downgrade(&self.feed_state), now)
        });
    }

    /// A valid key that may be served because the store fails.
    fn while_failing(&self, key: &KeyDigest) -> Option<AuthContext> {
        self.cache.known(key).filter(|caller| self.age(caller) != Age::Expired)
    }

    fn join(
        self: &Arc<Self>,
        key: &LookupKey,
        address: Option<IpAddr>,
    ) -> Result<Waiter, StoreError> {
        let prefix = Subject::Prefix(key.id().into());
        let generation = self.view.minimum_revisions.generation(&prefix);
        let digest = key.cache_digest();
        let cached = || match self.cached_digest(&digest) {
            Cached::Hit(caller) => Some(Ok(caller)),
            Cached::Negative(reason) => Some(Err(reason.into())),
            Cached::Miss => None,
        };
        let admit = |under_way| {
            let LookupKey::Presented(key) = key else {
                return self.admission.admit_verified(under_way);
            };
            let is_known =
                self.cache.known(&digest).is_some() || self.cache.proof(&digest).is_some();
            self.admission.admit(&self.scheme, (key, is_known), address, under_way)
        };
        self.single_flight.join(
            key.lookup_digest(),
            generation,
            &self.view,
            cached,
            admit,
            |seen, priority, leader| {
                let (inner, key) = (Arc::clone(self), key.clone());
                tokio::spawn(async move {
                    let waiters = leader.waiters().clone();
                    let flight =
                        inner.look_up_in_store(key, prefix, address, seen, priority, waiters);
                    let finished = flight.await;
                    if priority != Priority::Known {
                        let now = inner.scheme.clock().monotonic();
                        inner.admission.count(&finished.outcome, address, now);
                    }
                    leader.finish_with(finished);
                });
            },
        )
    }

    /// Asks the store, judges what does not depend on the request, and remembers the answer.
    async fn look_up_in_store(
        self: &Arc<Self>,
        key: LookupKey,
        prefix: Subject,
        address: Option<IpAddr>,
        mut seen: Seen,
        priority: Priority,
        waiters: Waiters,
    ) -> Finished {
        let mut proofs: Vec<_> =
            self.cache.proof(&key.cache_digest()).map(Proof::Seen).into_iter().collect();
        if let LookupKey::Verified(key) = &key {
            proofs.extend(key.proof.clone());
        }
        for (attempt, pause) in RETRIES.into_iter().enumerate() {
            if attempt > 0 {
                tokio::time::sleep(pause).await;
                seen = self.view.minimum_revisions.seen();
            }
            let as_of = self.now();
            let mut lookup =
                Lookup::new(key.clone(), self.scheme.clone(), address, Arc::clone(&self.view))
                    .with_waiters(priority, Arc::new(waiters.clone()));
            for proof in &proofs {
                lookup = lookup.with_proof(proof.clone());
            }
            if attempt > 0 || !lookup.is_presented() {
                lookup = lookup.without_copies();
            }
            let answer = match self.ask(&lookup).await {
                Ok(answer) => answer,
                Err(denial) => return Finished { outcome: Err(denial), judged: None },
            };
            // Before it is judged: of what comes after this, the judgement need not know.
            let judged = Some(self.view.minimum_revisions.seen());
            if let Some(outcome) = self.judge(answer, &lookup, &prefix, as_of, seen) {
                return Finished { outcome, judged };
            }
        }
        let behind = "what answers is older than changes that are known: a replica that lags";
        Finished { outcome: Err(StoreError::unavailable(behind).into()), judged: None }
    }

    async fn ask(&self, lookup: &Lookup) -> Result<Answer, Denial> {
        let answer = within(LOOKUP_DEADLINE, self.store.resolve(lookup)).await;
        let answer = answer.unwrap_or_else(|| Err(StoreError::timeout(LOOKUP_DEADLINE)));
        match &answer {
            Ok(answer) if answer.source() == Source::Store => {
                self.is_store_failing.store(false, Ordering::Relaxed);
            }
            Ok(_) => {}
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
            let mixed_up = "the key store gave the answer to another question";
            return Err(StoreError::rejected(mixed_up).into());
        }
        Ok(answer)
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").field("health", &self.health()).finish_non_exhaustive()
    }
}
