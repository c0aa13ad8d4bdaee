//! A fleet whose PostgreSQL, Redis and network fail, and the servers and the proxy that tests start for that.

mod fleet;
mod replica;
mod servers;
#[path = "../support/mod.rs"]
mod support;
