//! The feed of changes: the table `api_key_changes`, read whenever this process has written, or
//! `PRAGMA data_version` says that another one has.

use std::time::{Duration, Instant, SystemTime};

use diesel::SqliteConnection;
use tokio::{sync::watch, time::timeout};

use super::{SqliteStore, load};
use crate::{
    error::StoreError,
    record::Revision,
    store::{
        Change, ChangeStream,
        statement::{Bind, Statement, TextRow},
    },
    telemetry,
};

/// So often it is looked whether another process has written: the pragma reads a counter in shared
/// memory.
const WATCHED_EVERY: Duration = Duration::from_millis(20);
/// So often those who listen are told that nothing has happened.
const PULSE: Duration = Duration::from_secs(1);
/// The pause after a failure.
const PAUSE: Duration = Duration::from_millis(500);
/// Past so many new changes at once it is cheaper to read everything anew.
const MAX_CHANGES: usize = 10_000;
const PRUNED_EVERY: Duration = Duration::from_secs(600);
/// Rows of more than a day ago, which is longer than anybody looks back; never the last one.
const PRUNE: &str = "DELETE FROM api_key_changes WHERE changed_at < julianday('now') - 1
    AND revision < (SELECT max(revision) FROM api_key_changes) RETURNING CAST(revision AS TEXT) AS row";

pub(super) fn changes(store: &SqliteStore, since: SystemTime) -> ChangeStream {
    let feed = Feed {
        store: store.clone(),
        written: store.0.written.subscribe(),
        since,
        data_version: None,
        heard: None,
        next_pruning: Instant::now() + PRUNED_EVERY,
    };
    ChangeStream::steps(feed, |mut feed| async move {
        loop {
            match feed.next().await {
                Ok(changes) => return Some((changes, feed)),
                Err(error) => {
                    telemetry::feed_broken(&error);
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    })
}

struct Feed {
    store: SqliteStore,
    /// What this process has written, which its own connections may not see in the pragma.
    written: watch::Receiver<u64>,
    since: SystemTime,
    data_version: Option<i64>,
    /// The last revision that was read.
    heard: Option<u64>,
    next_pruning: Instant,
}

impl Feed {
    async fn next(&mut self) -> Result<Vec<Change>, StoreError> {
        if self.heard.is_some() {
            // The store is alive, or nobody would listen: this ends with a write, or at the pulse.
            let _ = timeout(PULSE, self.something_new()).await;
        }
        if Instant::now() >= self.next_pruning {
            self.next_pruning = Instant::now() + PRUNED_EVERY;
            // What could not be deleted is deleted the next time.
            let _ = self.store.write(Statement::new(PRUNE, [])).await;
        }
        let as_of = SystemTime::now();
        self.written.mark_unchanged();
        let statement = match self.heard {
            Some(heard) => {
                let filter = "revision > $1 OR $1 > (SELECT max(revision) FROM api_key_changes)";
                Statement::new(select(filter), [Bind::Integer(i64::try_from(heard).unwrap_or(0))])
            }
            None => {
                let age = as_of.duration_since(self.since).unwrap_or_default().as_secs() + 1;
                let filter = "changed_at > julianday('now') - $1 / 86400.0";
                Statement::new(
                    select(filter),
                    [Bind::Integer(i64::try_from(age).unwrap_or(i64::MAX))],
                )
            }
        };
        let rows = self.watch(move |connection| load(connection, &statement)).await?;
        let mut changes = Vec::new();
        let mut last = self.heard.unwrap_or(0);
        let latest = rows.iter().find_map(TextRow::id).and_then(|id| u64::try_from(id).ok());
        if latest.is_some_and(|latest| latest < last) || rows.len() > MAX_CHANGES {
            // Another database than before, or too much to tell.
            changes.push(Change::Reset);
        } else {
            for row in rows.iter().filter(|row| row.id().is_none()) {
                changes.push(change(row)?);
            }
        }
        last = latest.unwrap_or(last);
        self.heard = Some(last);
        changes.push(Change::Synced(as_of));
        Ok(changes)
    }

    /// Ends when there may be something to read.
    async fn something_new(&mut self) {
        // In memory, nobody else can write.
        if self.store.0.watcher.is_none() {
            let _ = self.written.changed().await;
            return;
        }
        while timeout(WATCHED_EVERY, self.written.changed()).await.is_err() {
            let statement = Statement::new(
                "SELECT CAST(data_version AS TEXT) AS row FROM pragma_data_version",
                [],
            );
            let rows = self.watch(move |connection| load(connection, &statement)).await;
            let version = rows.ok().and_then(|rows| rows.first().and_then(TextRow::id));
            if version.is_none() || self.data_version != version {
                self.data_version = version;
                return;
            }
        }
    }

    async fn watch<T: Send + 'static>(
        &self,
        query: impl FnOnce(&mut SqliteConnection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let threads = self.store.0.watcher.as_ref().unwrap_or(&self.store.0.writer);
        threads.run(self.store.0.deadline, query).await
    }
}

/// The changes for which `filter` is true, and the last revision as a row of its own.
fn select(filter: &str) -> String {
    format!(
        "SELECT json_array(revision, key_prefix, user_id) AS row FROM (
            SELECT * FROM api_key_changes WHERE {filter} ORDER BY revision LIMIT {MAX_CHANGES}
        ) UNION ALL SELECT CAST(max(revision) AS TEXT) FROM api_key_changes"
    )
}

fn change(row: &TextRow) -> Result<Change, StoreError> {
    let (revision, prefix, user): (u64, Option<String>, Option<i64>) =
        serde_json::from_str(&row.row).map_err(StoreError::rejected)?;
    let revision = Revision(revision);
    Ok(match (prefix, user) {
        (Some(prefix), _) => Change::Prefix(prefix, revision),
        (None, Some(user)) => Change::Owner(user.into(), revision),
        (None, None) => Change::Reset,
    })
}
