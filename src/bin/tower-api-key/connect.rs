//! From the URLs to a store: [`Database`].

use std::{path::Path, time::Duration};

use tower_api_key::{
    PostgresStore, RedisCache, SqliteStore,
    backend::{DatabaseHealth, FeedCheck, MigrateError, MigrationReport, SchemaVersion},
    redis::RedisServers,
    store::KeyRepository,
};

use crate::{
    args::Options,
    failure::{Exit, Failure},
};

/// Poll interval of the check of the change feed. An event that takes longer than a notification was polled.
const POLL_INTERVAL: Duration = Duration::from_secs(3);
/// Maximum time that a command waits for Redis. Correctness does not depend on it.
const REDIS_PATIENCE: Duration = Duration::from_secs(2);
/// Deadline of a statement: a batch of an import takes longer than a look-up.
const DEADLINE: Duration = Duration::from_secs(60);

/// The database that the URL names.
#[derive(Debug, Clone)]
pub(crate) enum Database {
    Sqlite(SqliteStore),
    Postgres(PostgresStore),
}

/// Whether a missing file of SQLite is created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    Create,
    /// An empty database in memory is used in place of the missing one.
    InMemory,
    Fail,
}

impl Database {
    /// Opens the database of the options.
    pub(crate) fn open(options: &Options, missing: Missing) -> Result<Self, Failure> {
        let url = options.database_url.as_deref().unwrap_or_default();
        if url.is_empty() {
            return Err(Failure::usage(
                "no database: set DATABASE_URL, or give --database-url sqlite:keys.db or postgres://USER@HOST/DATABASE",
            ));
        }
        if let Some(path) = url.strip_prefix("sqlite:") {
            // `sqlite:///var/keys.db` is an absolute path, and `sqlite://keys.db` a relative one.
            let path = path.strip_prefix("//").unwrap_or(path);
            return Self::open_file(path, missing);
        }
        if url.starts_with("postgres:") || url.starts_with("postgresql:") {
            let builder = PostgresStore::builder(url).poll_interval(POLL_INTERVAL);
            let builder = builder.max_connections(1).timeout(DEADLINE).statement_timeout(DEADLINE);
            let store = builder.build().map_err(|error| Failure::usage(error.to_string()))?;
            return Ok(Self::Postgres(store));
        }
        // The URL is not shown, because it may contain a password.
        Err(Failure::usage("the database URL begins neither with sqlite: nor with postgres://"))
    }

    fn open_file(path: &str, missing: Missing) -> Result<Self, Failure> {
        if path.is_empty() || path == ":memory:" {
            return Err(Failure::usage("write the path of the database after sqlite:"));
        }
        if !Path::new(path).exists() {
            match missing {
                Missing::Create => {}
                Missing::InMemory => return Ok(Self::Sqlite(SqliteStore::in_memory()?)),
                Missing::Fail => {
                    let message =
                        format!("there is no file {path}: run `tower-api-key migrate` first");
                    return Err(Failure::new(Exit::Unavailable, message));
                }
            }
        }
        Ok(Self::Sqlite(SqliteStore::builder(path).timeout(DEADLINE).open()?))
    }

    pub(crate) async fn migrate(&self) -> Result<MigrationReport, MigrateError> {
        match self {
            Self::Sqlite(store) => store.migrate().await,
            Self::Postgres(store) => store.migrate().await,
        }
    }

    pub(crate) async fn pending(&self) -> Result<Vec<String>, MigrateError> {
        match self {
            Self::Sqlite(store) => store.pending_migrations().await,
            Self::Postgres(store) => store.pending_migrations().await,
        }
    }

    /// Returns the SQL of a migration; `None` if there is nothing to do.
    pub(crate) async fn migration_sql(&self) -> Result<Option<String>, MigrateError> {
        if self.pending().await?.is_empty() {
            return Ok(None);
        }
        match self {
            Self::Sqlite(store) => store.migration_sql().await.map(Some),
            Self::Postgres(_) => Ok(Some(PostgresStore::migration_sql())),
        }
    }

