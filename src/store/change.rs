//! What a store says of its own accord: [`Change`], in a [`ChangeStream`].

use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll},
    time::SystemTime,
};

use futures_core::Stream;

use crate::record::{Revision, UserId};

/// Something that caches above a store must know.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// A key under this lookup prefix has changed.
    Prefix(String, Revision),
    /// This user has changed, and with it every key that it owns.
    Owner(UserId, Revision),
    /// Every change up to this time of the database has been said.
    Synced(SystemTime),
    /// Changes may have been missed: forget everything.
    Reset,
}

/// A stream of [`Change`]s. It ends when its store can't go on listening.
#[derive(Default)]
pub struct ChangeStream(Option<Pin<Box<dyn Stream<Item = Change> + Send>>>);

impl ChangeStream {
    /// The stream of a store that has no feed.
    pub fn none() -> Self {
        Self(None)
    }

    /// Wraps the stream of a store that has a feed.
    pub fn new(stream: impl Stream<Item = Change> + Send + 'static) -> Self {
        Self(Some(Box::pin(stream)))
    }

    /// Whether there is a feed at all.
    pub fn has_feed(&self) -> bool {
        self.0.is_some()
    }
}

impl Stream for ChangeStream {
    type Item = Change;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Change>> {
        match &mut self.0 {
            Some(stream) => stream.as_mut().poll_next(cx),
            None => Poll::Ready(None),
        }
    }
}

impl fmt::Debug for ChangeStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChangeStream").field("has_feed", &self.has_feed()).finish()
    }
}
