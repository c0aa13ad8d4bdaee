//! The feed of changes: the table `api_key_changes`, read whenever a notification hints at something new,
//! and every few seconds.

use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use serde::Deserialize;
use tokio::{
    sync::mpsc,
    time::{sleep, timeout, timeout_at},
};
use tokio_postgres::{AsyncMessage, Client, SimpleQueryMessage};

use super::{Inner, PostgresStore};
use crate::{
    error::StoreError,
    record::{Revision, UserId},
    store::{Change, ChangeStream},
    telemetry,
};

/// Nothing that the feed asks takes longer, or its connection counts as dead.
const DEADLINE: Duration = Duration::from_secs(2);
/// Past so many new changes at once it is cheaper to read everything anew.
const MAX_CHANGES: usize = 10_000;
/// Notifications in a burst are answered by one read.
const BURST: Duration = Duration::from_millis(2);
/// The pause before a connection is made anew grows from the one to the other.
const PAUSES: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(2)];
const PRUNED_EVERY: Duration = Duration::from_secs(600);

pub(super) fn changes(store: &PostgresStore, since: SystemTime) -> ChangeStream {
    let feed = Feed {
        store: Arc::clone(&store.0),
        since,
        position: None,
        listener: None,
        pause: PAUSES[0],
        next_poll: Instant::now(),
        next_pruning: Instant::now() + PRUNED_EVERY,
    };
    ChangeStream::steps(feed, |mut feed| async move {
        let changes = feed.next().await;
        Some((changes, feed))
    })
}

struct Feed {
    store: Arc<Inner>,
    since: SystemTime,
    /// Up to where the table was read; `None` before the first read.
    position: Option<Position>,
    listener: Option<Listener>,
    pause: Duration,
    next_poll: Instant,
    next_pruning: Instant,
}

/// Up to where the table was read.
struct Position {
    /// Rows of older transactions were all there to be seen: the oldest one that was under way, and no
    /// more than one past the last that has left a row. After a crash or a failover the database gives
    /// the ids of those again that wrote nothing (as a notification does), so that no other id is safe.
    horizon: u64,
    /// The rows of younger ones that were seen, with their transactions.
    seen: BTreeMap<u64, u64>,
    /// The row of the last transaction: if it is gone, this is another database than before.
    anchor: Option<Row>,
}

/// What one read of the table finds.
#[derive(Deserialize)]
struct Found {
    as_of_micros: u64,
    horizon: u64,
    is_continuous: bool,
    anchor: Option<Row>,
    changes: Option<Vec<Row>>,
}

#[derive(Deserialize)]
struct Row {
    revision: u64,
    xid: u64,
    /// When it was written, in microseconds: in a database that was restored, ids come again.
    at: u64,
    key_prefix: Option<String>,
    user_id: Option<i64>,
}

impl Feed {
    /// What is new, as soon as there is something, and at each poll. Does not come back before it knows.
    async fn next(&mut self) -> Vec<Change> {
        loop {
            match self.attempt().await {
                Ok(changes) => {
                    self.pause = PAUSES[0];
                    return changes;
                }
                Err(error) => {
                    if self.listener.take().is_some() || self.position.is_none() {
                        telemetry::feed_broken(&error);
                    }
                    sleep(self.pause).await;
                    self.pause = (self.pause * 2).min(PAUSES[1]);
                    self.next_poll = Instant::now();
                }
            }
        }
    }

    /// The order is what keeps a change from falling between: listen, then read what is there already,
    /// then wait.
    async fn attempt(&mut self) -> Result<Vec<Change>, StoreError> {
        let listener = match &mut self.listener {
            Some(listener) => {
                listener.wait(self.next_poll).await?;
                listener
            }
            none => none.insert(Listener::connect(&self.store).await?),
        };
        if Instant::now() >= self.next_poll {
            self.next_poll = Instant::now() + self.store.poll_interval;
            listener.beat().await?;
        }
        let found = listener.read(&self.position, self.since).await?;
        if Instant::now() >= self.next_pruning {
            self.next_pruning = Instant::now() + PRUNED_EVERY;
            listener.prune().await;
        }
        Ok(self.take_in(found))
    }

