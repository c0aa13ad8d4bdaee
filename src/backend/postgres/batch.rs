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
    coherence::Subject,
    error::StoreError,
    runtime::within,
    store::{Lookup, MAX_CANDIDATES, StoredKey},
};

/// Maximum number of look-ups in one statement.
pub(super) const MAX_BATCH: usize = 256;

impl PostgresStore {
    /// Reads what is stored under the lookup id. The deadline includes the wait for a connection.
    ///
    /// Thousands of look-ups may wait at once. What a running one needs is therefore boxed.
    pub(super) async fn look_up(&self, lookup: &Lookup) -> Result<FoundKeys, StoreError> {
        let deadline = self.0.deadline;
        // Not `in_time`, whose future would hold this one twice.
        let found = within(deadline, async {
            match self.turn(lookup).await? {
                Turn::Run(permit) => Box::pin(self.read(lookup, permit)).await,
                // The values of another look-up in the batch may be the cause.
                Turn::Answered(Err(error)) if !error.is_transient() => {
                    let permit = self.0.gate.pass(lookup).await?;
                    Box::pin(self.read(lookup, permit)).await
                }
                Turn::Answered(found) => match found?.decode() {
                    found if is_insufficient(lookup, &found) => {
                        let permit = self.0.gate.pass(lookup).await?;
                        Box::pin(self.read_in_full(lookup, permit)).await
                    }
                    found => Ok(found),
                },
            }
        });
        found.await.unwrap_or_else(|| Err(StoreError::timeout(deadline)))
    }

    async fn read(&self, lookup: &Lookup, permit: Permit) -> Result<FoundKeys, StoreError> {
        let found = Found::read(&self.0.lookups, lookup.id()).await?.decode();
        match is_insufficient(lookup, &found) {
            true => self.read_in_full(lookup, permit).await,
            false => Ok(found),
        }
    }

    /// Reads the keys again, in order and with the revisions of the last changes: a change that this node knows may be of
    /// a row that does not exist any more.
    async fn read_in_full(
        &self,
        lookup: &Lookup,
        _permit: Permit,
    ) -> Result<FoundKeys, StoreError> {
        let found = Found::read_many(&self.0.lookups, &[lookup.id()], true).await?;
        let found = found.into_iter().next();
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

/// Returns whether the keys have to be read in full. Of too many keys, the first ones are tried.
fn is_insufficient(lookup: &Lookup, found: &FoundKeys) -> bool {
    found.keys.len() > MAX_CANDIDATES || is_below_minimum(lookup, &found.keys)
}

/// Returns whether this node knows a change of the lookup id, or of the owner of one of these keys, that is newer than
/// their revisions.
fn is_below_minimum(lookup: &Lookup, keys: &[Result<StoredKey, StoreError>]) -> bool {
    let keys = || keys.iter().flatten();
    let latest = keys().map(|key| key.revisions.key).max().unwrap_or_default();
    let owner = |key: &StoredKey| (Subject::Owner(key.record.user.id.clone()), key.revisions.owner);
    let prefix = (Subject::Prefix(lookup.id().into()), latest);
    let subjects = iter::once(prefix).chain(keys().map(owner));
    lookup.view().minimum_revisions.is_below(subjects, lookup.clock().read())
}

/// Reads the keys of a batch, and gives each look-up its own. It ends early if all of them have left. It has a deadline of
/// its own, because those of the look-ups do not expire while their requests are not polled.
async fn run(inner: Arc<Inner>, _permit: Permit, mut batch: Vec<Seat>) {
    let ids: Vec<_> = batch.iter_mut().map(Seat::take_id).collect();
    let mut read = pin!(Found::read_many(&inner.lookups, &ids, false));
    let outcome = {
        let mut all_have_left = pin!(async {
            for seat in &mut batch {
                seat.has_left().await;
            }
        });
        let read = poll_fn(|cx| match read.as_mut().poll(cx) {
            Poll::Ready(outcome) => Poll::Ready(Some(outcome)),
            Poll::Pending => all_have_left.as_mut().poll(cx).map(|()| None),
        });
        let in_time = within(inner.deadline, read).await;
        in_time.unwrap_or_else(|| Some(Err(StoreError::timeout(inner.deadline))))
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
