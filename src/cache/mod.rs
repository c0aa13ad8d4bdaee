//! What a node remembers, and how it stays true.
//!
//! Copies of answers lie in the local cache and in Redis, and can be old there in every way: a fill
//! may be executed late, Redis may come back from a snapshot. Two rules keep an old one from being
//! served. The rule of floors ([`floors`]): a node that has learned of a change serves nothing from
//! before it. The rule of age ([`freshness`]): an answer is served only for so long after it was read,
//! or after the node last knew that it had heard of every change.
//!
//! Read [`answers`] first, which has the way down and up again; [`local`] is the first tier, [`flight`] is
//! what is under way for a key that is not in it, [`limiter`] decides whose look-ups go first, and [`feed`]
//! listens to the store.

mod admission;
mod answers;
mod feed;
mod flight;
mod floors;
mod freshness;
mod health;
mod limiter;
mod local;
mod moment;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

pub use self::health::Health;
pub(crate) use self::{
    answers::{Answers, LookupFuture, Recall},
    feed::Background,
    flight::Waiters,
    floors::Subject,
    freshness::Age,
    limiter::Priority,
    local::Stamp,
    moment::Moment,
};
use self::{floors::Floors, freshness::Freshness};
use crate::{
    record::Revision,
    store::{Change, FeedStatus},
    telemetry::{self, BadRowLog},
};

/// How much a node remembers and for how long, and how often it writes what was used.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    /// So many keys.
    pub(crate) capacity: usize,
    /// Number of look-ups that may be under way.
    pub(crate) max_lookups: usize,
    pub(crate) max_staleness: Duration,
    pub(crate) stale_if_error: Duration,
    /// `None` records no usage.
    pub(crate) usage_interval: Option<Duration>,
    pub(crate) lease_lifetime: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            capacity: 100_000,
            max_lookups: 4096,
            max_staleness: Duration::from_secs(30),
            stale_if_error: Duration::from_secs(60),
            usage_interval: Some(Duration::from_secs(1)),
            lease_lifetime: Duration::from_secs(30),
        }
    }
}

/// What a node knows of the changes in the store below it: which ones, and up to when all of them.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) floors: Floors,
    pub(crate) freshness: Freshness,
    /// As the store's feed has reported it last.
    feed: Mutex<FeedStatus>,
    pub(crate) bad_rows: BadRowLog,
}

impl View {
    pub(crate) fn new(settings: &Settings) -> Arc<Self> {
        Arc::new(Self {
            floors: Floors::new(),
            freshness: Freshness::new(settings),
            feed: Mutex::default(),
            bad_rows: BadRowLog::default(),
        })
    }

    /// Takes in what the store says, at the moment `now`.
    pub(crate) fn learn(&self, change: Change, now: Moment) {
        let database_now = || self.freshness.database_now(now);
        match change {
            Change::Prefix(prefix, revision) => {
                self.floors.raise(Subject::Prefix(prefix.into()), revision, now, database_now());
            }
            Change::Owner(owner, revision) => {
                self.floors.raise(Subject::Owner(owner), revision, now, database_now());
            }
            Change::Synced(as_of) => {
                self.freshness.synced(as_of, now);
                self.floors.caught_up();
            }
            Change::Reset => self.floors.reset(database_now()),
            Change::Status(status) => {
                let mut feed = self.feed.lock().unwrap_or_else(PoisonError::into_inner);
                telemetry::feed_status(&feed, &status);
                *feed = status;
            }
        }
    }

    /// The status of the store's feed.
    pub(crate) fn feed(&self) -> FeedStatus {
        self.feed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Forgets what is known of keys under `prefix`, in every tier, though no change was said.
    pub(crate) fn distrust(&self, prefix: &str, now: Moment) {
        let subject = Subject::Prefix(prefix.into());
        self.floors.distrust(subject, now, self.freshness.database_now(now));
    }

    /// Learns of a change from a tombstone that lies in place of a copy, if it is news.
    pub(crate) fn learn_of_delete(
        &self,
        subject: Subject,
        revision: Revision,
        made_at: SystemTime,
        now: Moment,
    ) {
        // Whoever is in sync knows better: a database that was restored has given up the revision.
        let is_in_sync = |sync| self.freshness.age(sync, now) == Age::Fresh;
        if !self.freshness.last_sync().is_some_and(is_in_sync) && self.floors.accept_delete(made_at)
        {
            self.floors.raise_to(subject, revision, now, self.freshness.database_now(now));
        }
    }

    /// Whether `as_of` is a time that the database has not come to.
    pub(crate) fn is_ahead(&self, as_of: SystemTime, now: Moment) -> bool {
        as_of > self.freshness.database_now(now) + floors::MARGIN
    }

    /// Whether a copy that others made at `as_of` may be looked at: how old it is, or `None` if a change
    /// that this node knows of, or may not know of yet, came after it.
    pub(crate) fn judge_copy(
        &self,
        subjects: &[(Subject, Revision)],
        as_of: SystemTime,
        now: Moment,
    ) -> Option<Age> {
        self.floors
            .accept_copy(subjects, as_of)
            .then(|| self.freshness.age(self.freshness.moment_of(as_of, now), now))
    }
}
