//! Keys in memory: [`MemoryStore`].

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use chrono::Utc;

use super::{Answer, KeyRepository, KeyStore, ListKeys, Lookup};
use crate::{
    error::StoreError,
    record::{KeyId, KeyRecord, Revision, Revisions, StoredKey, UsageTotals, User, UserId},
};

/// Keys in the memory of this process, for tests and for services that read their keys from a file.
///
/// Clones share the keys. Everything is gone when the last one is dropped.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore(Arc<RwLock<Tables>>);

#[derive(Debug, Default)]
struct Tables {
    users: BTreeMap<UserId, Row<User>>,
    keys: BTreeMap<KeyId, Row<StoredKey>>,
    by_prefix: HashMap<String, Vec<KeyId>>,
    revision: u64,
    last_id: i64,
}

#[derive(Debug)]
struct Row<T> {
    value: T,
    revision: Revision,
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    fn read(&self) -> RwLockReadGuard<'_, Tables> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tables> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
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
        Revision(self.revision)
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

    /// Changes a key if it is there, and says whether it is.
    fn change_key(&mut self, id: &KeyId, change: impl FnOnce(&mut StoredKey)) -> bool {
        let revision = self.next_revision();
        let Some(row) = self.keys.get_mut(id) else { return false };
        change(&mut row.value);
        row.value.record.updated_at = Utc::now();
        row.revision = revision;
        true
    }
}

impl KeyStore for MemoryStore {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        let (candidates, latest) = self.candidates(lookup.id());
        if candidates.is_empty() {
            let answer = lookup.verify([]).await?;
            return Ok(answer.with_revisions(Revisions { key: latest, owner: latest }));
        }
        let answer = lookup.verify(candidates).await?;
        if let Some(upgrade) = answer.upgrade() {
            // No new revision: a decision does not change.
            if let Some(row) = self.write().keys.get_mut(&upgrade.key)
                && row.value.hash == upgrade.checked
            {
                row.value.upgraded = Some(upgrade.fast.clone());
            }
        }
        Ok(answer)
    }
}

impl KeyRepository for MemoryStore {
    async fn insert_user(&self, email: &str, role: &str) -> Result<User, StoreError> {
        let mut tables = self.write();
        tables.email_is_free(email, None)?;
        let mut user = User::new(tables.next_id(), email);
        role.clone_into(&mut user.role);
        let revision = tables.next_revision();
        tables.users.insert(user.id.clone(), Row { value: user.clone(), revision });
        Ok(user)
    }

    async fn update_user(&self, user: &User) -> Result<bool, StoreError> {
        let mut tables = self.write();
        tables.email_is_free(&user.email, Some(&user.id))?;
        let revision = tables.next_revision();
        let Some(row) = tables.users.get_mut(&user.id) else { return Ok(false) };
        *row = Row { value: user.clone(), revision };
        Ok(true)
    }

    async fn insert_key(&self, key: &StoredKey) -> Result<KeyRecord, StoreError> {
        let mut tables = self.write();
        let prefix = &key.record.prefix;
        let same = |id: &KeyId| tables.keys.get(id).is_some_and(|row| row.value.hash == key.hash);
        if tables.by_prefix.get(prefix).is_some_and(|ids| ids.iter().any(same)) {
            return Err(StoreError::conflict("the same key is stored already"));
        }
        let Some(owner) = tables.users.get(&key.record.user.id) else {
            return Err(StoreError::conflict("the key's user does not exist"));
        };
        let (owner, now) = (owner.value.clone(), Utc::now());
        let record = KeyRecord {
            id: tables.next_id().into(),
            usage: UsageTotals::default(),
            last_used_at: None,
            created_at: now,
            updated_at: now,
            user: owner,
            ..key.record.clone()
        };
        let revision = tables.next_revision();
        let value = StoredKey::new(record.clone(), key.hash.clone());
        tables.keys.insert(record.id.clone(), Row { value, revision });
        tables.by_prefix.entry(prefix.clone()).or_default().push(record.id.clone());
        Ok(record)
    }

    async fn find_key(&self, id: &KeyId) -> Result<Option<KeyRecord>, StoreError> {
        Ok(self.read().record(id))
    }

    async fn list_keys(&self, page: &ListKeys) -> Result<Vec<KeyRecord>, StoreError> {
        let tables = self.read();
        let is_wanted =
            |record: &KeyRecord| page.owner.as_ref().is_none_or(|o| record.user.id == *o);
        let keys =
            tables.keys.keys().filter(|id| page.after.as_ref().is_none_or(|after| *id > after));
        let records = keys.filter_map(|id| tables.record(id)).filter(is_wanted);
        Ok(records.take(page.limit as usize).collect())
    }

    async fn update_key(&self, record: &KeyRecord) -> Result<bool, StoreError> {
        Ok(self.write().change_key(&record.id, |key| {
            let kept = key.record.clone();
            key.record = KeyRecord {
                prefix: kept.prefix,
                user: kept.user,
                usage: kept.usage,
                last_used_at: kept.last_used_at,
                created_at: kept.created_at,
                ..record.clone()
            };
        }))
    }

    async fn revoke_key(&self, id: &KeyId) -> Result<bool, StoreError> {
        Ok(self.write().change_key(id, |key| key.record.is_active = false))
    }
}