    /// The changes in `found`, and from where to go on.
    fn take_in(&mut self, found: Found) -> Vec<Change> {
        let mut changes = Vec::new();
        // Ids of transactions that go back are those of another database, too.
        let goes_on = |position: &Position| position.horizon <= found.horizon;
        let (is_first, is_continuous) = (
            self.position.is_none(),
            found.is_continuous && self.position.as_ref().is_none_or(goes_on),
        );
        if !is_first && !is_continuous {
            changes.push(Change::Reset);
        }
        let rows = found.changes.unwrap_or_default();
        if rows.len() > MAX_CHANGES {
            changes.push(Change::Reset);
        } else {
            changes.extend(rows.iter().map(Row::change));
        }
        let before = self.position.take().filter(|_| is_continuous);
        let mut seen = before.map(|position| position.seen).unwrap_or_default();
        seen.extend(rows.iter().map(|row| (row.revision, row.xid)));
        seen.retain(|_, xid| *xid >= found.horizon);
        self.position = Some(Position { horizon: found.horizon, seen, anchor: found.anchor });
        let as_of = SystemTime::UNIX_EPOCH + Duration::from_micros(found.as_of_micros);
        changes.push(Change::Synced(as_of));
        changes
    }
}

impl Row {
    fn change(&self) -> Change {
        let revision = Revision(self.revision);
        match (&self.key_prefix, self.user_id) {
            (Some(prefix), _) => Change::Prefix(prefix.clone(), revision),
            (None, Some(user)) => Change::Owner(UserId::from(user), revision),
            (None, None) => Change::Reset,
        }
    }
}

/// A connection of its own that notifications come in on.
struct Listener {
    client: Client,
    notified: mpsc::Receiver<Notified>,
    /// A channel that nobody else listens to: what comes back on it shows that notifications do come,
    /// which through PgBouncer they don't.
    own_channel: String,
    awaits_beat: bool,
    was_deaf: bool,
}

enum Notified {
    Changes,
    OwnBeat,
}

