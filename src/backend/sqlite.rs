//! A store in an embedded SQLite database: [`SqliteStore`].

mod adopt;
mod attribution;
mod audit;
mod feed;
#[cfg(unix)]
mod file;
mod health;
mod insert;
mod key_edits;
mod keys_read;
mod ledger;
mod repository;
mod run;
mod schema_version;
mod select;
mod threads;
mod triggers;
mod usage;
mod users;

use std::{
    fmt,
    future::Future,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime},
};

use diesel::{
    Connection, QueryableByName, SqliteConnection, connection::SimpleConnection, sqlite::Sqlite,
};
use tokio::sync::watch;

use self::{
    run::{BytesRow, execute, immediately, load, load_rows},
    threads::Threads,
};
use super::sql::{
    fault::store_error,
    gate::LookupGate,
    migrate::{MigrateError, MigrationReport},
    review::KeyReview,
    row,
    statement::{Bind, Statement, TextRow},
};
use crate::{
    error::StoreError,
    record::{Revision, UserId},
    runtime::{Clock, SystemClock, hex, later, within},
    store::{
        Answer, CacheSecret, ChangeStream, KeySelection, KeyStore, KeysRead, Lease, LeaseRequest,
        Lookup, ReadOwner, UsageBatch,
    },
    telemetry,
};

/// A store in an SQLite database that is compiled in: no server to install, and one file to back up. It suits one
/// process on one machine.
///
/// The file is in WAL mode, so that look-ups continue during a write. SQLite blocks, so the store has its own threads:
/// one that writes and a few that read. They end when the last clone is dropped.
///
/// ```
/// use tower_api_key::{ApiKeyAuthLayer, SqliteStore};
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// let store = SqliteStore::open("keys.db")?;
/// store.migrate().await?;
/// let layer = ApiKeyAuthLayer::new(store);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct SqliteStore(Arc<Inner>);

struct Inner {
    writer: Threads,
    /// `None` for a database in memory, where a second connection would open another database.
    readers: Option<Threads>,
    /// Gate of the readers for look-ups, so that any other query waits for at most one look-up per thread.
    gate: Arc<LookupGate>,
    /// The connection that detects writes of other processes; the writer's for a database in memory.
    watcher: Option<Threads>,
    /// Number of writes of this process.
    written: watch::Sender<u64>,
    /// Identifies a database in memory.
    name_in_memory: String,
    deadline: Duration,
    clock: Arc<dyn Clock>,
}

/// Builds a [`SqliteStore`].
#[derive(Debug, Clone)]
pub struct SqliteStoreBuilder {
    path: Option<PathBuf>,
    readers: usize,
    deadline: Duration,
    clock: Arc<dyn Clock>,
}

