//! A store in memory: [`MemoryStore`].

mod audit;
mod keys_read;
mod ledger;
mod repository;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, SystemTime},
};

use tokio::{sync::watch, time::timeout};

use self::{audit::Audit, ledger::Ledger};
use crate::{
    error::StoreError,
    record::{KeyId, Revision, Revisions, User, UserId},
    runtime::{Clock, SystemClock},
    store::{
        Answer, Change, ChangeStream, KeySelection, KeyStore, KeysRead, Lease, LeaseRequest,
        Lookup, ReadOwner, StoredKey, UsageBatch,
    },
};

/// A store in the memory of this process, for tests and for services that read their keys from a file.
///
/// Clones share the keys. The keys are gone when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct MemoryStore(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    clock: Arc<dyn Clock>,
    tables: RwLock<Tables>,
    /// The last revision, which wakes the change streams.
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Tables {
    users: BTreeMap<UserId, Row<User>>,
    keys: BTreeMap<KeyId, Row<StoredKey>>,
    /// The keys under each lookup id, current and previous.
    by_prefix: HashMap<String, KeysUnderId>,
    revision: u64,
    /// The last changes and their revisions.
    changes: VecDeque<(u64, Change)>,
    has_dropped_changes: bool,
    ledger: Ledger,
    audit: Audit,
    last_id: i64,
}

/// The keys under a lookup id.
#[derive(Debug, Default)]
struct KeysUnderId {
    ids: Vec<KeyId>,
    /// Revision of the last change of a key that was under the lookup id.
    changed_at: Revision,
}

/// Maximum number of changes that are kept for the change streams.
const MAX_CHANGES: usize = 10_000;
/// Interval of syncs without a change.
const PULSE: Duration = Duration::from_secs(1);

type FeedStep = (Vec<Change>, (MemoryStore, Option<u64>, watch::Receiver<u64>));

#[derive(Debug)]
struct Row<T> {
    value: T,
    revision: Revision,
}

impl MemoryStore {
    /// Creates an empty store.
    pub fn new() -> Self {
        Self::with_clock(Arc::new(SystemClock))
    }

    /// Creates an empty store with a custom clock, which decides when leases expire and budget periods end. Use the
    /// same clock for the [`Authenticator`](crate::Authenticator).
    pub fn with_clock(clock: Arc<dyn Clock>) -> Self {
        let (tables, changed) = (RwLock::default(), watch::Sender::default());
        Self(Arc::new(Inner { clock, tables, changed }))
    }

    fn now(&self) -> SystemTime {
        self.0.clock.now()
    }

    fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.0.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.0.tables.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reports a change to the change streams. It runs under the lock, so that changes are reported in their order.
    fn report(&self, tables: &mut Tables, change: &Change) {
        let revision = tables.revision;
        if tables.changes.len() >= MAX_CHANGES
            && let Some((oldest, _)) = tables.changes.pop_front()
        {
            tables.has_dropped_changes = true;
            // Changes of one revision are dropped together, so that a stream which misses one of them resets.
            while tables.changes.front().is_some_and(|(revision, _)| *revision == oldest) {
                tables.changes.pop_front();
            }
        }
        tables.changes.push_back((revision, change.clone()));
        self.0.changed.send_replace(revision);
    }

    /// Returns the changes after the revision `reported`, as soon as there are any.
    async fn listen(self, reported: Option<u64>, mut changed: watch::Receiver<u64>) -> FeedStep {
        if reported.is_some() {
            // The sender exists as long as this store does, so that this ends with a change or at the pulse.
            let _ = timeout(PULSE, changed.changed()).await;
        }
        let tables = self.read();
        let reported = reported.unwrap_or(0);
        let (now, revision) = (self.now(), tables.revision);
        let oldest = tables.changes.front().map_or(revision, |(revision, _)| *revision);
        let mut changes = Vec::new();
        if tables.has_dropped_changes && oldest > reported + 1 {
            changes.push(Change::Reset);
        }
        let new = tables.changes.iter().filter(|(revision, _)| *revision > reported);
        changes.extend(new.map(|(_, change)| change.clone()));
        changes.push(Change::Synced(now));
        drop(tables);
        (changes, (self, Some(revision), changed))
    }

    fn candidates(&self, prefix: &str) -> (Vec<StoredKey>, Revision) {
        let tables = self.read();
        match tables.by_prefix.get(prefix) {
            Some(under) => {
                // A key may have left the lookup id by a change that no row under it shows.
                let keys = under.ids.iter().filter_map(|id| tables.key(id)).collect();
                (keys, under.changed_at)
            }
            None => (Vec::new(), tables.revision()),
        }
    }
}

impl Tables {
    fn key(&self, id: &KeyId) -> Option<StoredKey> {
        let row = self.keys.get(id)?;
        let owner = self.users.get(&row.value.record.user.id)?;
        let mut key = row.value.clone();
        key.record.user = owner.value.clone();
        Some(key.with_revisions(Revisions { key: row.revision, owner: owner.revision }))
    }

    fn next_revision(&mut self) -> Revision {
        self.revision += 1;
        self.revision()
    }

    fn revision(&self) -> Revision {
        Revision(self.revision)
    }

    fn next_id(&mut self) -> i64 {
        self.last_id += 1;
        self.last_id
    }
}

impl KeyStore for MemoryStore {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        let (candidates, latest) = self.candidates(lookup.id());
        let answer = lookup.verify(candidates).await?;
        if let Some(upgrade) = answer.upgrade() {
            // A stored fast hash changes no decision, so that the row gets no new revision.
            if let Some(row) = self.write().keys.get_mut(&upgrade.key) {
                row.value.store_upgrade(upgrade);
            }
        }
        Ok(answer.with_key_revision(latest))
    }

    async fn record_usage(&self, batch: &UsageBatch) -> Result<(), StoreError> {
        let now = self.now();
        self.write().count(batch, now);
        Ok(())
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Lease, StoreError> {
        let now = self.now();
        Ok(self.write().lease(request, now))
    }

    fn can_read_keys(&self) -> bool {
        true
    }

    async fn read_keys(&self, selection: &KeySelection) -> Result<KeysRead, StoreError> {
        Ok(self.read().read_keys(selection, self.now()))
    }

    async fn read_owners(&self, owners: &[UserId]) -> Result<Vec<ReadOwner>, StoreError> {
        Ok(self.read().read_owners(owners))
    }

    fn changes(&self, _since: SystemTime) -> ChangeStream {
        let start = (self.clone(), None, self.0.changed.subscribe());
        ChangeStream::steps(start, |(store, reported, changed)| async move {
            Some(store.listen(reported, changed).await)
        })
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}
