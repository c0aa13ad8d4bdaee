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

/// The texts of a key's columns, as bytes: diesel fails the whole result if one is not UTF-8.
pub(in crate::backend) type Texts = Vec<Option<Vec<u8>>>;

impl Found {
    /// Returns the keys, each or the reason why it can't be decoded.
    pub(in crate::backend) fn keys(self) -> impl Iterator<Item = Result<StoredKey, StoreError>> {
        self.rows.into_iter().map(decode)
    }
}

fn decode(texts: Texts) -> Result<StoredKey, StoreError> {
    let id = texts.first().cloned().flatten().unwrap_or_default();
    let text = |bytes: Option<Vec<u8>>| bytes.map(String::from_utf8).transpose();
    let texts: Result<_, _> = texts.into_iter().map(text).collect();
    row::decode_texts(texts.map_err(|_| {
        let id = String::from_utf8_lossy(&id);
        StoreError::bad_row(format!("api_keys row {id} is not UTF-8"))
    })?)
}
