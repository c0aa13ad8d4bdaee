//! The changes that the replica has applied, for the nodes above it: [`ChangeLog`].

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use tokio::sync::watch;

use crate::store::{Change, ChangeStream, FeedStatus};

/// The last changes of the store's feed. The replica appends a change after it has marked it, so that no node receives a
/// change before its replica has applied it.
#[derive(Debug, Default)]
pub(super) struct ChangeLog {
    log: Mutex<Log>,
    /// Number of entries so far, which wakes the streams.
    appended: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Log {
    changes: VecDeque<Change>,
    /// Number of changes that were dropped from the front.
    dropped: u64,
    synced: Option<SystemTime>,
    status: FeedStatus,
    /// Number of entries so far, syncs and statuses included.
    appended: u64,
}

/// A stream's position.
#[derive(Debug, Default)]
struct Cursor {
    /// Number of changes that it has reported or skipped.
    changes: u64,
    synced: Option<SystemTime>,
    status: FeedStatus,
}

/// Maximum number of changes for streams that begin later, or lag behind.
const MAX_CHANGES: usize = 10_000;

impl ChangeLog {
    /// Appends a change, and wakes the streams.
    pub(super) fn append(&self, change: Change) {
        let mut log = self.log();
        match change {
            Change::Synced(as_of) => log.synced = Some(as_of),
            Change::Status(status) => log.status = status,
            Change::Reset => {
                // A reset includes all earlier changes, and there is no sync until the next one is reported.
                log.dropped += log.changes.len() as u64;
                log.changes.clear();
                log.changes.push_back(Change::Reset);
                log.synced = None;
            }
            change => {
                if log.changes.len() == MAX_CHANGES {
                    log.changes.pop_front();
                    log.dropped += 1;
                }
                log.changes.push_back(change);
            }
        }
        log.appended += 1;
        self.appended.send_replace(log.appended);
    }

    /// Returns whether nothing was appended.
    pub(super) fn is_empty(&self) -> bool {
        self.log().appended == 0
    }

    /// Returns a stream of the changes in the log and of those that follow. `ensure` starts the task that appends them.
    pub(super) fn stream(
        log: &Arc<Self>,
        ensure: impl Fn() + Send + Sync + Clone + 'static,
    ) -> ChangeStream {
        let start = (Arc::clone(log), Cursor::default(), log.appended.subscribe());
        ChangeStream::steps(start, move |(log, mut cursor, mut appended)| {
            let ensure = ensure.clone();
            async move {
                loop {
                    ensure();
                    // Marked as seen before the log is read: an entry that is appended meanwhile wakes the next step.
                    appended.borrow_and_update();
                    let changes = log.after(&mut cursor);
                    if !changes.is_empty() {
                        return Some((changes, (log, cursor, appended)));
                    }
                    // The log has the sender.
                    let _ = appended.changed().await;
                }
            }
        })
    }

    /// Returns the entries after `cursor`, and advances it.
    fn after(&self, cursor: &mut Cursor) -> Vec<Change> {
        let log = self.log();
        let mut changes = Vec::new();
        if cursor.status != log.status {
            cursor.status = log.status.clone();
            changes.push(Change::Status(log.status.clone()));
        }
        if cursor.changes < log.dropped {
            cursor.changes = log.dropped;
            if log.changes.front() != Some(&Change::Reset) {
                changes.push(Change::Reset);
            }
        }
        let skipped = usize::try_from(cursor.changes - log.dropped).unwrap_or(usize::MAX);
        changes.extend(log.changes.iter().skip(skipped).cloned());
        cursor.changes = log.dropped + log.changes.len() as u64;
        if let Some(synced) = log.synced
            && (cursor.synced != Some(synced) || !changes.is_empty())
        {
            cursor.synced = Some(synced);
            changes.push(Change::Synced(synced));
        }
        changes
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::record::Revision;

    fn prefix(revision: u64) -> Change {
        Change::Prefix("p".to_owned(), Revision(revision))
    }

    fn synced(seconds: u64) -> Change {
        Change::Synced(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
    }

    #[test]
    fn a_stream_reports_each_change_before_the_sync_that_includes_it() {
        let log = ChangeLog::default();
        let mut cursor = Cursor::default();
        [prefix(1), synced(1), prefix(2)].into_iter().for_each(|change| log.append(change));
        // The sync was before the second change, so that reporting it after it claims less than is true.
        assert_eq!(log.after(&mut cursor), [prefix(1), prefix(2), synced(1)]);
        assert_eq!(log.after(&mut cursor), []);
        log.append(synced(2));
        assert_eq!(log.after(&mut cursor), [synced(2)]);
    }

    #[test]
    fn a_stream_that_lags_too_far_behind_resets() {
        let log = ChangeLog::default();
        let mut cursor = Cursor::default();
        log.append(prefix(1));
        assert_eq!(log.after(&mut cursor), [prefix(1)]);
        (2..=MAX_CHANGES as u64 + 2).for_each(|revision| log.append(prefix(revision)));
        let changes = log.after(&mut cursor);
        assert_eq!((changes.len(), &changes[0]), (MAX_CHANGES + 1, &Change::Reset));
    }

    #[test]
    fn a_reset_is_reported_once_and_in_its_place() {
        let log = ChangeLog::default();
        let (mut old, mut new) = (Cursor::default(), Cursor::default());
        log.append(prefix(1));
        log.after(&mut old);
        [synced(1), Change::Reset, prefix(2)].into_iter().for_each(|change| log.append(change));
        assert_eq!(log.after(&mut old), [Change::Reset, prefix(2)]);
        assert_eq!(log.after(&mut new), [Change::Reset, prefix(2)]);
    }
}
