//! What the task of the replica writes.

use std::{
    sync::{MutexGuard, PoisonError, atomic::Ordering},
    time::{Duration, SystemTime},
};

use super::{
    Content,
    entries::{Entries, Entry, Owner, ReadId, Tick, UnderId},
    micros,
};
use crate::{
    backend::replica::{
        packed_key::{PackedKey, SharedParts},
        pending::Pending,
    },
    coherence::MINIMUM_REVISION_LIFETIME,
    error::StoreError,
    record::{Revision, UserId},
    runtime::Moment,
    store::{KeysRead, ReadOwner, ReadRow, ReplicaState, StoredKey},
};

/// Time for which an absent lookup id that was read keeps its entry: as long as the change may be its minimum revision.
pub(in crate::backend::replica) const ABSENT_LIFETIME: Duration = MINIMUM_REVISION_LIFETIME;

/// Approximate size of an entry apart from its bytes: a place in a hash table that is two thirds full, and two
/// allocations.
const ENTRY_BYTES: usize = (size_of::<(Box<str>, UnderId)>() + 1) * 3 / 2 + 32;

impl Content {
    /// Removes everything, because changes may have been missed or the replica is turned off.
    pub(in crate::backend::replica) fn clear(&self, state: ReplicaState) {
        // In this order, no look-up takes what is left for all keys.
        self.state.send_replace(state);
        self.epoch.fetch_add(1, Ordering::AcqRel);
        self.loaded_from.store(0, Ordering::Release);
        self.by_id.clear();
        self.owners.clear();
        self.pending.clear();
        *self.shared() = SharedParts::default();
        self.keys.store(0, Ordering::Relaxed);
        self.bytes.store(0, Ordering::Relaxed);
    }

    /// Begins a load. Changes are marked from now on.
    pub(in crate::backend::replica) fn begin(&self, as_of: SystemTime) {
        self.loaded_from.store(micros(as_of).max(1), Ordering::Release);
    }

    /// Ends a load: every key was read.
    pub(in crate::backend::replica) fn loaded(&self) {
        self.state.send_replace(ReplicaState::Loaded);
    }

    /// Records that every change up to `as_of`, a time of the database, is marked.
    pub(in crate::backend::replica) fn synced(&self, as_of: SystemTime, now: Moment) {
        self.synced.store(micros(as_of), Ordering::Release);
        *self.synced_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
    }

    /// Inserts the rows of a page. What was marked or read again meanwhile is kept.
    pub(in crate::backend::replica) fn insert_page(&self, read: KeysRead) {
        let read_at = micros(read.as_of);
        for row in read.rows {
            self.insert_owner(row.key.as_ref().ok());
            for id in &row.lookup_ids {
                let entry = self.entry(&row, id);
                self.by_id.update(id.as_str().into(), |under| match under {
                    Some(UnderId::Changed(_)) => {}
                    Some(UnderId::Read(under)) => {
                        if !under.keys.contains(&entry, &row) {
                            self.count(id, &entry, 1);
                            under.keys.push(entry);
                        }
                    }
                    none => {
                        self.count(id, &entry, 1);
                        let keys = Entries::One(entry);
                        *none = Some(UnderId::Read(ReadId { latest: Revision(0), read_at, keys }));
                    }
                });
            }
        }
    }

    /// Replaces what is stored under lookup ids that were read again at `tick`. Returns those that have to be read once
    /// more, and those under which there is no key.
    pub(in crate::backend::replica) fn replace(
        &self,
        ids: &[String],
        tick: Tick,
        read: KeysRead,
    ) -> (Vec<Pending>, Vec<Box<str>>) {
        let (mut again, mut absent) = (Vec::new(), Vec::new());
        let read_at = micros(read.as_of);
        for row in &read.rows {
            self.insert_owner(row.key.as_ref().ok());
        }
        for id in ids {
            let latest = read.latest.iter().find(|(of, _)| of == id);
            let latest = latest.map_or(Revision(0), |(_, latest)| *latest);
            let rows = read.rows.iter().filter(|row| row.lookup_ids.contains(id));
            let of_rows = rows.clone().filter_map(|row| row.key.as_ref().ok());
            let latest =
                latest.max(of_rows.map(|key| key.revisions().key).max().unwrap_or_default());
            let entries: Vec<_> = rows.map(|row| self.entry(row, id)).collect();
            let is_absent = entries.is_empty();
            let is_replaced = self.by_id.update(id.as_str().into(), |under| {
                if let Some(UnderId::Changed(mark)) = under
                    && !mark.is_included(tick, latest)
                {
                    return false;
                }
                self.forget(id, under.as_ref());
                entries.iter().for_each(|entry| self.count(id, entry, 1));
                let keys = Entries::new(entries);
                *under = Some(UnderId::Read(ReadId { latest, read_at, keys }));
                true
            });
            match (is_replaced, is_absent) {
                (false, _) => again.push(Pending::Id(id.as_str().into())),
                (true, true) => absent.push(id.as_str().into()),
                (true, false) => {}
            }
        }
        (again, absent)
    }

