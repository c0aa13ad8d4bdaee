//! The state of the caches: [`Health`].

use std::time::Duration;

use crate::store::FeedStatus;

/// State of the caches of an [`Authenticator`](crate::Authenticator).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Health {
    /// Valid keys that this node remembers.
    pub cached_keys: usize,
    /// Look-ups that wait for the store: at most as many as
    /// [`max_lookups`](crate::AuthenticatorBuilder::max_lookups).
    pub lookups_under_way: usize,
    /// Whether the store failed when it was last asked. Keys that are remembered are served within
    /// `max_staleness + stale_if_error`.
    pub is_store_failing: bool,
    /// How long ago this node was last in sync with the changes of its store. `None` before the first
    /// look-up, and for a store that has no feed.
    pub last_sync: Option<Duration>,
    /// Status of the change feed: why changes may not arrive, and how large its table is.
    pub feed: FeedStatus,
}
