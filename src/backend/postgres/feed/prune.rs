//! Pruning of the table of changes, in the background.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use serde::Deserialize;
use tokio::task::JoinHandle;

use crate::{
    backend::{
        postgres::{Inner, PostgresStore},
        sql::statement::{Statement, TextRow},
    },
    error::StoreError,
    store::FeedStatus,
    telemetry,
};

const INTERVAL: Duration = Duration::from_secs(600);
/// Interval of calls while one call does not delete all old rows.
const BUSY_INTERVAL: Duration = Duration::from_secs(1);

/// Calls `api_key_prune` periodically on another connection, so that no change waits for it.
pub(super) struct Pruning {
    next: Instant,
    running: Option<JoinHandle<Result<Pruned, StoreError>>>,
    has_failed: bool,
}

#[derive(Deserialize)]
struct Pruned {
    remaining: u64,
    oldest_micros: Option<u64>,
    has_more: bool,
}

impl Pruning {
    pub(super) fn new() -> Self {
        Self { next: Instant::now(), running: None, has_failed: false }
    }

    /// Starts a call when it is due, and returns the report of one that has ended.
    pub(super) async fn poll(&mut self, store: &Arc<Inner>) -> Option<FeedStatus> {
        if self.running.as_ref().is_some_and(JoinHandle::is_finished) {
            let outcome = self.running.take()?.await.ok()?;
            return self.note(outcome);
        }
        if self.running.is_none() && Instant::now() >= self.next {
            self.next = Instant::now() + INTERVAL;
            self.running = Some(tokio::spawn(prune(PostgresStore(Arc::clone(store)))));
        }
        None
    }

    fn note(&mut self, outcome: Result<Pruned, StoreError>) -> Option<FeedStatus> {
        match outcome {
            Ok(pruned) => {
                self.has_failed = false;
                if pruned.has_more {
                    self.next = Instant::now() + BUSY_INTERVAL;
                }
                let time = |micros| SystemTime::UNIX_EPOCH + Duration::from_micros(micros);
                let (rows, oldest) = (Some(pruned.remaining), pruned.oldest_micros.map(time));
                Some(FeedStatus { fault: None, rows, oldest })
            }
            Err(error) => {
                if !std::mem::replace(&mut self.has_failed, true) {
                    telemetry::not_pruned(&error);
                }
                None
            }
        }
    }
}

impl Drop for Pruning {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            running.abort();
        }
    }
}

async fn prune(store: PostgresStore) -> Result<Pruned, StoreError> {
    let select = "SELECT json_build_object('remaining', remaining, 'has_more', has_more,
            'oldest_micros', (extract(epoch FROM oldest) * 1000000)::bigint)::text AS row
        FROM api_key_prune()";
    let rows = store.load::<TextRow>(&store.0.management, &Statement::new(select, [])).await?;
    let row = rows.first().ok_or_else(|| StoreError::rejected("api_key_prune returns no row"))?;
    serde_json::from_str(&row.row).map_err(StoreError::rejected)
}