    /// Replaces owners that were read again at `tick`. Returns those that have to be read once more.
    pub(in crate::backend::replica) fn replace_owners(
        &self,
        ids: &[UserId],
        tick: Tick,
        read: Vec<ReadOwner>,
    ) -> Vec<Pending> {
        let mut again = Vec::new();
        for id in ids {
            let owner = read.iter().find(|owner| owner.user.id == *id);
            let revision = owner.map(|owner| owner.revision);
            let is_replaced = self.owners.update(id.clone(), |known| {
                if let Some(Owner::Changed(mark)) = known {
                    // A user that was deleted has no revision.
                    let minimum = revision.unwrap_or(mark.minimum);
                    if !mark.is_included(tick, minimum) {
                        return false;
                    }
                }
                // What remains of a user that was deleted is the mark.
                if let Some(owner) = owner {
                    *known = Some(Owner::Read(owner.clone()));
                }
                true
            });
            if !is_replaced {
                again.push(Pending::Owner(id.clone()));
            }
        }
        again
    }

    /// Removes the entry of a lookup id under which no key was found.
    pub(in crate::backend::replica) fn remove_absent(&self, id: &str) {
        self.by_id.update(id.into(), |under| {
            if let Some(UnderId::Read(ReadId { keys: Entries::None, .. })) = under {
                *under = None;
            }
        });
    }

    /// Adds the owner of a key that was read, unless a later one is known.
    fn insert_owner(&self, key: Option<&StoredKey>) {
        let Some(key) = key else { return };
        let (user, revision) = (&key.record().user, key.revisions().owner);
        self.owners.update(user.id.clone(), |known| {
            let is_known = match known {
                Some(Owner::Read(owner)) => owner.revision >= revision,
                Some(Owner::Changed(_)) => {
                    // It is read alone, because a key does not show that the id was another user's.
                    self.pending.push(Pending::Owner(user.id.clone()));
                    true
                }
                None => false,
            };
            if !is_known {
                let since = match known {
                    Some(Owner::Read(owner)) => owner.since,
                    _ => Revision(0),
                };
                let owner = ReadOwner::new(user.clone(), revision).with_since(since);
                *known = Some(Owner::Read(owner));
            }
        });
    }

    fn entry(&self, row: &ReadRow, id: &str) -> Entry {
        let unreadable = |error: StoreError| Entry::Unreadable(Box::new(error));
        match &row.key {
            // A key that was left out would be unknown.
            Ok(key) => PackedKey::new(key, id, &mut self.shared()).map_or_else(
                || unreadable(StoreError::bad_row(format!("key {} can't be packed", row.id))),
                Entry::Key,
            ),
            Err(error) => unreadable(error.clone()),
        }
    }

    /// Subtracts what is stored under a lookup id from the counts.
    pub(super) fn forget(&self, id: &str, under: Option<&UnderId>) {
        if let Some(UnderId::Read(read)) = under {
            read.keys.iter().for_each(|entry| self.count(id, entry, -1));
        }
    }

    fn count(&self, id: &str, entry: &Entry, sign: isize) {
        let (keys, own) = match entry {
            Entry::Key(key) => (usize::from(key.is_current()), key.own_bytes()),
            Entry::Unreadable(_) => (1, size_of::<StoreError>()),
        };
        let bytes = ENTRY_BYTES + id.len() + own;
        // A negative number wraps around, which the addition makes a subtraction.
        self.keys.fetch_add(keys.wrapping_mul(sign as usize), Ordering::Relaxed);
        self.bytes.fetch_add(bytes.wrapping_mul(sign as usize), Ordering::Relaxed);
    }

    pub(super) fn shared(&self) -> MutexGuard<'_, SharedParts> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
