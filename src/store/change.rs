//! What a store says of its own accord: [`Change`], in a [`ChangeStream`].

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

/// Something that caches above a store must know.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// A key under this lookup prefix has changed. Give the revision 0 unless each answer carries
    /// revisions: an answer below the highest that was said is not served.
    Prefix(String, Revision),
    /// This user has changed, and with it every key that it owns.
    Owner(UserId, Revision),
    /// Every change up to this time of the database has been said.
    Synced(SystemTime),
    /// Changes may have been missed: drop everything that is cached.
    Reset,
    /// What the feed reports about itself. While it has a fault there is no [`Change::Synced`].
    Status(FeedStatus),
}

/// Status of a change feed, as [`Health`](crate::Health) shows it.
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

/// Why changes may not arrive. Cached keys are served for `max_staleness` after the last sync, as on a node that is
/// cut off.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum FeedFault {
    /// The table of changes can't be read.
    Disconnected(Arc<str>),
    /// It can be read, but changes of keys or users need not be in it: triggers are missing or disabled. Call
    /// `migrate()` of the store, which restores them.
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

/// A stream of [`Change`]s. It ends when its store can't go on listening.
#[derive(Default)]
pub struct ChangeStream {
    changes: Option<Pin<Box<dyn Stream<Item = Change> + Send>>>,
    is_complete: bool,
}

impl ChangeStream {
    /// The stream of a store that has no feed.
    pub fn none() -> Self {
        Self::default()
    }

    /// Wraps the stream of a store that has a feed: each change is in it, and [`Change::Synced`] says up
    /// to when that is so.
    pub fn new(changes: impl Stream<Item = Change> + Send + 'static) -> Self {
        Self { changes: Some(Box::pin(changes)), is_complete: true }
    }

    /// Wraps a stream that says of changes what it happens to hear. Resolver get old all the same.
    pub fn best_effort(changes: impl Stream<Item = Change> + Send + 'static) -> Self {
        Self { changes: Some(Box::pin(changes)), is_complete: false }
    }

    /// A stream that `step` makes, a batch at a time, from a state that it is given and gives back. It
    /// ends when `step` gives none back.
    pub(crate) fn steps<S, F>(state: S, step: impl FnMut(S) -> F + Send + 'static) -> Self
    where
        S: Send + 'static,
        F: Future<Output = Option<(Vec<Change>, S)>> + Send + 'static,
    {
        Self::new(Steps { step, state: Some(state), under_way: None, ready: VecDeque::new() })
    }

    /// The same, as hints.
    pub(crate) fn into_hints(self) -> Self {
        Self { is_complete: false, ..self }
    }

    /// Whether there is anything to listen to.
    pub fn has_feed(&self) -> bool {
        self.changes.is_some()
    }

    /// Whether each change is in it.
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

// Nothing in it is pinned but what is boxed.
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
