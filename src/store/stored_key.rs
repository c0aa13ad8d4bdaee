//! A key with its hash: [`StoredKey`].

use std::time::{Duration, SystemTime};

use super::answer::HashUpgrade;
use crate::{
    key::KeyHash,
    record::{GracePeriod, KeyRecord, Revisions, Secret},
};

/// A stored key: the record, the hash that a presented key is checked against, and the revisions of the two rows it was
/// read from.
///
/// `Debug` shows no hash.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredKey {
    pub(crate) record: KeyRecord,
    pub(crate) hash: KeyHash,
    pub(crate) upgraded: Option<KeyHash>,
    pub(crate) revisions: Revisions,
    /// The previous secret. Its grace period is in the record.
    pub(crate) previous: Option<SecretHash>,
}

/// The stored hashes of one secret. `Debug` shows none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SecretHash {
    pub(crate) hash: KeyHash,
    pub(crate) upgraded: Option<KeyHash>,
}

/// One secret of a stored key, which a presented key is checked against.
#[derive(Debug, Clone)]
pub(crate) struct StoredSecret {
    pub(crate) record: KeyRecord,
    pub(crate) secret: Secret,
    pub(crate) hashes: SecretHash,
    pub(crate) revisions: Revisions,
}

/// Time for which a previous secret is checked after its grace period.
const ENDED_SECRETS_LISTED: Duration = Duration::from_secs(24 * 3600);

impl StoredKey {
    /// Returns the secrets under a lookup id that may match at `now`: the current one, and the previous one until a day
    /// after its grace period. The two may have different lookup ids. An ended secret that matches is denied as rotated,
    /// which ends when a clock that was ahead is corrected; a denial as unknown would not.
    pub(crate) fn secrets_under(
        self,
        id: &str,
        now: SystemTime,
    ) -> impl Iterator<Item = StoredSecret> {
        let Self { record, hash, upgraded, revisions, previous } = self;
        let is_previous = record.grace.as_ref().is_some_and(|grace| grace.prefix == id);
        let is_listed = |grace: &GracePeriod| is_listed(grace, now);
        let previous =
            previous.filter(|_| is_previous && record.grace.as_ref().is_some_and(is_listed));
        let previous = previous.map(|hashes| StoredSecret {
            record: record.clone(),
            secret: Secret::Previous,
            hashes,
            revisions,
        });
        let is_current = record.prefix == id || !is_previous;
        let hashes = SecretHash { hash, upgraded };
        let current = StoredSecret { record, secret: Secret::Current, hashes, revisions };
        is_current.then_some(current).into_iter().chain(previous)
    }

    /// Returns whether a secret of the key is under a lookup id at `now`, as
    /// [`secrets_under`](Self::secrets_under) defines it.
    pub(crate) fn is_listed_under(&self, id: &str, now: SystemTime) -> bool {
        let is_previous = |grace: &GracePeriod| {
            grace.prefix == id && is_listed(grace, now) && self.previous.is_some()
        };
        self.record.prefix == id || self.record.grace.as_ref().is_some_and(is_previous)
    }

    /// Stores the fast hash beside the slow hash that it was derived from, if the key still has that one.
    pub(crate) fn store_upgrade(&mut self, upgrade: &HashUpgrade) {
        if self.hash == upgrade.checked {
            self.upgraded = Some(upgrade.fast.clone());
        }
        if let Some(previous) = self.previous.as_mut().filter(|it| it.hash == upgrade.checked) {
            previous.upgraded = Some(upgrade.fast.clone());
        }
    }

    /// Returns whether a secret of the key has this lookup id and this hash.
    pub(crate) fn has_hash(&self, id: &str, hash: &KeyHash) -> bool {
        let has_previous =
            |grace: &GracePeriod| grace.prefix == id && self.previous_hash() == Some(hash);
        (self.record.prefix == id && self.hash == *hash)
            || self.record.grace.as_ref().is_some_and(has_previous)
    }

    /// Returns the lookup ids of the key: that of the current secret, and that of the previous one if it differs.
    pub(crate) fn lookup_ids(&self) -> impl Iterator<Item = &str> {
        let current = self.record.prefix.as_str();
        let previous = self.record.grace.as_ref().map(|grace| grace.prefix.as_str());
        [Some(current), previous.filter(|previous| *previous != current)].into_iter().flatten()
    }

    /// Creates a key that matches the key from which `hash` was made.
    pub fn new(record: KeyRecord, hash: KeyHash) -> Self {
        Self { record, hash, upgraded: None, revisions: Revisions::default(), previous: None }
    }

    /// Adds the revisions of the rows that the key was read from. The record gets that of the key as well.
    #[must_use]
    pub fn with_revisions(mut self, revisions: Revisions) -> Self {
        self.record.revision = revisions.key;
        Self { revisions, ..self }
    }

    /// Adds the fast hash that an earlier check stored beside the bcrypt hash. The store must ensure that it was
    /// derived from the current `key_hash` of the row.
    #[must_use]
    pub fn with_upgrade(self, fast: KeyHash) -> Self {
        Self { upgraded: Some(fast), ..self }
    }

    /// Adds the hash of the previous secret, with the fast hash that an earlier check stored beside it. It is accepted
    /// until the end of [`KeyRecord::grace`], and never without a grace period.
    #[must_use]
    pub fn with_previous(self, hash: KeyHash, upgraded: Option<KeyHash>) -> Self {
        Self { previous: Some(SecretHash { hash, upgraded }), ..self }
    }

    /// Returns the hash of the previous secret.
    pub fn previous_hash(&self) -> Option<&KeyHash> {
        self.previous.as_ref().map(|previous| &previous.hash)
    }

    /// Returns the revisions of the rows that the key was read from.
    pub fn revisions(&self) -> Revisions {
        self.revisions
    }

    /// Returns the record.
    pub fn record(&self) -> &KeyRecord {
        &self.record
    }

    /// Replaces the record, for an edit. Hashes and revisions are kept.
    #[must_use]
    pub fn with_record(self, record: KeyRecord) -> Self {
        Self { record, ..self }
    }

    /// Returns the record, without the hashes.
    pub fn into_record(self) -> KeyRecord {
        self.record
    }

    /// Returns the stored hash.
    pub fn hash(&self) -> &KeyHash {
        &self.hash
    }
}

/// Returns whether the previous secret is still checked at `now`.
fn is_listed(grace: &GracePeriod, now: SystemTime) -> bool {
    now.duration_since(grace.ends_at.into()).unwrap_or_default() < ENDED_SECRETS_LISTED
}
