//! Changes that a store reports: [`Change`], in a [`ChangeStream`].

use std::{
    collections::VecDeque,
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::SystemTime,
};

use futures_core::Stream;

use crate::record::{Revision, UserId};

/// A change event for the caches above a store.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// A key under this lookup id has changed. Use the revision 0 unless each answer carries revisions: an answer below
    /// the highest reported revision is not served.
    Prefix(String, Revision),
    /// This user has changed, and with it all keys that it owns.
    Owner(UserId, Revision),
    /// Every change up to this time of the database has been reported.
    Synced(SystemTime),
    /// Changes may have been missed. Caches drop all entries.
    Reset,
    /// Status of the feed. While the feed has a fault, it reports no [`Change::Synced`].
    Status(FeedStatus),
}

/// Status of a change feed, as [`Health`](crate::authenticator::Health) shows it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct FeedStatus {
    /// Why changes may not arrive; `None` while the feed works.
    pub fault: Option<FeedFault>,
    /// Number of rows in the table of changes when it was last pruned, every 10 minutes.
    pub rows: Option<u64>,
    /// When the oldest of these rows was written, by the clock of the database. Rows are kept for two hours.
    pub oldest: Option<SystemTime>,
}

/// The reason why changes may not arrive. Cached keys are served for `max_staleness` after the last sync, as on a node
/// that is cut off.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum FeedFault {
    /// The table of changes can't be read.
    Disconnected(Arc<str>),
    /// The table can be read, but changes of keys or users may be missing from it, because triggers are missing or
    /// disabled. Call `migrate()` of the store, which restores them.
    Incomplete(Arc<str>),
}

impl fmt::Display for FeedFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disconnected(reason) => write!(f, "the change feed is disconnected: {reason}"),
            Self::Incomplete(reason) => write!(f, "the change feed is incomplete: {reason}"),
        }
    }
}

/// A stream of [`Change`]s. It ends when its store can't report changes any more.
#[derive(Default)]
pub struct ChangeStream {
    changes: Option<Pin<Box<dyn Stream<Item = Change> + Send>>>,
    is_complete: bool,
}

impl ChangeStream {
    /// Creates the stream of a store that has no feed.
    pub fn none() -> Self {
        Self::default()
    }

    /// Wraps the stream of a store with a complete feed: it contains each change, and [`Change::Synced`] reports up to
    /// which time.
    pub fn new(changes: impl Stream<Item = Change> + Send + 'static) -> Self {
        Self { changes: Some(Box::pin(changes)), is_complete: true }
    }

    /// Wraps a stream that may miss changes. Answers become stale all the same.
    pub fn best_effort(changes: impl Stream<Item = Change> + Send + 'static) -> Self {
        Self { changes: Some(Box::pin(changes)), is_complete: false }
    }

    /// Creates a stream from `step`, which produces one batch at a time from a state and returns the next state. The
    /// stream ends when `step` returns no state.
    pub(crate) fn steps<S, F>(state: S, step: impl FnMut(S) -> F + Send + 'static) -> Self
    where
        S: Send + 'static,
        F: Future<Output = Option<(Vec<Change>, S)>> + Send + 'static,
    {
        Self::new(Steps { step, state: Some(state), under_way: None, ready: VecDeque::new() })
    }

    /// Converts the stream into a best-effort stream.
    #[cfg(feature = "redis")]
    pub(crate) fn into_hints(self) -> Self {
        Self { is_complete: false, ..self }
    }

    /// Returns whether the store has a feed.
    pub fn has_feed(&self) -> bool {
        self.changes.is_some()
    }

    /// Returns whether the stream contains each change.
    pub fn is_complete(&self) -> bool {
        self.is_complete
    }
}

impl Stream for ChangeStream {
    type Item = Change;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Change>> {
        match &mut self.changes {
            Some(changes) => changes.as_mut().poll_next(cx),
            None => Poll::Ready(None),
        }
    }
}

struct Steps<S, F, G> {
    step: G,
    state: Option<S>,
    under_way: Option<Pin<Box<F>>>,
    ready: VecDeque<Change>,
}

// Only boxed values are pinned.
impl<S, F, G> Unpin for Steps<S, F, G> {}

impl<S, F, G> Stream for Steps<S, F, G>
where
    F: Future<Output = Option<(Vec<Change>, S)>>,
    G: FnMut(S) -> F,
{
    type Item = Change;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Change>> {
        loop {
            if let Some(change) = self.ready.pop_front() {
                return Poll::Ready(Some(change));
            }
            if let Some(state) = self.state.take() {
                let step = (self.step)(state);
                self.under_way = Some(Box::pin(step));
            }
            let Some(step) = &mut self.under_way else { return Poll::Ready(None) };
            let outcome = ready!(step.as_mut().poll(cx));
            self.under_way = None;
            if let Some((changes, state)) = outcome {
                self.ready.extend(changes);
                self.state = Some(state);
            }
        }
    }
}

impl fmt::Debug for ChangeStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChangeStream").field("has_feed", &self.has_feed()).finish_non_exhaustive()
    }
}
