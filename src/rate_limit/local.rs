//! Rate limits of one process: [`LocalRateLimiter`].

use std::{
    collections::HashMap,
    fmt,
    hash::BuildHasher,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use foldhash::fast::RandomState;

use super::RateLimiter;
use crate::{
    error::StoreError,
    record::{KeyId, Quota, RateLimits, RatePeriod},
    runtime::{Clock, SystemClock},
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
    counters: HashMap<KeyId, Counters, RandomState>,
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
            hasher: RandomState::default(),
            clock,
            epoch: wall.saturating_sub(monotonic),
        }))
    }

    /// Counts a request that somebody else has allowed, whether there is room or not.
    pub(super) fn note(&self, key: &KeyId, limits: RateLimits) {
        self.take(key, limits, true);
    }

    /// Counts a request if there is room for it, or if it `is_allowed` already.
    fn take(&self, key: &KeyId, limits: RateLimits, is_allowed: bool) -> Quota {
        let now = self.now();
        let mut shard = self.shard(key);
        shard.sweep(now);
        let counters = match shard.counters.get_mut(key) {
            Some(counters) => counters,
            None => shard.counters.entry(key.clone()).or_default(),
        };
        let mut quota = Quota::empty(true);
        for period in RatePeriod::ALL {
            let Some(limit) = period.limit(&limits) else { continue };
            let (window, left) = window_at(period, now);
            let counter = &mut counters[period as usize];
            counter.turn_to(window);
            if counter.count >= limit {
                quota.refuse();
            }
            quota.put(period, limit, limit.saturating_sub(counter.count), left);
        }
        if !quota.is_allowed() && !is_allowed {
            return quota;
        }
        for period in RatePeriod::ALL {
            if period.limit(&limits).is_some() {
                let counter = &mut counters[period as usize];
                counter.count = counter.count.saturating_add(1);
            }
        }
        quota.take_one();
        quota
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
                    counter.count > 0 && counter.window >= window_at(period, now).0
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

/// Which window it is since the Unix epoch, and the milliseconds to the next one. By constants, so that nothing is
/// divided.
#[inline]
fn window_at(period: RatePeriod, now: u64) -> (u64, u32) {
    const SECOND: u64 = 1_000_000_000;
    let (window, since, length) = match period {
        RatePeriod::Minute => (now / (60 * SECOND), now % (60 * SECOND), 60 * SECOND),
        RatePeriod::Hour => (now / (3_600 * SECOND), now % (3_600 * SECOND), 3_600 * SECOND),
        RatePeriod::Day => (now / (86_400 * SECOND), now % (86_400 * SECOND), 86_400 * SECOND),
    };
    (window, (length - since).div_ceil(1_000_000) as u32)
}

impl RateLimiter for LocalRateLimiter {
    async fn count(&self, key: &KeyId, limits: RateLimits) -> Result<Quota, StoreError> {
        Ok(self.take(key, limits, false))
    }

    fn count_now(&self, key: &KeyId, limits: RateLimits) -> Option<Quota> {
        Some(self.take(key, limits, false))
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