    /// Compares the schema with this program, before a command uses it.
    pub(crate) async fn check_schema(&self) -> Result<(), Failure> {
        let version = match self {
            Self::Sqlite(store) => store.schema_version().await?,
            Self::Postgres(store) => store.schema_version().await?,
        };
        match version {
            SchemaVersion::None => Err(Failure::failed(
                "the database has no tables of this program: run `tower-api-key migrate`",
            )),
            SchemaVersion::Older => Err(Failure::failed(
                "the schema was made by an older version of tower-api-key: run `tower-api-key migrate`",
            )),
            SchemaVersion::Newer => {
                crate::output::note(format_args!(
                    "warning: the schema was made by a newer version of tower-api-key: use that version of this program"
                ));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    pub(crate) async fn health(&self) -> Result<DatabaseHealth, Failure> {
        Ok(match self {
            Self::Sqlite(store) => store.health().await?,
            Self::Postgres(store) => store.health().await?,
        })
    }

    /// Returns the state of a database that rejected a statement, or could not run it. A read-only database and a newer
    /// schema explain both.
    async fn health_after(&self, failure: &mut Failure) -> Option<DatabaseHealth> {
        if !failure.is_rejected && failure.exit != Exit::Unavailable {
            return None;
        }
        let health = self.health().await.ok()?;
        if health.is_read_only {
            failure.exit = Exit::Unavailable;
            failure.message =
                "the database is read-only, as a standby is: use the URL of the primary".to_owned();
            return None;
        }
        if health.schema == SchemaVersion::Newer {
            failure.message +=
                "; the schema was made by a newer version: use that version of tower-api-key";
            return None;
        }
        Some(health)
    }

    pub(crate) async fn check_feed(&self, limit: Duration) -> Result<FeedCheck, Failure> {
        Ok(match self {
            Self::Sqlite(store) => store.check_feed(limit).await?,
            Self::Postgres(store) => store.check_feed(limit).await?,
        })
    }

    /// Finds out why the database rejected a statement of a command: an old schema, a missing right, a standby.
    pub(crate) async fn explain(&self, mut failure: Failure) -> Failure {
        if failure.is_rejected {
            match self.pending().await {
                Ok(pending) if !pending.is_empty() => {
                    return Failure::failed(format!(
                        "the schema is not up to date ({} is missing): run `tower-api-key migrate`",
                        pending.first().map(String::as_str).unwrap_or_default()
                    ));
                }
                Err(error) => return error.into(),
                Ok(_) => {}
            }
        }
        let Some(health) = self.health_after(&mut failure).await else { return failure };
        let lacks = health.missing_privileges.iter();
        let lacks: Vec<_> = lacks.map(|it| format!("{} on {}", it.privilege, it.table)).collect();
        if !failure.is_rejected || lacks.is_empty() {
            return failure;
        }
        let message = format!("the role of the database lacks rights: grant {}", lacks.join(", "));
        Failure::new(Exit::NotPermitted, message)
    }

    /// Finds out why the database rejected a migration.
    pub(crate) async fn explain_migration(&self, mut failure: Failure) -> Failure {
        match self.health_after(&mut failure).await {
            Some(health) if failure.is_rejected && !health.can_migrate => Failure::new(
                Exit::NotPermitted,
                "the role may not create tables in the schema, or does not own the tables: migrate as their owner",
            ),
            _ => failure,
        }
    }
}

/// Returns the Redis servers of the options.
pub(crate) fn redis(options: &Options) -> Option<RedisServers> {
    let url = options.redis_url.as_deref().filter(|url| !url.is_empty())?;
    Some(match url.contains(',') {
        true => RedisServers::cluster(url.split(',').map(str::trim).filter(|url| !url.is_empty())),
        false => RedisServers::single(url),
    })
}

/// Puts Redis in front of a store, and connects.
pub(crate) async fn cached<R: KeyRepository>(
    store: R,
    servers: RedisServers,
    options: &Options,
) -> Result<RedisCache<R>, Failure> {
    let mut builder = RedisCache::builder(store, servers).timeout(REDIS_PATIENCE);
    if let Some(namespace) = &options.redis_namespace {
        builder = builder.namespace(namespace);
    }
    let cache = builder.build().map_err(|error| Failure::usage(error.to_string()))?;
    if !cache.prepare(REDIS_PATIENCE).await {
        crate::output::note(format_args!(
            "warning: Redis can't be used (see `tower-api-key doctor`): its entries are not deleted; nodes learn of \
             changes from the database all the same"
        ));
    }
    Ok(cache)
}

/// Waits until the entries of changed keys are deleted.
pub(crate) async fn flushed<R: KeyRepository>(cache: &RedisCache<R>) {
    // Nodes learn of the changes from the database all the same.
    let _ = cache.flush(REDIS_PATIENCE).await;
}
