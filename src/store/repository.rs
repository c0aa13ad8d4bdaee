//! The write side of a store: [`KeyRepository`].

use std::{future::Future, sync::Arc};

use chrono::{DateTime, NaiveDate, Utc};

use super::{
    KeyStore,
    attribution::Attribution,
    audit::{AuditPage, ListAudit},
    change::Change,
    filter::KeyFilter,
    page::{KeyPage, ListKeys, ListUsers, UserPage},
    stored_key::StoredKey,
};
use crate::{
    error::StoreError,
    record::{KeyId, KeyRecord, User, UserId},
};

/// Usage of one key on one day (UTC).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct DailyUsage {
    /// The day, in UTC.
    pub day: NaiveDate,
    /// Number of requests.
    pub requests: u64,
    /// Number of tokens.
    pub tokens: u64,
    /// Cost in micro-cents.
    pub cost_micro_cents: i64,
}

impl DailyUsage {
    /// Creates a day without usage.
    pub fn new(day: NaiveDate) -> Self {
        Self { day, requests: 0, tokens: 0, cost_micro_cents: 0 }
    }
}

/// A store to which keys can be written. [`KeyManager`](crate::KeyManager) uses it.
///
/// Each change is one transaction with its audit row, which contains the [`Attribution`]. Reads are in the state of the
/// last commit.
///
/// All methods fail with a [`StoreError`] of the kind `Conflict` for a write that contradicts stored data, and of the
/// kinds of [`KeyStore::resolve`] otherwise. The methods from [`list_usage`](Self::list_usage) on fail with
/// `Unsupported` by default.
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
        by: &Attribution,
    ) -> impl Future<Output = Result<User, StoreError>> + Send;

    /// Returns the user with this id, if there is one.
    ///
    /// # Errors
    ///
    /// See [`KeyRepository`].
    fn find_user(
        &self,
        id: &UserId,
    ) -> impl Future<Output = Result<Option<User>, StoreError>> + Send;

    /// Returns the user with this e-mail address, if there is one. Of several users, it returns the one with the lowest
    /// id.
    ///
    /// # Errors
    ///
    /// See [`KeyRepository`].
    fn find_user_by_email(
        &self,
        email: &str,
    ) -> impl Future<Output = Result<Option<User>, StoreError>> + Send;

    /// Returns a page of users, ordered by id.
    ///
    /// # Errors
    ///
    /// See [`KeyRepository`].
    fn list_users(
        &self,
        page: &ListUsers,
    ) -> impl Future<Output = Result<UserPage, StoreError>> + Send;

    /// Updates e-mail address, role and activity of a user. Returns the change, for the caches above; `None` if there
    /// is no such user.
    ///
    /// # Errors
    ///
    /// `Conflict` if another user has the e-mail address.
    fn update_user(
        &self,
        user: &User,
        by: &Attribution,
    ) -> impl Future<Output = Result<Option<Change>, StoreError>> + Send;

    /// Deletes a user who owns no keys. Returns the change; `None` if there is no such user.
    ///
    /// # Errors
    ///
    /// `Conflict` if the user owns keys, or another table refers to the user.
    fn delete_user(
        &self,
        id: &UserId,
        by: &Attribution,
    ) -> impl Future<Output = Result<Option<Change>, StoreError>> + Send;

    /// Stores a key for the user that its record names. The store assigns the id and the time stamps, and sets usage
    /// totals to 0. It ignores these fields of the record.
    ///
    /// # Errors
    ///
    /// `Conflict` if there is no such user, or the same hash is already stored under the lookup id, for a current or a
    /// previous secret.
    fn insert_key(
        &self,
        key: &StoredKey,
        by: &Attribution,
    ) -> impl Future<Output = Result<KeyRecord, StoreError>> + Send;

    /// Stores many keys in one transaction, like [`insert_key`](Self::insert_key). A key whose user does not exist, or
    /// whose hash is already stored under its lookup id, is skipped. Returns for each key whether it was stored, in the
    /// order of `keys`.
    ///
    /// # Errors
    ///
    /// See [`KeyRepository`]. No key is then stored, or, after a timeout, all of them are stored a little later.
    fn insert_keys(
        &self,
        keys: &[StoredKey],
        by: &Attribution,
    ) -> impl Future<Output = Result<Vec<Inserted>, StoreError>> + Send;

    /// Returns the key with this id, if there is one, with its hashes.
    ///
    /// # Errors
    ///
    /// `BadRow` if it can't be decoded.
    fn find_key(
        &self,
        id: &KeyId,
    ) -> impl Future<Output = Result<Option<StoredKey>, StoreError>> + Send;

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

    /// Replaces a key by an edited one with the same id, if the row still has the revision of `old`. Only fields that
    /// differ are written. The id, the owner, usage totals and the time of creation are not edited. Returns the record
    /// after the edit; `None` if there is no such key.
    ///
    /// # Errors
    ///
    /// `Conflict` if the row has another revision than `old`: read the key again, and edit that one. A replacement is not
    /// retried after a lost connection, so that its own first attempt is not taken for a change by another writer.
    fn replace_key(
        &self,
        old: &StoredKey,
        new: &StoredKey,
        by: &Attribution,
    ) -> impl Future<Output = Result<Option<KeyRecord>, StoreError>> + Send;

    /// Deactivates a key, also one that can't be decoded. The time of the revocation, the actor and the reason are those
    /// of the first revocation. Returns the change; `None` if there is no such key. Revoking is idempotent.
    ///
    /// # Errors
    ///
    /// See [`KeyRepository`].
    fn revoke_key(
        &self,
        id: &KeyId,
        by: &Attribution,
    ) -> impl Future<Output = Result<Option<Change>, StoreError>> + Send;

    /// Deactivates all active keys that `filter` selects, in one transaction. Returns their ids and the changes.
    ///
    /// # Errors
    ///
    /// See [`KeyRepository`].
    fn revoke_keys(
        &self,
        filter: &KeyFilter,
        by: &Attribution,
    ) -> impl Future<Output = Result<Vec<(KeyId, Change)>, StoreError>> + Send;

    /// Deletes a key. Its usage and its audit are kept. Returns the change; `None` if there is no such key.
    ///
    /// # Errors
    ///
    /// See [`KeyRepository`].
    fn delete_key(
        &self,
        id: &KeyId,
        by: &Attribution,
    ) -> impl Future<Output = Result<Option<Change>, StoreError>> + Send;

    /// Returns the usage of a key on the days from `from` to `to`, both included, ordered by day. Days without usage
    /// are left out.
    ///
    /// # Errors
    ///
    /// See [`KeyRepository`].
    fn list_usage(
        &self,
        key: &KeyId,
        from: NaiveDate,
        to: NaiveDate,
    ) -> impl Future<Output = Result<Vec<DailyUsage>, StoreError>> + Send {
        let _ = (key, from, to);
        async { Err(StoreError::unsupported("usage by day")) }
    }

    /// Returns a page of the audit, the latest entries first.
    ///
    /// # Errors
    ///
    /// See [`KeyRepository`].
    fn list_audit(
        &self,
        page: &ListAudit,
    ) -> impl Future<Output = Result<AuditPage, StoreError>> + Send {
        let _ = page;
        async { Err(StoreError::unsupported("an audit")) }
    }

    /// Deletes the entries of the audit from before a time. Returns their number.
    ///
    /// # Errors
    ///
    /// See [`KeyRepository`].
    fn prune_audit(
        &self,
        before: DateTime<Utc>,
    ) -> impl Future<Output = Result<u64, StoreError>> + Send {
        let _ = before;
        async { Err(StoreError::unsupported("an audit")) }
    }
}

