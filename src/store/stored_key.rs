//! A key with its hash: [`StoredKey`].

use crate::{
    key::KeyHash,
    record::{KeyRecord, Revisions},
};

/// A stored key: the record, the hash that a presented key is checked against, and the revisions of the two rows it was
/// read from.
///
/// `Debug` shows no hash.
#[derive(Debug, Clone)]
pub struct StoredKey {
    pub(crate) record: KeyRecord,
    pub(crate) hash: KeyHash,
    pub(crate) upgraded: Option<KeyHash>,
    pub(crate) revisions: Revisions,
}

impl StoredKey {
    /// Creates a key that matches the key from which `hash` was made.
    pub fn new(record: KeyRecord, hash: KeyHash) -> Self {
        Self { record, hash, upgraded: None, revisions: Revisions::default() }
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

    /// Returns the record.
    pub fn record(&self) -> &KeyRecord {
        &self.record
    }

    /// Returns the stored hash.
    pub fn hash(&self) -> &KeyHash {
        &self.hash
    }
}
