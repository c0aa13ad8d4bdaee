//! The write side of [`MemoryStore`].

use std::time::SystemTime;

use chrono::{DateTime, NaiveDate, Utc};

use super::{MemoryStore, Row, Tables};
use crate::{
    error::StoreError,
    record::{KeyId, KeyRecord, UsageTotals, User, UserId},
    store::{
        Attribution, AuditAction, AuditPage, CHANGED_SINCE, Change, DailyUsage, Inserted,
        KeyFilter, KeyPage, KeyRepository, ListAudit, ListKeys, ListUsers, StoredKey, UserPage,
    },
};

impl KeyRepository for MemoryStore {
    async fn insert_user(
        &self,
        email: &str,
        role: &str,
        by: &Attribution,
    ) -> Result<User, StoreError> {
        let (mut tables, now) = (self.write(), self.now());
        tables.check_email(email, None)?;
        let mut user = User::new(tables.next_id(), email);
        role.clone_into(&mut user.role);
        let revision = tables.revision();
        tables.users.insert(user.id.clone(), Row { value: user.clone(), revision });
        tables.audit.note_user((AuditAction::CreateUser, by, now), None, Some(&user));
        Ok(user)
    }

    async fn find_user(&self, id: &UserId) -> Result<Option<User>, StoreError> {
        Ok(self.read().users.get(id).map(|row| row.value.clone()))
    }

    async fn find_user_by_email(&self, email: &str) -> Result<Option<User>, StoreError> {
        let tables = self.read();
        let found = tables.users.values().find(|row| row.value.email == email);
        Ok(found.map(|row| row.value.clone()))
    }

    async fn list_users(&self, page: &ListUsers) -> Result<UserPage, StoreError> {
        let tables = self.read();
        let is_after = |user: &&User| page.after.as_ref().is_none_or(|after| user.id > *after);
        let users = tables.users.values().map(|row| &row.value).filter(is_after).cloned();
        Ok(UserPage::from_users(page, users))
    }

    async fn update_user(
        &self,
        user: &User,
        by: &Attribution,
    ) -> Result<Option<Change>, StoreError> {
        let (mut tables, now) = (self.write(), self.now());
        tables.check_email(&user.email, Some(&user.id))?;
        let revision = tables.next_revision();
        let Some(row) = tables.users.get_mut(&user.id) else { return Ok(None) };
        let old = std::mem::replace(row, Row { value: user.clone(), revision }).value;
        tables.audit.note_user((AuditAction::UpdateUser, by, now), Some(&old), Some(user));
        let change = Change::Owner(user.id.clone(), revision);
        self.report(&mut tables, &change);
        Ok(Some(change))
    }

    async fn delete_user(
        &self,
        id: &UserId,
        by: &Attribution,
    ) -> Result<Option<Change>, StoreError> {
        let (mut tables, now) = (self.write(), self.now());
        if tables.keys.values().any(|row| row.value.record.user.id == *id) {
            return Err(StoreError::conflict("the user owns keys"));
        }
        let Some(old) = tables.users.remove(id) else { return Ok(None) };
        tables.audit.note_user((AuditAction::DeleteUser, by, now), Some(&old.value), None);
        let change = Change::Owner(id.clone(), tables.next_revision());
        self.report(&mut tables, &change);
        Ok(Some(change))
    }

    async fn insert_key(&self, key: &StoredKey, by: &Attribution) -> Result<KeyRecord, StoreError> {
        let mut tables = self.write();
        let (inserted, record) = self.insert(&mut tables, key, by);
        let conflict = match inserted {
            Inserted::NoUser => "the key's user does not exist",
            _ => "the same key is already stored",
        };
        record.ok_or_else(|| StoreError::conflict(conflict))
    }

    async fn insert_keys(
        &self,
        keys: &[StoredKey],
        by: &Attribution,
    ) -> Result<Vec<Inserted>, StoreError> {
        let mut tables = self.write();
        Ok(keys.iter().map(|key| self.insert(&mut tables, key, by).0).collect())
    }

    async fn find_key(&self, id: &KeyId) -> Result<Option<StoredKey>, StoreError> {
        Ok(self.read().key(id))
    }

