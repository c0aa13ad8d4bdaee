//! PostgreSQL: connections, the change feed, adopted schemas, migrations and replication.

mod adoption;
mod batches;
mod connections;
mod dumps;
mod feed_bulk;
mod feed_failover;
mod feed_postgres;
mod feed_triggers;
mod foreign_migrations;
mod last_changes;
mod management;
mod notifications;
mod pooler;
mod postgres_hosts;
mod pruning;
mod replication;
mod schema_repair;
#[path = "../support/mod.rs"]
mod support;
