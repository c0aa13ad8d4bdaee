//! A key with its hash: [`StoredKey`].

use crate::{
    key::KeyHash,
    record::{KeyRecord, Revisions},
};

/// A key as it lies in a store: the record, the hash that a presented key is checked against, and
/// the revisions of the two rows it was read from.
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
    /// A key that matches whatever `hash` was made from.
    pub fn new(record: KeyRecord, hash: KeyHash) -> Self {
        Self { record, hash, upgraded: None, revisions: Revisions::default() }
    }

    /// Adds the revisions of the rows that this was read from, that of the key to the record as well.
    #[must_use]
    pub fn with_revisions(mut self, revisions: Revisions) -> Self {
        self.record.revision = revisions.key;
        Self { revisions, ..self }
    }

    /// Adds the fast hash that an earlier check stored beside the bcrypt hash. The store must have
    /// made sure that it was derived from the `key_hash` that stands in the row now.
    #[must_use]
    pub fn with_upgrade(self, fast: KeyHash) -> Self {
        Self { upgraded: Some(fast), ..self }
    }

    /// What is known of the key.
    pub fn record(&self) -> &KeyRecord {
        &self.record
    }

    /// The hash at rest.
    pub fn hash(&self) -> &KeyHash {
        &self.hash
    }
}