    async fn list_keys(&self, page: &ListKeys) -> Result<KeyPage, StoreError> {
        let tables = self.read();
        let after = page.after.as_ref();
        let ids = tables.keys.keys().filter(|id| after.is_none_or(|after| *id > after));
        let keys = ids.filter_map(|id| tables.key(id)).map(|key| key.record);
        let keys = keys.filter(|key| page.filter.selects(key));
        Ok(KeyPage::from_rows(page, keys.map(|key| (key.id.clone(), Ok(key)))))
    }

    async fn replace_key(
        &self,
        old: &StoredKey,
        new: &StoredKey,
        by: &Attribution,
    ) -> Result<Option<KeyRecord>, StoreError> {
        let mut tables = self.write();
        let Some(current) = tables.key(&old.record.id) else { return Ok(None) };
        if current.revisions.key != old.revisions.key {
            return Err(StoreError::conflict(CHANGED_SINCE));
        }
        let (kept, mut new) = (&current.record, new.clone());
        // Usage and fast hashes have no revision. Only what the edit changes is written.
        if new.record.last_used_at == old.record.last_used_at {
            new.record.last_used_at = kept.last_used_at;
        }
        if new.record.grace == old.record.grace {
            new.record.grace.clone_from(&kept.grace);
        }
        if (&new.hash, &new.previous) == (&old.hash, &old.previous) {
            new.upgraded.clone_from(&current.upgraded);
            new.previous.clone_from(&current.previous);
        }
        new.record = KeyRecord {
            id: kept.id.clone(),
            user: kept.user.clone(),
            usage: kept.usage,
            created_at: kept.created_at,
            ..new.record
        };
        let action = AuditAction::of_edit(&current, &new);
        Ok(Some(self.replace(&mut tables, &current, new, (action, by)).record))
    }

    async fn revoke_key(&self, id: &KeyId, by: &Attribution) -> Result<Option<Change>, StoreError> {
        let mut tables = self.write();
        let revoked = tables.key(id).map(|key| self.revoke(&mut tables, &key, by));
        Ok(revoked.map(|key| Change::Prefix(key.record.prefix.clone(), key.revisions.key)))
    }

    async fn revoke_keys(
        &self,
        filter: &KeyFilter,
        by: &Attribution,
    ) -> Result<Vec<(KeyId, Change)>, StoreError> {
        let mut tables = self.write();
        let keys: Vec<_> = tables.keys.keys().filter_map(|id| tables.key(id)).collect();
        let is_revoked = |key: &StoredKey| key.record.is_active && filter.selects(&key.record);
        let mut changes = Vec::new();
        for key in keys.into_iter().filter(is_revoked) {
            let revoked = self.revoke(&mut tables, &key, by);
            let change = Change::Prefix(revoked.record.prefix.clone(), revoked.revisions.key);
            changes.push((revoked.record.id, change));
        }
        Ok(changes)
    }

    async fn delete_key(&self, id: &KeyId, by: &Attribution) -> Result<Option<Change>, StoreError> {
        let (mut tables, now) = (self.write(), self.now());
        let Some(old) = tables.key(id) else { return Ok(None) };
        tables.keys.remove(id);
        let revision = tables.next_revision();
        tables.unlist(&old);
        tables.audit.note_key((AuditAction::Delete, by, now), Some(&old), None);
        self.report_key(&mut tables, [&old]);
        Ok(Some(Change::Prefix(old.record.prefix, revision)))
    }

    async fn list_usage(
        &self,
        key: &KeyId,
        from: NaiveDate,
        to: NaiveDate,
    ) -> Result<Vec<DailyUsage>, StoreError> {
        Ok(self.read().usage_between(key, from, to))
    }

    async fn list_audit(&self, page: &ListAudit) -> Result<AuditPage, StoreError> {
        Ok(self.read().audit.list(page))
    }

    async fn prune_audit(&self, before: DateTime<Utc>) -> Result<u64, StoreError> {
        Ok(self.write().audit.prune(before))
    }
}

impl MemoryStore {
    /// Stores a key, and reports the change.
    fn insert(
        &self,
        tables: &mut Tables,
        key: &StoredKey,
        by: &Attribution,
    ) -> (Inserted, Option<KeyRecord>) {
        let now = self.now();
        let inserted = match tables.insert_key(key, now) {
            Ok(inserted) => inserted,
            Err(reason) => return (reason, None),
        };
        tables.audit.note_key((AuditAction::Issue, by, now), None, Some(&inserted));
        self.report_key(tables, [&inserted]);
        (Inserted::Stored, Some(inserted.record))
    }

