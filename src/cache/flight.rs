//! One look-up a key at a time: [`Flights`].

use std::{
    collections::HashMap,
    fmt,
    panic::catch_unwind,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, time::sleep};

use super::{
    View,
    floors::{Generation, Seen},
};
use crate::{
    context::AuthContext, deadline::within, error::StoreError, key::KeyDigest, respond::Denial,
};

/// What a look-up comes to.
pub(crate) type Outcome = Result<AuthContext, Denial>;

/// The look-ups under way.
#[derive(Default)]
pub(crate) struct Flights(Mutex<HashMap<KeyDigest, Flight>>);

/// One of them. It runs on a task of its own, so that it goes on when the caller that began it goes
/// away.
struct Flight {
    /// What was known when it began.
    seen: Seen,
    prefix: Generation,
    outcome: watch::Receiver<Option<Outcome>>,
}

/// Where a flight puts its outcome. Dropped without one, because the look-up panicked or its runtime
/// ended, it lets those who wait know.
pub(crate) struct Landing {
    flights: Arc<Flights>,
    key: KeyDigest,
    outcome: watch::Sender<Option<Outcome>>,
}

/// What a request does that waits for an outcome.
pub(crate) struct Boarding(watch::Receiver<Option<Outcome>>);

impl Flights {
    /// Joins the look-up of `key` that is under way or, if there is none, or it began before a change
    /// that could be about this key, begins one: `begin` is given what was known before, and the landing.
    pub(crate) fn board(
        self: &Arc<Self>,
        key: KeyDigest,
        prefix: Generation,
        view: &View,
        recall: impl FnOnce() -> Option<Outcome>,
        begin: impl FnOnce(Seen, Landing),
    ) -> Boarding {
        let mut flights = self.flights();
        if let Some(flight) = flights.get(&key)
            && flight.prefix == prefix
            && view.floors.may_join(flight.prefix, flight.seen)
        {
            return Boarding(flight.outcome.clone());
        }
        // One may have landed since the cache was looked at.
        if let Some(known) = recall() {
            return Boarding(watch::channel(Some(known)).1);
        }
        let (sender, outcome) = watch::channel(None);
        let seen = view.floors.seen();
        // An overtaken one is no longer found, but lands for those who are on it.
        flights.insert(key, Flight { seen, prefix, outcome: outcome.clone() });
        drop(flights);
        begin(seen, Landing { flights: Arc::clone(self), key, outcome: sender });
        Boarding(outcome)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.flights().len()
    }

    fn flights(&self) -> MutexGuard<'_, HashMap<KeyDigest, Flight>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Landing {
    /// Nobody joins any more once the outcome is there: whoever comes after it looks into the cache.
    pub(crate) fn land(self, outcome: Outcome) {
        self.remove();
        self.outcome.send_replace(Some(outcome));
    }

    fn remove(&self) {
        let mut flights = self.flights.flights();
        // A later flight of the same key may be there by now.
        if flights
            .get(&self.key)
            .is_some_and(|it| it.outcome.same_channel(&self.outcome.subscribe()))
        {
            flights.remove(&self.key);
        }
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.remove();
    }
}

impl Boarding {
    /// Waits for the outcome, at most for `limit`: the runtime of the flight may not be driven any more.
    pub(crate) async fn outcome(mut self, limit: Duration) -> Outcome {
        // tokio panics where the runtime has no timer.
        if catch_unwind(|| sleep(limit)).is_err() {
            let no_timer = "the Tokio runtime has no timer: build it with enable_all";
            return Err(StoreError::unavailable(no_timer).into());
        }
        let outcome = within(limit, self.0.wait_for(Option::is_some)).await;
        let outcome = outcome.and_then(Result::ok).and_then(|outcome| outcome.clone());
        outcome.unwrap_or_else(|| Err(lost()))
    }
}

fn lost() -> Denial {
    StoreError::unavailable("the look-up panicked, or its runtime was shut down").into()
}

impl fmt::Debug for Flights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flights").field("under_way", &self.len()).finish()
    }
}
