//! What a caller with a key may manage: [`Caller`], and the checks of each change.

use super::{error::ManageError, key_manager::KeyManager, validation};
use crate::{
    error::StoreErrorKind,
    policy::{GrantableOwners, ceiling},
    record::{KeyId, KeyRecord, Revision, UserId},
    store::{KeyFilter, KeyRepository, StoredKey},
};

/// The key with which the changes are made.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    key: KeyRecord,
    is_admin: bool,
}

/// Maximum number of attempts of an edit that needs no revision, if other writers change the key at the same time.
const ATTEMPTS: usize = 10;

impl Caller {
    pub(super) fn new(key: KeyRecord, admin_role: &str) -> Self {
        let is_admin = key.user.role == admin_role;
        Self { key, is_admin }
    }
}

impl<R: KeyRepository> KeyManager<R> {
    /// Returns the only user whose keys the caller may see; `None` if the caller may see all.
    pub(super) fn restricted_to(&self) -> Option<&UserId> {
        self.caller.as_ref().filter(|it| !it.is_admin).map(|it| &it.key.user.id)
    }

    /// Returns whether the caller may see a user and the user's keys.
    pub(super) fn sees(&self, owner: &UserId) -> bool {
        self.restricted_to().is_none_or(|own| own == owner)
    }

    /// Restricts a filter to the keys that the caller may see.
    pub(super) fn own(&self, filter: KeyFilter) -> KeyFilter {
        match (self.restricted_to(), &filter.owner) {
            (None, _) => filter,
            // No key has two owners: the id of a user who does not exist.
            (Some(own), Some(other)) if own != other => filter.owner(-1),
            (Some(own), _) => filter.owner(own.clone()),
        }
    }

    pub(super) fn require_admin(&self, what: &'static str) -> Result<(), ManageError> {
        match self.restricted_to() {
            None => Ok(()),
            Some(_) => Err(ManageError::NotPermitted(what)),
        }
    }

    /// Checks the fields of a record that is about to be stored, and the ceiling.
    pub(super) fn check(
        &self,
        record: &KeyRecord,
        old: Option<&KeyRecord>,
    ) -> Result<(), ManageError> {
        validation::check_record(record, old, self.now())?;
        self.check_ceiling(record)
    }

    /// Checks that a key grants at most what the caller's key has.
    pub(super) fn check_ceiling(&self, record: &KeyRecord) -> Result<(), ManageError> {
        let Some(caller) = &self.caller else { return Ok(()) };
        let owners = match caller.is_admin {
            true => GrantableOwners::Any,
            false => GrantableOwners::Own,
        };
        Ok(ceiling(&caller.key, record, owners, self.now())?)
    }

    /// Returns a key that the caller may see.
    pub(super) async fn stored(&self, id: &KeyId) -> Result<StoredKey, ManageError> {
        let found = self.repository.find_key(id).await?;
        found.filter(|key| self.sees(&key.record.user.id)).ok_or(ManageError::NotFound("key"))
    }

    /// Reads a key, edits it, and stores it if it was not changed in the meantime. Without `expected`, the edit is
    /// repeated on the changed key.
    pub(super) async fn edit(
        &self,
        id: &KeyId,
        expected: Option<Revision>,
        edit: impl Fn(&StoredKey) -> Result<StoredKey, ManageError> + Send,
    ) -> Result<KeyRecord, ManageError> {
        let mut attempt = 1;
        loop {
            let old = self.stored(id).await?;
            let current = old.record.revision;
            if expected.is_some_and(|expected| expected != current) {
                let message = "the key was changed after it was read".to_owned();
                return Err(ManageError::Conflict { message, current: Some(current) });
            }
            let new = edit(&old)?;
            if new == old {
                return Ok(old.record);
            }
            match self.repository.replace_key(&old, &new, &self.by).await {
                Ok(replaced) => return replaced.ok_or(ManageError::NotFound("key")),
                Err(error) if error.kind() == StoreErrorKind::Conflict && attempt < ATTEMPTS => {
                    attempt += 1;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}
