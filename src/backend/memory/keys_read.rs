//! Reads of many keys.

use std::{
    collections::BTreeSet,
    ops::Bound::{Excluded, Unbounded},
    time::SystemTime,
};

use super::Tables;
use crate::{
    record::{KeyId, UserId},
    store::{KeySelection, KeysRead, ReadOwner, ReadRow},
};

impl Tables {
    pub(super) fn read_keys(&self, selection: &KeySelection, now: SystemTime) -> KeysRead {
        let row = |id: &KeyId| self.key(id).map(ReadRow::new);
        match selection {
            KeySelection::Page { after, limit } => {
                let start = after.as_ref().map_or(Unbounded, Excluded);
                let keys = self.keys.range::<KeyId, _>((start, Unbounded)).map(|(id, _)| id);
                KeysRead::new(keys.filter_map(row).take(*limit as usize).collect(), now)
            }
            KeySelection::Under(lookup_ids) => {
                let under = |id: &String| self.by_prefix.get(id);
                let keys: BTreeSet<_> =
                    lookup_ids.iter().filter_map(under).flat_map(|under| &under.ids).collect();
                // What is known of a lookup id without keys is the last change of all.
                let latest = lookup_ids.iter().map(|id| {
                    (id.clone(), under(id).map_or(self.revision(), |under| under.changed_at))
                });
                KeysRead::new(keys.into_iter().filter_map(row).collect(), now)
                    .with_latest(latest.collect())
            }
        }
    }

    pub(super) fn read_owners(&self, owners: &[UserId]) -> Vec<ReadOwner> {
        let rows = owners.iter().filter_map(|id| self.users.get(id));
        rows.map(|row| ReadOwner::new(row.value.clone(), row.revision)).collect()
    }
}
