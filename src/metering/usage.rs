//! Usage of keys, which is counted in memory and written asynchronously: [`Usage`].
//!
//! Each request that is let in adds one to a counter of its key, and handlers add tokens and cost. A background task
//! flushes the counters to the store, by default every second. Batches are retried unchanged until the store has
//! them, and they are idempotent. If the process is killed, the usage since the last write is lost: at most one
//! interval while the store accepts writes.

/// Usage of a handler on behalf of a key, beside the request itself, which is already counted.
///
/// ```
/// use tower_api_key::{AuthContext, metering::Usage};
///
/// fn answered(caller: &AuthContext, tokens: u64) {
///     // 0.25 cents for a thousand tokens: 250 micro-cents each.
///     caller.record_usage(Usage { tokens, cost: tokens * 250 });
/// }
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Usage {
    /// Number of tokens.
    pub tokens: u64,
    /// Cost in micro-cents (millionths of a cent): an integer, so that sums are exact.
    pub cost: u64,
}

impl Usage {
    /// Creates a usage of tokens only.
    pub fn tokens(tokens: u64) -> Self {
        Self { tokens, cost: 0 }
    }

    /// Creates a usage of a cost only, in micro-cents.
    pub fn cost(micro_cents: u64) -> Self {
        Self { tokens: 0, cost: micro_cents }
    }
}
