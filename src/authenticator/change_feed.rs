//! Follows the change feed of the store: [`follow`].

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use futures_core::Stream;

use crate::{
    coherence::{MINIMUM_REVISION_LIFETIME, View},
    runtime::{Clock, Moment},
    store::{Change, ChangeStream, DynKeyStore, FeedFault, FeedStatus, KeyStore},
    telemetry,
};

/// Pause before a feed that has ended is read again.
const PAUSE: Duration = Duration::from_secs(1);

/// State of a node that is updated from the change feed of its store.
#[derive(Debug)]
pub(crate) struct FeedState {
    view: Arc<View>,
    /// Last status that the feed has reported.
    status: Mutex<FeedStatus>,
}

impl FeedState {
    pub(crate) fn new(view: Arc<View>) -> Arc<Self> {
        Arc::new(Self { view, status: Mutex::default() })
    }

    /// Returns the status of the store's feed.
    pub(crate) fn status(&self) -> FeedStatus {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Applies a change event at the moment `now`.
    fn apply(&self, change: Change, now: Moment) {
        match change {
            Change::Prefix(prefix, revision) => self.view.prefix_changed(prefix, revision, now),
            Change::Owner(owner, revision) => self.view.owner_changed(owner, revision, now),
            Change::Synced(as_of) => self.view.synced(as_of, now),
            Change::Reset => self.view.reset(now),
            Change::Status(status) => {
                let mut last = self.status.lock().unwrap_or_else(PoisonError::into_inner);
                log_status(&last, &status);
                *last = status;
            }
        }
    }
}

/// Applies the change events of `store` until `feed` is dropped. A store without a feed sends no events. There are no
/// changes to catch up with then, and only the maximum age bounds its answers.
pub(crate) async fn follow(store: DynKeyStore, feed: Weak<FeedState>, clock: Arc<dyn Clock>) {
    loop {
        // Copies live at most this long. This node has read no changes yet, or may have missed some.
        let mut changes = store.changes(clock.read().minus(MINIMUM_REVISION_LIFETIME).wall());
        if let Some(feed) = feed.upgrade()
            && feed
                .view
                .freshness
                .last_sync()
                .is_some_and(|sync| clock.read().since(sync) >= MINIMUM_REVISION_LIFETIME)
        {
            // The feed starts no further back than this.
            feed.apply(Change::Reset, clock.read());
        }
        if !changes.is_complete()
            && let Some(feed) = feed.upgrade()
        {
            feed.view.minimum_revisions.caught_up();
        }
        if !changes.has_feed() {
            // Never returns, because the task would otherwise be started again by each look-up.
            return std::future::pending().await;
        }
        while let Some(change) = next(&mut changes).await {
            let Some(feed) = feed.upgrade() else { return };
            log_change(&change);
            // A node that receives only notifications is never in sync.
            if changes.is_complete() || !matches!(change, Change::Synced(_)) {
                feed.apply(change, clock.read());
            }
        }
        if feed.strong_count() == 0 {
            return;
        }
        telemetry::feed_ended();
        tokio::time::sleep(PAUSE).await;
    }
}

async fn next(changes: &mut ChangeStream) -> Option<Change> {
    poll_fn(|cx| Pin::new(&mut *changes).poll_next(cx)).await
}

/// Logs and counts a change event.
fn log_change(change: &Change) {
    if !matches!(change, Change::Synced(_) | Change::Status(_)) {
        telemetry::count("api_key_changes_total");
    }
    match change {
        Change::Prefix(prefix, revision) => {
            tracing::debug!(key_prefix = prefix, revision = revision.0, "API key changed");
        }
        Change::Owner(owner, revision) => {
            tracing::debug!(%owner, revision = revision.0, "owner of API keys changed");
        }
        Change::Synced(_) | Change::Status(_) => {}
        Change::Reset => {
            tracing::info!("changes may have been missed: cached API keys are invalidated")
        }
    }
}

/// Updates the metrics of the feed status, and logs a change of its fault.
fn log_status(before: &FeedStatus, status: &FeedStatus) {
    telemetry::gauge("api_key_feed_complete", if status.fault.is_none() { 1.0 } else { 0.0 });
    if let Some(rows) = status.rows {
        telemetry::gauge("api_key_feed_rows", rows as f64);
    }
    if before.fault == status.fault {
        return;
    }
    match &status.fault {
        Some(FeedFault::Incomplete(reason)) => tracing::error!(
            reason = &**reason,
            "changes of API keys may be missed: call migrate() of the store, which restores the triggers; \
             until then cached keys are served no longer than max_staleness"
        ),
        // Logged by the code that handles the connection.
        Some(FeedFault::Disconnected(_)) => {}
        None => tracing::info!("the feed of API key changes is complete"),
    }
}
