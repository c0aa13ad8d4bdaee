//! The change feed: the table `api_key_changes`. It is read after each write of this process, and when `PRAGMA
//! data_version` shows a write of another process.

use std::time::{Duration, Instant, SystemTime};

use diesel::{
    Connection, QueryableByName, RunQueryDsl, SqliteConnection, sql_query, sql_types::BigInt,
};
use tokio::{sync::watch, time::timeout};

use super::{BytesRow, SqliteStore, load, load_rows, triggers};
use crate::{
    backend::sql::{
        fault::{Failure, store_error},
        statement::{Bind, Statement, TextRow},
    },
    error::StoreError,
    record::Revision,
    store::{Change, ChangeStream, FeedFault, FeedStatus},
    telemetry,
};

/// Interval at which the counter of other processes' writes is read, which is in shared memory.
const WATCHED_EVERY: Duration = Duration::from_millis(20);
/// Interval of syncs without a change.
const PULSE: Duration = Duration::from_secs(1);
/// Pause after a failure.
const PAUSE: Duration = Duration::from_millis(500);
/// Maximum number of new changes per read. Beyond it, everything is read again.
const MAX_CHANGES: usize = 10_000;
const PRUNED_EVERY: Duration = Duration::from_secs(600);

pub(super) fn changes(store: &SqliteStore, since: SystemTime) -> ChangeStream {
    let feed = Feed {
        store: store.clone(),
        written: store.0.written.subscribe(),
        since,
        data_version: None,
        position: None,
        missing_triggers: Vec::new(),
        next_pruning: Instant::now(),
        status: FeedStatus::default(),
        has_failed_to_prune: false,
    };
    ChangeStream::steps(feed, |mut feed| async move {
        loop {
            match feed.next().await {
                Ok(changes) => return Some((changes, feed)),
                Err(error) => {
                    telemetry::feed_disconnected(&error);
                    let fault = Some(FeedFault::Disconnected(error.to_string().into()));
                    let status = FeedStatus { fault, ..feed.status.clone() };
                    if !matches!(feed.status.fault, Some(FeedFault::Disconnected(_))) {
                        return Some((feed.report(status).into_iter().collect(), feed));
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    })
}

struct Feed {
    store: SqliteStore,
    /// Writes of this process, which its own connections may not see in the pragma.
    written: watch::Receiver<u64>,
    since: SystemTime,
    data_version: Option<i64>,
    position: Option<Position>,
    /// The missing triggers at the schema version of `position`.
    missing_triggers: Vec<String>,
    next_pruning: Instant,
    /// The status that was last reported.
    status: FeedStatus,
    has_failed_to_prune: bool,
}

/// The position up to which the table was read.
#[derive(Clone, Copy)]
struct Position {
    revision: i64,
    /// Random number of the row with that revision. Another number means another copy of the file.
    nonce: i64,
    /// Version of the schema, which SQLite increments with each change.
    schema: i64,
}

/// The result of one read, from one snapshot.
struct FeedRead {
    position: Position,
    /// Whether the last row of the previous read still exists.
    is_continuous: bool,
    missing_triggers: Vec<String>,
    changes: Vec<BytesRow>,
}

impl Feed {
    async fn next(&mut self) -> Result<Vec<Change>, StoreError> {
        if self.position.is_some() {
            // It ends with a write or at the pulse.
            let _ = timeout(PULSE, self.wait_for_change()).await;
        }
        let mut status = self.status.clone();
        if self.position.is_some() && Instant::now() >= self.next_pruning {
            self.next_pruning = Instant::now() + PRUNED_EVERY;
            self.prune(&mut status).await;
        }
        let as_of = self.store.0.clock.now();
        self.written.mark_unchanged();
        let (position, age) = (self.position, as_of.duration_since(self.since).unwrap_or_default());
        let known = self.missing_triggers.clone();
        let found = self.watch(move |connection| {
            let read = |it: &mut _| read(it, position, known, age).map_err(Failure);
            let found = connection.transaction(read);
            found.map_err(|Failure(error)| error)
        });
        let found = found.await?;

        let was_incomplete = matches!(self.status.fault, Some(FeedFault::Incomplete(_)));
        let missing = found.missing_triggers.join(", ");
        status.fault = (!missing.is_empty()).then(|| {
            FeedFault::Incomplete(format!("triggers are missing or altered: {missing}").into())
        });
        let is_synced = status.fault.is_none();
        // Changes before a change of the schema may be missing from the table, even if the triggers exist again.
        let has_altered = position.is_some_and(|before| before.schema != found.position.schema);
        let is_reset = !found.is_continuous
            || has_altered
            || is_synced && was_incomplete
            || found.changes.len() > MAX_CHANGES;
        let mut changes: Vec<_> = self.report(status).into_iter().collect();
        if is_reset {
            changes.push(Change::Reset);
        }
        if found.changes.len() <= MAX_CHANGES {
            for row in &found.changes {
                add_changes(row, &mut changes)?;
            }
        }
        self.position = Some(found.position);
        self.missing_triggers = found.missing_triggers;
        if is_synced {
            changes.push(Change::Synced(as_of));
        }
        Ok(changes)
    }

    /// Returns the change that reports `status`, if it is new.
    fn report(&mut self, status: FeedStatus) -> Option<Change> {
        if status == self.status {
            return None;
        }
        self.status = status.clone();
        Some(Change::Status(status))
    }

    async fn prune(&mut self, status: &mut FeedStatus) {
        let pruned = self.store.in_silent_transaction(prune).await;
        let row = pruned.and_then(|row| {
            serde_json::from_str::<(u64, u64)>(&row.row).map_err(StoreError::rejected)
        });
        match row {
            Ok((rows, oldest)) => {
                self.has_failed_to_prune = false;
                status.rows = Some(rows);
                status.oldest = Some(SystemTime::UNIX_EPOCH + Duration::from_secs(oldest));
            }
            // Rows that could not be deleted are deleted the next time.
            Err(error) => {
                if !std::mem::replace(&mut self.has_failed_to_prune, true) {
                    telemetry::not_pruned(&error);
                }
            }
        }
    }

    /// Completes when there may be something to read.
    async fn wait_for_change(&mut self) {
        // No other process can open a database in memory.
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

#[derive(QueryableByName)]
struct Last {
    #[diesel(sql_type = BigInt)]
    revision: i64,
    #[diesel(sql_type = BigInt)]
    nonce: i64,
    #[diesel(sql_type = BigInt)]
    schema: i64,
}

fn read(
    connection: &mut SqliteConnection,
    position: Option<Position>,
    known: Vec<String>,
    age: Duration,
) -> Result<FeedRead, StoreError> {
    let last = "SELECT revision, nonce, s.schema_version AS schema
        FROM api_key_changes, pragma_schema_version AS s ORDER BY revision DESC LIMIT 1";
    let last = sql_query(last).load::<Last>(connection).map_err(store_error)?;
    let last = last.first().ok_or_else(|| StoreError::rejected("api_key_changes is empty"))?;
    let here = Position { revision: last.revision, nonce: last.nonce, schema: last.schema };
    let is_there = |position: Position| {
        let select = "SELECT '1' AS row FROM api_key_changes WHERE revision = $1 AND nonce = $2";
        Statement::new(select, [position.revision, position.nonce].map(Bind::Integer))
    };
    let is_continuous = match position.map(is_there) {
        Some(statement) => !load(connection, &statement)?.is_empty(),
        None => true,
    };
    let changes = match position {
        Some(position) => {
            let binds = [Bind::Integer(position.revision)];
            load_rows(connection, &Statement::new(select("revision > $1"), binds))?
        }
        // The changes committed since then; all changes if that is not known.
        None => {
            let seconds = i64::try_from(age.as_secs() + 1).unwrap_or(i64::MAX);
            let filter = "revision > coalesce((
                SELECT max(revision) FROM api_key_horizons WHERE taken_at < julianday('now') - $1 / 86400.0), 0)";
            load_rows(connection, &Statement::new(select(filter), [Bind::Integer(seconds)]))?
        }
    };
    let missing_triggers = match position {
        Some(position) if position.schema == here.schema => known,
        _ => triggers::missing(connection).map_err(store_error)?,
    };
    Ok(FeedRead { position: here, is_continuous, missing_triggers, changes })
}

/// Returns the changes for which `filter` is true. For a new user, these include the lookup ids of the keys that were
/// stored before their owner: they were unknown until then.
fn select(filter: &str) -> String {
    // JSON can't contain bytes, and no look-up finds them.
    let text = |id: &str| format!("CASE typeof({id}) WHEN 'blob' THEN hex({id}) ELSE {id} END");
    let [id, of_key, previous_of_key] =
        ["key_prefix", "k.key_prefix", "k.previous_key_prefix"].map(text);
    format!(
        "SELECT CAST(json_array(revision, {id}, user_id, json(CASE WHEN is_new_user THEN (
            SELECT json_group_array(id) FROM (
                SELECT {of_key} AS id FROM api_keys k
                    WHERE k.user_id = c.user_id AND k.api_key_owned_since < c.revision
                UNION SELECT {previous_of_key} FROM api_keys k
                    WHERE k.user_id = c.user_id AND k.api_key_owned_since < c.revision)) END)) AS BLOB) AS row
        FROM api_key_changes c WHERE {filter} ORDER BY revision LIMIT {}",
        MAX_CHANGES + 1
    )
}

