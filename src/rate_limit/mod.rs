//! Rate limits of keys: [`RateLimiter`] and its implementations.
//!
//! A key has limits per minute, hour and day ([`RateLimits`]); 0 allows nothing, `None` means unlimited.
//! [`RateLimitLayer`](crate::RateLimitLayer) enforces them with a limiter: [`LocalRateLimiter`] counts in this process,
//! [`RedisRateLimiter`] for a fleet, in one round trip. Responses carry `RateLimit` and `RateLimit-Policy`.
//!
//! ```
//! use tower_api_key::{NewKey, RateLimitLayer, rate_limit::LocalRateLimiter, record::RateLimits};
//!
//! let key = NewKey::new(1, "trial").rate_limits(RateLimits::default().per_minute(60).per_day(10_000));
//! let layer = RateLimitLayer::new(LocalRateLimiter::new());
//! ```
//!
//! # Windows
//!
//! Windows are aligned: a minute is a minute of the wall clock, not the 60 seconds before a request. For a limit of L
//! per minute, at most L requests pass in each minute of the wall clock, and at most 2 L in any 60 seconds that span
//! the end of a minute. In exchange, the response to a denied request contains the exact second at which the caller
//! may retry, and all counters of a key are six numbers.
//!
//! [`RedisRateLimiter`] documents the bounds while Redis fails. Services that share a Redis need a
//! [`namespace`](RedisRateLimiterBuilder::namespace) each.

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

/// Counts requests and decides whether they are within the rate limits.
///
/// # What an implementer must never do
///
/// Never count a request that is denied, in any window. Never count by anything but the key's id, which stays the
/// same when a key is rotated.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a rate limiter",
    label = "this is not a `RateLimiter`",
    note = "use `LocalRateLimiter::new()`, a `RedisRateLimiter` (a builder becomes one with `build()`), or an `Arc` of a rate limiter; the trait is not dyn compatible"
)]
pub trait RateLimiter: Send + Sync + 'static {
    /// Counts a request of `key` in every window that has a limit or, if a window is full, in none.
    ///
    /// # Errors
    ///
    /// Returns an error if the limiter can't decide. The caller gets a 503.
    fn count(
        &self,
        key: &KeyId,
        limits: RateLimits,
    ) -> impl Future<Output = Result<Quota, StoreError>> + Send;

    /// Counts a request like [`count`](Self::count), without waiting. For limiters that never wait; returns `None` by
    /// default.
    fn count_now(&self, key: &KeyId, limits: RateLimits) -> Option<Quota> {
        let _ = (key, limits);
        None
    }
}
