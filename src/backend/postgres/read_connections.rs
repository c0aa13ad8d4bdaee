//! Connections for reads of keys, without diesel: [`ReadConnections`].
//!
//! diesel formats the text of a statement each time, to find the prepared one, and copies what it reads into lists of its
//! own. For a look-up, that takes longer than the statement itself on this side of the connection.

use std::{
    sync::OnceLock,
    time::{Duration, Instant},
};

use deadpool::managed::{
    Manager, Metrics, Object, Pool, PoolError, QueueMode, RecycleError, RecycleResult,
};
use tokio::task::JoinHandle;
use tokio_postgres::{
    Client, Error, Row, Statement,
    types::{ToSql, Type},
};

use super::{
    connect::Target,
    hosts::ConnectFault,
    select::KeyRead,
    sqlstate::{SqlFault, statement_error},
};
use crate::error::StoreError;

/// Maximum time for which a connection is not used. A router may drop it without notice, and a statement on it would then
/// take until its deadline.
const MAX_IDLE: Duration = Duration::from_secs(60);

/// A pool of connections that are opened on demand. The one that was used last is used next, so that its server process
/// is warm.
pub(super) struct ReadConnections {
    pool: Pool<ReadConnector>,
    statement_timeout: Duration,
}

/// Opens connections.
pub(super) struct ReadConnector {
    target: Target,
    statement_timeout: Duration,
    /// Maximum time for all hosts together.
    budget: Duration,
}

pub(super) struct ReadConnection {
    client: Client,
    prepared: [OnceLock<Statement>; KeyRead::ALL.len()],
    driver: JoinHandle<()>,
}

/// A connection that is in use. If it is dropped in the middle of a statement, because the caller was dropped or the
/// deadline has passed, it leaves the pool and is closed: the server may be busy with the statement for longer.
struct ReadCheckout(Option<Object<ReadConnector>>);

/// The reason why a statement failed.
enum ReadFault {
    Connect(StoreError),
    Statement(Error),
}

impl ReadConnections {
    /// Creates a pool of at most `size` connections to `target`.
    pub(super) fn new(
        target: &Target,
        size: usize,
        statement_timeout: Duration,
        budget: Duration,
    ) -> Self {
        let connector = ReadConnector { target: target.clone(), statement_timeout, budget };
        let pool = Pool::builder(connector).max_size(size).queue_mode(QueueMode::Lifo).build();
        // Only timeouts of the pool's own require a runtime.
        let pool = pool.unwrap_or_else(|_| unreachable!("the pool has no timeouts"));
        Self { pool, statement_timeout }
    }

    /// Runs a statement. It is retried once if the connection was dead.
    pub(super) async fn load(
        &self,
        read: KeyRead,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, StoreError> {
        let began = Instant::now();
        let rows = match self.attempt(read, parameters).await {
            Err(fault) if fault.is_of_the_connection() => {
                // The connection was in the pool when the server went away, and so were the others.
                self.pool.retain(|_, _| false);
                self.attempt(read, parameters).await
            }
            rows => rows,
        };
        rows.map_err(|fault| fault.into_store_error(began.elapsed(), self.statement_timeout))
    }

    async fn attempt(
        &self,
        read: KeyRead,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, ReadFault> {
        let connection = self.pool.get().await.map_err(|error| match error {
            PoolError::Backend(fault) => ReadFault::Connect(fault.into()),
            error => ReadFault::Connect(StoreError::unavailable(error)),
        })?;
        let checkout = ReadCheckout(Some(connection));
        let rows = checkout.connection().load(read, parameters).await.map_err(ReadFault::Statement);
        if !rows.as_ref().is_err_and(ReadFault::is_of_the_connection) {
            checkout.put_back();
        }
        rows
    }
}

impl ReadConnection {
    async fn load(
        &self,
        read: KeyRead,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, Error> {
        let prepared = &self.prepared[read as usize];
        if prepared.get().is_none() {
            let types: &[Type] = read.parameters();
            let statement = self.client.prepare_typed(read.sql(), types).await?;
            let _ = prepared.set(statement);
        }
        let Some(statement) = prepared.get() else { unreachable!("it was prepared") };
        self.client.query(statement, parameters).await
    }
}

impl Manager for ReadConnector {
    type Type = ReadConnection;
    type Error = ConnectFault;

    async fn create(&self) -> Result<ReadConnection, ConnectFault> {
        let Self { target, statement_timeout, budget } = self;
        // Boxed, because each look-up holds this future, and few connect.
        let connecting = Box::pin(target.connect_read(*statement_timeout, *budget));
        let (client, connection) = connecting.await?;
        let driver = tokio::spawn(async move {
            // Its end shows in the client.
            let _ = connection.await;
        });
        let connection = ReadConnection { client, prepared: Default::default(), driver };
        // As diesel does for other connections. PgBouncer keeps this setting apart for each of its clients.
        connection.client.batch_execute("SET TIME ZONE 'UTC'").await?;
        Ok(connection)
    }

    async fn recycle(
        &self,
        connection: &mut ReadConnection,
        metrics: &Metrics,
    ) -> RecycleResult<ConnectFault> {
        if connection.client.is_closed() {
            return Err(RecycleError::message("the connection is closed"));
        }
        if metrics.last_used() > MAX_IDLE {
            return Err(RecycleError::message("the connection was idle for too long"));
        }
        Ok(())
    }
}

impl ReadCheckout {
    fn connection(&self) -> &ReadConnection {
        let Some(connection) = &self.0 else {
            unreachable!("the connection is present until it is put back")
        };
        connection
    }

    fn put_back(mut self) {
        drop(self.0.take());
    }
}

impl Drop for ReadCheckout {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            drop(Object::take(connection));
        }
    }
}

impl Drop for ReadConnection {
    fn drop(&mut self) {
        // The driver would wait for the end of a statement.
        self.driver.abort();
    }
}

impl ReadFault {
    fn is_of_the_connection(&self) -> bool {
        match self {
            Self::Connect(_) => false,
            Self::Statement(error) => match error.as_db_error() {
                Some(error) => SqlFault::from(error).is_of_the_connection(),
                None => true,
            },
        }
    }

    /// Returns the error of a statement that took `elapsed`.
    fn into_store_error(self, elapsed: Duration, statement_timeout: Duration) -> StoreError {
        let error = match self {
            Self::Connect(error) => return error,
            Self::Statement(error) => error,
        };
        match error.as_db_error().map(SqlFault::from) {
            Some(fault) if fault.is_cancellation() && elapsed >= statement_timeout => {
                // Behind a pooler, the server's own setting applies.
                let limit = if statement_timeout.is_zero() { elapsed } else { statement_timeout };
                StoreError::timeout(limit).caused_by(fault)
            }
            _ => statement_error(error),
        }
    }
}
