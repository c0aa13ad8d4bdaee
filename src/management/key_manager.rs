//! Creates, changes and revokes users and keys: [`KeyManager`].

use std::sync::Arc;

use chrono::{DateTime, NaiveDate, Utc};

use super::{
    caller::Caller,
    error::ManageError,
    new_key::{IssuedKey, NewKey},
    patch::{KeyPatch, UserPatch},
    validation,
};
use crate::{
    context::AuthContext,
    key::KeyScheme,
    record::{KeyId, KeyRecord, User, UserId},
    runtime::{Clock, SystemClock},
    store::{
        Attribution, AuditPage, DailyUsage, KeyFilter, KeyPage, KeyRepository, ListAudit, ListKeys,
        ListUsers, StoredKey, UserPage,
    },
};

/// Creates users, and issues, rotates, changes and revokes keys.
///
/// Use the same [`KeyScheme`] as the layer; otherwise the layer does not accept the keys. Every change is one transaction
/// with its audit row, and reaches every node as a change event.
///
/// ```
/// use tower_api_key::{KeyManager, MemoryStore, NewKey};
///
/// # async fn run() -> Result<(), tower_api_key::management::ManageError> {
/// let manager = KeyManager::new(MemoryStore::new());
/// let user = manager.create_user("ada@example.com", "admin").await?;
/// let issued = manager.issue(NewKey::new(user.id, "laptop").scopes(["chat:write"])).await?;
/// println!("{}", issued.expose_secret());
/// manager.reason("lost").revoke(&issued.record().id).await?;
/// # Ok(())
/// # }
/// ```
///
/// Cheap to clone if the store is. [`acting_for`](Self::acting_for), [`actor`](Self::actor) and [`reason`](Self::reason)
/// return a manager for the changes of one actor.
#[derive(Debug, Clone)]
pub struct KeyManager<R> {
    pub(super) repository: R,
    pub(super) scheme: KeyScheme,
    pub(super) caller: Option<Caller>,
    pub(super) by: Attribution,
    clock: Arc<dyn Clock>,
    admin_role: Arc<str>,
}

impl<R: KeyRepository> KeyManager<R> {
    /// Creates a manager with the default scheme.
    pub fn new(repository: R) -> Self {
        Self {
            repository,
            scheme: KeyScheme::default(),
            caller: None,
            by: Attribution::default(),
            clock: Arc::new(SystemClock),
            admin_role: "admin".into(),
        }
    }

    /// Sets the scheme with which keys are minted and hashed.
    #[must_use]
    pub fn scheme(self, scheme: KeyScheme) -> Self {
        Self { scheme, ..self }
    }

    /// Sets the clock that decides when grace periods end. Use that of the [`Authenticator`](crate::Authenticator).
    #[must_use]
    pub fn clock(self, clock: Arc<dyn Clock>) -> Self {
        Self { clock, ..self }
    }

    /// Sets the role whose callers may manage the keys of all users: `admin` by default.
    #[must_use]
    pub fn admin_role(self, role: impl Into<String>) -> Self {
        Self { admin_role: role.into().into(), ..self }
    }

    /// Returns a manager that acts for an authenticated caller. It sees only the caller's own keys, and no key that it
    /// issues, changes, rotates, imports or reactivates grants more than the caller's key does (its ceiling). A key of
    /// another user does not exist for it. Callers with the [admin role](Self::admin_role) manage the users, and the keys
    /// of all users, within the same ceiling.
    ///
    /// A key that grants more than the caller's key can't be changed or rotated, not even in a field that grants nothing,
    /// but it can be revoked and deleted.
    #[must_use]
    pub fn acting_for(self, caller: &AuthContext) -> Self {
        let by = self.by.actor(&*caller.user().email).key(caller.key().id.clone());
        let caller = Some(Caller::new(caller.key().clone(), &self.admin_role));
        Self { caller, by, ..self }
    }

    /// Sets the actor in the audit, for people: an e-mail address, or `cli:ada`.
    #[must_use]
    pub fn actor(self, actor: impl Into<String>) -> Self {
        Self { by: self.by.actor(actor), ..self }
    }

    /// Sets the reason in the audit.
    #[must_use]
    pub fn reason(&self, reason: impl Into<String>) -> Self
    where
        R: Clone,
    {
        let by = self.by.clone().reason(reason);
        Self { by, ..self.clone() }
    }

    /// Sets the id of the request in the audit.
    #[must_use]
    pub fn request_id(self, id: impl Into<String>) -> Self {
        Self { by: self.by.request_id(id), ..self }
    }

    pub(super) fn now(&self) -> DateTime<Utc> {
        self.clock.now().into()
    }

