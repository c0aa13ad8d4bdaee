//! The write side of a [`RedisCache`]: it calls the store, and queues tombstones for its changes.

use super::RedisCache;
use crate::{
    error::StoreError,
    record::{KeyId, KeyRecord, Revision, User},
    store::{Change, KeyPage, KeyRepository, ListKeys, StoredKey},
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
}

impl<S: KeyRepository> KeyRepository for RedisCache<S> {
    async fn insert_user(&self, email: &str, role: &str) -> Result<User, StoreError> {
        self.0.store.insert_user(email, role).await
    }

    async fn update_user(&self, user: &User) -> Result<Option<Change>, StoreError> {
        Ok(self.announce(self.0.store.update_user(user).await?))
    }

    async fn insert_key(&self, key: &StoredKey) -> Result<KeyRecord, StoreError> {
        self.0.store.insert_key(key).await
    }

    async fn find_key(&self, id: &KeyId) -> Result<Option<KeyRecord>, StoreError> {
        self.0.store.find_key(id).await
    }

    async fn list_keys(&self, page: &ListKeys) -> Result<KeyPage, StoreError> {
        self.0.store.list_keys(page).await
    }

    async fn update_key(
        &self,
        record: &KeyRecord,
        expected: Option<Revision>,
    ) -> Result<Option<Change>, StoreError> {
        Ok(self.announce(self.0.store.update_key(record, expected).await?))
    }

    async fn revoke_key(&self, id: &KeyId) -> Result<Option<Change>, StoreError> {
        Ok(self.announce(self.0.store.revoke_key(id).await?))
    }
}
