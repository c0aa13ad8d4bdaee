//! State of the caches: [`Health`].

use std::time::{Duration, SystemTime};

use crate::store::{FeedStatus, ReplicaStatus};

/// State of the caches of an [`Authenticator`](crate::Authenticator).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Health {
    /// Number of valid keys in the local cache.
    pub cached_keys: usize,
    /// Number of concurrent look-ups: at most [`max_lookups`](crate::authenticator::AuthenticatorBuilder::max_lookups).
    pub lookups_under_way: usize,
    /// Whether the store failed at the last look-up. Cached keys are then served for at most `max_staleness +
    /// stale_if_error`.
    pub is_store_failing: bool,
    /// Time since this node was last in sync with the change feed of its store. `None` before the first look-up, and
    /// for a store without a feed.
    pub last_sync: Option<Duration>,
    /// Time of the last sync by the clock of the database. This node has received every change that was committed before
    /// it. `None` in the same cases as `last_sync`. After a change by hand, read the time of the database once more: a
    /// node whose `synced_to` is later has received the change.
    pub synced_to: Option<SystemTime>,
    /// Status of the change feed: why changes may not arrive, and the size of its table.
    pub feed: FeedStatus,
    /// Status of the [`Replica`](crate::Replica), if the store is one.
    pub replica: Option<ReplicaStatus>,
}
