//! The write side of a [`RedisCache`]: it calls the store, and queues tombstones for its changes.

use std::collections::HashMap;

use chrono::{DateTime, NaiveDate, Utc};

use super::RedisCache;
use crate::{
    error::StoreError,
    record::{KeyId, KeyRecord, User, UserId},
    store::{
        Attribution, AuditPage, Change, DailyUsage, Inserted, KeyFilter, KeyPage, KeyRepository,
        ListAudit, ListKeys, ListUsers, StoredKey, UserPage,
    },
};

impl<S: KeyRepository> RedisCache<S> {
    /// Announces a change in the background: no change waits for Redis.
    fn announce(&self, change: Option<Change>) -> Option<Change> {
        if let Some(change) = &change {
            self.queue_tombstone(change);
            self.publish(change);
        }
        change
    }

    /// Announces a change of a key under the lookup id of its previous secret, if it has another one than the current
    /// secret. The change is committed, so that a failure is ignored: nodes learn of it from the store.
    fn announce_previous(&self, change: Option<&Change>, key: &KeyRecord) {
        if let (Some(Change::Prefix(current, revision)), Some(grace)) = (change, &key.grace)
            && grace.prefix != *current
        {
            self.announce(Some(Change::Prefix(grace.prefix.clone(), *revision)));
        }
    }

    /// Does the same for many keys that were revoked, which the filter selects, in the order of their ids.
    async fn announce_previous_of_all(&self, filter: &KeyFilter, revoked: &[(KeyId, Change)]) {
        let (Some((first, _)), Some((last, _))) = (revoked.first(), revoked.last()) else { return };
        let changes: HashMap<_, _> = revoked.iter().map(|(id, change)| (id, change)).collect();
        let mut page = ListKeys::default().filter(filter.clone().revoked()).limit(PAGE);
        page.after = first.as_i64().and_then(|first| first.checked_sub(1)).map(KeyId::from);
        while let Ok(listed) = self.0.store.list_keys(&page).await {
            for key in &listed.keys {
                self.announce_previous(changes.get(&key.id).copied(), key);
            }
            // No key after the last one was revoked.
            let Some(next) = listed.next.filter(|next| next.as_i64() < last.as_i64()) else {
                return;
            };
            page.after = Some(next);
        }
    }
}

/// Number of keys that are read at once after many keys were revoked.
const PAGE: u32 = 1_000;

impl<S: KeyRepository> KeyRepository for RedisCache<S> {
    async fn insert_user(
        &self,
        email: &str,
        role: &str,
        by: &Attribution,
    ) -> Result<User, StoreError> {
        self.0.store.insert_user(email, role, by).await
    }

    async fn find_user(&self, id: &UserId) -> Result<Option<User>, StoreError> {
        self.0.store.find_user(id).await
    }

    async fn find_user_by_email(&self, email: &str) -> Result<Option<User>, StoreError> {
        self.0.store.find_user_by_email(email).await
    }

    async fn list_users(&self, page: &ListUsers) -> Result<UserPage, StoreError> {
        self.0.store.list_users(page).await
    }

    async fn update_user(
        &self,
        user: &User,
        by: &Attribution,
    ) -> Result<Option<Change>, StoreError> {
        Ok(self.announce(self.0.store.update_user(user, by).await?))
    }

    async fn delete_user(
        &self,
        id: &UserId,
        by: &Attribution,
    ) -> Result<Option<Change>, StoreError> {
        Ok(self.announce(self.0.store.delete_user(id, by).await?))
    }

    async fn insert_key(&self, key: &StoredKey, by: &Attribution) -> Result<KeyRecord, StoreError> {
        self.0.store.insert_key(key, by).await
    }

    async fn insert_keys(
        &self,
        keys: &[StoredKey],
        by: &Attribution,
    ) -> Result<Vec<Inserted>, StoreError> {
        self.0.store.insert_keys(keys, by).await
    }

    async fn find_key(&self, id: &KeyId) -> Result<Option<StoredKey>, StoreError> {
        self.0.store.find_key(id).await
    }

    async fn list_keys(&self, page: &ListKeys) -> Result<KeyPage, StoreError> {
        self.0.store.list_keys(page).await
    }

    async fn replace_key(
        &self,
        old: &StoredKey,
        new: &StoredKey,
        by: &Attribution,
    ) -> Result<Option<KeyRecord>, StoreError> {
        let replaced = self.0.store.replace_key(old, new, by).await?;
        if let Some(record) = &replaced {
            let mut ids: Vec<_> = old.lookup_ids().chain(new.lookup_ids()).collect();
            ids.dedup();
            for id in ids {
                self.announce(Some(Change::Prefix(id.to_owned(), record.revision)));
            }
        }
        Ok(replaced)
    }

    async fn revoke_key(&self, id: &KeyId, by: &Attribution) -> Result<Option<Change>, StoreError> {
        let revoked = self.announce(self.0.store.revoke_key(id, by).await?);
        if revoked.is_some()
            && let Ok(Some(key)) = self.0.store.find_key(id).await
        {
            self.announce_previous(revoked.as_ref(), key.record());
        }
        Ok(revoked)
    }

    async fn revoke_keys(
        &self,
        filter: &KeyFilter,
        by: &Attribution,
    ) -> Result<Vec<(KeyId, Change)>, StoreError> {
        let revoked = self.0.store.revoke_keys(filter, by).await?;
        for (_, change) in &revoked {
            self.announce(Some(change.clone()));
        }
        self.announce_previous_of_all(filter, &revoked).await;
        Ok(revoked)
    }

    async fn delete_key(&self, id: &KeyId, by: &Attribution) -> Result<Option<Change>, StoreError> {
        // The row is read before it is gone.
        let key = self.0.store.find_key(id).await;
        let deleted = self.announce(self.0.store.delete_key(id, by).await?);
        if let Ok(Some(key)) = key {
            self.announce_previous(deleted.as_ref(), key.record());
        }
        Ok(deleted)
    }

    async fn list_usage(
        &self,
        key: &KeyId,
        from: NaiveDate,
        to: NaiveDate,
    ) -> Result<Vec<DailyUsage>, StoreError> {
        self.0.store.list_usage(key, from, to).await
    }

    async fn list_audit(&self, page: &ListAudit) -> Result<AuditPage, StoreError> {
        self.0.store.list_audit(page).await
    }

    async fn prune_audit(&self, before: DateTime<Utc>) -> Result<u64, StoreError> {
        self.0.store.prune_audit(before).await
    }
}
