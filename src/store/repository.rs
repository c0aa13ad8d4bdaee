//! The write side of a store: [`KeyRepository`].

use std::{future::Future, sync::Arc};

use super::{
    KeyStore,
    change::Change,
    page::{KeyPage, ListKeys},
    stored_key::StoredKey,
};
use crate::{
    error::StoreError,
    record::{KeyId, KeyRecord, Revision, User},
};

/// A store to which keys can be written. [`KeyManager`](crate::KeyManager) uses it.
///
/// All methods fail with a [`StoreError`] of the kind `Conflict` for a write that contradicts stored data, and of the
/// kinds of [`KeyStore::resolve`] otherwise.
#[diagnostic::on_unimplemented(
    message = "keys can't be written to `{Self}`",
    label = "this is not a `KeyRepository`",
    note = "`MemoryStore`, `SqliteStore`, `PostgresStore` and a `RedisCache` in front of one of them are; a `DynKeyStore` can only be read: make the `KeyManager` before the type is erased",
    note = "a store of your own implements `KeyRepository`, or makes its keys with `KeyScheme::mint`"
)]
pub trait KeyRepository: KeyStore {
    /// Creates an active user.
    ///
    /// # Errors
    ///
    /// `Conflict` if the e-mail address is taken.
    fn insert_user(
        &self,
        email: &str,
        role: &str,
    ) -> impl Future<Output = Result<User, StoreError>> + Send;

    /// Updates e-mail address, role and activity of a user. Returns the change, for the caches above; `None` if there
    /// is no such user.
    ///
    /// # Errors
    ///
    /// `Conflict` if another user has the e-mail address.
    fn update_user(
        &self,
        user: &User,
    ) -> impl Future<Output = Result<Option<Change>, StoreError>> + Send;

    /// Stores a key for the user that its record names. The store assigns the id and the time stamps, and sets usage
    /// totals to 0. It ignores these fields of the record.
    ///
    /// # Errors
    ///
    /// `Conflict` if there is no such user, or the same hash is already stored.
    fn insert_key(
        &self,
        key: &StoredKey,
    ) -> impl Future<Output = Result<KeyRecord, StoreError>> + Send;

    /// Returns the key with this id, if there is one.
    ///
    /// # Errors
    ///
    /// `BadRow` if it can't be decoded.
    fn find_key(
        &self,
        id: &KeyId,
    ) -> impl Future<Output = Result<Option<KeyRecord>, StoreError>> + Send;

    /// Returns a page of keys, ordered by id. A key that can't be decoded is listed as
    /// [`unreadable`](KeyPage::unreadable), and does not affect other keys.
    ///
    /// # Errors
    ///
    /// See [`KeyRepository`].
    fn list_keys(
        &self,
        page: &ListKeys,
    ) -> impl Future<Output = Result<KeyPage, StoreError>> + Send;

    /// Updates the editable fields of a key: all but id, prefix, owner, revocation, usage and time stamps. With
    /// `expected`, usually the record's [`revision`](KeyRecord::revision), it updates only if the row still has that
    /// revision. Returns the change; `None` if there is no such key.
    ///
    /// # Errors
    ///
    /// `Conflict` if the row has another revision than `expected`: read the key again, and edit the new record. An
    /// update with `expected` is not retried after a lost connection, so that its own first attempt is not taken for a
    /// change by another writer.
    fn update_key(
        &self,
        record: &KeyRecord,
        expected: Option<Revision>,
    ) -> impl Future<Output = Result<Option<Change>, StoreError>> + Send;

    /// Deactivates a key. Returns the change; `None` if there is no such key. Revoking is idempotent.
    ///
    /// # Errors
    ///
    /// See [`KeyRepository`].
    fn revoke_key(
        &self,
        id: &KeyId,
    ) -> impl Future<Output = Result<Option<Change>, StoreError>> + Send;
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

    async fn list_keys(&self, page: &ListKeys) -> Result<KeyPage, StoreError> {
        S::list_keys(self, page).await
    }

    async fn update_key(
        &self,
        record: &KeyRecord,
        expected: Option<Revision>,
    ) -> Result<Option<Change>, StoreError> {
        S::update_key(self, record, expected).await
    }

    async fn revoke_key(&self, id: &KeyId) -> Result<Option<Change>, StoreError> {
        S::revoke_key(self, id).await
    }
}
