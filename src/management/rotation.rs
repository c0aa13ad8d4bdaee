//! Rotation: a new secret for a key, and a grace period for the previous one.

use std::sync::Mutex;

use chrono::{DateTime, TimeDelta, Utc};

use super::{
    error::ManageError,
    key_manager::KeyManager,
    new_key::{IssuedKey, Rotation},
};
use crate::{
    key::MintedKey,
    record::{GracePeriod, KeyId, KeyRecord},
    store::{KeyRepository, SecretHash, StoredKey},
};

impl<R: KeyRepository> KeyManager<R> {
    /// Gives a key a new secret. Id, limits, budget and usage are kept, and so is the lookup id of a structured key. A key
    /// in a legacy format becomes a structured one, with a new lookup id. The previous secret is accepted until the end of
    /// the grace period.
    ///
    /// # Errors
    ///
    /// `NotFound`; `Conflict` if the key is revoked, or if the grace period of an earlier rotation has not ended (see
    /// [`Rotation::end_previous`]); `ExceedsCeiling`, because the caller gets the new secret; `Mint`.
    pub async fn rotate(&self, id: &KeyId, how: Rotation) -> Result<IssuedKey, ManageError> {
        let minted = Mutex::new(None);
        let record = self
            .edit(id, None, |old| {
                self.check_ceiling(&old.record)?;
                check_rotation(&old.record, how, self.now())?;
                let key = self.scheme.mint_again(&old.record.prefix, &old.hash)?;
                let new = rotated(old, &key, how, self.now());
                if let Ok(mut minted) = minted.lock() {
                    *minted = Some(key);
                }
                Ok(new)
            })
            .await?;
        let key = minted.into_inner().ok().flatten();
        let key = key.ok_or_else(|| ManageError::conflict("the key was not rotated"))?;
        Ok(IssuedKey { record, key })
    }

    /// Ends the grace period of the previous secret at once. A key without a grace period is not changed.
    ///
    /// # Errors
    ///
    /// `NotFound`.
    pub async fn end_grace(&self, id: &KeyId) -> Result<KeyRecord, ManageError> {
        self.edit(id, None, |old| {
            let mut new = old.clone();
            new.record.grace = None;
            new.previous = None;
            Ok(new)
        })
        .await
    }
}

fn check_rotation(
    record: &KeyRecord,
    how: Rotation,
    now: DateTime<Utc>,
) -> Result<(), ManageError> {
    if !record.is_active {
        return Err(ManageError::conflict("the key is revoked: reactivate it first"));
    }
    let running = record.grace.as_ref().filter(|grace| now < grace.ends_at);
    match running {
        Some(grace) if !how.ends_previous => Err(ManageError::conflict(format!(
            "the grace period of the last rotation ends at {}: end it first",
            grace.ends_at.to_rfc3339_opts(chrono::SecondsFormat::Secs, true)
        ))),
        _ => Ok(()),
    }
}

/// Returns the key with the new secret. The secret that was the current one becomes the previous one.
fn rotated(old: &StoredKey, key: &MintedKey, how: Rotation, now: DateTime<Utc>) -> StoredKey {
    let mut record = old.record.clone();
    let grace = TimeDelta::from_std(how.grace).unwrap_or(TimeDelta::MAX);
    let ends_at = now.checked_add_signed(grace).unwrap_or(DateTime::<Utc>::MAX_UTC);
    record.grace = (!how.grace.is_zero()).then(|| GracePeriod {
        last_used_at: record.last_used_at,
        ..GracePeriod::new(&*record.prefix, ends_at)
    });
    key.lookup_id().clone_into(&mut record.prefix);
    record.last_used_at = None;
    let previous = SecretHash { hash: old.hash.clone(), upgraded: old.upgraded.clone() };
    StoredKey {
        hash: key.hash().clone(),
        upgraded: None,
        previous: record.grace.is_some().then_some(previous),
        revisions: old.revisions,
        record,
    }
}
