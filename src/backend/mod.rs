//! The stores of this crate: in memory, SQLite, PostgreSQL, and the Redis cache in front of a store.

mod memory;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "redis")]
mod redis;
#[cfg(feature = "_sql")]
mod sql;
#[cfg(feature = "sqlite")]
mod sqlite;

pub use self::memory::MemoryStore;
#[cfg(feature = "postgres")]
pub use self::postgres::{PostgresStore, PostgresStoreBuilder, PostgresUrlError};
#[cfg(feature = "redis")]
pub use self::redis::{RedisCache, RedisCacheBuilder, RedisCacheError};
#[cfg(feature = "_sql")]
pub use self::sql::{
    ColumnFault, FindingKind, KeyFinding, KeyReview, MigrateError, MigrationReport,
};
#[cfg(feature = "sqlite")]
pub use self::sqlite::{SqliteStore, SqliteStoreBuilder};
