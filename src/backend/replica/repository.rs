//! The write side of a [`Replica`]: it calls the store, and marks what it has changed before the feed reports it.

use chrono::{DateTime, NaiveDate, Utc};

use super::Replica;
use crate::{
    error::StoreError,
    record::{KeyId, KeyRecord, Revision, User, UserId},
    store::{
        Attribution, AuditPage, Change, DailyUsage, Inserted, KeyFilter, KeyPage, KeyRepository,
        ListAudit, ListKeys, ListUsers, StoredKey, UserPage,
    },
};

impl<S> Replica<S> {
    fn mark(&self, change: Option<Change>) -> Option<Change> {
        if let Some(change) = &change {
            self.core.content.mark(change);
        }
        change
    }

    fn mark_keys<'a>(&self, keys: impl IntoIterator<Item = &'a StoredKey>) {
        for id in keys.into_iter().flat_map(StoredKey::lookup_ids) {
            self.core.content.mark(&Change::Prefix(id.to_owned(), Revision(0)));
        }
    }
}

impl<S: KeyRepository> KeyRepository for Replica<S> {
    async fn insert_user(
        &self,
        email: &str,
        role: &str,
        by: &Attribution,
    ) -> Result<User, StoreError> {
        self.core.store.insert_user(email, role, by).await
    }

    async fn find_user(&self, id: &UserId) -> Result<Option<User>, StoreError> {
        self.core.store.find_user(id).await
    }

    async fn find_user_by_email(&self, email: &str) -> Result<Option<User>, StoreError> {
        self.core.store.find_user_by_email(email).await
    }

    async fn list_users(&self, page: &ListUsers) -> Result<UserPage, StoreError> {
        self.core.store.list_users(page).await
    }

    async fn update_user(
        &self,
        user: &User,
        by: &Attribution,
    ) -> Result<Option<Change>, StoreError> {
        Ok(self.mark(self.core.store.update_user(user, by).await?))
    }

    async fn delete_user(
        &self,
        id: &UserId,
        by: &Attribution,
    ) -> Result<Option<Change>, StoreError> {
        Ok(self.mark(self.core.store.delete_user(id, by).await?))
    }

    async fn insert_key(&self, key: &StoredKey, by: &Attribution) -> Result<KeyRecord, StoreError> {
        let inserted = self.core.store.insert_key(key, by).await;
        self.mark_keys([key]);
        inserted
    }

    async fn insert_keys(
        &self,
        keys: &[StoredKey],
        by: &Attribution,
    ) -> Result<Vec<Inserted>, StoreError> {
        let inserted = self.core.store.insert_keys(keys, by).await;
        self.mark_keys(keys);
        inserted
    }

    async fn find_key(&self, id: &KeyId) -> Result<Option<StoredKey>, StoreError> {
        self.core.store.find_key(id).await
    }

    async fn list_keys(&self, page: &ListKeys) -> Result<KeyPage, StoreError> {
        self.core.store.list_keys(page).await
    }

    async fn replace_key(
        &self,
        old: &StoredKey,
        new: &StoredKey,
        by: &Attribution,
    ) -> Result<Option<KeyRecord>, StoreError> {
        let replaced = self.core.store.replace_key(old, new, by).await;
        self.mark_keys([old, new]);
        replaced
    }

    async fn revoke_key(&self, id: &KeyId, by: &Attribution) -> Result<Option<Change>, StoreError> {
        Ok(self.mark(self.core.store.revoke_key(id, by).await?))
    }

    async fn revoke_keys(
        &self,
        filter: &KeyFilter,
        by: &Attribution,
    ) -> Result<Vec<(KeyId, Change)>, StoreError> {
        let revoked = self.core.store.revoke_keys(filter, by).await?;
        for (_, change) in &revoked {
            self.mark(Some(change.clone()));
        }
        Ok(revoked)
    }

    async fn delete_key(&self, id: &KeyId, by: &Attribution) -> Result<Option<Change>, StoreError> {
        Ok(self.mark(self.core.store.delete_key(id, by).await?))
    }

    async fn list_usage(
        &self,
        key: &KeyId,
        from: NaiveDate,
        to: NaiveDate,
    ) -> Result<Vec<DailyUsage>, StoreError> {
        self.core.store.list_usage(key, from, to).await
    }

    async fn list_audit(&self, page: &ListAudit) -> Result<AuditPage, StoreError> {
        self.core.store.list_audit(page).await
    }

    async fn prune_audit(&self, before: DateTime<Utc>) -> Result<u64, StoreError> {
        self.core.store.prune_audit(before).await
    }
}
