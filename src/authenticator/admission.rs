//! Admits look-ups and sets their priority: [`Admission`].

use std::{
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{lookup_limiter::LookupLimiter, single_flight::Outcome};
use crate::{
    denial::{Denial, InvalidKey},
    error::StoreError,
    key::{KeyScheme, PresentedKey},
    policy::NetworkSteps,
    store::Priority,
};

/// Limits the concurrent look-ups of a node.
#[derive(Debug)]
pub(super) struct Admission {
    limiter: Mutex<LookupLimiter>,
    max_lookups: usize,
}

impl Admission {
    pub(super) fn new(max_lookups: usize) -> Self {
        Self { limiter: Mutex::new(LookupLimiter::new()), max_lookups }
    }

    /// Returns the priority of a look-up while `under_way` other look-ups are in progress. `is_known` is true if this
    /// node has verified the key before, and `now` is the monotonic time.
    ///
    /// # Errors
    ///
    /// `Overloaded` if too many other look-ups are in progress, or if the key has a slow hash and its check would be
    /// rejected.
    pub(super) fn admit(
        &self,
        scheme: &KeyScheme,
        (key, is_known): (&PresentedKey, bool),
        address: Option<IpAddr>,
        now: Duration,
        under_way: usize,
    ) -> Result<Priority, StoreError> {
        let priority = if is_known {
            Priority::Known
        } else if let Some(error) = scheme.turns_away(key, address, now) {
            return Err(error);
        } else {
            self.limiter().priority(NetworkSteps::of(address), now)
        };
        self.admit_as(priority, under_way)
    }

    /// Returns the priority of a look-up of a key that this node has verified, while `under_way` others are in
    /// progress.
    ///
    /// # Errors
    ///
    /// `Overloaded` if too many other look-ups are in progress.
    pub(super) fn admit_verified(&self, under_way: usize) -> Result<Priority, StoreError> {
        self.admit_as(Priority::Known, under_way)
    }

    fn admit_as(&self, priority: Priority, under_way: usize) -> Result<Priority, StoreError> {
        if under_way >= priority.bound(self.max_lookups) {
            let message = "too many concurrent look-ups";
            return Err(StoreError::overloaded(message, Duration::from_secs(1)));
        }
        Ok(priority)
    }

    /// Counts look-ups that find no such key or another secret, by the network of the client.
    pub(super) fn count(&self, outcome: &Outcome, address: Option<IpAddr>, now: Duration) {
        let source = NetworkSteps::of(address);
        match outcome {
            Ok(_) => self.limiter().succeeded(source, now),
            Err(Denial::InvalidKey(InvalidKey::Unknown | InvalidKey::WrongSecret)) => {
                self.limiter().failed(source, now);
            }
            Err(_) => {}
        }
    }

    fn limiter(&self) -> MutexGuard<'_, LookupLimiter> {
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
