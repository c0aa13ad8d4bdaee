//! Connections for reads of keys, without diesel: [`ReadConnections`].
//!
//! diesel formats the text of a statement each time, to find the prepared one, and copies what it reads into lists of its
//! own. For a look-up, that takes longer than the statement itself on this side of the connection.

use std::{
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use tokio::{sync::Semaphore, task::JoinHandle};
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

/// Connections that are opened on demand. The one that was used last is used next, so that its server process is warm.
pub(super) struct ReadConnections {
    target: Target,
    statement_timeout: Duration,
    /// Maximum time in which a connection is opened, for all hosts together.
    budget: Duration,
    /// Bounds the number of connections.
    permits: Semaphore,
    idle: Mutex<Vec<IdleConnection>>,
}

struct IdleConnection {
    connection: ReadConnection,
    since: Instant,
}

/// A connection, which is closed when it is dropped: also in the middle of a statement, because the caller was dropped or
/// the deadline has passed. The server may be busy with the statement for longer.
struct ReadConnection {
    client: Client,
    prepared: [OnceLock<Statement>; KeyRead::ALL.len()],
    driver: JoinHandle<()>,
}

/// The reason why a statement failed.
enum ReadFault {
    Connect(StoreError),
    Statement(Error),
}

impl ReadConnections {
    /// Creates an empty list of at most `size` connections to `target`.
    pub(super) fn new(
        target: &Target,
        size: usize,
        statement_timeout: Duration,
        budget: Duration,
    ) -> Self {
        let permits = Semaphore::new(size.min(Semaphore::MAX_PERMITS));
        let (target, idle) = (target.clone(), Mutex::default());
        Self { target, statement_timeout, budget, permits, idle }
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
                // The connection was idle when the server went away, and so were the others.
                self.idle().clear();
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
        let permit = self.permits.acquire().await;
        let _permit = permit.map_err(|error| ReadFault::Connect(StoreError::unavailable(error)))?;
        let connection = match self.take_idle() {
            Some(connection) => connection,
            None => self.open().await.map_err(|fault| ReadFault::Connect(fault.into()))?,
        };
        let rows = connection.load(read, parameters).await.map_err(ReadFault::Statement);
        if !rows.as_ref().is_err_and(ReadFault::is_of_the_connection) {
            self.idle().push(IdleConnection { connection, since: Instant::now() });
        }
        rows
    }

    fn take_idle(&self) -> Option<ReadConnection> {
        let mut idle = self.idle();
        while let Some(IdleConnection { connection, since }) = idle.pop() {
            if since.elapsed() > MAX_IDLE {
                // The others have been idle for longer.
                idle.clear();
            } else if !connection.client.is_closed() {
                return Some(connection);
            }
        }
        None
    }

    async fn open(&self) -> Result<ReadConnection, ConnectFault> {
        let Self { target, statement_timeout, budget, .. } = self;
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

    fn idle(&self) -> MutexGuard<'_, Vec<IdleConnection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
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
