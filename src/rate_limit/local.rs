//! In-process rate limits: [`LocalRateLimiter`].

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

/// Counts the requests of one process in memory. Clones share their counters.
///
/// Windows are aligned to the wall clock at the time at which the limiter was created. From then on the monotonic
/// clock moves them, so that setting the clock does not allow more requests. Keys that were not used in the current
/// windows take no memory.
#[derive(Clone)]
pub struct LocalRateLimiter(Arc<LocalCounters>);

struct LocalCounters {
    shards: [Mutex<Shard>; SHARDS],
    hasher: RandomState,
    clock: Arc<dyn Clock>,
    /// Offset of the monotonic clock to the time since the Unix epoch, in nanoseconds.
    epoch: u64,
}

#[derive(Default)]
struct Shard {
    counters: HashMap<KeyId, Counters, RandomState>,
    /// Number of counters at which those of past windows are removed.
    sweep_at: usize,
}

/// Counters of a key, by period.
type Counters = [Counter; 3];

#[derive(Clone, Copy, Default)]
struct Counter {
    /// Number of the window since the Unix epoch.
    window: u64,
    count: u64,
}

/// Number of shards. Sharded to avoid contention.
const SHARDS: usize = 64;
/// Minimum number of counters before a sweep.
const MIN_SWEEP: usize = 64;

impl LocalRateLimiter {
    /// Creates a limiter without counted requests.
    pub fn new() -> Self {
        Self::with_clock(Arc::new(SystemClock))
    }

    /// Creates a limiter with a custom clock.
    pub fn with_clock(clock: Arc<dyn Clock>) -> Self {
        let now = clock.read();
        Self(Arc::new(LocalCounters {
            shards: std::array::from_fn(|_| Mutex::default()),
            hasher: RandomState::default(),
            clock,
            epoch: now.wall.saturating_sub(now.monotonic),
        }))
    }

    /// Counts a request that was allowed elsewhere, even if the limit is reached.
    #[cfg(feature = "redis")]
    pub(super) fn count_allowed(&self, key: &KeyId, limits: RateLimits) {
        self.take(key, limits, true);
    }

    /// Counts a request if it is within the limits, or if it `is_allowed` already.
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
            counter.roll_over(window);
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

    /// Returns the time since the Unix epoch, in nanoseconds.
    fn now(&self) -> u64 {
        self.0.epoch.saturating_add(self.0.clock.read().monotonic)
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
            self.sweep_at = MIN_SWEEP.max(2 * self.counters.len());
        }
    }
}

impl Counter {
    fn roll_over(&mut self, window: u64) {
        if self.window != window {
            *self = Self { window, count: 0 };
        }
    }
}

/// Returns the number of the window since the Unix epoch, and the milliseconds until the next one. Divides by
/// constants, which compiles to multiplications.
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
