//! Shares one look-up between concurrent requests with the same key: [`SingleFlight`].

use std::{
    collections::HashMap,
    fmt,
    future::poll_fn,
    pin::pin,
    ptr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::Poll,
    time::Duration,
};

use tokio::{runtime::Handle, sync::Notify};

use super::lookup_work::{LookupWork, WorkFuture};
use crate::{
    coherence::{Generation, Seen, View},
    context::AuthContext,
    denial::Denial,
    error::StoreError,
    key::KeyDigest,
    runtime::{timer, within},
    store::{Priority, Waiting},
};

/// Outcome of a look-up.
pub(crate) type Outcome = Result<AuthContext, Denial>;

/// Look-ups in progress.
#[derive(Default)]
pub(crate) struct SingleFlight {
    joinable: Mutex<HashMap<KeyDigest, Arc<SharedLookup>>>,
    /// Number of look-ups in progress, including those that can't be joined any more.
    under_way: AtomicUsize,
}

/// A look-up in progress.
pub(crate) struct SharedLookup {
    single_flight: Arc<SingleFlight>,
    key: KeyDigest,
    /// Changes that were known when it began.
    seen: Seen,
    prefix: Generation,
    work: LookupWork,
    outcome: OnceLock<Finished>,
    has_finished: Notify,
    /// Number of requests that wait for the outcome. Requests join under the lock of `joinable`.
    waiters: AtomicUsize,
    has_no_waiters: Notify,
}

/// An outcome, and the changes that were known when it was judged; `None` for an error, which applies to all waiters.
#[derive(Clone)]
pub(crate) struct Finished {
    pub(crate) outcome: Outcome,
    pub(crate) judged: Option<Seen>,
}

/// Sets the outcome of a look-up. If it is dropped without one, because the look-up panicked or its runtime ended, the
/// waiters get an error.
pub(crate) struct Leader {
    lookup: Arc<SharedLookup>,
    has_finished: bool,
}

/// Request that waits for an outcome.
pub(crate) struct Waiter {
    lookup: Arc<SharedLookup>,
    /// Whether it has begun the look-up, and polls it until that moves to a task.
    has_begun: bool,
    /// Changes that were known when it began to wait.
    joined: Seen,
}

/// The outcome of a request, or the place where it waits for one.
pub(crate) enum Joined {
    Wait(Waiter),
    /// A look-up has finished meanwhile.
    Cached(Outcome),
}

impl SingleFlight {
    /// Joins the look-up of `key` that is in progress. If there is none, or it began before a change that may concern
    /// this key, begins a look-up: `admit` gets the number of look-ups in progress, and `begin` gets the changes that
    /// were known before, the priority, and the leader.
    ///
    /// # Errors
    ///
    /// Returns the error of `admit`.
    pub(crate) fn join(
        self: &Arc<Self>,
        (key, prefix): (KeyDigest, Generation),
        view: &View,
        cached: impl FnOnce() -> Option<Outcome>,
        admit: impl FnOnce(usize) -> Result<Priority, StoreError>,
        begin: impl FnOnce(Seen, Priority, Leader) -> WorkFuture,
    ) -> Result<Joined, StoreError> {
        let mut joinable = self.joinable();
        let joined = view.minimum_revisions.seen();
        if let Some(lookup) = joinable.get(&key)
            && lookup.prefix == prefix
            && view.minimum_revisions.may_join(lookup.prefix, lookup.seen)
        {
            let lookup = Arc::clone(lookup);
            lookup.waiters.fetch_add(1, Ordering::Relaxed);
            drop(joinable);
            lookup.work.share();
            return Ok(Joined::Wait(Waiter { lookup, has_begun: false, joined }));
        }
        // A look-up may have finished since the cache was probed.
        if let Some(outcome) = cached() {
            return Ok(Joined::Cached(outcome));
        }
        let priority = admit(self.len())?;
        let lookup = Arc::new(SharedLookup {
            single_flight: Arc::clone(self),
            key,
            seen: joined,
            prefix,
            work: LookupWork::new(Handle::current()),
            outcome: OnceLock::new(),
            has_finished: Notify::new(),
            waiters: AtomicUsize::new(1),
            has_no_waiters: Notify::new(),
        });
        // An overtaken look-up can't be joined any more, but still delivers its outcome to its waiters.
        joinable.insert(key, Arc::clone(&lookup));
        self.under_way.fetch_add(1, Ordering::Relaxed);
        drop(joinable);
        let leader = Leader { lookup: Arc::clone(&lookup), has_finished: false };
        lookup.work.begin(begin(joined, priority, leader));
        Ok(Joined::Wait(Waiter { lookup, has_begun: true, joined }))
    }

