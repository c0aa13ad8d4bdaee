//! One reading of both clocks: [`Moment`].

use std::time::{Duration, SystemTime};

use super::clock::{Clock, nanos};

/// A point in time by both clocks of this machine, in nanoseconds: the monotonic clock can't be set back, and the wall
/// clock does not stop while the machine is suspended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moment {
    pub(crate) monotonic: u64,
    pub(crate) wall: u64,
}

impl Moment {
    #[inline]
    pub(crate) fn now(clock: &dyn Clock) -> Self {
        let (wall, monotonic) = clock.nanos();
        Self { monotonic, wall }
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

    /// Returns the wall clock in nanoseconds since the Unix epoch.
    pub(crate) fn wall_nanos(self) -> u64 {
        self.wall
    }

    pub(crate) fn wall(self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_nanos(self.wall)
    }
}
