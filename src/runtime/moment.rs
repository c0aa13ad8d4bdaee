//! One reading of both clocks: [`Moment`].

use std::time::{Duration, SystemTime};

use super::clock::{Clock, nanos};

/// When something happened, by both clocks of this machine, in nanoseconds: the monotonic one can't be
/// set back, and the wall clock does not stand still while the machine is suspended.
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

    /// What has passed since `earlier`, by the clock that says more.
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

    /// The later one, by the monotonic clock.
    pub(crate) fn later(self, other: Self) -> Self {
        if self.monotonic >= other.monotonic { self } else { other }
    }

    /// The wall clock, in nanoseconds since the Unix epoch.
    pub(crate) fn wall_nanos(self) -> u64 {
        self.wall
    }

    pub(crate) fn wall(self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_nanos(self.wall)
    }
}