impl Listener {
    async fn connect(store: &Inner) -> Result<Self, StoreError> {
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|error| StoreError::unavailable(error.to_string()))?;
        let own_channel = format!("api_key_beat_{:016x}", u64::from_ne_bytes(random));
        let connect = store.target.connect_raw();
        let (client, mut connection) = timeout(DEADLINE, connect)
            .await
            .map_err(|_| StoreError::timeout(DEADLINE))?
            .map_err(StoreError::unavailable)?;
        // A full queue has all the hints in it that one read needs.
        let (hint, notified) = mpsc::channel(64);
        let own = own_channel.clone();
        // Ends when the client is dropped.
        tokio::spawn(async move {
            while let Some(Ok(message)) =
                std::future::poll_fn(|cx| connection.poll_message(cx)).await
            {
                let AsyncMessage::Notification(notification) = message else { continue };
                let is_own = notification.channel() == own;
                // What else is in it, anybody may have written.
                let _ = hint.try_send(if is_own { Notified::OwnBeat } else { Notified::Changes });
            }
        });
        let listener = Self { client, notified, own_channel, awaits_beat: false, was_deaf: false };
        listener.run(&format!("LISTEN api_key_changes; LISTEN {}", listener.own_channel)).await?;
        Ok(listener)
    }

    /// Waits for a hint, at most until `until`.
    async fn wait(&mut self, until: Instant) -> Result<(), StoreError> {
        loop {
            match timeout_at(until.into(), self.notified.recv()).await {
                Err(_) => return Ok(()),
                Ok(None) => return Err(StoreError::unavailable("the connection is closed")),
                Ok(Some(Notified::OwnBeat)) => self.hears(),
                Ok(Some(Notified::Changes)) => break,
            }
        }
        sleep(BURST).await;
        while let Ok(notified) = self.notified.try_recv() {
            if matches!(notified, Notified::OwnBeat) {
                self.hears();
            }
        }
        Ok(())
    }

    fn hears(&mut self) {
        self.awaits_beat = false;
        if std::mem::take(&mut self.was_deaf) {
            telemetry::feed_hears(true);
        }
    }

    /// Sends a notification to this connection itself, and notes if the last one has not come back.
    async fn beat(&mut self) -> Result<(), StoreError> {
        if self.awaits_beat && !std::mem::replace(&mut self.was_deaf, true) {
            telemetry::feed_hears(false);
        }
        self.awaits_beat = true;
        self.run(&format!("NOTIFY {}", self.own_channel)).await.map(drop)
    }

    async fn read(
        &self,
        position: &Option<Position>,
        since: SystemTime,
    ) -> Result<Found, StoreError> {
        let (filter, is_continuous) = match position {
            None => {
                // How long ago, not when: the clocks of this machine and of the database may differ.
                let age = SystemTime::now().duration_since(since).unwrap_or_default();
                let seconds = age.as_secs() + 1;
                (format!("changed_at > now() - interval '{seconds} seconds'"), "TRUE".to_owned())
            }
            Some(position) => {
                let mut filter = format!("xid >= '{}'::xid8", position.horizon);
                if !position.seen.is_empty() {
                    let seen: Vec<_> = position.seen.keys().map(u64::to_string).collect();
                    let _ =
                        write!(filter, " AND revision <> ALL ('{{{}}}'::bigint[])", seen.join(","));
                }
                let anchor = position.anchor.as_ref().map_or("TRUE".to_owned(), |row| {
                    format!(
                        "EXISTS (SELECT FROM api_key_changes WHERE revision = {} AND xid = '{}'::xid8
                            AND (extract(epoch FROM changed_at) * 1000000)::bigint = {})",
                        row.revision, row.xid, row.at
                    )
                });
                (filter, anchor)
            }
        };
        // One statement, so that all of it is from one snapshot. The latest first: of several changes
        // under one prefix the lower revision may have been committed last, and said last it counts.
        let columns = "revision, xid::text::bigint AS xid,
            (extract(epoch FROM changed_at) * 1000000)::bigint AS at, key_prefix, user_id";
        let sql = format!(
            "SELECT json_build_object(
                'as_of_micros', (extract(epoch FROM statement_timestamp()) * 1000000)::bigint,
                'horizon', least(
                    pg_snapshot_xmin(pg_current_snapshot())::text::bigint,
                    (SELECT xid::text::bigint + 1 FROM api_key_changes ORDER BY xid DESC LIMIT 1)),
                'is_continuous', {is_continuous},
                'anchor', (SELECT row_to_json(a) FROM (
                    SELECT {columns} FROM api_key_changes
                    ORDER BY xid DESC, revision DESC LIMIT 1) AS a),
                'changes', (SELECT json_agg(c) FROM (
                    SELECT {columns} FROM api_key_changes WHERE {filter}
                    ORDER BY revision DESC LIMIT {}) AS c)
            )",
            MAX_CHANGES + 1
        );
        let text = self.run(&sql).await?;
        let text = text.ok_or_else(|| StoreError::rejected("the feed's query has no row"))?;
        serde_json::from_str(&text).map_err(StoreError::rejected)
    }

    /// Takes away rows of more than a day ago, which is longer than anybody looks back. Not the last ones,
    /// which are somebody's anchor.
    async fn prune(&self) {
        let pruned = self.run(
            "DELETE FROM api_key_changes WHERE changed_at < now() - interval '1 day'
                AND revision < (SELECT max(revision) FROM api_key_changes) - 1000",
        );
        if let Err(error) = pruned.await {
            telemetry::not_pruned(&error);
        }
    }

    /// Runs statements and returns the first value. As text in one message: nothing is prepared, so that
    /// it works through any pooler, and nothing in it comes from outside but numbers.
    async fn run(&self, sql: &str) -> Result<Option<String>, StoreError> {
        let ran = timeout(DEADLINE, self.client.simple_query(sql)).await;
        let messages = ran.map_err(|_| StoreError::timeout(DEADLINE))?;
        let messages = messages.map_err(StoreError::unavailable)?;
        Ok(messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        }))
    }
}
