//! Connections for one purpose, and the execution of statements on them: [`Connections`].

use std::time::{Duration, Instant};

use diesel::{
    QueryableByName,
    pg::Pg,
    result::{DatabaseErrorKind, Error},
};
use diesel_async::{
    AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection,
    pooled_connection::{
        PoolableConnection,
        deadpool::{Object, Pool},
    },
};

use super::{connect::Target, session};
use crate::{
    backend::sql::{
        fault::store_error,
        statement::{Statement, TextRow},
    },
    error::StoreError,
};

/// A pool of connections that are opened on demand.
pub(super) struct Connections {
    pool: Pool<AsyncPgConnection>,
    target: Target,
    statement_timeout: Duration,
}

/// The transaction settings that a statement requires.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Isolation {
    Any,
    /// The statement must see what was committed while it waited for a lock.
    ReadCommitted,
}

struct Attempt {
    error: StoreError,
    was_broken: bool,
}

impl Connections {
    pub(super) fn new(
        pool: Pool<AsyncPgConnection>,
        target: Target,
        statement_timeout: Duration,
    ) -> Self {
        Self { pool, target, statement_timeout }
    }

    /// Runs an idempotent statement. It is retried once if the connection was dead.
    pub(super) async fn load<R>(
        &self,
        isolation: Isolation,
        statement: &Statement,
    ) -> Result<Vec<R>, StoreError>
    where
        R: QueryableByName<Pg> + Send + 'static,
    {
        let outcome = match self.attempt(isolation, statement).await {
            // The connection was in the pool when the server went away, and so were the others.
            Err(Attempt { was_broken: true, .. }) => {
                self.pool.retain(|_, _| false);
                self.attempt(isolation, statement).await
            }
            outcome => outcome,
        };
        outcome.map_err(|attempt| attempt.error)
    }

    /// Runs a statement without a retry, because the first attempt may have been carried out.
    pub(super) async fn load_once<R>(&self, statement: &Statement) -> Result<Vec<R>, StoreError>
    where
        R: QueryableByName<Pg> + Send + 'static,
    {
        self.attempt(Isolation::ReadCommitted, statement).await.map_err(|attempt| attempt.error)
    }

    /// Runs `first`, if there is one, and the statement that `then` makes of its rows, in one transaction with a statement
    /// timeout of its own. The second statement sees what was committed while the first one waited for a lock.
    pub(super) async fn transact<R>(
        &self,
        statement_timeout: Duration,
        first: Option<&Statement>,
        then: impl FnOnce(Vec<R>) -> Statement + Send,
    ) -> Result<Vec<TextRow>, StoreError>
    where
        R: QueryableByName<Pg> + Send + 'static,
    {
        let mut checkout = self.checkout().await?;
        let settings = session::local_settings(statement_timeout);
        let began = Instant::now();
        let mut transaction = checkout.connection().build_transaction().read_committed();
        let outcome = transaction.run(async |connection| {
            connection.batch_execute(&settings).await?;
            let rows = match first {
                Some(first) => RunQueryDsl::load(first, connection).await?,
                None => Vec::new(),
            };
            RunQueryDsl::load(&then(rows), connection).await
        });
        let outcome: Result<_, Error> = outcome.await;
        settle(checkout, outcome, began).await.map_err(|attempt| attempt.error)
    }

    pub(super) async fn checkout(&self) -> Result<Checkout, StoreError> {
        Ok(Checkout(Some(self.pool.get().await.map_err(StoreError::unavailable)?)))
    }

    pub(super) fn statement_timeout(&self) -> Duration {
        self.statement_timeout
    }

    /// Returns the settings that a transaction must apply where the session has none.
    pub(super) fn local_settings(&self) -> String {
        session::local_settings(self.statement_timeout)
    }

    async fn attempt<R>(
        &self,
        isolation: Isolation,
        statement: &Statement,
    ) -> Result<Vec<R>, Attempt>
    where
        R: QueryableByName<Pg> + Send + 'static,
    {
        let failed = |error| Attempt { error, was_broken: false };
        let mut checkout = self.checkout().await.map_err(failed)?;
        let connection = checkout.connection();
        let began = Instant::now();
        let result = if isolation == Isolation::ReadCommitted && self.target.is_pooled() {
            let settings = self.local_settings();
            let work = async |connection: &mut AsyncPgConnection| {
                connection.batch_execute(&settings).await?;
                RunQueryDsl::load(statement, connection).await
            };
            connection.build_transaction().read_committed().run(work).await
        } else {
            RunQueryDsl::load(statement, connection).await
        };
        settle(checkout, result, began).await
    }
}

/// Puts the connection back unless it is broken, and classifies the error.
async fn settle<T>(
    mut checkout: Checkout,
    result: Result<T, Error>,
    began: Instant,
) -> Result<T, Attempt> {
    let elapsed = began.elapsed();
    let connection = checkout.connection();
    let mut limit = None;
    let was_broken = match &result {
        // A primary that became a standby is treated like a dead connection.
        Err(Error::DatabaseError(DatabaseErrorKind::ReadOnlyTransaction, _)) => true,
        // diesel does not expose the SQLSTATE of a server that shuts down (57P01), nor those of timeouts. The next
        // statement shows whether the connection still works.
        Err(Error::DatabaseError(DatabaseErrorKind::Unknown, _)) => {
            match RunQueryDsl::load::<TextRow>(&Statement::new(LIMITS, []), connection).await {
                Ok(rows) => {
                    limit = shortest_limit(&rows).filter(|limit| elapsed >= *limit);
                    false
                }
                Err(_) => true,
            }
        }
        _ => connection.is_broken(),
    };
    if !was_broken {
        checkout.put_back();
    }
    result.map_err(|error| {
        let error = match limit {
            _ if was_broken => StoreError::unavailable(error),
            Some(limit) => StoreError::timeout(limit).caused_by(error),
            None => store_error(error),
        };
        Attempt { error, was_broken }
    })
}

/// Selects the server's limits for a statement, for a lock wait and for deadlock detection, in milliseconds. 0 means
/// unlimited.
const LIMITS: &str = "SELECT coalesce(json_agg(setting), '[]')::text AS row FROM pg_settings
    WHERE name IN ('statement_timeout', 'lock_timeout', 'deadlock_timeout')";

/// Returns the shortest limit. A statement that took less time was not ended by any of them. One that took longer may
/// have been. Only the time decides, because the message is in the server's language.
fn shortest_limit(rows: &[TextRow]) -> Option<Duration> {
    let settings: Vec<String> = serde_json::from_str(&rows.first()?.row).ok()?;
    let limits = settings.iter().filter_map(|setting| setting.parse().ok());
    limits.filter(|millis| *millis > 0).min().map(Duration::from_millis)
}

/// A checked-out connection. If it is dropped in the middle of a query, because the caller was dropped or the deadline
/// has passed, it leaves the pool and is closed: an answer may still arrive on it.
pub(super) struct Checkout(Option<Object<AsyncPgConnection>>);

impl Checkout {
    pub(super) fn connection(&mut self) -> &mut Object<AsyncPgConnection> {
        let Some(connection) = &mut self.0 else {
            unreachable!("the connection is present until it is put back")
        };
        connection
    }

    pub(super) fn put_back(mut self) {
        drop(self.0.take());
    }
}

impl Drop for Checkout {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            drop(Object::take(connection));
        }
    }
}
