//! Threads with an SQLite connection each, which run queued queries.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use diesel::SqliteConnection;
use tokio::sync::{mpsc, oneshot};

use crate::{error::StoreError, runtime::within};

/// Maximum number of waiting queries. Beyond it, requests are answered 503.
const QUEUE: usize = 1024;

type Job = Box<dyn FnOnce(&mut SqliteConnection) + Send>;

/// A few threads with one queue. After a drop, they finish their current query and end.
pub(super) struct Threads {
    jobs: mpsc::Sender<Job>,
}

impl Threads {
    /// Starts `count` threads, each with a connection from `open`.
    pub(super) fn start(
        count: usize,
        open: &impl Fn() -> Result<SqliteConnection, StoreError>,
    ) -> Result<Self, StoreError> {
        let (jobs, queue) = mpsc::channel(QUEUE);
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..count {
            let (mut connection, queue) = (open()?, Arc::clone(&queue));
            let work = move || {
                while let Some(job) = next(&queue) {
                    job(&mut connection);
                }
            };
            thread::Builder::new()
                .name("api-key-sqlite".to_owned())
                .spawn(work)
                .map_err(StoreError::unavailable)?;
        }
        Ok(Self { jobs })
    }

    /// Runs `query` on one of the threads. A query that has begun runs to its end even if its caller was dropped, so
    /// that a connection is never left in the middle of a transaction.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        deadline: Duration,
        query: impl FnOnce(&mut SqliteConnection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            if answer.is_closed() {
                return;
            }
            // A panic in a query must not end the thread, or the waiting queries would be lost.
            let result = catch_unwind(AssertUnwindSafe(|| query(connection)));
            let panicked = |_| Err(StoreError::rejected(io::Error::other("a query panicked")));
            // The receiver is closed if the caller was dropped; the query has run all the same.
            let _ = answer.send(result.unwrap_or_else(panicked));
        });
        self.jobs.try_send(job).map_err(|_| {
            StoreError::overloaded("too many queries wait for SQLite", Duration::from_secs(1))
        })?;
        match within(deadline, answered).await {
            Some(Ok(result)) => result,
            Some(Err(gone)) => Err(StoreError::unavailable(gone)),
            None => Err(StoreError::timeout(deadline)),
        }
    }
}

fn next(queue: &Mutex<mpsc::Receiver<Job>>) -> Option<Job> {
    queue.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv()
}
