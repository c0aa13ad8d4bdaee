//! Injected time, so that no test sleeps to make time pass.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

#[cfg(target_os = "linux")]
use rustix::time::ClockId;

/// Where the crate reads the time. Give a [`ManualClock`] in tests.
///
/// Two readings, because they fail differently: the wall clock can be set back, the monotonic one
/// stands still while a machine is suspended.
///
/// ```
/// use std::{sync::Arc, time::{Duration, SystemTime}};
/// use tower_api_key::{KeyScheme, ManualClock};
///
/// let clock = Arc::new(ManualClock::at(SystemTime::UNIX_EPOCH));
/// let scheme = KeyScheme::builder().clock(clock.clone()).build()?;
/// clock.advance(Duration::from_secs(60));
/// # Ok::<(), tower_api_key::SchemeError>(())
/// ```
pub trait Clock: fmt::Debug + Send + Sync + 'static {
    /// The wall clock: expiry is judged by it.
    fn now(&self) -> SystemTime;

    /// Time since a fixed moment in this process; never goes back. Rations and ages are measured with it.
    fn monotonic(&self) -> Duration;

    /// Both, in nanoseconds: the wall clock since the Unix epoch (0 for a time before it), and the monotonic
    /// one. For a clock that can read them faster than one by one: a hit does.
    fn nanos(&self) -> (u64, u64) {
        let wall = self.now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        (nanos(wall), nanos(self.monotonic()))
    }
}

/// A duration of more than 584 years is the longest that there is.
pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The machine's own clocks.
///
/// On Linux the coarse ones, to the last tick of the kernel (1 to 10 ms): reading them costs a tenth, and a
/// hit reads both.
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

/// In nanoseconds; a time before its epoch reads as 0.
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

/// A clock that moves only when it is told to.
#[derive(Debug)]
pub struct ManualClock(Mutex<Reading>);

#[derive(Debug, Clone, Copy)]
struct Reading {
    wall: SystemTime,
    monotonic: Duration,
}

impl ManualClock {
    /// A clock that stands at `wall`.
    pub fn at(wall: SystemTime) -> Self {
        Self(Mutex::new(Reading { wall, monotonic: Duration::ZERO }))
    }

    /// Moves both readings forward.
    pub fn advance(&self, by: Duration) {
        self.change(|reading| {
            reading.wall += by;
            reading.monotonic += by;
        });
    }

    /// Makes the wall clock jump, either way, as an operator or NTP would; the monotonic reading stays.
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
