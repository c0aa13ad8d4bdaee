//! Listening to the store: [`follow`].

use std::{
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, SystemTime},
};

use futures_core::Stream;

use crate::{
    coherence::{MINIMUM_REVISION_LIFETIME, View},
    runtime::Moment,
    store::{Change, ChangeStream, DynKeyStore, FeedFault, FeedStatus, KeyStore},
    telemetry,
};

/// How long a feed that ended is left alone before it is listened to again.
const PAUSE: Duration = Duration::from_secs(1);

/// What a node learns from the change feed of its store.
#[derive(Debug)]
pub(crate) struct FeedState {
    view: Arc<View>,
    /// As the feed has reported it last.
    status: Mutex<FeedStatus>,
}

impl FeedState {
    pub(crate) fn new(view: Arc<View>) -> Arc<Self> {
        Arc::new(Self { view, status: Mutex::default() })
    }

    /// The status of the store's feed.
    pub(crate) fn status(&self) -> FeedStatus {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes in a change event at the moment `now`.
    fn learn(&self, change: Change, now: Moment) {
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

/// Takes in what `store` says for as long as `feed` is wanted. A store without a feed says nothing:
/// there is nothing to catch up with either, and the rule of age is all that bounds its answers.
pub(crate) async fn follow(store: DynKeyStore, feed: Weak<FeedState>, clock: impl Fn() -> Moment) {
    loop {
        // As long as a copy can live anywhere: this node knows of no change yet, or has missed some.
        let mut changes = store.changes(SystemTime::now() - MINIMUM_REVISION_LIFETIME);
        if let Some(feed) = feed.upgrade()
            && feed
                .view
                .freshness
                .last_sync()
                .is_some_and(|sync| clock().since(sync) >= MINIMUM_REVISION_LIFETIME)
        {
            // It looks back no further than that.
            feed.learn(Change::Reset, clock());
        }
        if !changes.is_complete()
            && let Some(feed) = feed.upgrade()
        {
            feed.view.minimum_revisions.caught_up();
        }
        if !changes.has_feed() {
            // Not the end, or this would begin anew at each look-up.
            return std::future::pending().await;
        }
        while let Some(change) = next(&mut changes).await {
            let Some(feed) = feed.upgrade() else { return };
            log_change(&change);
            // Whoever only hears hints is never in sync.
            if changes.is_complete() || !matches!(change, Change::Synced(_)) {
                feed.learn(change, clock());
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

/// The store reports a change.
fn log_change(change: &Change) {
    if !matches!(change, Change::Synced(_) | Change::Status(_)) {
        telemetry::count("api_key_changes_total");
    }
    match change {
        Change::Prefix(prefix, revision) => {
            tracing::debug!(key_prefix = prefix, revision = revision.0, "an API key has changed");
        }
        Change::Owner(owner, revision) => {
            tracing::debug!(%owner, revision = revision.0, "an owner of API keys has changed");
        }
        Change::Synced(_) | Change::Status(_) => {}
        Change::Reset => tracing::info!("changes may have been missed: API keys are read anew"),
    }
}

/// The status of a change feed differs from the last one.
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
        // Logged where the connection is.
        Some(FeedFault::Disconnected(_)) => {}
        None => tracing::info!("the feed of API key changes is complete"),
    }
}
