//! Rate limits of one process: [`LocalRateLimiter`].

use std::{
    collections::{HashMap, hash_map::RandomState},
    fmt,
    hash::BuildHasher,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{Quota, RateLimiter, RatePeriod, RateWindow};
use crate::{
    clock::{Clock, SystemClock},
    error::StoreError,
    record::{KeyId, RateLimits},
};

/// Counts the requests of one process, in its memory. Clones count together.
///
/// Windows are those of the wall clock at the time at which this was made; from then on the monotonic clock
/// moves them, so that nobody gets more by setting a clock. Keys that were not used in the windows that are
/// under way take no memory.
#[derive(Clone)]
pub struct LocalRateLimiter(Arc<Inner>);

struct Inner {
    shards: [Mutex<Shard>; SHARDS],
    hasher: RandomState,
    clock: Arc<dyn Clock>,
    /// What the monotonic clock lacks of the time since the Unix epoch, in nanoseconds.
    epoch: u64,
}

#[derive(Default)]
struct Shard {
    counters: HashMap<KeyId, Counters>,
    /// At so many, those whose windows are over are looked for.
    sweep_at: usize,
}

/// By period.
type Counters = [Counter; 3];

#[derive(Clone, Copy, Default)]
struct Counter {
    /// Which window since the Unix epoch.
    window: u64,
    count: u64,
}

/// So that cores seldom meet.
const SHARDS: usize = 64;
const FEW: usize = 64;

impl LocalRateLimiter {
    /// A limiter that has counted nothing.
    pub fn new() -> Self {
        Self::with_clock(Arc::new(SystemClock))
    }

    /// A limiter with a clock of your own.
    pub fn with_clock(clock: Arc<dyn Clock>) -> Self {
        let (wall, monotonic) = clock.nanos();
        Self(Arc::new(Inner {
            shards: std::array::from_fn(|_| Mutex::default()),
            hasher: RandomState::new(),
            clock,
            epoch: wall.saturating_sub(monotonic),
        }))
    }

    /// Counts a request that somebody else has allowed, whether there is room or not.
    pub(super) fn note(&self, key: &KeyId, limits: RateLimits) {
        self.take(key, limits, |_| true);
    }

    /// Counts a request if `may_count` allows it, by what was counted before.
    fn take(
        &self,
        key: &KeyId,
        limits: RateLimits,
        may_count: impl FnOnce(&Quota) -> bool,
    ) -> Quota {
        let now = self.now();
        let mut shard = self.shard(key);
        shard.sweep(now);
        let counters = match shard.counters.get_mut(key) {
            Some(counters) => counters,
            None => shard.counters.entry(key.clone()).or_default(),
        };
        let mut has_room = true;
        let windows = RatePeriod::ALL.map(|period| {
            let limit = period.limit(&limits)?;
            let counter = &mut counters[period as usize];
            counter.turn_to(window_at(period, now));
            has_room &= counter.count < limit;
            let remaining = limit.saturating_sub(counter.count);
            Some(RateWindow { period, limit, remaining, resets_in: until_next(period, now) })
        });
        let before = Quota::new(has_room, windows.into_iter().flatten());
        if !may_count(&before) {
            return before;
        }
        for window in before.windows() {
            let counter = &mut counters[window.period as usize];
            counter.count = counter.count.saturating_add(1);
        }
        let after = windows.into_iter().flatten();
        Quota::new(
            has_room,
            after.map(|it| RateWindow { remaining: it.remaining.saturating_sub(1), ..it }),
        )
    }

    fn shard(&self, key: &KeyId) -> MutexGuard<'_, Shard> {
        let at = self.0.hasher.hash_one(key) as usize % SHARDS;
        self.0.shards[at].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Since the Unix epoch, in nanoseconds.
    fn now(&self) -> u64 {
        self.0.epoch.saturating_add(self.0.clock.nanos().1)
    }
}

impl Shard {
    fn sweep(&mut self, now: u64) {
        if self.counters.len() >= self.sweep_at {
            self.counters.retain(|_, counters| {
                RatePeriod::ALL.iter().any(|&period| {
                    let counter = &counters[period as usize];
                    counter.count > 0 && counter.window >= window_at(period, now)
                })
            });
            self.sweep_at = FEW.max(2 * self.counters.len());
        }
    }
}

impl Counter {
    fn turn_to(&mut self, window: u64) {
        if self.window != window {
            *self = Self { window, count: 0 };
        }
    }
}

fn nanos(period: RatePeriod) -> u64 {
    period.seconds() * 1_000_000_000
}

fn window_at(period: RatePeriod, now: u64) -> u64 {
    now / nanos(period)
}

fn until_next(period: RatePeriod, now: u64) -> Duration {
    Duration::from_nanos(nanos(period) - now % nanos(period))
}

impl RateLimiter for LocalRateLimiter {
    async fn count(&self, key: &KeyId, limits: RateLimits) -> Result<Quota, StoreError> {
        Ok(self.take(key, limits, Quota::is_allowed))
    }

    fn count_now(&self, key: &KeyId, limits: RateLimits) -> Option<Quota> {
        Some(self.take(key, limits, Quota::is_allowed))
    }
}

impl Default for LocalRateLimiter {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for LocalRateLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalRateLimiter").finish_non_exhaustive()
    }
}
