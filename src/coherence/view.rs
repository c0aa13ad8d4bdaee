//! What a node knows of changes: [`View`].

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use crate::coherence::freshness::{Age, Freshness};
use crate::coherence::minimum_revisions::{self, MinimumRevisions, Subject};
use crate::{
    record::{Revision, UserId},
    runtime::Moment,
    telemetry::BadRowLog,
};

/// What a node knows of the changes in the store below it: which ones, and up to when all of them.
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

    /// The rows under a lookup prefix have changed.
    pub(crate) fn prefix_changed(&self, prefix: String, revision: Revision, now: Moment) {
        let database_now = self.freshness.database_now(now);
        self.minimum_revisions.raise(Subject::Prefix(prefix.into()), revision, now, database_now);
    }

    /// An owner has changed.
    pub(crate) fn owner_changed(&self, owner: UserId, revision: Revision, now: Moment) {
        self.minimum_revisions.raise(
            Subject::Owner(owner),
            revision,
            now,
            self.freshness.database_now(now),
        );
    }

    /// All changes up to `as_of`, a time of the database, are known.
    pub(crate) fn synced(&self, as_of: SystemTime, now: Moment) {
        self.freshness.synced(as_of, now);
        self.minimum_revisions.caught_up();
    }

    /// Changes may have been missed.
    pub(crate) fn reset(&self, now: Moment) {
        self.minimum_revisions.reset(self.freshness.database_now(now));
    }

    /// Forgets what is known of keys under `prefix`, in every tier, though no change was said.
    pub(crate) fn invalidate(&self, prefix: &str, now: Moment) {
        let subject = Subject::Prefix(prefix.into());
        self.minimum_revisions.invalidate(subject, now, self.freshness.database_now(now));
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
        if !self.freshness.last_sync().is_some_and(is_in_sync)
            && self.minimum_revisions.accept_delete(made_at)
        {
            self.minimum_revisions.raise_to(
                subject,
                revision,
                now,
                self.freshness.database_now(now),
            );
        }
    }

    /// Whether `as_of` is a time that the database has not come to.
    pub(crate) fn is_ahead(&self, as_of: SystemTime, now: Moment) -> bool {
        as_of > self.freshness.database_now(now) + minimum_revisions::MARGIN
    }

    /// Whether a copy that others made at `as_of` may be looked at: how old it is, or `None` if a change
    /// that this node knows of, or may not know of yet, came after it.
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
