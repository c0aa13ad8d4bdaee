//! The way to Redis, for what lies in it: cached answers, and the counters of rate limits.

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

/// Puts what goes by `name` into one slot of a cluster. In hexadecimal, because it may have braces in it as
/// well.
pub(crate) fn slot(name: &str) -> String {
    format!("{{{}}}", hex(name.as_bytes()))
}
