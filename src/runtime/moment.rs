//! One reading of both clocks: [`Moment`].

use std::time::{Duration, SystemTime};

/// One reading of a [`Clock`](crate::clock::Clock): a point in time by the wall clock and by the monotonic clock.
///
/// The monotonic clock can't be set back, and the wall clock does not stop while the machine is suspended. Both readings
/// are kept in nanoseconds: the wall clock from 1970 to 2554, and the monotonic clock up to 584 years. Times outside of
/// that are clamped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    pub(crate) monotonic: u64,
    pub(crate) wall: u64,
}

impl Moment {
    /// Creates a reading of the time of the wall clock, and of the time since a fixed moment in this process.
    pub fn new(wall: SystemTime, monotonic: Duration) -> Self {
        let wall = wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { monotonic: nanos(monotonic), wall: nanos(wall) }
    }

    /// Returns the time of the wall clock.
    pub fn wall(self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_nanos(self.wall)
    }

    /// Returns the time of the monotonic clock.
    pub fn monotonic(self) -> Duration {
        Duration::from_nanos(self.monotonic)
    }

    /// Returns the time of the wall clock in nanoseconds since the Unix epoch.
    pub(crate) fn wall_nanos(self) -> u64 {
        self.wall
    }

    /// Returns the time since `earlier`: the larger of what the two clocks measured.
    pub(crate) fn since(self, earlier: Self) -> Duration {
        let monotonic = self.monotonic.saturating_sub(earlier.monotonic);
        let wall = self.wall.saturating_sub(earlier.wall);
        Duration::from_nanos(monotonic.max(wall))
    }

    pub(crate) fn minus(self, by: Duration) -> Self {
        let by = nanos(by);
        let (monotonic, wall) = (self.monotonic.saturating_sub(by), self.wall.saturating_sub(by));
        Self { monotonic, wall }
    }

    pub(crate) fn plus(self, by: Duration) -> Self {
        let by = nanos(by);
        let (monotonic, wall) = (self.monotonic.saturating_add(by), self.wall.saturating_add(by));
        Self { monotonic, wall }
    }

    /// Returns the later moment by the monotonic clock.
    pub(crate) fn later(self, other: Self) -> Self {
        if self.monotonic >= other.monotonic { self } else { other }
    }
}

/// Returns the duration in nanoseconds, at most 584 years.
fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