    /// Replaces a key, and reports the change. Returns the new key with its revision.
    fn replace(
        &self,
        tables: &mut Tables,
        old: &StoredKey,
        mut new: StoredKey,
        (action, by): (AuditAction, &Attribution),
    ) -> StoredKey {
        let now = self.now();
        let revision = tables.next_revision();
        new.record.updated_at = now.into();
        new.record.revision = revision;
        new.revisions.key = revision;
        tables.audit.note_key((action, by, now), Some(old), Some(&new));
        tables.unlist(old);
        tables.list(&new);
        tables.keys.insert(new.record.id.clone(), Row { value: new.clone(), revision });
        self.report_key(tables, [old, &new]);
        new
    }

    /// Revokes a key. A key that was revoked before keeps the reason of the first revocation.
    fn revoke(&self, tables: &mut Tables, key: &StoredKey, by: &Attribution) -> StoredKey {
        if !key.record.is_active {
            return key.clone();
        }
        let mut new = key.clone();
        new.record.is_active = false;
        new.record.revoked_at = Some(self.now().into());
        new.record.revoked_by.clone_from(&by.actor);
        new.record.revoke_reason.clone_from(&by.reason);
        self.replace(tables, key, new, (AuditAction::Revoke, by))
    }

    /// Reports a change of the keys under all lookup ids of a key.
    fn report_key<'a>(&self, tables: &mut Tables, keys: impl IntoIterator<Item = &'a StoredKey>) {
        let revision = tables.revision();
        let mut ids: Vec<_> = keys.into_iter().flat_map(StoredKey::lookup_ids).collect();
        ids.sort_unstable();
        ids.dedup();
        for id in ids {
            self.report(tables, &Change::Prefix(id.to_owned(), revision));
        }
    }
}

impl Tables {
    /// Stores a key, or returns the reason why it can't be stored.
    fn insert_key(&mut self, key: &StoredKey, now: SystemTime) -> Result<StoredKey, Inserted> {
        // A key that was rotated since is not stored a second time with its previous secret.
        let same = |id: &KeyId| {
            let has = |row: &Row<StoredKey>| row.value.has_hash(&key.record.prefix, &key.hash);
            self.keys.get(id).is_some_and(has)
        };
        if self.by_prefix.get(&key.record.prefix).is_some_and(|under| under.ids.iter().any(same)) {
            return Err(Inserted::Duplicate);
        }
        let owner = self.users.get(&key.record.user.id).ok_or(Inserted::NoUser)?;
        let user = owner.value.clone();
        let revision = self.next_revision();
        let record = KeyRecord {
            id: self.next_id().into(),
            usage: UsageTotals::default(),
            last_used_at: None,
            created_at: now.into(),
            updated_at: now.into(),
            user,
            revision,
            ..key.record.clone()
        };
        let mut stored = StoredKey { record, ..key.clone() };
        stored.revisions.key = revision;
        self.list(&stored);
        self.keys.insert(stored.record.id.clone(), Row { value: stored.clone(), revision });
        Ok(stored)
    }

    /// Adds a key to the index of lookup ids.
    fn list(&mut self, key: &StoredKey) {
        for id in key.lookup_ids() {
            self.by_prefix.entry(id.to_owned()).or_default().ids.push(key.record.id.clone());
        }
    }

    /// Removes a key from the index of lookup ids, by a change with the last revision.
    fn unlist(&mut self, key: &StoredKey) {
        let revision = self.revision();
        for id in key.lookup_ids() {
            if let Some(under) = self.by_prefix.get_mut(id) {
                under.changed_at = revision;
                under.ids.retain(|it| *it != key.record.id);
                if under.ids.is_empty() {
                    self.by_prefix.remove(id);
                }
            }
        }
    }

    fn check_email(&self, email: &str, of: Option<&UserId>) -> Result<(), StoreError> {
        let mut users = self.users.values().map(|row| &row.value);
        let is_taken = users.any(|user| user.email == email && Some(&user.id) != of);
        if is_taken { Err(StoreError::conflict("the e-mail address is taken")) } else { Ok(()) }
    }
}
