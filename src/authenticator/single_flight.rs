//! Shares one look-up between concurrent requests with the same key: [`SingleFlight`].

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::sync::watch;

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
    joinable: Mutex<HashMap<KeyDigest, InFlight>>,
    /// Number of look-ups in progress, including those that can't be joined any more.
    under_way: AtomicUsize,
}

/// A look-up in progress. One that has to wait runs on a task of its own, so that it continues when its first caller is
/// dropped, and no waiter depends on another one.
struct InFlight {
    /// Changes that were known when it began.
    seen: Seen,
    prefix: Generation,
    outcome: watch::Sender<Option<Finished>>,
}

/// An outcome, and the changes that were known when it was judged; `None` for an error, which applies to all waiters.
#[derive(Clone)]
pub(crate) struct Finished {
    pub(crate) outcome: Outcome,
    pub(crate) judged: Option<Seen>,
}

/// Leader of a flight, which sets its outcome. If it is dropped without one, because the look-up panicked or its
/// runtime ended, the waiters get an error.
pub(crate) struct Leader {
    waiters: Waiters,
    has_finished: bool,
}

/// Waiters of one flight.
#[derive(Clone)]
pub(crate) struct Waiters {
    single_flight: Arc<SingleFlight>,
    key: KeyDigest,
    outcome: watch::Sender<Option<Finished>>,
}

/// Request that waits for an outcome.
pub(crate) struct Waiter {
    outcome: watch::Receiver<Option<Finished>>,
    /// Changes that were known when it began to wait.
    joined: Seen,
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
        key: KeyDigest,
        prefix: Generation,
        view: &View,
        cached: impl FnOnce() -> Option<Outcome>,
        admit: impl FnOnce(usize) -> Result<Priority, StoreError>,
        begin: impl FnOnce(Seen, Priority, Leader),
    ) -> Result<Waiter, StoreError> {
        let mut joinable = self.joinable();
        let joined = view.minimum_revisions.seen();
        if let Some(flight) = joinable.get(&key)
            && flight.prefix == prefix
            && view.minimum_revisions.may_join(flight.prefix, flight.seen)
        {
            return Ok(Waiter { outcome: flight.outcome.subscribe(), joined });
        }
        // A look-up may have finished since the cache was probed.
        if let Some(outcome) = cached() {
            let known = Finished { outcome, judged: None };
            return Ok(Waiter { outcome: watch::channel(Some(known)).1, joined });
        }
        let priority = admit(self.len())?;
        let (sender, outcome) = watch::channel(None);
        // An overtaken flight can't be joined any more, but still delivers its outcome to its waiters.
        joinable.insert(key, InFlight { seen: joined, prefix, outcome: sender.clone() });
        self.under_way.fetch_add(1, Ordering::Relaxed);
        drop(joinable);
        let waiters = Waiters { single_flight: Arc::clone(self), key, outcome: sender };
        begin(joined, priority, Leader { waiters, has_finished: false });
        Ok(Waiter { outcome, joined })
    }

    /// Returns the number of look-ups in progress.
    pub(crate) fn len(&self) -> usize {
        self.under_way.load(Ordering::Relaxed)
    }

    fn joinable(&self) -> MutexGuard<'_, HashMap<KeyDigest, InFlight>> {
        self.joinable.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Leader {
    pub(crate) fn waiters(&self) -> &Waiters {
        &self.waiters
    }

    /// Sets the outcome. The flight can't be joined afterwards: later requests find the cached entry.
    pub(crate) fn finish_with(mut self, finished: Finished) {
        self.finish(finished);
    }

    fn finish(&mut self, finished: Finished) {
        self.has_finished = true;
        let Waiters { single_flight, key, outcome } = &self.waiters;
        remove(&mut single_flight.joinable(), key, outcome);
        single_flight.under_way.fetch_sub(1, Ordering::Relaxed);
        outcome.send_replace(Some(finished));
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        if !self.has_finished {
            self.finish(Finished { outcome: Err(no_outcome()), judged: None });
        }
    }
}

impl Waiting for Waiters {
    #[cfg(feature = "_sql")]
    fn have_left(&self) -> crate::store::Left<'_> {
        Box::pin(self.left())
    }
}

#[cfg(feature = "_sql")]
impl Waiters {
    async fn left(&self) {
        loop {
            self.outcome.closed().await;
            let mut joinable = self.single_flight.joinable();
            if self.outcome.borrow().is_some() {
                break;
            }
            // Requests join under the lock, so this misses none.
            if self.outcome.receiver_count() == 0 {
                remove(&mut joinable, &self.key, &self.outcome);
                return;
            }
        }
        // The look-up has finished, so it must not be dropped any more.
        std::future::pending().await
    }
}

/// Removes the flight, unless a later flight of the same key has replaced it.
fn remove(
    joinable: &mut HashMap<KeyDigest, InFlight>,
    key: &KeyDigest,
    outcome: &watch::Sender<Option<Finished>>,
) {
    if joinable.get(key).is_some_and(|flight| flight.outcome.same_channel(outcome)) {
        joinable.remove(key);
    }
}

impl Waiter {
    /// Waits for the outcome, at most for `limit`: the runtime of the flight may not be driven any more.
    ///
    /// Returns `None` if the outcome was judged before a change that was known when this request arrived: it has to
    /// join again.
    pub(crate) async fn outcome(mut self, limit: Duration) -> Option<Outcome> {
        if timer(limit).is_none() {
            let no_timer = "the Tokio runtime has no timer: build it with enable_all";
            return Some(Err(StoreError::unavailable(no_timer).into()));
        }
        let mut finished = self.outcome.borrow().clone();
        if finished.is_none() {
            let waited = within(limit, self.outcome.wait_for(Option::is_some)).await;
            finished = waited.and_then(Result::ok).and_then(|finished| finished.clone());
        }
        let Some(Finished { outcome, judged }) = finished else { return Some(Err(no_outcome())) };
        judged.is_none_or(|judged| judged.includes(self.joined)).then_some(outcome)
    }
}

fn no_outcome() -> Denial {
    StoreError::unavailable("the look-up panicked, or its runtime was shut down").into()
}

impl fmt::Debug for SingleFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SingleFlight").field("under_way", &self.len()).finish()
    }
}

impl fmt::Debug for Waiters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiters").field("count", &self.outcome.receiver_count()).finish()
    }
}
