//! Injected time, so that tests need not sleep.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

#[cfg(target_os = "linux")]
use rustix::time::ClockId;

use super::moment::Moment;

/// The source of time of the crate. Use a [`ManualClock`] in tests.
///
/// One reading has the time of two clocks, because they fail differently: the wall clock can be set back, and the
/// monotonic clock stops while a machine is suspended. The wall clock decides expiry. The monotonic clock measures ages
/// and the waiting times of the failure limiter.
///
/// An authenticator, its store and its limiters each have a clock. Set the same one for all of them.
///
/// ```
/// use std::{sync::Arc, time::{Duration, SystemTime}};
/// use tower_api_key::{Authenticator, MemoryStore, clock::ManualClock};
///
/// let clock = Arc::new(ManualClock::at(SystemTime::UNIX_EPOCH));
/// let store = MemoryStore::with_clock(clock.clone());
/// let authenticator = Authenticator::builder(store).clock(clock.clone()).build();
/// clock.advance(Duration::from_secs(60));
/// ```
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// Returns the time of both clocks. The monotonic time never goes back. Each cache hit calls it once, so it must be
    /// fast.
    fn read(&self) -> Moment;

    /// Returns the time of the wall clock.
    fn now(&self) -> SystemTime {
        self.read().wall()
    }
}

/// The clocks of the machine.
///
/// On Linux, these are the coarse clocks, with a resolution of one tick of the kernel (1 to 10 ms). Reading them costs
/// a tenth, and a cache hit reads both.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

#[cfg(target_os = "linux")]
impl Clock for SystemClock {
    #[inline]
    fn read(&self) -> Moment {
        let (wall, monotonic) = (coarse(ClockId::RealtimeCoarse), coarse(ClockId::MonotonicCoarse));
        Moment { monotonic, wall }
    }
}

/// Returns the reading in nanoseconds; 0 for a time before the epoch of the clock.
#[cfg(target_os = "linux")]
#[inline]
fn coarse(clock: ClockId) -> u64 {
    let time = rustix::time::clock_gettime(clock);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(not(target_os = "linux"))]
impl Clock for SystemClock {
    fn read(&self) -> Moment {
        static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
        let monotonic = START.get_or_init(std::time::Instant::now).elapsed();
        Moment::new(SystemTime::now(), monotonic)
    }
}

/// A clock that changes only when its methods are called.
#[derive(Debug)]
pub struct ManualClock(Mutex<Moment>);

impl ManualClock {
    /// Creates a clock whose wall clock reads `wall`. The monotonic time is 0.
    pub fn at(wall: SystemTime) -> Self {
        Self(Mutex::new(Moment::new(wall, Duration::ZERO)))
    }

    /// Advances both readings.
    pub fn advance(&self, by: Duration) {
        self.change(|moment| moment.plus(by));
    }

    /// Sets the wall clock forward or back, as an operator or NTP would. The monotonic reading does not change.
    pub fn set_wall(&self, wall: SystemTime) {
        self.change(|moment| Moment::new(wall, moment.monotonic()));
    }

    fn change(&self, change: impl FnOnce(Moment) -> Moment) {
        let mut moment = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *moment = change(*moment);
    }
}

impl Clock for ManualClock {
    fn read(&self) -> Moment {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