/// Result of [`KeyRepository::insert_keys`] for one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Inserted {
    /// The key was stored.
    Stored,
    /// The same hash is already stored under the lookup id.
    Duplicate,
    /// The user does not exist.
    NoUser,
}

/// Returns the lane of a lookup id, below 16: a hash. Insertions of keys of one lane wait for each other.
pub(crate) fn import_lane(lookup_id: &str) -> u8 {
    // FNV-1a. Nodes of different versions compute the same one.
    let hash = lookup_id
        .bytes()
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    ((hash >> 24) & 0xf) as u8
}

impl<S: KeyRepository> KeyRepository for Arc<S> {
    async fn insert_user(
        &self,
        email: &str,
        role: &str,
        by: &Attribution,
    ) -> Result<User, StoreError> {
        S::insert_user(self, email, role, by).await
    }

    async fn find_user(&self, id: &UserId) -> Result<Option<User>, StoreError> {
        S::find_user(self, id).await
    }

    async fn find_user_by_email(&self, email: &str) -> Result<Option<User>, StoreError> {
        S::find_user_by_email(self, email).await
    }

    async fn list_users(&self, page: &ListUsers) -> Result<UserPage, StoreError> {
        S::list_users(self, page).await
    }

    async fn update_user(
        &self,
        user: &User,
        by: &Attribution,
    ) -> Result<Option<Change>, StoreError> {
        S::update_user(self, user, by).await
    }

    async fn delete_user(
        &self,
        id: &UserId,
        by: &Attribution,
    ) -> Result<Option<Change>, StoreError> {
        S::delete_user(self, id, by).await
    }

    async fn insert_key(&self, key: &StoredKey, by: &Attribution) -> Result<KeyRecord, StoreError> {
        S::insert_key(self, key, by).await
    }

    async fn insert_keys(
        &self,
        keys: &[StoredKey],
        by: &Attribution,
    ) -> Result<Vec<Inserted>, StoreError> {
        S::insert_keys(self, keys, by).await
    }

    async fn find_key(&self, id: &KeyId) -> Result<Option<StoredKey>, StoreError> {
        S::find_key(self, id).await
    }

    async fn list_keys(&self, page: &ListKeys) -> Result<KeyPage, StoreError> {
        S::list_keys(self, page).await
    }

    async fn replace_key(
        &self,
        old: &StoredKey,
        new: &StoredKey,
        by: &Attribution,
    ) -> Result<Option<KeyRecord>, StoreError> {
        S::replace_key(self, old, new, by).await
    }

    async fn revoke_key(&self, id: &KeyId, by: &Attribution) -> Result<Option<Change>, StoreError> {
        S::revoke_key(self, id, by).await
    }

    async fn revoke_keys(
        &self,
        filter: &KeyFilter,
        by: &Attribution,
    ) -> Result<Vec<(KeyId, Change)>, StoreError> {
        S::revoke_keys(self, filter, by).await
    }

    async fn delete_key(&self, id: &KeyId, by: &Attribution) -> Result<Option<Change>, StoreError> {
        S::delete_key(self, id, by).await
    }

    async fn list_usage(
        &self,
        key: &KeyId,
        from: NaiveDate,
        to: NaiveDate,
    ) -> Result<Vec<DailyUsage>, StoreError> {
        S::list_usage(self, key, from, to).await
    }

    async fn list_audit(&self, page: &ListAudit) -> Result<AuditPage, StoreError> {
        S::list_audit(self, page).await
    }

    async fn prune_audit(&self, before: DateTime<Utc>) -> Result<u64, StoreError> {
        S::prune_audit(self, before).await
    }
}