impl SqliteStore {
    /// Opens the database in the file at `path`. A missing file is created, on Unix with the mode 0600 whatever the
    /// umask is. The mode of an existing file is not changed.
    ///
    /// # Errors
    ///
    /// If the file can't be opened, or is not an SQLite database.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, StoreError> {
        Self::builder(path).open()
    }

    /// Opens a database in memory, which is dropped with the last clone.
    ///
    /// # Errors
    ///
    /// If a thread can't be started.
    pub fn in_memory() -> Result<Self, StoreError> {
        SqliteStoreBuilder::new(None, 0).open()
    }

    /// Creates a builder for the database in the file at `path`.
    pub fn builder(path: impl AsRef<Path>) -> SqliteStoreBuilder {
        SqliteStoreBuilder::new(Some(path.as_ref().to_owned()), 2)
    }

    /// Brings the schema up to date, and adopts existing tables `users` and `api_keys`. Several processes may call it
    /// at once.
    ///
    /// # Errors
    ///
    /// If tables can't be adopted, or the database fails. Nothing is changed then. After a timeout (60 s) the migration
    /// may still succeed; call this again to check.
    pub async fn migrate(&self) -> Result<MigrationReport, MigrateError> {
        let migrated =
            self.0.writer.run(MIGRATION_DEADLINE, |connection| Ok(adopt::migrate(connection)));
        let has_adopted_keys = migrated.await??;
        Ok(match has_adopted_keys {
            true => MigrationReport::of_adopted(self.review_keys().await),
            false => MigrationReport::default(),
        })
    }

    /// Lists the keys that fail, and those that change their meaning, for a service that adopted its tables, before it
    /// switches. Reads all keys, in pages of 1,000.
    ///
    /// # Errors
    ///
    /// If the database fails. A key that can't be decoded is a finding.
    pub async fn review_keys(&self) -> Result<KeyReview, StoreError> {
        let (mut review, mut after) = (KeyReview::default(), Some(i64::MIN));
        while let Some(last) = after {
            after = review.add(&self.reviewed(last).await?);
        }
        Ok(review)
    }

    /// Runs a read-only statement.
    async fn read(&self, statement: Statement) -> Result<Vec<TextRow>, StoreError> {
        self.read_rows(statement).await
    }

    /// Runs a read-only statement that returns rows other than texts.
    async fn read_rows<R>(&self, statement: Statement) -> Result<Vec<R>, StoreError>
    where
        R: QueryableByName<Sqlite> + Send + 'static,
    {
        self.0.run(move |connection| load_rows(connection, &statement)).await
    }

    /// Runs the statement of a look-up. The deadline includes the wait for a thread.
    async fn look_up(
        &self,
        lookup: &Lookup,
        statement: Statement,
    ) -> Result<Vec<TextRow>, StoreError> {
        let rows = async {
            let permit = self.0.gate.pass(lookup).await?;
            let query = move |connection: &mut SqliteConnection| {
                let rows = load(connection, &statement);
                // The thread is free from here, even if no request waits for the rows any more.
                drop(permit);
                rows
            };
            self.0.run(query).await
        };
        let deadline = self.0.deadline;
        within(deadline, rows).await.unwrap_or_else(|| Err(StoreError::timeout(deadline)))
    }

    /// Runs several statements that change no decision in one transaction. It does not wake the feed.
    async fn in_silent_transaction<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut SqliteConnection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let transaction = |connection: &mut SqliteConnection| immediately(connection, work);
        self.0.writer.run(self.0.deadline, transaction).await
    }

    /// Runs a statement that may write.
    async fn write(&self, statement: Statement) -> Result<Vec<TextRow>, StoreError> {
        let write = move |connection: &mut SqliteConnection| load(connection, &statement);
        self.changed(self.0.writer.run(self.0.deadline, write)).await
    }

    /// Wakes the feed after a write.
    async fn changed<T>(
        &self,
        write: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let outcome = write.await;
        self.0.written.send_modify(|written| *written += 1);
        outcome
    }
}

impl Inner {
    /// Runs a read-only query.
    async fn run<T: Send + 'static>(
        &self,
        query: impl FnOnce(&mut SqliteConnection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.readers.as_ref().unwrap_or(&self.writer).run(self.deadline, query).await
    }
}

const DEADLINE: Duration = Duration::from_secs(5);
/// Maximum number of waiting look-ups per reading thread.
const WAITING_PER_READER: usize = 256;
/// Deadline of a migration, which may have to build an index on an adopted table.
const MIGRATION_DEADLINE: Duration = Duration::from_secs(60);
/// Minimum deadline of a change of many keys.
const BULK_DEADLINE: Duration = Duration::from_secs(60);
/// Size of the writer's page cache, in KiB: keys are at random places of the indexes, and with SQLite's 2 MiB each
/// insertion into a large table would read and write pages of the file.
const WRITER_CACHE: u32 = 64 * 1024;

impl SqliteStoreBuilder {
    fn new(path: Option<PathBuf>, readers: usize) -> Self {
        Self { path, readers, deadline: DEADLINE, clock: Arc::new(SystemClock) }
    }

    /// Sets the number of reading threads: 2 by default, 1 to 64. Other values are clamped.
    #[must_use]
    pub fn readers(self, readers: usize) -> Self {
        Self { readers: readers.clamp(1, 64), ..self }
    }

    /// Sets the deadline of a query, including its wait for a thread and for other writers: 5 s by default.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { deadline: timeout, ..self }
    }

    /// Sets the clock, which decides when leases expire and budget periods end, and which day usage is charged to:
    /// [`SystemClock`] by default. Use the same clock for the
    /// [`Authenticator`](crate::Authenticator).
    #[must_use]
    pub fn clock(self, clock: Arc<dyn Clock>) -> Self {
        Self { clock, ..self }
    }

    /// Opens the database. It needs no runtime.
    ///
    /// # Errors
    ///
    /// If the file can't be opened, or is not an SQLite database.
    pub fn open(self) -> Result<SqliteStore, StoreError> {
        let Self { path, readers: reader_count, deadline, clock } = self;
        let open = move || open(path.as_deref(), deadline);
        // The writer is opened first: it creates the file and sets WAL mode.
        let open_writer = || {
            let mut connection = open()?;
            let cache = format!("PRAGMA cache_size = -{WRITER_CACHE}");
            connection.batch_execute(&cache).map_err(store_error)?;
            // A file that can't be read fails at the first query.
            if let Ok(version) = schema_version::read(&mut connection) {
                version.log();
            }
            Ok(connection)
        };
        let writer = Threads::start(1, &open_writer)?;
        let (readers, watcher) = match reader_count {
            0 => (None, None),
            _ => (Some(Threads::start(reader_count, &open)?), Some(Threads::start(1, &open)?)),
        };
        let (written, gate) =
            (watch::Sender::new(0), LookupGate::new(reader_count.max(1), WAITING_PER_READER));
        let mut name = [0; 16];
        getrandom::fill(&mut name).map_err(|error| StoreError::unavailable(error.to_string()))?;
        let name_in_memory = hex(&name);
        let inner =
            Inner { writer, readers, gate, watcher, written, name_in_memory, deadline, clock };
        Ok(SqliteStore(Arc::new(inner)))
    }
}

