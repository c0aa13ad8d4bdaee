//! Change state of a node: [`View`].

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

#[cfg(feature = "redis")]
use super::{freshness::Age, minimum_revisions::MARGIN};
use super::{
    freshness::Freshness,
    minimum_revisions::{MinimumRevisions, Subject},
};
use crate::{
    record::{Revision, UserId},
    runtime::Moment,
    telemetry::BadRowLog,
};

/// Change state of a node: the changes in the store below that it has received, and the time up to which it has
/// received all of them.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) minimum_revisions: MinimumRevisions,
    pub(crate) freshness: Freshness,
    pub(crate) bad_rows: BadRowLog,
}

impl View {
    pub(crate) fn new(max_staleness: Duration, stale_if_error: Duration) -> Arc<Self> {
        Arc::new(Self {
            minimum_revisions: MinimumRevisions::new(),
            freshness: Freshness::new(max_staleness, stale_if_error),
            bad_rows: BadRowLog::default(),
        })
    }

    /// Records that the rows under a lookup id have changed.
    pub(crate) fn prefix_changed(&self, prefix: String, revision: Revision, now: Moment) {
        let database_now = self.freshness.database_now(now);
        self.minimum_revisions.raise(Subject::Prefix(prefix.into()), revision, now, database_now);
    }

    /// Records that an owner has changed.
    pub(crate) fn owner_changed(&self, owner: UserId, revision: Revision, now: Moment) {
        self.minimum_revisions.raise(
            Subject::Owner(owner),
            revision,
            now,
            self.freshness.database_now(now),
        );
    }

    /// Records that all changes up to `as_of`, a time of the database, are known.
    pub(crate) fn synced(&self, as_of: SystemTime, now: Moment) {
        self.freshness.synced(as_of, now);
        self.minimum_revisions.caught_up();
    }

    /// Records that changes may have been missed.
    pub(crate) fn reset(&self, now: Moment) {
        self.minimum_revisions.reset(self.freshness.database_now(now));
    }

    /// Invalidates the keys under `prefix` in every tier, for changes made outside the store's knowledge.
    pub(crate) fn invalidate(&self, prefix: &str, now: Moment) {
        let subject = Subject::Prefix(prefix.into());
        self.minimum_revisions.invalidate(subject, now, self.freshness.database_now(now));
    }
}

/// What a replica holds.
impl View {
    /// Returns whether a replica of the store may answer from what it read at `read_at`, by the database's clock. Resets
    /// are the replica's concern: it reads everything again.
    pub(crate) fn accepts_replica(
        &self,
        subjects: &[(Subject, Revision)],
        read_at: SystemTime,
    ) -> bool {
        self.minimum_revisions.accept_read(subjects, read_at)
    }
}

/// Changes and copies that a shared cache holds.
#[cfg(feature = "redis")]
impl View {
    /// Records the change of a tombstone that replaces a copy, if the change is new.
    pub(crate) fn record_tombstone(
        &self,
        subject: Subject,
        revision: Revision,
        made_at: SystemTime,
        now: Moment,
    ) {
        // A node in sync ignores the tombstone: a restored database may have lost the revision.
        let is_in_sync = |sync| self.freshness.age(sync, now) == Age::Fresh;
        if !self.freshness.last_sync().is_some_and(is_in_sync)
            && self.minimum_revisions.accept_tombstone(made_at)
        {
            self.minimum_revisions.raise_to(
                subject,
                revision,
                now,
                self.freshness.database_now(now),
            );
        }
    }

    /// Returns whether `as_of` is later than the current time of the database.
    pub(crate) fn is_ahead(&self, as_of: SystemTime, now: Moment) -> bool {
        as_of > self.freshness.database_now(now) + MARGIN
    }

    /// Returns the age of a copy that another node made at `as_of`; `None` if a change that this node knows, or may not
    /// know yet, came after it.
    pub(crate) fn judge_copy(
        &self,
        subjects: &[(Subject, Revision)],
        as_of: SystemTime,
        now: Moment,
    ) -> Option<Age> {
        self.minimum_revisions
            .accept_copy(subjects, as_of)
            .then(|| self.freshness.age(self.freshness.moment_of(as_of, now), now))
    }
}
