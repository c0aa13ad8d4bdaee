//! The feed of a node: what one read of the change table leads to.

use crate::database::{Database, Progress, Tick};
use crate::node::{Moment, Node};
use crate::setup::Mechanism;

impl Node {
    /// Reads the change table: processes all changes that are new. The node is in sync as of now if
    /// the same snapshot has all triggers; without them a change may have left no row.
    pub(crate) fn poll(&mut self, database: &Database, moment: Moment<'_>) {
        if self.has_to_reset(database, moment) {
            self.reset(database, moment);
        }
        for change in database.rows() {
            if !self.has_processed(change) {
                self.begin_change(change, moment);
                self.finish_change(moment);
            }
        }
        self.saw_triggers_missing = database.lacks_triggers;
        if !database.lacks_triggers || !moment.has(Mechanism::SyncNeedsTriggers) {
            self.last_sync = moment.now;
            self.caught_up = true;
        }
    }

    /// Whether a read that comes now finds that changes may have been missed.
    pub(crate) fn has_to_reset(&self, database: &Database, moment: Moment<'_>) -> bool {
        let are_back = self.saw_triggers_missing && !database.lacks_triggers;
        are_back && moment.has(Mechanism::ResetWhenBack)
            || self.misses_a_row(database, moment)
            || moment.setup.reads_marks && database.is_marked && !self.saw_mark
    }

    /// Whether rows that this feed has read are gone: commits were lost.
    fn misses_a_row(&self, database: &Database, moment: Moment<'_>) -> bool {
        let mut rows = self.processed.numbers().zip(self.rows_read.numbers());
        if moment.has(Mechanism::EveryRowChecked) {
            rows.any(|(_, identity)| !database.contains(identity))
        } else {
            rows.max().is_some_and(|(_, identity)| !database.contains(identity))
        }
    }

    /// Forgets the minimum revisions and all answers. What was read up to now is not taken from Redis any more.
    /// The rows that are there need no minimum revision: this stands for all of them.
    fn reset(&mut self, database: &Database, moment: Moment<'_>) {
        self.minimum = Progress::default();
        self.processed = database.progress();
        self.rows_read = database.identities();
        self.saw_mark = database.is_marked;
        self.resets += 1;
        self.reset_at = Some(moment.now);
        self.drop_dead_entries(moment);
        self.ever_processed = database.identities();
        self.knows_of_loss = database.fork.is_some();
    }

    /// Whether something may be taken from Redis that was read, or left there, at `time`.
    pub(crate) fn is_from_after_reset(&self, time: Tick) -> bool {
        self.reset_at.is_none_or(|reset| time > reset)
    }
}
