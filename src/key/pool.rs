//! The pool of slow hash checks: off the async threads, few at a time, behind a bounded queue.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use tokio::sync::Semaphore;

use super::{
    failure_limiter::{FailureLimiter, Standing},
    hash::BcryptHash,
    presented::PresentedKey,
};
use crate::{error::StoreError, policy::NetworkSteps, runtime::Clock};

/// A bounded pool of bcrypt checks, shared by all users of one scheme.
#[derive(Debug)]
pub(super) struct BcryptPool {
    /// Permits of the running checks.
    slots: Arc<Semaphore>,
    /// Permits of the running and the waiting checks.
    tickets: Arc<Semaphore>,
    /// One permit per lookup id, kept while a check uses it.
    turns: Mutex<HashMap<Box<str>, Weak<Semaphore>>>,
    failure_limiter: Mutex<FailureLimiter>,
}

/// The slow checks of one look-up: a key against the bcrypt hashes under its lookup id.
pub(crate) struct SlowCheck {
    pub(crate) hashes: Vec<BcryptHash>,
    pub(crate) key: Arc<PresentedKey>,
    pub(crate) address: Option<IpAddr>,
    /// Clock of the node. It is read when the check is admitted and when it ends.
    pub(crate) clock: Arc<dyn Clock>,
}

impl BcryptPool {
    pub(super) fn new(slots: usize, queue: usize) -> Self {
        Self {
            slots: Arc::new(Semaphore::new(slots)),
            tickets: Arc::new(Semaphore::new(slots + queue)),
            turns: Mutex::default(),
            failure_limiter: Mutex::new(FailureLimiter::new(slots)),
        }
    }

    /// Checks the hashes in order and returns the index of the one that matches, if one does.
    ///
    /// A check that has begun runs to its end and counts, even if its caller was dropped. It holds its slot and its
    /// turn until then.
    ///
    /// # Errors
    ///
    /// `Overloaded` if the queue is full or the failure limiter rejects the check.
    pub(super) async fn run(
        self: &Arc<Self>,
        check: SlowCheck,
    ) -> Result<Option<usize>, StoreError> {
        let source = NetworkSteps::of(check.address);
        let standing = self.admit(&check, source)?;
        let Ok(ticket) = Arc::clone(&self.tickets).try_acquire_owned() else {
            return Err(busy("too many bcrypt checks are waiting"));
        };
        // The turn is acquired first: a check that waits for it must not hold a slot that another key could use.
        let turn = self.turn(check.key.id());
        let turn = match standing {
            Standing::Clean => acquire(turn).await?,
            // Suspect checks do not wait, because they would fill the queue that all keys share.
            Standing::Suspect => turn.try_acquire_owned().map_err(|_| {
                busy("too many failed checks: only one at a time is allowed for this key")
            })?,
        };
        let slot = acquire(Arc::clone(&self.slots)).await?;
        // Checked again, because earlier checks may have failed while this one waited.
        self.admit(&check, source)?;

        let pool = Arc::clone(self);
        let job = move || {
            let span = tracing::debug_span!("bcrypt_check", key_prefix = check.key.id()).entered();
            let begun = Instant::now();
            let key = check.key.expose_secret();
            let matched = check.hashes.iter().position(|hash| hash.matches(key));
            let (now, took) = (check.clock.read().monotonic(), begun.elapsed());
            pool.failure_limiter().note(check.key.id(), source, now, took, matched.is_none());
            drop(span);
            drop((turn, slot, ticket));
            matched
        };
        tokio::task::spawn_blocking(job).await.map_err(StoreError::unavailable)
    }

    fn admit(&self, check: &SlowCheck, source: NetworkSteps) -> Result<Standing, StoreError> {
        let now = check.clock.read().monotonic();
        self.failure_limiter().admit(check.key.id(), source, now).map_err(failure_limited)
    }

    /// Returns the error with which a check of a key under `prefix` would be rejected at the monotonic time `now`, as
    /// far as that is known before the look-up.
    pub(super) fn turns_away(
        &self,
        prefix: &str,
        address: Option<IpAddr>,
        now: Duration,
    ) -> Option<StoreError> {
        let source = NetworkSteps::of(address);
        self.failure_limiter().turns_away(prefix, source, now).map(failure_limited)
    }

    fn failure_limiter(&self) -> MutexGuard<'_, FailureLimiter> {
        self.failure_limiter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self, prefix: &str) -> Arc<Semaphore> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(turn) = turns.get(prefix).and_then(Weak::upgrade) {
            return turn;
        }
        // There are at most as many live turns as tickets, so that the sweep is short and the map stays small.
        turns.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::new(Semaphore::new(1));
        turns.insert(prefix.into(), Arc::downgrade(&turn));
        turn
    }
}

fn failure_limited(wait: Duration) -> StoreError {
    StoreError::overloaded("too many failed checks: slow hash checks are limited", wait)
}

fn busy(message: &'static str) -> StoreError {
    StoreError::overloaded(message, Duration::from_secs(1))
}

async fn acquire(
    semaphore: Arc<Semaphore>,
) -> Result<tokio::sync::OwnedSemaphorePermit, StoreError> {
    // These semaphores are never closed.
    semaphore.acquire_owned().await.map_err(StoreError::unavailable)
}
