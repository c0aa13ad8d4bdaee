//! The write side of a store: [`KeyRepository`].

use std::{future::Future, sync::Arc};

use super::{Change, KeyStore};
use crate::{
    error::StoreError,
    record::{KeyId, KeyRecord, StoredKey, User, UserId},
};

/// A store that keys can be written to. [`KeyManager`](crate::KeyManager) works on it.
///
/// All methods fail with a [`StoreError`] of the kind `Conflict` for a write that contradicts what
/// is stored, and of the kinds of [`KeyStore::resolve`] otherwise.
pub trait KeyRepository: KeyStore {
    /// Makes an active user.
    ///
    /// # Errors
    ///
    /// `Conflict` if the e-mail address is taken.
    fn insert_user(
        &self,
        email: &str,
        role: &str,
    ) -> impl Future<Output = Result<User, StoreError>> + Send;

    /// Writes e-mail, role and activity of a user. Returns the change, for the caches above; `None` if
    /// there is no such user.
    ///
    /// # Errors
    ///
    /// `Conflict` if the e-mail address is another user's.
    fn update_user(
        &self,
        user: &User,
    ) -> impl Future<Output = Result<Option<Change>, StoreError>> + Send;

    /// Stores a key for the user that its record names. The store gives the id, the time stamps and
    /// usage totals of 0: what the record has there is not looked at.
    ///
    /// # Errors
    ///
    /// `Conflict` if there is no such user, or the same hash is stored already.
    fn insert_key(
        &self,
        key: &StoredKey,
    ) -> impl Future<Output = Result<KeyRecord, StoreError>> + Send;

    /// The key with this id, if there is one.
    ///
    /// # Errors
    ///
    /// `BadRow` if it can't be decoded.
    fn find_key(
        &self,
        id: &KeyId,
    ) -> impl Future<Output = Result<Option<KeyRecord>, StoreError>> + Send;

    /// A page of keys in the order of their ids.
    ///
    /// # Errors
    ///
    /// `BadRow` if one of them can't be decoded.
    fn list_keys(
        &self,
        page: &ListKeys,
    ) -> impl Future<Output = Result<Vec<KeyRecord>, StoreError>> + Send;

    /// Writes what can be edited of a key: everything but id, prefix, owner, usage and time stamps.
    /// Returns the change; `None` if there is no such key.
    ///
    /// # Errors
    ///
    /// See [`KeyRepository`].
    fn update_key(
        &self,
        record: &KeyRecord,
    ) -> impl Future<Output = Result<Option<Change>, StoreError>> + Send;

    /// Makes a key inactive. Returns the change; `None` if there is no such key. Revoking twice is fine.
    ///
    /// # Errors
    ///
    /// See [`KeyRepository`].
    fn revoke_key(
        &self,
        id: &KeyId,
    ) -> impl Future<Output = Result<Option<Change>, StoreError>> + Send;
}

/// Which keys to list.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListKeys {
    /// Those of this user alone.
    pub owner: Option<UserId>,
    /// Those after this key.
    pub after: Option<KeyId>,
    /// So many at most: 100 by default.
    pub limit: u32,
}

impl Default for ListKeys {
    fn default() -> Self {
        Self { owner: None, after: None, limit: 100 }
    }
}

impl<S: KeyRepository> KeyRepository for Arc<S> {
    async fn insert_user(&self, email: &str, role: &str) -> Result<User, StoreError> {
        S::insert_user(self, email, role).await
    }

    async fn update_user(&self, user: &User) -> Result<Option<Change>, StoreError> {
        S::update_user(self, user).await
    }

    async fn insert_key(&self, key: &StoredKey) -> Result<KeyRecord, StoreError> {
        S::insert_key(self, key).await
    }

    async fn find_key(&self, id: &KeyId) -> Result<Option<KeyRecord>, StoreError> {
        S::find_key(self, id).await
    }

    async fn list_keys(&self, page: &ListKeys) -> Result<Vec<KeyRecord>, StoreError> {
        S::list_keys(self, page).await
    }

    async fn update_key(&self, record: &KeyRecord) -> Result<Option<Change>, StoreError> {
        S::update_key(self, record).await
    }

    async fn revoke_key(&self, id: &KeyId) -> Result<Option<Change>, StoreError> {
        S::revoke_key(self, id).await
    }
}
