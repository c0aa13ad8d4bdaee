//! Import of keys of another service, of which only the hashes are known.

use super::{error::ManageError, key_manager::KeyManager, new_key::ImportedKey, validation};
use crate::store::{Inserted, KeyRepository, StoredKey};

/// Result of the import of one key.
#[derive(Debug)]
#[non_exhaustive]
pub enum Imported {
    /// The key was stored.
    Stored,
    /// The same hash is already stored under the lookup id, for example by an earlier import.
    Duplicate,
    /// The key was not stored.
    Rejected(ManageError),
}

impl<R: KeyRepository> KeyManager<R> {
    /// Stores keys of another service, in one transaction. A key that is stored already is skipped, so that an import
    /// that was interrupted can be repeated. Import some thousand keys per call.
    ///
    /// Keys with bcrypt hashes keep working in the format of the other service, which the [`KeyScheme`] must accept
    /// ([`KeyFormat::first_chars`]). Returns for each key what became of it, in the order of `keys`.
    ///
    /// [`KeyScheme`]: crate::KeyScheme
    /// [`KeyFormat::first_chars`]: crate::key::KeyFormat::first_chars
    ///
    /// # Errors
    ///
    /// `Store`. No key is then stored, or, after a timeout, all of them are stored a little later.
    pub async fn import(
        &self,
        keys: impl IntoIterator<Item = ImportedKey> + Send,
    ) -> Result<Vec<Imported>, ManageError> {
        let checked: Vec<_> = keys.into_iter().map(|key| self.checked(key)).collect();
        let accepted: Vec<_> =
            checked.iter().filter_map(|key| key.as_ref().ok()).cloned().collect();
        let mut inserted = self.repository.insert_keys(&accepted, &self.by).await?.into_iter();
        let outcome = |key: Result<StoredKey, ManageError>| match key {
            Err(error) => Imported::Rejected(error),
            Ok(_) => match inserted.next() {
                Some(Inserted::Stored) => Imported::Stored,
                Some(Inserted::Duplicate) => Imported::Duplicate,
                _ => Imported::Rejected(ManageError::NotFound("user")),
            },
        };
        Ok(checked.into_iter().map(outcome).collect())
    }

    /// Returns what [`import`](Self::import) would store of a key, without storing it.
    ///
    /// # Errors
    ///
    /// `Invalid`; `ExceedsCeiling`.
    pub fn check_import(&self, key: &ImportedKey) -> Result<(), ManageError> {
        self.checked(key.clone()).map(|_| ())
    }

    fn checked(&self, key: ImportedKey) -> Result<StoredKey, ManageError> {
        let ImportedKey { mut record, hash } = key;
        validation::check_lookup_id(&record.prefix)?;
        record.created_by.clone_from(&self.by.actor);
        record.created_by_key.clone_from(&self.by.key);
        // A key of another service may have expired.
        self.check(&record, Some(&record))?;
        Ok(StoredKey::new(record, hash))
    }
}
