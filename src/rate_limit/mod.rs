//! How often a key may be used: [`RateLimitLayer`], over a [`RateLimiter`].
//!
//! Windows are aligned: a minute is the one of the clock on the wall, not the sixty seconds before a request.
//! So a key with a limit of L a minute gets at most L requests through in any minute of the clock, and at most
//! 2 L in sixty seconds that have the end of one in them. In exchange a refused caller can be told the second
//! at which it may come again, and all counters of a key are six numbers.

mod local;
#[cfg(feature = "redis")]
mod redis;

use std::future::Future;

pub use self::local::LocalRateLimiter;
#[cfg(feature = "redis")]
pub use self::redis::{OnRedisFailure, RedisRateLimiter, RedisRateLimiterBuilder};
use crate::{
    error::StoreError,
    record::{KeyId, Quota, RateLimits},
};

/// Counts requests.
///
/// # What an implementer must never do
///
/// Never count a request that is refused, in any window; never count by anything but the key's id, which is what
/// stays when a key is rotated.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a rate limiter",
    label = "this is not a `RateLimiter`",
    note = "use `LocalRateLimiter::new()`, a `RedisRateLimiter` (a builder becomes one with `build()`), or an `Arc` of a rate limiter; the trait is not dyn compatible"
)]
pub trait RateLimiter: Send + Sync + 'static {
    /// Counts a request of `key` in every window that has a limit or, if one of them is full, in none.
    ///
    /// # Errors
    ///
    /// When it can't be said whether there is room: the caller gets a 503.
    fn count(
        &self,
        key: &KeyId,
        limits: RateLimits,
    ) -> impl Future<Output = Result<Quota, StoreError>> + Send;

    /// The same without waiting, for a limiter that never has to; `None` by default.
    fn count_now(&self, key: &KeyId, limits: RateLimits) -> Option<Quota> {
        let _ = (key, limits);
        None
    }
}
