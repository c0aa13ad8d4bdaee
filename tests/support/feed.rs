//! Records the change events of a store, and waits for them.

use std::{
    pin::Pin,
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};

use futures_util::Stream;
use tokio::task::JoinHandle;
use tower_api_key::{
    Authenticator,
    store::{Change, ChangeStream, FeedStatus},
};

/// The change events of a feed since they were last taken.
pub struct FeedRecorder {
    changes: Arc<Mutex<Vec<Change>>>,
    synced: Arc<Mutex<Option<SystemTime>>>,
    status: Arc<Mutex<Option<FeedStatus>>>,
    task: JoinHandle<()>,
}

impl FeedRecorder {
    pub fn listen(mut stream: ChangeStream) -> Self {
        assert!(stream.has_feed() && stream.is_complete());
        let (changes, synced) = (Arc::<Mutex<Vec<_>>>::default(), Arc::<Mutex<_>>::default());
        let status = Arc::<Mutex<_>>::default();
        let (recorded, as_of, at) =
            (Arc::clone(&changes), Arc::clone(&synced), Arc::clone(&status));
        let task = tokio::spawn(async move {
            loop {
                match std::future::poll_fn(|cx| Pin::new(&mut stream).poll_next(cx)).await {
                    Some(Change::Synced(time)) => *as_of.lock().unwrap() = Some(time),
                    // Not a change, but the status of the feed.
                    Some(Change::Status(status)) => *at.lock().unwrap() = Some(status),
                    Some(change) => recorded.lock().unwrap().push(change),
                    None => return,
                }
            }
        });
        Self { changes, synced, status, task }
    }

    /// Returns the events of the changes that were committed before this call, and maybe of later ones.
    pub async fn all(&self) -> Vec<Change> {
        let now = SystemTime::now();
        eventually("a sync", async || self.synced.lock().unwrap().is_some_and(|at| at > now)).await;
        std::mem::take(&mut *self.changes.lock().unwrap())
    }

    /// The same, without revisions: `prefix abc`, `owner 7`, `reset`; each once, in order.
    pub async fn subjects(&self) -> Vec<String> {
        in_order(&self.all().await)
    }

    /// Returns the first events, without revisions, as soon as there are any.
    pub async fn take(&self) -> Vec<String> {
        eventually("a change", async || !self.changes.lock().unwrap().is_empty()).await;
        // What was committed together comes together, but not at one instant.
        tokio::time::sleep(Duration::from_millis(10)).await;
        in_order(&std::mem::take(&mut *self.changes.lock().unwrap()))
    }

    /// The status of the feed, as it was reported last.
    pub fn status(&self) -> FeedStatus {
        self.status.lock().unwrap().clone().unwrap_or_default()
    }

    /// Returns the events so far, without waiting.
    pub fn so_far(&self) -> Vec<Change> {
        self.changes.lock().unwrap().clone()
    }
}

impl Drop for FeedRecorder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn in_order(changes: &[Change]) -> Vec<String> {
    let mut subjects: Vec<_> = changes.iter().map(subject).collect();
    subjects.sort();
    subjects.dedup();
    subjects
}

pub fn subject(change: &Change) -> String {
    match change {
        Change::Prefix(prefix, _) => format!("prefix {prefix}"),
        Change::Owner(owner, _) => format!("owner {owner}"),
        Change::Reset => "reset".to_owned(),
        _ => "synced".to_owned(),
    }
}

/// Polls until `is_so`, for 10 s at most; returns how long it took.
pub async fn eventually(what: &str, is_so: impl AsyncFnMut() -> bool) -> Duration {
    within(Duration::from_secs(10), what, is_so).await
}

pub async fn within(limit: Duration, what: &str, mut is_so: impl AsyncFnMut() -> bool) -> Duration {
    let begun = Instant::now();
    while !is_so().await {
        assert!(begun.elapsed() < limit, "waited {limit:?} in vain for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    begun.elapsed()
}

/// Waits until the node has received every change that was there before this was called. The clock of the database is that
/// of this machine.
pub async fn in_sync(node: &Authenticator) {
    let begun = SystemTime::now();
    eventually("the node to be in sync", async || is_synced_since(node, begun)).await;
}

/// Returns whether the node has received every change that was committed before this time.
pub fn is_synced_since(node: &Authenticator, begun: SystemTime) -> bool {
    // Not `Health::last_sync`, which is later than the read by the shortest delay of a sync so far.
    node.health().synced_to.is_some_and(|as_of| as_of > begun)
}
