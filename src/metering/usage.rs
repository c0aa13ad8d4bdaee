//! What is used on keys, counted in memory and written behind: [`Usage`].
//!
//! Every request that is let in counts one, and handlers add tokens and cost. Both are an addition to a counter
//! of the key ([`counter`]); a [`worker`] takes what has come together, by default every second, and tells the
//! store. A batch that was sent is sent again as it is until the store has it, and stores count it once. When a
//! process is killed, what came in since its last write is lost: one interval at most while the store takes it.

/// What a handler has used on behalf of a key, beside the request itself, which is counted already.
///
/// ```
/// use tower_api_key::{AuthContext, Usage};
///
/// fn answered(caller: &AuthContext, tokens: u64) {
///     // 0.25 cents for a thousand tokens: 250 micro-cents each.
///     caller.record_usage(Usage { tokens, cost: tokens * 250 });
/// }
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Usage {
    /// Tokens.
    pub tokens: u64,
    /// Cost in micro-cents, a millionth of a cent: an integer, so that sums are exact.
    pub cost: u64,
}

impl Usage {
    /// Tokens alone.
    pub fn tokens(tokens: u64) -> Self {
        Self { tokens, cost: 0 }
    }

    /// Cost alone, in micro-cents.
    pub fn cost(micro_cents: u64) -> Self {
        Self { tokens: 0, cost: micro_cents }
    }
}
