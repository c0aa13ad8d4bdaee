//! Storage of the keys in batches, while the next rows are read.

use indicatif::ProgressBar;
use tokio::task::JoinHandle;
use tower_api_key::{
    KeyManager,
    management::{Imported, ImportedKey, ManageError},
    store::KeyRepository,
};

use super::{Summary, reader::RowError};
use crate::{failure::Failure, output::count};

/// Minimum number of keys per transaction.
const BATCH: usize = 4_000;
/// Maximum number of keys that wait in a lane. The memory of an import does not depend on the size of the file. Above
/// 10,000 the triggers in PostgreSQL record row by row.
const MAX_WAITING: usize = 8_000;
/// Number of batches that are stored at the same time, each on a connection. `PostgresStore` has two for management.
const LANES: usize = 2;

/// Keys by [`ImportedKey::lane`], so that batches of different lanes don't wait for each other.
pub(super) struct Lanes<'a, R> {
    manager: &'a KeyManager<R>,
    lanes: [Lane; LANES],
}

impl<'a, R: KeyRepository + Clone> Lanes<'a, R> {
    pub(super) fn new(manager: &'a KeyManager<R>) -> Self {
        Self { manager, lanes: Default::default() }
    }

    /// Adds keys to their lanes, and starts to store the full ones, or all at the end.
    pub(super) async fn store(
        &mut self,
        keys: Vec<(u64, ImportedKey)>,
        is_end: bool,
        summary: &mut Summary,
        progress: &ProgressBar,
    ) -> Result<(), Failure> {
        for (line, key) in keys {
            self.lanes[key.lane(LANES)].keys.push((line, key));
        }
        for lane in self.lanes.iter_mut().filter(|lane| is_end || lane.is_ready()) {
            lane.finish(summary, progress).await?;
            let (lines, keys): (Vec<_>, Vec<_>) = lane.keys.drain(..).unzip();
            let manager = self.manager.clone();
            let imported = tokio::spawn(async move { manager.import(keys).await });
            lane.storing = Some(Batch { lines, imported });
        }
        Ok(())
    }

    /// Waits until all batches are stored that were started.
    pub(super) async fn finish(
        &mut self,
        summary: &mut Summary,
        progress: &ProgressBar,
    ) -> Result<(), Failure> {
        let mut stored = Ok(());
        for lane in &mut self.lanes {
            stored = stored.and(lane.finish(summary, progress).await);
        }
        stored
    }
}

/// Keys whose batches are stored one after the other.
#[derive(Default)]
struct Lane {
    keys: Vec<(u64, ImportedKey)>,
    storing: Option<Batch>,
}

/// A batch that is being stored.
struct Batch {
    /// The line of each key.
    lines: Vec<u64>,
    imported: JoinHandle<Result<Vec<Imported>, ManageError>>,
}

impl Lane {
    fn is_ready(&self) -> bool {
        let is_free = self.storing.as_ref().is_none_or(|batch| batch.imported.is_finished());
        self.keys.len() >= if is_free { BATCH } else { MAX_WAITING }
    }

    /// Waits until the batch is stored.
    async fn finish(
        &mut self,
        summary: &mut Summary,
        progress: &ProgressBar,
    ) -> Result<(), Failure> {
        let Some(Batch { lines, imported }) = self.storing.take() else { return Ok(()) };
        let imported = match imported.await {
            Ok(imported) => imported,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        let imported = imported.map_err(|error| {
            let mut failure = Failure::from(error);
            failure.message = format!(
                "{failure}; {} stored before: repeat the command to import the others",
                count(summary.stored, "row")
            );
            failure
        })?;
        for (line, outcome) in lines.into_iter().zip(imported) {
            match outcome {
                Imported::Stored => summary.stored += 1,
                Imported::Duplicate => summary.duplicates += 1,
                Imported::Rejected(error) => {
                    let reason = match error {
                        ManageError::NotFound(what) => {
                            format!("there is no such {what}: create the user first")
                        }
                        error => error.to_string(),
                    };
                    summary.reject(&RowError { line, reason }, progress);
                }
                _ => {}
            }
        }
        Ok(())
    }
}
