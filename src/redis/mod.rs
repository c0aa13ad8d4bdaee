//! Connections to Redis, for [`RedisCache`](crate::RedisCache) and
//! [`RedisRateLimiter`](crate::rate_limit::RedisRateLimiter).
//!
//! Both take a URL, or [`RedisServers`] for a cluster or servers behind Sentinel:
//!
//! ```
//! use tower_api_key::{rate_limit::RedisRateLimiter, redis::RedisServers};
//!
//! # fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let cluster = RedisServers::cluster(["redis://a.internal", "redis://b.internal"]);
//! let limiter = RedisRateLimiter::new(cluster)?;
//! # Ok(())
//! # }
//! ```
//!
//! By default, a request waits for Redis at most 100 ms. After five failures in a row the circuit breaker opens: Redis
//! is not used, and is probed in the background. [`RedisState`] is its state, for a health check.

mod health;
mod link;
mod script;
mod servers;

pub use self::{
    health::{RedisHealth, RedisHealthError},
    link::RedisState,
    servers::{RedisServers, RedisUrlError},
};
pub(crate) use self::{
    link::{Fault, Link},
    script::Script,
    servers::Connector,
};
use crate::runtime::push_hex;

/// Returns the hash tag that maps all names with `name` to one slot of a cluster. It is hexadecimal, because `name` may
/// contain braces.
pub(crate) fn slot(name: &str) -> String {
    let mut slot = String::with_capacity(2 * name.len() + 2);
    slot.push('{');
    push_hex(name.as_bytes(), &mut slot);
    slot.push('}');
    slot
}