    /// Returns the number of look-ups in progress.
    pub(crate) fn len(&self) -> usize {
        self.under_way.load(Ordering::Relaxed)
    }

    fn joinable(&self) -> MutexGuard<'_, HashMap<KeyDigest, Arc<SharedLookup>>> {
        self.joinable.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SharedLookup {
    /// Removes it from the joinable ones, unless a later look-up of the same key has replaced it.
    fn remove_from(&self, joinable: &mut HashMap<KeyDigest, Arc<SharedLookup>>) {
        if joinable.get(&self.key).is_some_and(|lookup| ptr::eq(&**lookup, self)) {
            joinable.remove(&self.key);
        }
    }

    /// Completes when it has finished.
    async fn finished(&self) -> &Finished {
        loop {
            let mut notified = pin!(self.has_finished.notified());
            // Before the outcome is read, so that none is missed.
            notified.as_mut().enable();
            if let Some(finished) = self.outcome.get() {
                return finished;
            }
            notified.await;
        }
    }

    /// Completes when no request waits any more.
    #[cfg(feature = "_sql")]
    async fn left(&self) {
        loop {
            let mut notified = pin!(self.has_no_waiters.notified());
            notified.as_mut().enable();
            if self.waiters.load(Ordering::Relaxed) == 0 {
                let mut joinable = self.single_flight.joinable();
                if self.outcome.get().is_some() {
                    break;
                }
                // Requests join under the lock, so this misses none.
                if self.waiters.load(Ordering::Relaxed) == 0 {
                    self.remove_from(&mut joinable);
                    return;
                }
            }
            notified.await;
        }
        // The look-up has finished, so it must not be dropped any more.
        std::future::pending().await
    }
}

impl Leader {
    pub(crate) fn lookup(&self) -> &Arc<SharedLookup> {
        &self.lookup
    }

    /// Sets the outcome. The look-up can't be joined afterwards: later requests find the cached entry.
    pub(crate) fn finish_with(mut self, finished: Finished) {
        self.finish(finished);
    }

    fn finish(&mut self, finished: Finished) {
        self.has_finished = true;
        let SharedLookup { single_flight, outcome, has_finished, .. } = &*self.lookup;
        self.lookup.remove_from(&mut single_flight.joinable());
        single_flight.under_way.fetch_sub(1, Ordering::Relaxed);
        // There is one leader, which finishes once.
        let _ = outcome.set(finished);
        has_finished.notify_waiters();
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        if !self.has_finished {
            self.finish(Finished { outcome: Err(no_outcome()), judged: None });
        }
    }
}

impl Waiting for SharedLookup {
    #[cfg(feature = "_sql")]
    fn have_left(&self) -> crate::store::Left<'_> {
        Box::pin(self.left())
    }

    #[cfg(any(feature = "_sql", feature = "redis"))]
    fn set_holding(&self, is_holding: bool) {
        self.work.set_holding(is_holding);
    }
}

impl Waiter {
    /// Polls the look-up once, if this request has begun it.
    pub(crate) async fn begin(&self) {
        if self.has_begun {
            let _ = poll_fn(|cx| Poll::Ready(self.lookup.work.poll(cx))).await;
        }
    }

    /// Waits for the outcome; while the look-up runs on a task, at most for `limit`: its runtime may not be driven any
    /// more.
    ///
    /// Returns `None` if the outcome was judged before a change that was known when this request arrived: it has to
    /// join again.
    pub(crate) async fn outcome(self, limit: Duration) -> Option<Outcome> {
        if self.has_begun {
            poll_fn(|cx| self.lookup.work.poll(cx)).await;
        }
        let finished = match self.lookup.outcome.get() {
            Some(finished) => Some(finished),
            None if timer(limit).is_none() => None,
            None => within(limit, self.lookup.finished()).await,
        };
        let Some(Finished { outcome, judged }) = finished else { return Some(Err(no_outcome())) };
        judged.is_none_or(|judged| judged.includes(self.joined)).then(|| outcome.clone())
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        if self.has_begun {
            self.lookup.work.leave();
        }
        if self.lookup.waiters.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.lookup.has_no_waiters.notify_waiters();
        }
    }
}

fn no_outcome() -> Denial {
    let has_no_timer = Handle::try_current().is_ok() && timer(Duration::ZERO).is_none();
    let reason = match has_no_timer {
        true => "the Tokio runtime has no timer: build it with enable_all",
        false => "the look-up panicked, or its runtime was shut down",
    };
    StoreError::unavailable(reason).into()
}

impl fmt::Debug for SingleFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SingleFlight").field("under_way", &self.len()).finish()
    }
}

impl fmt::Debug for SharedLookup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedLookup")
            .field("waiters", &self.waiters.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}
