//! Reads of many keys at once, for a copy of all keys: [`KeySelection`] and [`KeysRead`].

use std::time::SystemTime;

use super::stored_key::StoredKey;
use crate::{
    error::StoreError,
    record::{KeyId, Revision, User},
};

/// Selects the keys that [`KeyStore::read_keys`](super::KeyStore::read_keys) returns.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeySelection {
    /// A page of all keys, ordered by id.
    Page {
        /// Selects only the keys after this one: the last key of the previous page.
        after: Option<KeyId>,
        /// Maximum number of keys. A page with fewer keys is the last one.
        limit: u32,
    },
    /// All keys under these lookup ids, current or previous; at most nine for each of them.
    Under(Vec<String>),
}

/// Keys as one read of a store returned them. The read may be from several snapshots, but not from before it was sent.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct KeysRead {
    /// The rows of the keys: in a page, ordered by id.
    pub rows: Vec<ReadRow>,
    /// For [`KeySelection::Under`]: the revision of the last change under each of the lookup ids, including deleted
    /// keys.
    pub latest: Vec<(String, Revision)>,
    /// The database's time when the read was sent.
    pub as_of: SystemTime,
}

/// A key's row, joined with that of its owner.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ReadRow {
    /// The key's id.
    pub id: KeyId,
    /// The lookup ids of the key: of its current secret, and of its previous one if it has another.
    pub lookup_ids: Vec<String>,
    /// The key; an error of the kind `BadRow` if the row can't be decoded.
    pub key: Result<StoredKey, StoreError>,
}

/// A user, and the revision of its row.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReadOwner {
    /// The user.
    pub user: User,
    /// The revision of the last change of the user.
    pub revision: Revision,
    /// The revision at which a user that had the same id before was deleted; 0 if there was none. Keys below it belonged
    /// to that user.
    pub since: Revision,
}

impl KeysRead {
    /// Creates the result of a read that was sent at `as_of`, without revisions of lookup ids.
    pub fn new(rows: Vec<ReadRow>, as_of: SystemTime) -> Self {
        Self { rows, latest: Vec::new(), as_of }
    }

    /// Sets the revision of the last change under each of the lookup ids.
    #[must_use]
    pub fn with_latest(self, latest: Vec<(String, Revision)>) -> Self {
        Self { latest, ..self }
    }
}

impl ReadRow {
    /// Creates the row of a key that could be decoded.
    pub fn new(key: StoredKey) -> Self {
        let lookup_ids = key.lookup_ids().map(str::to_owned).collect();
        Self { id: key.record.id.clone(), lookup_ids, key: Ok(key) }
    }

    /// Creates a row that can't be decoded.
    pub fn unreadable(
        id: impl Into<KeyId>,
        lookup_ids: impl IntoIterator<Item = String>,
        error: StoreError,
    ) -> Self {
        Self { id: id.into(), lookup_ids: lookup_ids.into_iter().collect(), key: Err(error) }
    }
}

impl ReadOwner {
    /// Creates a user with the revision of its row.
    pub fn new(user: User, revision: Revision) -> Self {
        Self { user, revision, since: Revision(0) }
    }

    /// Sets the revision at which an earlier user with the same id was deleted.
    #[must_use]
    pub fn with_since(self, since: Revision) -> Self {
        Self { since, ..self }
    }
}