fn add_changes(row: &BytesRow, changes: &mut Vec<Change>) -> Result<(), StoreError> {
    type Columns = (u64, Option<String>, Option<i64>, Option<Vec<Option<String>>>);
    let (revision, prefix, user, keys): Columns =
        serde_json::from_str(&row.json()).map_err(StoreError::rejected)?;
    let revision = Revision(revision);
    match (prefix, user) {
        (Some(prefix), _) => changes.push(Change::Prefix(prefix, revision)),
        (None, Some(user)) => {
            changes.push(Change::Owner(user.into(), revision));
            // The rows of these keys have no revision for this change.
            let unknown = keys.into_iter().flatten().flatten();
            changes.extend(unknown.map(|prefix| Change::Prefix(prefix, Revision(0))));
        }
        (None, None) => changes.push(Change::Reset),
    }
    Ok(())
}

/// Records the last revision with the time, and deletes rows older than two hours, except the last row. Returns the
/// number of rows, and the time of the oldest in seconds since the Unix epoch.
fn prune(connection: &mut SqliteConnection) -> Result<TextRow, StoreError> {
    const STATEMENTS: [&str; 3] = [
        "INSERT INTO api_key_horizons (revision) SELECT max(revision) FROM api_key_changes
            WHERE NOT EXISTS (SELECT 1 FROM api_key_horizons WHERE taken_at > julianday('now') - 5 / 1440.0)
            RETURNING '' AS row",
        "DELETE FROM api_key_changes WHERE revision < (SELECT max(revision) FROM api_key_changes) AND revision <= (
                SELECT max(revision) FROM api_key_horizons WHERE taken_at < julianday('now') - 2 / 24.0)
            RETURNING '' AS row",
        "DELETE FROM api_key_horizons WHERE taken_at < julianday('now') - 1 RETURNING '' AS row",
    ];
    for statement in STATEMENTS {
        load(connection, &Statement::new(statement, []))?;
    }
    let count =
        "SELECT json_array(count(*), CAST((min(changed_at) - 2440587.5) * 86400 AS INTEGER)) AS row
        FROM api_key_changes";
    let rows = load(connection, &Statement::new(count, []))?;
    rows.into_iter().next().ok_or_else(|| StoreError::rejected("a count returned no row"))
}
