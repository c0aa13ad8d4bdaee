//! Reads of many keys, for a [`Replica`](crate::Replica).

use std::collections::HashSet;

use serde_json::json;

use super::{PostgresStore, select};
use crate::{
    backend::sql::{
        found::Found,
        statement::{Bind, Statement, TextRow},
    },
    error::StoreError,
    record::{Revision, User, UserId},
    store::{KeySelection, KeysRead, ReadOwner},
};

pub(super) async fn keys(
    store: &PostgresStore,
    selection: &KeySelection,
) -> Result<KeysRead, StoreError> {
    let pool = &store.0.replica_reads;
    match selection {
        KeySelection::Page { after, limit } => {
            // Ids of this schema are integers.
            let after = after.as_ref().and_then(|id| id.as_i64()).unwrap_or(i64::MIN);
            let found = store.in_time(Found::read_page(pool, after, *limit)).await?;
            let as_of = found.as_ref().map_or(store.0.clock.now(), |found| found.as_of);
            let rows = found.into_iter().flat_map(Found::read_rows).collect();
            Ok(KeysRead::new(rows, as_of))
        }
        KeySelection::Under(lookup_ids) => {
            let ids: Vec<_> = lookup_ids.iter().map(String::as_str).collect();
            let found = store.in_time(Found::read_many(pool, &ids, true)).await?;
            let as_of = found.first().map_or(store.0.clock.now(), |found| found.as_of);
            let latest = lookup_ids.iter().cloned().zip(found.iter().map(|found| found.latest));
            let latest = latest.collect();
            // A key is found under each of its lookup ids.
            let mut seen = HashSet::new();
            let rows = found.into_iter().flat_map(Found::read_rows);
            let rows = rows.filter(|row| seen.insert(row.id.clone())).collect();
            Ok(KeysRead::new(rows, as_of).with_latest(latest))
        }
    }
}

pub(super) async fn owners(
    store: &PostgresStore,
    owners: &[UserId],
) -> Result<Vec<ReadOwner>, StoreError> {
    let ids: Vec<_> = owners.iter().filter_map(UserId::as_i64).collect();
    let statement = Statement::new(select::OWNERS, [Bind::Text(json!(ids).to_string())]);
    let rows = store.load::<TextRow>(&store.0.management, &statement).await?;
    let decode = |row: &TextRow| {
        let decoded: Result<(i64, _, _, _, u64), _> = serde_json::from_str(&row.row);
        let (id, email, role, is_active, revision) = decoded.map_err(|error| {
            StoreError::bad_row("a row of users can't be decoded").caused_by(error)
        })?;
        let mut user = User::new(id, String::new());
        (user.email, user.role, user.is_active) = (email, role, is_active);
        Ok(ReadOwner::new(user, Revision(revision)))
    };
    rows.iter().map(decode).collect()
}
