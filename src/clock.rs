//! The source of time of the crate, and a clock for tests.
//!
//! Services use [`SystemClock`], the default. A test injects a [`ManualClock`] and advances it, so that it checks
//! expiry or the end of a rate-limit window without sleeping:
//!
//! ```
//! use std::{sync::Arc, time::{Duration, SystemTime}};
//! use tower_api_key::{clock::ManualClock, rate_limit::LocalRateLimiter};
//!
//! let clock = Arc::new(ManualClock::at(SystemTime::UNIX_EPOCH));
//! let limiter = LocalRateLimiter::with_clock(clock.clone());
//! // A minute later, the windows of a minute have ended.
//! clock.advance(Duration::from_secs(60));
//! ```

pub use crate::runtime::{Clock, ManualClock, Moment, SystemClock};
