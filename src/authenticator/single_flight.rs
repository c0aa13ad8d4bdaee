//! One look-up a key at a time: [`SingleFlight`].

use std::{
    collections::HashMap,
    fmt,
    panic::catch_unwind,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{sync::watch, time::sleep};

use crate::{
    coherence::{Generation, Seen, View},
    context::AuthContext,
    denial::Denial,
    error::StoreError,
    key::KeyDigest,
    runtime::within,
    store::{Priority, Waiting},
};

/// What a look-up comes to.
pub(crate) type Outcome = Result<AuthContext, Denial>;

/// The look-ups under way.
#[derive(Default)]
pub(crate) struct SingleFlight {
    joinable: Mutex<HashMap<KeyDigest, InFlight>>,
    /// With those that can't be joined any more.
    under_way: AtomicUsize,
}

/// One of them. It runs on a task of its own, so that it goes on when the caller that began it goes
/// away.
struct InFlight {
    /// What was known when it began.
    seen: Seen,
    prefix: Generation,
    outcome: watch::Sender<Option<Finished>>,
}

/// An outcome, and what was known when it was judged; `None` for an error, which holds for all who wait.
#[derive(Clone)]
pub(crate) struct Finished {
    pub(crate) outcome: Outcome,
    pub(crate) judged: Option<Seen>,
}

/// Where a flight puts its outcome. Dropped without one, because the look-up panicked or its runtime
/// ended, it lets those who wait know.
pub(crate) struct Leader {
    waiters: Waiters,
    has_finished: bool,
}

/// Those who wait for one flight.
#[derive(Clone)]
pub(crate) struct Waiters {
    single_flight: Arc<SingleFlight>,
    key: KeyDigest,
    outcome: watch::Sender<Option<Finished>>,
}

/// What a request does that waits for an outcome.
pub(crate) struct Waiter {
    outcome: watch::Receiver<Option<Finished>>,
    /// What was known when it began to wait.
    joined: Seen,
}

impl SingleFlight {
    /// Joins the look-up of `key` that is under way or, if there is none, or it began before a change
    /// that could be about this key, begins one: `admit` is given how many are under way, and `begin` what
    /// was known before, the priority, and the leader.
    ///
    /// # Errors
    ///
    /// That of `admit`.
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
        // One may have finished since the cache was looked at.
        if let Some(outcome) = cached() {
            let known = Finished { outcome, judged: None };
            return Ok(Waiter { outcome: watch::channel(Some(known)).1, joined });
        }
        let priority = admit(self.len())?;
        let (sender, outcome) = watch::channel(None);
        // An overtaken one is no longer found, but lands for those who are on it.
        joinable.insert(key, InFlight { seen: joined, prefix, outcome: sender.clone() });
        self.under_way.fetch_add(1, Ordering::Relaxed);
        drop(joinable);
        let waiters = Waiters { single_flight: Arc::clone(self), key, outcome: sender };
        begin(joined, priority, Leader { waiters, has_finished: false });
        Ok(Waiter { outcome, joined })
    }

    /// How many there are.
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

    /// Nobody joins any more once the outcome is there: whoever comes after it looks into the cache.
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
            self.finish(Finished { outcome: Err(lost()), judged: None });
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
            // Requests join under the lock: there is none that this misses.
            if self.outcome.receiver_count() == 0 {
                remove(&mut joinable, &self.key, &self.outcome);
                return;
            }
        }
        // The look-up has finished, and is not dropped any more.
        std::future::pending().await
    }
}

/// Removes the flight. A later one of the same key may be there by now.
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
    /// `None` if the outcome was judged before a change that was known when this request came: it has to
    /// board anew.
    pub(crate) async fn outcome(mut self, limit: Duration) -> Option<Outcome> {
        // tokio panics where the runtime has no timer.
        if catch_unwind(|| sleep(limit)).is_err() {
            let no_timer = "the Tokio runtime has no timer: build it with enable_all";
            return Some(Err(StoreError::unavailable(no_timer).into()));
        }
        let finished = within(limit, self.outcome.wait_for(Option::is_some)).await;
        let finished = finished.and_then(Result::ok).and_then(|finished| finished.clone());
        let Some(Finished { outcome, judged }) = finished else { return Some(Err(lost())) };
        judged.is_none_or(|judged| judged.includes(self.joined)).then_some(outcome)
    }
}

fn lost() -> Denial {
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
