//! Connections to Redis, for cached answers and for the counters of rate limits.

mod link;
mod script;
mod servers;

pub use self::{
    link::RedisState,
    servers::{RedisServers, RedisUrlError},
};
pub(crate) use self::{
    link::{Fault, Link},
    script::Script,
    servers::Connector,
};
use crate::runtime::hex;

/// Returns the hash tag that maps all names with `name` to one slot of a cluster. It is hexadecimal, because `name` may
/// contain braces.
pub(crate) fn slot(name: &str) -> String {
    format!("{{{}}}", hex(name.as_bytes()))
}
