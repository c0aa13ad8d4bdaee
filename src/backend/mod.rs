//! The stores of this crate.
//!
//! | store | keys are in | feature | use it for |
//! |---|---|---|---|
//! | [`MemoryStore`] | this process | | tests, keys from a file |
//! | [`SqliteStore`] | a file, in a database that is compiled in | `sqlite` | one process |
//! | [`PostgresStore`] | PostgreSQL 13 or newer | `postgres` | any number of nodes |
//! | [`RedisCache`] | the store that it wraps; answers are cached in Redis | `redis` | many nodes, bcrypt hashes |
//! | [`Replica`] | the store that it wraps; all keys are in the memory of each node | | up to some millions of keys |
//!
//! Start with [`SqliteStore::open`] or [`PostgresStore::new`], then call `migrate()`, which every node may do at every
//! start. A [`RedisCache`] is a store itself:
//!
//! ```no_run
//! # #[cfg(all(feature = "postgres", feature = "redis"))]
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! use tower_api_key::{ApiKeyAuthLayer, PostgresStore, RedisCache};
//!
//! let postgres = PostgresStore::new("postgres://app@db.internal/app?sslmode=verify-full")?;
//! postgres.migrate().await?;
//! let layer = ApiKeyAuthLayer::new(RedisCache::new(postgres, "rediss://:password@redis.internal")?);
//! # Ok(())
//! # }
//! ```
//!
//! To choose the store at run time, use [`DynKeyStore`](crate::store::DynKeyStore).
//!
//! # Local cache, Redis or replica
//!
//! The local cache of the [`Authenticator`](crate::Authenticator) is always there, and answers most requests. What is
//! below it decides about the rest: the first request with a key on each node, unknown keys, and outages.
//!
//! | | local cache only | [`RedisCache`] | [`Replica`] |
//! |---|---|---|---|
//! | first request with a key on a node | a query | a query on the first node, then a round trip to Redis | from memory |
//! | unknown key | a query | a query | from memory |
//! | deployment of nodes with empty caches | a query for each key and node, in batches | a round trip for each key, or for up to 64 at once | one scan of the table per node |
//! | bcrypt hash | verified once, then the fast hash is stored | the same, and other nodes don't verify it again | verified once, then the fast hash is stored |
//! | outage of the database, key not used on this node | 503 | from Redis, within the bounds | from memory, within the bounds |
//! | memory of a node | 1.2 KB for each key that it uses | the same | 280 bytes for every key, and the local cache |
//! | more to operate | nothing | Redis | nothing |
//!
//! Start without either. Use a replica if the keys fit into the memory of each node: 100,000 keys are loaded in 4 s, and
//! a million in 40 s, with one scan of the table. A look-up in it takes 3 to 10 µs. Use Redis with more keys, or if nodes
//! start very often. Both at once is possible (`Replica::new(RedisCache::new(…)?)?`), and seldom useful. The figures are
//! of two cores that PostgreSQL shares (`cargo bench --bench replica`, `--bench cold_start`).
//!
//! # The change feed
//!
//! Triggers in the database record each change of a key or its owner, including an `UPDATE` by hand, and every node
//! reads these changes. With each read it verifies that all triggers exist and are enabled. If one is missing, because
//! a table was rebuilt for example, the node treats the feed as disconnected, logs one error, and
//! [`Health::feed`](crate::authenticator::Health::feed) names the trigger. `migrate()` restores it, and every node then
//! reads its keys anew. PostgreSQL notifies the nodes (`LISTEN`); where notifications don't arrive, nodes poll
//! ([`PostgresStoreBuilder::poll_interval`]). Rows of `api_key_changes` are kept for two hours.
//!
//! # Existing tables
//!
//! `migrate()` creates the tables. Existing tables `users` and `api_keys` are adopted: missing columns are added,
//! everything else is left as it is, and the other service continues to use them. `json` or `jsonb`, `integer` or
//! `bigint`, arrays, enums, time stamps with or without a time zone (read as UTC) are supported. What can't be adopted
//! is reported column by column, before anything is changed ([`MigrateError::NotAdoptable`]). Partitioned tables are
//! rejected, because a partition can be truncated or detached without a trigger.
//!
//! - **Review**: `review_keys()` lists the keys that fail and those whose meaning changes (`chat:*` becomes a
//!   wildcard), with the reason ([`KeyReview`]). The [`MigrationReport`] of the call that adopts a table has the same
//!   list.
//! - **Values**: `total_cost` and `budget_limit_cents` are in cents; a remainder below a cent is kept in
//!   `total_cost_rest`. −1 in a limit or budget means unlimited, any other negative number fails the key. `budget_type`
//!   applies only with a limit. Nested objects of permissions grant their paths (`{"chat": {"read": true}}` grants
//!   `chat:read`). A `total` budget counts the larger of `api_key_usage` and `total_cost`.
//! - **The other service**: its sign-ups fire no trigger (with a foreign key from `api_keys` to `users`). An update of
//!   a user or key runs one row trigger, and sends a notification only if a decision depends on the change. Its
//!   migrations may alter and drop columns. `PREPARE TRANSACTION`, `pg_dump --data-only` into a migrated schema
//!   (without `__diesel_schema_migrations`) and logical replication `FOR ALL TABLES` work. An ORM that reads
//!   `total_requests`, adds and writes it back overwrites what the crate has counted meanwhile; `api_key_usage` stays
//!   correct.
//! - **Repair**: `migrate()` restores missing, disabled or outdated tables, columns, functions and triggers of this
//!   crate. Where all are there, it changes nothing and needs only the right to read.
//! - **New users and keys**: to create them, the tables have to allow it. A column that is `NOT NULL` without a
//!   default, a `key_hash` of under 85 characters or a `key_prefix` of under 10 is an error.
//!
//! # Privileges in PostgreSQL
//!
//! | what the service does | what its role needs |
//! |---|---|
//! | checks keys | `SELECT` on `users`, `api_keys`, `api_key_changes` and `api_key_cache_secrets` |
//! | counts usage, reserves budgets | `UPDATE` on `api_keys`; all rights on `api_key_usage`, `api_key_usage_writers` and `api_key_leases`; `EXECUTE` on `api_key_try` and `api_key_lease` (which every role has by default) |
//!
//! [`without_usage`](crate::authenticator::AuthenticatorBuilder::without_usage) makes the second row unnecessary.
//!
//! # Several hosts, and poolers
//!
//! With several hosts in the URL, each gets its share of the connect time-out, and the last one that worked is tried
//! first. A transaction pooler has to support prepared statements (PgBouncer 1.21 or newer with
//! `max_prepared_statements`). Settings are start-up options. Where the pooler rejects them, usage and leases set
//! theirs in a transaction, and a time-out for other statements is a setting of the role (`ALTER ROLE … SET
//! statement_timeout`).
//!
//! # What is in Redis
//!
//! Entries carry a MAC under a secret that is stored in the database: write access to Redis can neither create a key
//! nor revive one. Redis contains neither keys nor hashes, but records with names and e-mail addresses. Entries are
//! bound to the database; [`RedisCache`] describes when copies of a database need a
//! [`namespace`](RedisCacheBuilder::namespace). After restoring a backup, insert two new rows into
//! `api_key_cache_secrets`, so that entries from before the restore are ignored by nodes that start later.
//! [`RedisCache::state`] is for health checks.

mod encoded_record;
mod memory;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "redis")]
mod redis;
mod replica;
#[cfg(feature = "_sql")]
mod sql;
#[cfg(feature = "sqlite")]
mod sqlite;

pub use self::memory::MemoryStore;
#[cfg(feature = "postgres")]
pub use self::postgres::{PostgresStore, PostgresStoreBuilder, PostgresUrlError};
#[cfg(feature = "redis")]
pub use self::redis::{RedisCache, RedisCacheBuilder, RedisCacheError};
pub use self::replica::{Replica, ReplicaBuilder, ReplicaError};
#[cfg(feature = "_sql")]
pub use self::sql::{
    ClockReading, ColumnFault, DatabaseHealth, FeedCheck, FindingKind, KeyFinding, KeyReview,
    MigrateError, MigrationReport, MissingPrivilege, PrivilegePurpose, SchemaVersion,
};
#[cfg(feature = "sqlite")]
pub use self::sqlite::{SqliteStore, SqliteStoreBuilder};
