//! Private servers for tests: each in a temporary folder, on the loopback address, not as root, ended by its
//! process id when it goes out of scope. PostgreSQL, PgBouncer, nginx, and Redis from 7.0 on.

mod nginx;
mod pgbouncer;
mod postgres;
mod process;
mod redis;
mod redis_cluster;
mod redis_sentinel;
mod resp;

pub use self::{
    nginx::Nginx,
    pgbouncer::PgBouncer,
    postgres::Postgres,
    process::{Port, wait_for},
    redis::Redis,
    redis_cluster::RedisCluster,
    redis_sentinel::RedisSentinel,
};