    /// Creates an active user.
    ///
    /// # Errors
    ///
    /// `Conflict` if the e-mail address is taken; `Invalid` if it is not an address, or the role is empty.
    pub async fn create_user(&self, email: &str, role: &str) -> Result<User, ManageError> {
        self.require_admin("create users")?;
        validation::check_email(email)?;
        validation::check_role(role)?;
        Ok(self.repository.insert_user(email, role, &self.by).await?)
    }

    /// Returns a user.
    ///
    /// # Errors
    ///
    /// `NotFound`.
    pub async fn find_user(&self, id: &UserId) -> Result<User, ManageError> {
        let found = self.repository.find_user(id).await?;
        found.filter(|user| self.sees(&user.id)).ok_or(ManageError::NotFound("user"))
    }

    /// Returns the user with an e-mail address.
    ///
    /// # Errors
    ///
    /// `NotFound`.
    pub async fn find_user_by_email(&self, email: &str) -> Result<User, ManageError> {
        let found = self.repository.find_user_by_email(email).await?;
        found.filter(|user| self.sees(&user.id)).ok_or(ManageError::NotFound("user"))
    }

    /// Returns a page of users, ordered by id.
    ///
    /// # Errors
    ///
    /// `NotPermitted` for a caller who is no administrator.
    pub async fn list_users(&self, page: &ListUsers) -> Result<UserPage, ManageError> {
        self.require_admin("list users")?;
        Ok(self.repository.list_users(page).await?)
    }

    /// Changes a user. Returns the user after the change.
    ///
    /// # Errors
    ///
    /// `NotFound`; `Conflict` if another user has the e-mail address; `Invalid`.
    pub async fn update_user(&self, id: &UserId, patch: &UserPatch) -> Result<User, ManageError> {
        self.require_admin("change users")?;
        let old = self.find_user(id).await?;
        let new = patch.apply(old.clone());
        if new == old {
            return Ok(old);
        }
        if new.email != old.email {
            validation::check_email(&new.email)?;
        }
        validation::check_role(&new.role)?;
        let changed = self.repository.update_user(&new, &self.by).await?;
        changed.map(|_| new).ok_or(ManageError::NotFound("user"))
    }

    /// Deactivates a user: all keys of the user are denied until the user is reactivated.
    ///
    /// # Errors
    ///
    /// The errors of [`update_user`](Self::update_user).
    pub async fn deactivate_user(&self, id: &UserId) -> Result<User, ManageError> {
        self.update_user(id, &UserPatch::default().active(false)).await
    }

    /// Activates a user that was deactivated.
    ///
    /// # Errors
    ///
    /// The errors of [`update_user`](Self::update_user).
    pub async fn reactivate_user(&self, id: &UserId) -> Result<User, ManageError> {
        self.update_user(id, &UserPatch::default().active(true)).await
    }

    /// Deletes a user who owns no keys. Deactivate a user who owns keys. Usage and audit are kept.
    ///
    /// # Errors
    ///
    /// `NotFound`; `Conflict` if the user owns keys.
    pub async fn delete_user(&self, id: &UserId) -> Result<(), ManageError> {
        self.require_admin("delete users")?;
        let deleted = self.repository.delete_user(id, &self.by).await?;
        deleted.map(|_| ()).ok_or(ManageError::NotFound("user"))
    }

    /// Mints a key in the scheme's first structured format and stores its hash. The key itself is available only from
    /// the returned value.
    ///
    /// # Errors
    ///
    /// `Conflict` if the user does not exist; `Invalid`; `ExceedsCeiling`; `Mint` if the scheme has no structured format
    /// or the operating system returns no random bytes.
    pub async fn issue(&self, new: NewKey) -> Result<IssuedKey, ManageError> {
        let mut record = new.record;
        record.created_by.clone_from(&self.by.actor);
        record.created_by_key.clone_from(&self.by.key);
        self.check(&record, None)?;
        let key = self.scheme.mint()?;
        key.lookup_id().clone_into(&mut record.prefix);
        let stored = StoredKey::new(record, key.hash().clone());
        let record = self.repository.insert_key(&stored, &self.by).await?;
        Ok(IssuedKey { record, key })
    }

    /// Returns a key.
    ///
    /// # Errors
    ///
    /// `NotFound`; `Store` with a `BadRow` if the key can't be decoded.
    pub async fn find(&self, id: &KeyId) -> Result<KeyRecord, ManageError> {
        Ok(self.stored(id).await?.record)
    }

