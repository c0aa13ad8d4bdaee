//! The freshness rule: [`Freshness`].

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use crate::runtime::Moment;

/// The last sync with the change feed, and how long an answer may be served after it.
#[derive(Debug)]
pub(crate) struct Freshness {
    max_staleness: Duration,
    /// `max_staleness` and `stale_if_error` together.
    max_staleness_on_error: Duration,
    /// The moment of the last sync; 0 for none. The two words are not written atomically: a hit between the two writes
    /// reads an older wall clock value, and at worst queries the store.
    synced_monotonic: AtomicU64,
    synced_wall: AtomicU64,
    sync: Mutex<Sync>,
}

/// The last sync, and the delay of sync notifications.
#[derive(Debug, Default)]
struct Sync {
    last: Option<(SystemTime, Moment)>,
    /// The database's time minus the monotonic time when a sync arrived: the larger, the smaller the delay. The largest
    /// value of the last minute, and of the minute before.
    quickest: [Option<i128>; 2],
    since: u64,
}

/// The age of an answer, as far as it matters for serving.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Age {
    /// It may be served.
    Fresh,
    /// It may be served while the store fails, if it is positive.
    Stale,
    /// It may not be served.
    Expired,
}

/// Maximum assumed delay of a sync notification, because a jump of the database's clock looks like a delay.
const MAX_DELAY: Duration = Duration::from_secs(5);
const WINDOW_NANOS: u64 = 60_000_000_000;

impl Freshness {
    pub(super) fn new(max_staleness: Duration, stale_if_error: Duration) -> Self {
        Self {
            max_staleness,
            max_staleness_on_error: max_staleness.saturating_add(stale_if_error),
            synced_monotonic: AtomicU64::new(0),
            synced_wall: AtomicU64::new(0),
            sync: Mutex::default(),
        }
    }

    /// Records that every change up to `as_of`, a time of the database, is known at the moment `now`.
    pub(super) fn synced(&self, as_of: SystemTime, now: Moment) {
        let mut sync = self.sync.lock().unwrap_or_else(PoisonError::into_inner);
        let moment = now.minus(sync.delay(as_of, now));
        sync.last = Some((as_of, moment));
        // The wall clock value is written first: a reader of the new monotonic value must not read the old wall clock
        // value.
        self.synced_wall.store(moment.wall, Ordering::Release);
        self.synced_monotonic.store(moment.monotonic.max(1), Ordering::Release);
    }

    /// Returns the moment of the last sync, if there was one.
    pub(crate) fn last_sync(&self) -> Option<Moment> {
        let monotonic = self.synced_monotonic.load(Ordering::Acquire);
        let wall = self.synced_wall.load(Ordering::Acquire);
        (monotonic > 0).then_some(Moment { monotonic, wall })
    }

    /// Returns the database's time of the last sync, if there was one.
    pub(crate) fn synced_to(&self) -> Option<SystemTime> {
        self.last().map(|(as_of, _)| as_of)
    }

    /// Returns the age of an answer whose read was sent at `as_of`.
    #[inline]
    pub(crate) fn age(&self, as_of: Moment, now: Moment) -> Age {
        let base = self.last_sync().map_or(as_of, |sync| sync.later(as_of));
        match now.since(base) {
            age if age <= self.max_staleness => Age::Fresh,
            age if age <= self.max_staleness_on_error => Age::Stale,
            _ => Age::Expired,
        }
    }

    /// Returns the moment at which the database's clock read `as_of`. Before the last sync it is not known, but is not
    /// needed either: age is then measured from the sync.
    pub(crate) fn moment_of(&self, as_of: SystemTime, now: Moment) -> Moment {
        let moment = match self.last() {
            Some((synced, moment)) => {
                moment.plus(as_of.duration_since(synced).unwrap_or(Duration::ZERO))
            }
            // There is no feed: the time comes from the node that read the store, and the clocks of nodes are
            // synchronized.
            None => now.minus(now.wall().duration_since(as_of).unwrap_or(Duration::ZERO)),
        };
        if moment.monotonic > now.monotonic { now } else { moment }
    }

    /// Returns the current time of the database, as far as it is known.
    pub(crate) fn database_now(&self, now: Moment) -> SystemTime {
        self.last().map_or(now.wall(), |(as_of, moment)| as_of + now.since(moment))
    }

    fn last(&self) -> Option<(SystemTime, Moment)> {
        self.sync.lock().unwrap_or_else(PoisonError::into_inner).last
    }
}

impl Sync {
    /// Returns the delay of the notification of a sync at `as_of`, relative to the quickest recent one.
    fn delay(&mut self, as_of: SystemTime, now: Moment) -> Duration {
        let time = as_of.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let offset = time.as_nanos() as i128 - i128::from(now.monotonic);
        if now.monotonic.saturating_sub(self.since) > WINDOW_NANOS {
            self.quickest = [None, self.quickest[0]];
            self.since = now.monotonic;
        }
        self.quickest[0] = self.quickest[0].max(Some(offset));
        let quickest = self.quickest.into_iter().flatten().max().unwrap_or(offset);
        let delay = u64::try_from(quickest - offset).unwrap_or(u64::MAX);
        Duration::from_nanos(delay).min(MAX_DELAY)
    }
}
