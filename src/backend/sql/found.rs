//! What is stored under a lookup id: [`Found`], [`FoundKeys`].

use std::{error::Error, time::SystemTime};

use tokio_postgres::{
    Row,
    types::{FromSql, Type, accepts},
};

use super::row;
use crate::{error::StoreError, record::Revision, store::StoredKey};

/// What a statement read under one lookup id, current or previous.
#[derive(Debug)]
pub(in crate::backend) struct Found {
    /// Time of the statement, by the clock of the database.
    pub(in crate::backend) as_of: SystemTime,
    /// Revision of the last change under the lookup id, including deleted keys; 0 if it was not read.
    pub(in crate::backend) latest: Revision,
    pub(in crate::backend) rows: Vec<FoundRow>,
}

/// A row whose first column is the array of the texts that `row` decodes.
#[derive(Debug)]
pub(in crate::backend) struct FoundRow(Row);

/// The same, decoded.
pub(in crate::backend) struct FoundKeys {
    pub(in crate::backend) as_of: SystemTime,
    pub(in crate::backend) latest: Revision,
    /// Each key, or the reason why it can't be decoded.
    pub(in crate::backend) keys: Vec<Result<StoredKey, StoreError>>,
}

impl Found {
    /// Decodes the rows in the order of their ids, so that of two rows with one hash always the same is used.
    pub(in crate::backend) fn decode(self) -> FoundKeys {
        let Self { as_of, latest, mut rows } = self;
        if rows.len() > 1 {
            rows.sort_by_cached_key(FoundRow::id);
        }
        FoundKeys { as_of, latest, keys: rows.iter().map(FoundRow::key).collect() }
    }
}

impl FoundRow {
    /// `None` if the first column is NULL, because nothing was found.
    pub(in crate::backend) fn new(row: Row) -> Option<Self> {
        let found: Option<Present> = row.try_get(0).ok()?;
        found.map(|Present| Self(row))
    }

    pub(in crate::backend) fn key(&self) -> Result<StoredKey, StoreError> {
        row::decode_texts(self.texts())
    }

    pub(in crate::backend) fn id(&self) -> i64 {
        self.text("id").and_then(|id| id.parse().ok()).unwrap_or_default()
    }

    /// Returns the text of a column; `None` if it is NULL or not UTF-8.
    pub(in crate::backend) fn text(&self, column: &str) -> Option<&str> {
        let at = row::READ.iter().position(|(name, _)| *name == column)?;
        self.texts().get(at).copied().flatten().and_then(|text| str::from_utf8(text).ok())
    }

    /// Returns the texts; none if the column is not an array of texts, so that all columns are missing.
    fn texts(&self) -> Vec<Option<&[u8]>> {
        let texts: Vec<Option<Unchecked<'_>>> = self.0.try_get(0).unwrap_or_default();
        texts.into_iter().map(|text| text.map(|Unchecked(text)| text)).collect()
    }
}

/// A text that need not be UTF-8: one in a database without an encoding fails its column, not the whole result.
struct Unchecked<'a>(&'a [u8]);

impl<'a> FromSql<'a> for Unchecked<'a> {
    fn from_sql(_: &Type, text: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Self(text))
    }

    accepts!(TEXT);
}

/// A value other than NULL.
struct Present;

impl FromSql<'_> for Present {
    fn from_sql(_: &Type, _: &[u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Self)
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}
