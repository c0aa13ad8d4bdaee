//! Look-ups that wait for a connection, read in one statement.
//!
//! A look-up that finds a free connection runs at once and alone. If it has to wait for one, it then runs those that
//! still wait with it. A statement that has begun is joined by none, so that its snapshot is never older than a look-up.

use std::{
    future::{Future, poll_fn},
    iter,
    pin::pin,
    sync::Arc,
    task::Poll,
};

use super::{Inner, PostgresStore};
use crate::{
    backend::sql::{
        found::{Found, FoundKeys},
        gate::{Permit, Seat, Turn},
    },
    coherence::{Standing, Subject},
    error::StoreError,
    store::{Lookup, MAX_CANDIDATES, StoredKey},
};

/// Maximum number of look-ups in one statement.
pub(super) const MAX_BATCH: usize = 256;

impl PostgresStore {
    /// Reads what is stored under the lookup id. The deadline includes the wait for a connection.
    pub(super) async fn look_up(&self, lookup: &Lookup) -> Result<FoundKeys, StoreError> {
        self.in_time(async {
            let (found, permit) = self.read(lookup).await?;
            let found = found.decode();
            // Of too many keys, the first ones are tried.
            match found.keys.len() > MAX_CANDIDATES || is_below_minimum(lookup, &found.keys) {
                true => self.read_in_full(lookup, permit).await,
                false => Ok(found),
            }
        })
        .await
    }

    /// Returns the permit too, if the look-up ran alone.
    async fn read(&self, lookup: &Lookup) -> Result<(Found, Option<Permit>), StoreError> {
        let Inner { lookups, gate, .. } = &*self.0;
        let permit = match self.turn(lookup).await? {
            Turn::Run(permit) => permit,
            // The values of another look-up in the batch may be the cause.
            Turn::Answered(Err(error)) if !error.is_transient() => gate.pass(lookup).await?,
            Turn::Answered(found) => return Ok((found?, None)),
        };
        Ok((Found::read(lookups, lookup.id()).await?, Some(permit)))
    }

    /// Reads the keys again, in order and with the revisions of the last changes: a change that this node knows may be of
    /// a row that does not exist any more.
    async fn read_in_full(
        &self,
        lookup: &Lookup,
        permit: Option<Permit>,
    ) -> Result<FoundKeys, StoreError> {
        let Inner { lookups, gate, .. } = &*self.0;
        let _permit = match permit {
            Some(permit) => permit,
            None => gate.pass(lookup).await?,
        };
        let found = Found::read_many(lookups, &[lookup.id()], true).await?.into_iter().next();
        let found = found.ok_or_else(|| StoreError::rejected("a look-up returned no row"))?;
        Ok(found.decode())
    }

    /// Waits for a connection, or for the answer of a batch.
    async fn turn(&self, lookup: &Lookup) -> Result<Turn, StoreError> {
        let turn = self.0.gate.pass_or_join(lookup).await?;
        let Turn::Run(permit) = turn else { return Ok(turn) };
        let others = permit.take_waiting(MAX_BATCH - 1);
        if others.is_empty() {
            return Ok(Turn::Run(permit));
        }
        let (own, turn) = Seat::of(lookup);
        let batch = iter::once(own).chain(others).collect();
        // On a task, because this look-up may be dropped before the others.
        tokio::spawn(run(Arc::clone(&self.0), permit, batch));
        turn.await.map_err(StoreError::unavailable)?
    }
}

/// Returns whether this node knows a change of the lookup id, or of the owner of one of these keys, that is newer than
/// their revisions.
fn is_below_minimum(lookup: &Lookup, keys: &[Result<StoredKey, StoreError>]) -> bool {
    let keys = || keys.iter().flatten();
    let latest = keys().map(|key| key.revisions.key).max().unwrap_or_default();
    let owner = |key: &StoredKey| (Subject::Owner(key.record.user.id.clone()), key.revisions.owner);
    let prefix = (Subject::Prefix(lookup.id().into()), latest);
    let subjects: Vec<_> = iter::once(prefix).chain(keys().map(owner)).collect();
    let minimums = &lookup.view().minimum_revisions;
    minimums.judge(&subjects, minimums.seen(), lookup.clock().read()) == Standing::Below
}

/// Reads the keys of a batch, and gives each look-up its own. It ends early if all of them have left, each by its own
/// deadline.
async fn run(inner: Arc<Inner>, _permit: Permit, mut batch: Vec<Seat>) {
    let ids: Vec<_> = batch.iter().map(|seat| seat.id().to_owned()).collect();
    let mut read = pin!(Found::read_many(&inner.lookups, &ids, false));
    let outcome = {
        let mut all_have_left = pin!(async {
            for seat in &mut batch {
                seat.has_left().await;
            }
        });
        poll_fn(|cx| match read.as_mut().poll(cx) {
            Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
            Poll::Pending => all_have_left.as_mut().poll(cx).map(|()| None),
        })
        .await
    };
    match outcome {
        Some(Ok(found)) => {
            for (seat, found) in batch.into_iter().zip(found) {
                seat.answer(Ok(found));
            }
        }
        Some(Err(error)) => {
            for seat in batch {
                seat.answer(Err(error.clone()));
            }
        }
        None => {}
    }
}
