//! The rule of age: [`Freshness`].

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use crate::runtime::Moment;

/// When this node last knew that it had heard of every change, and how long an answer may be served
/// after that.
#[derive(Debug)]
pub(crate) struct Freshness {
    max_staleness: Duration,
    /// `max_staleness` and `stale_if_error` together.
    max_staleness_on_error: Duration,
    /// The moment of the last sync; 0 for none. Two words that are not written as one: a hit in between
    /// sees an older wall reading, and at worst asks the store.
    synced_monotonic: AtomicU64,
    synced_wall: AtomicU64,
    sync: Mutex<Sync>,
}

/// The last sync, and what is known of how long the word of one takes to get here.
#[derive(Debug, Default)]
struct Sync {
    last: Option<(SystemTime, Moment)>,
    /// The database's time minus the monotonic one when a sync arrived: the larger, the shorter it had
    /// been on its way. The largest one of the last minute, and of the one before.
    quickest: [Option<i128>; 2],
    since: u64,
}

/// How old an answer is, as far as serving it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Age {
    /// It may be served.
    Fresh,
    /// It may be served, if it lets somebody in, while the store fails.
    Stale,
    /// It may not be served.
    Expired,
}

/// No word of a sync is taken to have been longer on its way: a jump of the database's clock looks like
/// a delay.
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

    /// Every change up to `as_of`, a time of the database, is known at the moment `now`.
    pub(super) fn synced(&self, as_of: SystemTime, now: Moment) {
        let mut sync = self.sync.lock().unwrap_or_else(PoisonError::into_inner);
        let moment = now.minus(sync.delay(as_of, now));
        sync.last = Some((as_of, moment));
        // The wall reading first: with the new monotonic one it must not be an old one that is seen.
        self.synced_wall.store(moment.wall, Ordering::Release);
        self.synced_monotonic.store(moment.monotonic.max(1), Ordering::Release);
    }

    /// The moment of the last sync, if there was one.
    pub(crate) fn last_sync(&self) -> Option<Moment> {
        let monotonic = self.synced_monotonic.load(Ordering::Acquire);
        let wall = self.synced_wall.load(Ordering::Acquire);
        (monotonic > 0).then_some(Moment { monotonic, wall })
    }

    /// How old an answer is whose read was sent at `as_of`.
    #[inline]
    pub(crate) fn age(&self, as_of: Moment, now: Moment) -> Age {
        let base = self.last_sync().map_or(as_of, |sync| sync.later(as_of));
        match now.since(base) {
            age if age <= self.max_staleness => Age::Fresh,
            age if age <= self.max_staleness_on_error => Age::Stale,
            _ => Age::Expired,
        }
    }

    /// The moment at which the database's clock said `as_of`. Before the last sync it is not known, but
    /// does not matter either: the sync is what counts then.
    pub(crate) fn moment_of(&self, as_of: SystemTime, now: Moment) -> Moment {
        let last = self.sync.lock().unwrap_or_else(PoisonError::into_inner).last;
        let moment = match last {
            Some((synced, moment)) => {
                moment.plus(as_of.duration_since(synced).unwrap_or(Duration::ZERO))
            }
            // There is no feed: the time is that of the node which read, and nodes keep the same time.
            None => now.minus(now.wall().duration_since(as_of).unwrap_or(Duration::ZERO)),
        };
        if moment.monotonic > now.monotonic { now } else { moment }
    }

    /// The database's time now, as far as it is known.
    pub(crate) fn database_now(&self, now: Moment) -> SystemTime {
        let last = self.sync.lock().unwrap_or_else(PoisonError::into_inner).last;
        last.map_or(now.wall(), |(as_of, moment)| as_of + now.since(moment))
    }
}

impl Sync {
    /// How long the word of a sync at `as_of` was on its way, beyond the quickest of late.
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
