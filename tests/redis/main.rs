//! The Redis cache and the Redis rate limiter, with one server, a cluster and sentinels.

mod cache;
mod combined_reads;
mod rate_limit_redis;
mod redis_bad_entries;
mod redis_cluster;
mod redis_namespaces;
mod redis_new_node;
mod redis_outage;
mod redis_sentinel;
#[path = "../support/mod.rs"]
mod support;