fn open(path: Option<&Path>, deadline: Duration) -> Result<SqliteConnection, StoreError> {
    let path = match path.map(Path::to_str) {
        None => ":memory:",
        // With such a path, each connection would have its own database.
        Some(Some("" | ":memory:")) => {
            return Err(StoreError::rejected(
                "for a database in memory, use SqliteStore::in_memory",
            ));
        }
        Some(Some(path)) => path,
        Some(None) => return Err(StoreError::rejected("the path of the database is not UTF-8")),
    };
    #[cfg(unix)]
    if path != ":memory:" {
        file::create(path);
    }
    let mut connection = SqliteConnection::establish(path).map_err(StoreError::unavailable)?;
    let busy = deadline.as_millis().min(60_000);
    // FULL, because with NORMAL a power failure can lose a commit in WAL mode, but does not damage the
    // file: https://sqlite.org/pragma.html#pragma_synchronous. The journals of statements with triggers are kept in
    // memory: writing them to a file takes a third of the time of an insertion.
    let settings = format!(
        "PRAGMA busy_timeout = {busy}; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; \
         PRAGMA foreign_keys = ON; PRAGMA trusted_schema = OFF; PRAGMA temp_store = MEMORY;"
    );
    // The busy timeout does not apply to the change to WAL mode, which can fail if several processes open a new file at
    // once.
    let until = later(deadline);
    loop {
        match connection.batch_execute(&settings).map_err(store_error) {
            Ok(()) => return Ok(connection),
            Err(error) if error.is_transient() && Instant::now() < until => {
                thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error),
        }
    }
}

impl KeyStore for SqliteStore {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        let rows = self.look_up(lookup, select::look_up(lookup)).await?;
        let latest = rows.iter().find_map(TextRow::id).and_then(|id| u64::try_from(id).ok());
        let keys = rows.iter().filter(|found| found.id().is_none());
        let answer = lookup.verify_rows(keys.map(|found| row::decode(&found.row))).await?;
        if let Some(upgrade) = answer.upgrade()
            && let Err(error) = self.write(upgrade.statement()).await
        {
            telemetry::upgrade_failed(&error);
        }
        Ok(answer.with_key_revision(Revision(latest.unwrap_or(0))))
    }

    fn changes(&self, since: SystemTime) -> ChangeStream {
        feed::changes(self, since)
    }

    async fn record_usage(&self, batch: &UsageBatch) -> Result<(), StoreError> {
        self.count_usage(batch).await
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Lease, StoreError> {
        self.grant_lease(request).await
    }

    fn can_read_keys(&self) -> bool {
        true
    }

    async fn read_keys(&self, selection: &KeySelection) -> Result<KeysRead, StoreError> {
        self.many_keys(selection).await
    }

    async fn read_owners(&self, owners: &[UserId]) -> Result<Vec<ReadOwner>, StoreError> {
        self.owners_of_keys(owners).await
    }

    fn has_cache_secret(&self) -> bool {
        true
    }

    async fn cache_secret(&self) -> Result<Option<CacheSecret>, StoreError> {
        // It must not be ready at the first poll: a cache that polls once to detect a store without a secret has no
        // runtime.
        tokio::task::yield_now().await;
        let select = "SELECT json_array(id, hex(secret), 'sqlite:' || coalesce(
                nullif((SELECT file FROM pragma_database_list WHERE name = 'main'), ''), $1)) AS row
            FROM api_key_cache_secrets ORDER BY created_at DESC, id DESC LIMIT 2";
        let binds = [Bind::Text(self.0.name_in_memory.clone())];
        let rows = self.read(Statement::new(select, binds)).await?;
        CacheSecret::from_rows(rows.iter().map(|row| row.row.as_str()))
    }
}

impl fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteStore").finish_non_exhaustive()
    }
}
