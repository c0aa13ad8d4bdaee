//! Injected time, so that no test sleeps to make time pass.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

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
}

/// The machine's own clocks.
///
/// On Linux the coarse ones, to the last tick of the kernel (1 to 10 ms): reading them costs a tenth, and a
/// hit reads both.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

#[cfg(target_os = "linux")]
impl Clock for SystemClock {
    #[inline]
    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + coarse(rustix::time::ClockId::RealtimeCoarse)
    }

    #[inline]
    fn monotonic(&self) -> Duration {
        coarse(rustix::time::ClockId::MonotonicCoarse)
    }
}

/// A time before its epoch reads as 0.
#[cfg(target_os = "linux")]
#[inline]
fn coarse(clock: rustix::time::ClockId) -> Duration {
    let time = rustix::time::clock_gettime(clock);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
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
