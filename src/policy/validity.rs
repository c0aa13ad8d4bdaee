//! The validity rule: whether a key may be used at a given moment.

use chrono::{DateTime, Utc};

use crate::{
    denial::InvalidKey,
    record::{KeyRecord, Secret},
};

/// Returns the first reason for which the key is not valid at `now`, in the order in which users check them: the key
/// itself, its owner, its expiry, its start, the grace period of its previous secret. A key is expired from `expires_at`
/// on, and valid from `not_before` on.
pub(crate) fn validity(
    record: &KeyRecord,
    secret: Secret,
    now: DateTime<Utc>,
) -> Result<(), InvalidKey> {
    if !record.is_active {
        return Err(InvalidKey::Revoked);
    }
    if !record.user.is_active {
        return Err(InvalidKey::OwnerInactive);
    }
    if record.expires_at.is_some_and(|expiry| now >= expiry) {
        return Err(InvalidKey::Expired);
    }
    if record.not_before.is_some_and(|start| now < start) {
        return Err(InvalidKey::NotYetValid);
    }
    let is_graced = || record.grace.as_ref().is_some_and(|grace| now < grace.ends_at);
    if secret == Secret::Previous && !is_graced() {
        return Err(InvalidKey::Rotated);
    }
    Ok(())
}
