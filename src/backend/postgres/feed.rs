//! The change feed: the table `api_key_changes`, read at each notification and at each poll.

mod completeness;
mod listener;
mod position;
mod prune;
mod read;

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::time::sleep;

use self::{
    completeness::Completeness, listener::Listener, position::Position, prune::Pruning,
    read::FeedRead,
};
use super::{
    Inner, PostgresStore,
    schema::pending::{STORED_VERSION, schema_version},
};
use crate::{
    error::StoreError,
    runtime::later,
    store::{Change, ChangeStream, FeedFault, FeedStatus},
    telemetry,
};

/// Deadline of a statement of the feed. Beyond it, the feed reconnects.
const DEADLINE: Duration = Duration::from_secs(2);
/// Minimum and maximum pause before a reconnection. It grows from the one to the other.
const PAUSES: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(2)];
/// Poll interval where the server allows prepared transactions, so that triggers send no notification.
const UNNOTIFIED_POLL: Duration = Duration::from_millis(250);

pub(super) fn changes(store: &PostgresStore, since: SystemTime) -> ChangeStream {
    let feed = Feed {
        store: Arc::clone(&store.0),
        since,
        position: None,
        listener: None,
        pause: PAUSES[0],
        next_beat: Instant::now(),
        next_poll: Instant::now(),
        pruning: Pruning::new(),
        completeness: Completeness::default(),
        status: FeedStatus::default(),
    };
    ChangeStream::steps(feed, |mut feed| async move {
        let changes = feed.next().await;
        Some((changes, feed))
    })
}

struct Feed {
    store: Arc<Inner>,
    since: SystemTime,
    /// The position up to which the table was read; `None` before the first read.
    position: Option<Position>,
    listener: Option<Listener>,
    pause: Duration,
    next_beat: Instant,
    next_poll: Instant,
    pruning: Pruning,
    completeness: Completeness,
    /// The status that was last reported.
    status: FeedStatus,
}

impl Feed {
    /// Returns new changes as soon as there are any, and at each poll.
    async fn next(&mut self) -> Vec<Change> {
        loop {
            match self.attempt().await {
                Ok(changes) => {
                    self.pause = PAUSES[0];
                    return changes;
                }
                Err(error) => {
                    if self.listener.take().is_some() || self.position.is_none() {
                        telemetry::feed_disconnected(&error);
                    }
                    self.next_poll = Instant::now();
                    let status =
                        FeedStatus { fault: Some(disconnected(&error)), ..self.status.clone() };
                    if !matches!(self.status.fault, Some(FeedFault::Disconnected(_))) {
                        return self.report(status).into_iter().collect();
                    }
                    sleep(self.pause).await;
                    self.pause = (self.pause * 2).min(PAUSES[1]);
                }
            }
        }
    }

    /// Subscribes first, then reads, and only then waits: in this order no change is missed in between.
    async fn attempt(&mut self) -> Result<Vec<Change>, StoreError> {
        let listener = match &mut self.listener {
            Some(listener) => {
                listener.wait(self.next_poll).await?;
                listener
            }
            none => none.insert(Listener::connect(&self.store).await?),
        };
        let position = match self.position.take() {
            Some(position) => position,
            None => {
                // The age is sent, not the time: the clocks of this machine and of the database may differ.
                let age = self.store.clock.now().duration_since(self.since).unwrap_or_default();
                // A schema that can't be read fails at the start.
                let select = format!("SELECT coalesce(to_json({STORED_VERSION}), 'null')");
                if let Ok(stored) = listener.run_json(&select).await {
                    schema_version(stored).log();
                }
                listener.start(age).await?
            }
        };
        // The position is kept if the read fails.
        let position = self.position.insert(position);
        let now = Instant::now();
        if now >= self.next_beat {
            self.next_beat = later(self.store.poll_interval);
            listener.beat().await?;
        }
        let mut found = listener.read(position).await?;
        let fault = loop {
            if let Some(fault) = self.completeness.fault_of(&found.shape, listener).await? {
                break fault;
            }
            found = listener.read(position).await?;
        };
        if now >= self.next_poll {
            let is_notified = found.is_notified;
            let most = if is_notified { Duration::MAX } else { UNNOTIFIED_POLL };
            self.next_poll = later(self.store.poll_interval.min(most));
        }
        let pruned = self.pruning.poll(&self.store).await;
        Ok(self.process(found, fault, pruned))
    }

    fn process(
        &mut self,
        found: FeedRead,
        fault: Option<String>,
        pruned: Option<FeedStatus>,
    ) -> Vec<Change> {
        let mut status = pruned.unwrap_or_else(|| self.status.clone());
        status.fault = fault.map(|fault| FeedFault::Incomplete(fault.into()));
        let is_synced = status.fault.is_none();
        let was_incomplete = matches!(self.status.fault, Some(FeedFault::Incomplete(_)));
        let as_of = found.as_of();
        let mut changes: Vec<_> = self.report(status).into_iter().collect();
        if let Some(position) = &mut self.position {
            let read = position.advance(found);
            // Changes while triggers were missing are not in the table.
            if is_synced && was_incomplete && !read.contains(&Change::Reset) {
                changes.push(Change::Reset);
            }
            changes.extend(read);
        }
        if is_synced {
            changes.push(Change::Synced(as_of));
        }
        changes
    }

    /// Returns the change that reports `status`, if it is new.
    fn report(&mut self, status: FeedStatus) -> Option<Change> {
        if status == self.status {
            return None;
        }
        self.status = status.clone();
        Some(Change::Status(status))
    }
}

fn disconnected(error: &StoreError) -> FeedFault {
    FeedFault::Disconnected(error.to_string().into())
}
