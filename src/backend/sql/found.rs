//! What is stored under a lookup id: [`Found`].

use std::time::SystemTime;

use super::row;
use crate::{error::StoreError, record::Revision, store::StoredKey};

/// What a statement read under one lookup id, current or previous.
#[derive(Debug)]
pub(in crate::backend) struct Found {
    /// Time of the statement, by the clock of the database.
    pub(in crate::backend) as_of: SystemTime,
    /// Revision of the last change under the lookup id, including deleted keys.
    pub(in crate::backend) latest: Revision,
    pub(in crate::backend) rows: Vec<Texts>,
}

/// The texts of a key's columns.
pub(in crate::backend) type Texts = Vec<Option<String>>;

impl Found {
    /// Returns the keys, each or the reason why it can't be decoded.
    pub(in crate::backend) fn keys(self) -> impl Iterator<Item = Result<StoredKey, StoreError>> {
        self.rows.into_iter().map(row::decode_texts)
    }
}
