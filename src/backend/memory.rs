//! A store in memory: [`MemoryStore`].

mod ledger;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, SystemTime},
};

use chrono::{DateTime, Utc};
use tokio::{sync::watch, time::timeout};

use self::ledger::Ledger;
use crate::{
    error::StoreError,
    record::{KeyId, KeyRecord, Revision, Revisions, UsageTotals, User, UserId},
    runtime::{Clock, SystemClock},
    store::{
        Answer, CHANGED_SINCE, Change, ChangeStream, KeyPage, KeyRepository, KeyStore, Lease,
        LeaseRequest, ListKeys, Lookup, StoredKey, UsageBatch,
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
    by_prefix: HashMap<String, Vec<KeyId>>,
    revision: u64,
    /// The last changes and their revisions.
    changes: VecDeque<(u64, Change)>,
    ledger: Ledger,
    last_id: i64,
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
        if tables.changes.len() == MAX_CHANGES {
            tables.changes.pop_front();
        }
        tables.changes.push_back((revision, change.clone()));
        self.0.changed.send_replace(revision);
    }

    /// Changes a key if it exists and has the expected revision.
    fn change_key(
        &self,
        id: &KeyId,
        expected: Option<Revision>,
        change: impl FnOnce(&mut StoredKey),
    ) -> Result<Option<Change>, StoreError> {
        let mut tables = self.write();
        let revision = tables.next_revision();
        let Some(row) = tables.keys.get_mut(id) else { return Ok(None) };
        if expected.is_some_and(|expected| expected != row.revision) {
            return Err(StoreError::conflict(CHANGED_SINCE));
        }
        change(&mut row.value);
        row.value.record.updated_at = self.now().into();
        row.revision = revision;
        let change = Change::Prefix(row.value.record.prefix.clone(), revision);
        self.report(&mut tables, &change);
        Ok(Some(change))
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
        if tables.changes.len() == MAX_CHANGES && oldest > reported + 1 {
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
        let ids = tables.by_prefix.get(prefix).into_iter().flatten();
        (ids.filter_map(|id| tables.key(id)).collect(), Revision(tables.revision))
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

    fn record(&self, id: &KeyId) -> Option<KeyRecord> {
        self.key(id).map(|key| key.record)
    }

    fn next_revision(&mut self) -> Revision {
        self.revision += 1;
        self.revision()
    }

    fn revision(&self) -> Revision {
        Revision(self.revision)
    }

    fn insert_key(&mut self, key: &StoredKey, now: DateTime<Utc>) -> Result<KeyRecord, StoreError> {
        let prefix = &key.record.prefix;
        let same = |id: &KeyId| self.keys.get(id).is_some_and(|row| row.value.hash == key.hash);
        if self.by_prefix.get(prefix).is_some_and(|ids| ids.iter().any(same)) {
            return Err(StoreError::conflict("the same key is already stored"));
        }
        let Some(owner) = self.users.get(&key.record.user.id) else {
            return Err(StoreError::conflict("the key's user does not exist"));
        };
        let user = owner.value.clone();
        let record = KeyRecord {
            id: self.next_id().into(),
            usage: UsageTotals::default(),
            last_used_at: None,
            created_at: now,
            updated_at: now,
            user,
            ..key.record.clone()
        };
        let revision = self.next_revision();
        let value = StoredKey::new(record.clone(), key.hash.clone());
        self.keys.insert(record.id.clone(), Row { value, revision });
        self.by_prefix.entry(prefix.clone()).or_default().push(record.id.clone());
        Ok(KeyRecord { revision, ..record })
    }

    fn next_id(&mut self) -> i64 {
        self.last_id += 1;
        self.last_id
    }

    fn email_is_free(&self, email: &str, for_user: Option<&UserId>) -> Result<(), StoreError> {
        let taken =
            self.users.values().any(|u| u.value.email == email && Some(&u.value.id) != for_user);
        if taken { Err(StoreError::conflict("the e-mail address is taken")) } else { Ok(()) }
    }
}

impl KeyStore for MemoryStore {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        let (candidates, latest) = self.candidates(lookup.id());
        if candidates.is_empty() {
            let answer = lookup.verify([]).await?;
            return Ok(answer.with_key_revision(latest));
        }
        let answer = lookup.verify(candidates).await?;
        if let Some(upgrade) = answer.upgrade() {
            // A stored fast hash changes no decision, so that the row gets no new revision.
            if let Some(row) = self.write().keys.get_mut(&upgrade.key)
                && row.value.hash == upgrade.checked
            {
                row.value.upgraded = Some(upgrade.fast.clone());
            }
        }
        Ok(answer)
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

    fn changes(&self, _since: SystemTime) -> ChangeStream {
        let start = (self.clone(), None, self.0.changed.subscribe());
        ChangeStream::steps(start, |(store, reported, changed)| async move {
            Some(store.listen(reported, changed).await)
        })
    }
}

impl KeyRepository for MemoryStore {
    async fn insert_user(&self, email: &str, role: &str) -> Result<User, StoreError> {
        let mut tables = self.write();
        tables.email_is_free(email, None)?;
        let mut user = User::new(tables.next_id(), email);
        role.clone_into(&mut user.role);
        let revision = tables.revision();
        tables.users.insert(user.id.clone(), Row { value: user.clone(), revision });
        Ok(user)
    }

    async fn update_user(&self, user: &User) -> Result<Option<Change>, StoreError> {
        let mut tables = self.write();
        tables.email_is_free(&user.email, Some(&user.id))?;
        let revision = tables.next_revision();
        let Some(row) = tables.users.get_mut(&user.id) else { return Ok(None) };
        *row = Row { value: user.clone(), revision };
        let change = Change::Owner(user.id.clone(), revision);
        self.report(&mut tables, &change);
        Ok(Some(change))
    }

    async fn insert_key(&self, key: &StoredKey) -> Result<KeyRecord, StoreError> {
        let mut tables = self.write();
        let record = tables.insert_key(key, self.now().into())?;
        let change = Change::Prefix(record.prefix.clone(), tables.revision());
        self.report(&mut tables, &change);
        Ok(record)
    }

    async fn find_key(&self, id: &KeyId) -> Result<Option<KeyRecord>, StoreError> {
        Ok(self.read().record(id))
    }

    async fn list_keys(&self, page: &ListKeys) -> Result<KeyPage, StoreError> {
        let tables = self.read();
        let is_wanted =
            |record: &KeyRecord| page.owner.as_ref().is_none_or(|o| record.user.id == *o);
        let keys =
            tables.keys.keys().filter(|id| page.after.as_ref().is_none_or(|after| *id > after));
        let records = keys.filter_map(|id| tables.record(id)).filter(is_wanted);
        Ok(KeyPage::from_rows(page, records.map(|record| (record.id.clone(), Ok(record)))))
    }

    async fn update_key(
        &self,
        record: &KeyRecord,
        expected: Option<Revision>,
    ) -> Result<Option<Change>, StoreError> {
        let change = |key: &mut StoredKey| {
            let kept = key.record.clone();
            key.record = KeyRecord {
                prefix: kept.prefix,
                user: kept.user,
                is_active: kept.is_active,
                usage: kept.usage,
                last_used_at: kept.last_used_at,
                created_at: kept.created_at,
                ..record.clone()
            };
        };
        self.change_key(&record.id, expected, change)
    }

    async fn revoke_key(&self, id: &KeyId) -> Result<Option<Change>, StoreError> {
        self.change_key(id, None, |key| key.record.is_active = false)
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}
