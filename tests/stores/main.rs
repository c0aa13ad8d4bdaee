//! Behaviour that all stores share, and SQLite.

mod adopted_values;
mod bad_rows;
mod every_store;
mod feed_sqlite;
mod hand_written_changes;
mod management_sqlite;
mod replica;
mod replica_rows;
mod sqlite;
mod store_errors;
#[path = "../support/mod.rs"]
mod support;
mod triggers_sqlite;