    /// Returns a page of keys, ordered by id. The cost of a page does not depend on its position.
    ///
    /// # Errors
    ///
    /// `Store`.
    pub async fn list(&self, page: &ListKeys) -> Result<KeyPage, ManageError> {
        let page = page.clone();
        let filter = self.own(page.filter.clone());
        Ok(self.repository.list_keys(&ListKeys { filter, ..page }).await?)
    }

    /// Changes a key. Fields that the patch does not set are kept, also if another writer changes them at the same time.
    /// With `expected`, usually a record's [`revision`](KeyRecord::revision), the key is changed only if it still has that
    /// revision. Returns the key after the change.
    ///
    /// # Errors
    ///
    /// `NotFound`; `Conflict` with the current revision if the key has another one than `expected`; `Invalid`;
    /// `ExceedsCeiling`.
    pub async fn update(
        &self,
        id: &KeyId,
        patch: &KeyPatch,
        expected: Option<crate::record::Revision>,
    ) -> Result<KeyRecord, ManageError> {
        self.edit(id, expected, |old| {
            let record = patch.apply(old.record.clone());
            self.check(&record, Some(&old.record))?;
            Ok(StoredKey { record, ..old.clone() })
        })
        .await
    }

    /// Revokes a key. Revoking is idempotent. The audit contains the [reason](Self::reason).
    ///
    /// # Errors
    ///
    /// `NotFound`. If the store fails, the key may still be valid, or, after a timeout, be revoked a little later.
    pub async fn revoke(&self, id: &KeyId) -> Result<(), ManageError> {
        if self.caller.is_some() {
            self.stored(id).await?;
        }
        let revoked = self.repository.revoke_key(id, &self.by).await?;
        revoked.map(|_| ()).ok_or(ManageError::NotFound("key"))
    }

    /// Revokes all active keys that `filter` selects, in one transaction. Returns their ids.
    ///
    /// # Errors
    ///
    /// `Invalid` if the filter selects every key.
    pub async fn revoke_all(&self, filter: &KeyFilter) -> Result<Vec<KeyId>, ManageError> {
        if filter.is_empty() {
            return Err(ManageError::invalid("filter", "is empty: it would select every key"));
        }
        let filter = self.own(filter.clone());
        let revoked = self.repository.revoke_keys(&filter, &self.by).await?;
        Ok(revoked.into_iter().map(|(id, _)| id).collect())
    }

    /// Makes a revoked key active again.
    ///
    /// # Errors
    ///
    /// `NotFound`; `ExceedsCeiling`.
    pub async fn reactivate(&self, id: &KeyId) -> Result<KeyRecord, ManageError> {
        self.edit(id, None, |old| {
            let mut record = old.record.clone();
            record.is_active = true;
            record.revoked_at = None;
            record.revoked_by = None;
            record.revoke_reason = None;
            self.check_ceiling(&record)?;
            Ok(StoredKey { record, ..old.clone() })
        })
        .await
    }

    /// Deletes a key. Its usage and its audit are kept. Revoke a key if it may be needed again.
    ///
    /// # Errors
    ///
    /// `NotFound`.
    pub async fn delete(&self, id: &KeyId) -> Result<(), ManageError> {
        if self.caller.is_some() {
            self.stored(id).await?;
        }
        let deleted = self.repository.delete_key(id, &self.by).await?;
        deleted.map(|_| ()).ok_or(ManageError::NotFound("key"))
    }

    /// Returns the usage of a key on the days (UTC) from `from` to `to`, both included, ordered by day. Days without
    /// usage are left out.
    ///
    /// # Errors
    ///
    /// `NotFound` if the caller may not see the key. The usage of a deleted key is returned otherwise.
    pub async fn usage(
        &self,
        id: &KeyId,
        from: NaiveDate,
        to: NaiveDate,
    ) -> Result<Vec<DailyUsage>, ManageError> {
        if self.caller.is_some() {
            self.stored(id).await?;
        }
        Ok(self.repository.list_usage(id, from, to).await?)
    }

    /// Returns a page of the audit, the latest changes first.
    ///
    /// # Errors
    ///
    /// `Store`.
    pub async fn audit(&self, page: &ListAudit) -> Result<AuditPage, ManageError> {
        let page = match self.restricted_to() {
            Some(owner) => page.clone().user(owner.clone()),
            None => page.clone(),
        };
        Ok(self.repository.list_audit(&page).await?)
    }

    /// Deletes the entries of the audit from before a time. Returns their number.
    ///
    /// # Errors
    ///
    /// `NotPermitted` for a caller who is no administrator.
    pub async fn prune_audit(&self, before: DateTime<Utc>) -> Result<u64, ManageError> {
        self.require_admin("prune the audit")?;
        Ok(self.repository.prune_audit(before).await?)
    }
}
