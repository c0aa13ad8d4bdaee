//! Injected time, so that tests need not sleep.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

#[cfg(target_os = "linux")]
use rustix::time::ClockId;

/// The source of time of the crate. Use a [`ManualClock`] in tests.
///
/// There are two readings, because they fail differently: the wall clock can be set back, and the monotonic clock stops
/// while a machine is suspended.
///
/// ```
/// use std::{sync::Arc, time::{Duration, SystemTime}};
/// use tower_api_key::{KeyScheme, clock::ManualClock};
///
/// let clock = Arc::new(ManualClock::at(SystemTime::UNIX_EPOCH));
/// let scheme = KeyScheme::builder().clock(clock.clone()).build()?;
/// clock.advance(Duration::from_secs(60));
/// # Ok::<(), tower_api_key::key::SchemeError>(())
/// ```
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// Returns the time of the wall clock, which decides expiry.
    fn now(&self) -> SystemTime;

    /// Returns the time since a fixed moment in this process. It never goes back. It measures ages and the waiting
    /// times of the failure limiter.
    fn monotonic(&self) -> Duration;

    /// Returns both readings in nanoseconds: the wall clock since the Unix epoch (0 for a time before it), and the
    /// monotonic clock. Override it if your clock can read both faster than one by one, because each cache hit calls
    /// it.
    fn nanos(&self) -> (u64, u64) {
        let wall = self.now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        (nanos(wall), nanos(self.monotonic()))
    }
}

/// Returns the duration in nanoseconds, at most 584 years.
pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The clocks of the machine.
///
/// On Linux, these are the coarse clocks, with a resolution of one tick of the kernel (1 to 10 ms). Reading them costs
/// a tenth, and a cache hit reads both.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

#[cfg(target_os = "linux")]
impl Clock for SystemClock {
    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_nanos(coarse(ClockId::RealtimeCoarse))
    }

    fn monotonic(&self) -> Duration {
        Duration::from_nanos(coarse(ClockId::MonotonicCoarse))
    }

    #[inline]
    fn nanos(&self) -> (u64, u64) {
        (coarse(ClockId::RealtimeCoarse), coarse(ClockId::MonotonicCoarse))
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
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn monotonic(&self) -> Duration {
        static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
        START.get_or_init(std::time::Instant::now).elapsed()
    }
}

/// A clock that changes only when its methods are called.
#[derive(Debug)]
pub struct ManualClock(Mutex<Reading>);

#[derive(Debug, Clone, Copy)]
struct Reading {
    wall: SystemTime,
    monotonic: Duration,
}

impl ManualClock {
    /// Creates a clock whose wall clock reads `wall`.
    pub fn at(wall: SystemTime) -> Self {
        Self(Mutex::new(Reading { wall, monotonic: Duration::ZERO }))
    }

    /// Advances both readings.
    pub fn advance(&self, by: Duration) {
        self.change(|reading| {
            reading.wall += by;
            reading.monotonic += by;
        });
    }

    /// Sets the wall clock forward or back, as an operator or NTP would. The monotonic reading does not change.
    pub fn set_wall(&self, wall: SystemTime) {
        self.change(|reading| reading.wall = wall);
    }

    fn change(&self, change: impl FnOnce(&mut Reading)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn read(&self) -> Reading {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clock for ManualClock {
    fn now(&self) -> SystemTime {
        self.read().wall
    }

    fn monotonic(&self) -> Duration {
        self.read().monotonic
    }
}
