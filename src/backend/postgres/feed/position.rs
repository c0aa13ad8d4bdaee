//! Position in the table of changes: [`Position`].

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, SystemTime},
};

use super::read::{FeedRead, MAX_CHANGES, Row};
use crate::{
    record::{Revision, UserId},
    store::Change,
};

/// The position up to which the table was read: every row of a transaction below `next_xid` was visible, except for
/// those in progress. Its size is bounded by the number of connections, not by the number of changes.
pub(super) struct Position {
    /// At most one more than the last transaction that left a row: after a crash the database reassigns the ids of
    /// transactions that wrote nothing.
    pub(super) next_xid: u64,
    pub(super) in_progress: Vec<u64>,
    /// A row of each of the transactions that were read last. A failover may lose the last commits, including one with
    /// a lower id than one that survived. Then one of these rows is missing.
    recent: VecDeque<Recent>,
    /// The rows of the last read, if they were of more transactions than `recent` holds.
    bulk: Option<BulkRead>,
    /// The row of the highest transaction id.
    last: Option<String>,
    triggers: Option<String>,
    as_of: Option<SystemTime>,
}

struct Recent {
    id: String,
    read_at: SystemTime,
}

/// Rows of many transactions that one read returned. Any of these transactions may have been the last to commit, so
/// that their number is checked until a later transaction is read.
pub(super) struct BulkRead {
    /// The transaction ids: those from `from` up to, but not including, `to`, and those in `before`.
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) before: Vec<u64>,
    /// The transactions that were still in progress.
    pub(super) except: Vec<u64>,
    pub(super) rows: usize,
    read_at: SystemTime,
}

/// Maximum number of transactions whose rows are checked. The last commits are the first to be lost, so that a few are
/// sufficient, unless one read returns more.
const MAX_RECENT: usize = 64;
/// Age from which on a failover can't lose a commit. It is half of the time for which rows are kept: a node that has
/// not read for that time may have missed rows that were pruned.
const MAX_GAP: Duration = Duration::from_secs(3600);

impl Position {
    pub(super) fn new(next_xid: u64, in_progress: Vec<u64>) -> Self {
        let (recent, bulk, last, triggers, as_of) = (VecDeque::new(), None, None, None, None);
        Self { next_xid, in_progress, recent, bulk, last, triggers, as_of }
    }

    /// Returns the ids of rows that must still exist.
    pub(super) fn recent(&self) -> impl Iterator<Item = &str> {
        self.recent.iter().map(|row| row.id.as_str()).chain(self.last.as_deref())
    }

    pub(super) fn bulk(&self) -> Option<&BulkRead> {
        self.bulk.as_ref()
    }

    /// Advances past a read, and returns its changes.
    pub(super) fn advance(&mut self, found: FeedRead) -> Vec<Change> {
        let as_of = found.as_of();
        let is_first = self.as_of.is_none();
        let is_late = self
            .as_of
            .is_some_and(|last| as_of.duration_since(last).is_ok_and(|gap| gap > MAX_GAP));
        let is_same_database = found.is_continuous && found.next_xid >= self.next_xid;
        let has_touched_triggers = !is_first && self.triggers != found.triggers;
        let rows = found.changes.unwrap_or_default();
        let mut changes = Vec::new();
        if !is_first && (is_late || !is_same_database || has_touched_triggers)
            || rows.len() > MAX_CHANGES
        {
            changes.push(Change::Reset);
        }
        if !is_same_database {
            self.recent.clear();
            self.bulk = None;
        }
        let transactions = self.record(&rows, as_of);
        let is_old = |bulk: &BulkRead| is_past(bulk.read_at, as_of);
        if transactions > 0 || self.bulk.as_ref().is_some_and(is_old) {
            let is_bulk = !is_first && transactions > MAX_RECENT && rows.len() <= MAX_CHANGES;
            self.bulk = is_bulk.then(|| BulkRead {
                from: self.next_xid,
                to: found.next_xid,
                before: self.in_progress.clone(),
                except: found.in_progress.clone(),
                rows: rows.len(),
                read_at: as_of,
            });
        }
        if rows.len() <= MAX_CHANGES {
            changes.extend(changes_of(rows));
        }
        self.next_xid = found.next_xid;
        self.in_progress = found.in_progress;
        self.last = found.last.map(|row| row.id);
        self.triggers = found.triggers;
        self.as_of = Some(as_of);
        changes
    }

    /// Records the rows, and returns the number of their transactions.
    fn record(&mut self, rows: &[Row], read_at: SystemTime) -> usize {
        let by_transaction: BTreeMap<_, _> = rows.iter().map(|row| (row.xid, &row.id)).collect();
        let transactions = by_transaction.len();
        let read = by_transaction.into_values();
        self.recent.extend(read.map(|id| Recent { id: id.clone(), read_at }));
        let is_old = |row: &Recent| is_past(row.read_at, read_at);
        while self.recent.len() > MAX_RECENT || self.recent.front().is_some_and(is_old) {
            self.recent.pop_front();
        }
        transactions
    }
}

/// Returns whether a failover can't lose any more what was read at `read_at`.
fn is_past(read_at: SystemTime, now: SystemTime) -> bool {
    now.duration_since(read_at).is_ok_and(|age| age > MAX_GAP)
}

/// Returns the changes in rows of one snapshot, each subject once. Revisions of one row rise in the order of its
/// commits, so that the highest is the last. If several keys share a lookup id, the lower revision may have been
/// committed last: both are returned, the lower one after the higher.
fn changes_of(mut rows: Vec<Row>) -> Vec<Change> {
    let mut changes = Vec::with_capacity(rows.len());
    if rows.iter().any(|row| row.key_prefix.is_none() && row.user_id.is_none()) {
        changes.push(Change::Reset);
    }
    rows.sort_by_key(|row| std::cmp::Reverse(row.revision));
    let (mut keys, mut owners) = (BTreeMap::new(), BTreeMap::new());
    for row in rows {
        let revision = row.revision;
        match (row.key_prefix, row.user_id) {
            (Some(prefix), _) => {
                let of = keys.entry(prefix).or_insert((revision, row.api_key_id, None));
                if of.1 != row.api_key_id {
                    of.2 = Some(revision);
                }
            }
            (None, Some(user)) => {
                owners.entry(user).or_insert(revision);
            }
            (None, None) => {}
        }
    }
    for (prefix, (highest, _, lowest)) in keys {
        let of_revision = |revision| Change::Prefix(prefix.clone(), Revision(revision));
        changes.extend([Some(highest), lowest].into_iter().flatten().map(of_revision));
    }
    let of_owner = |(user, revision)| Change::Owner(UserId::from(user), Revision(revision));
    changes.extend(owners.into_iter().map(of_owner));
    changes
}
