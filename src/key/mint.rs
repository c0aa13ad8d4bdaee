//! New keys: [`MintedKey`].

use std::fmt;

use super::{hash::KeyHash, presented::PresentedKey, scheme::KeyScheme};

/// A key that was just created by [`KeyScheme::mint`], with what a store keeps of it: its lookup id and its hash.
///
/// `Debug` shows only the lookup id.
#[derive(Clone)]
pub struct MintedKey {
    key: PresentedKey,
    hash: KeyHash,
}

impl MintedKey {
    /// Returns the key itself. Show it to its owner once, and never store it.
    pub fn expose_secret(&self) -> &str {
        self.key.expose_secret()
    }

    /// Returns the public lookup id, by which a store finds the key (column `key_prefix`).
    pub fn lookup_id(&self) -> &str {
        self.key.id()
    }

    /// Returns the hash for the store: HMAC-SHA-256 if the scheme has a pepper, otherwise SHA-256.
    pub fn hash(&self) -> &KeyHash {
        &self.hash
    }
}

impl KeyScheme {
    /// Creates a key in the scheme's first structured format, for a custom store. It stores nothing:
    /// [`KeyManager::issue`](crate::KeyManager::issue) creates and stores a key in a
    /// [`KeyRepository`](crate::store::KeyRepository).
    ///
    /// ```
    /// use std::{collections::HashMap, sync::RwLock};
    /// use tower_api_key::{
    ///     KeyScheme, StoreError,
    ///     key::{KeyHash, MintError},
    ///     record::{KeyRecord, User},
    ///     store::{Answer, KeyStore, Lookup, StoredKey},
    /// };
    ///
    /// /// Owners and hashes by lookup id.
    /// #[derive(Default)]
    /// struct Keys(RwLock<HashMap<String, (User, KeyHash)>>);
    ///
    /// impl Keys {
    ///     /// Creates a key for `owner` and returns it. It can't be shown again.
    ///     fn issue(&self, scheme: &KeyScheme, owner: User) -> Result<String, MintError> {
    ///         let minted = scheme.mint()?;
    ///         let mut keys = self.0.write().unwrap_or_else(|poisoned| poisoned.into_inner());
    ///         keys.insert(minted.lookup_id().to_owned(), (owner, minted.hash().clone()));
    ///         Ok(minted.expose_secret().to_owned())
    ///     }
    /// }
    ///
    /// impl KeyStore for Keys {
    ///     async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
    ///         let found = {
    ///             let keys = self.0.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    ///             keys.get(lookup.id()).cloned()
    ///         };
    ///         let stored = found.map(|(owner, hash)| {
    ///             StoredKey::new(KeyRecord::new(lookup.id(), lookup.id(), owner), hash)
    ///         });
    ///         lookup.verify(stored).await
    ///     }
    /// }
    ///
    /// let keys = Keys::default();
    /// let key = keys.issue(&KeyScheme::default(), User::new(7, "ada@example.com"))?;
    /// assert!(key.starts_with("tak_live_"));
    /// # Ok::<(), MintError>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If the scheme has no structured format, or the operating system returns no random bytes.
    pub fn mint(&self) -> Result<MintedKey, MintError> {
        self.mint_under(None)
    }

    /// Creates a new secret for a key with this lookup id and hash. A key in a legacy format gets a new lookup id.
    pub(crate) fn mint_again(&self, id: &str, hash: &KeyHash) -> Result<MintedKey, MintError> {
        self.mint_under(Some(id).filter(|_| !hash.is_slow()))
    }

    fn mint_under(&self, id: Option<&str>) -> Result<MintedKey, MintError> {
        let key = self.generate(id).ok_or(MintError::NoMintableFormat)?;
        let key = key.map_err(|_| MintError::NoRandomness)?;
        let hash = self.fast_hash(&key).ok_or(MintError::NoMintableFormat)?;
        Ok(MintedKey { key, hash })
    }
}

impl fmt::Debug for MintedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MintedKey").field("lookup_id", &self.lookup_id()).finish_non_exhaustive()
    }
}

/// The reason why a key can't be minted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MintError {
    /// The scheme has no structured format.
    NoMintableFormat,
    /// The operating system returned no random bytes.
    NoRandomness,
}

impl fmt::Display for MintError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoMintableFormat => "the key scheme has no structured format to mint keys in",
            Self::NoRandomness => "the operating system returned no random bytes",
        })
    }
}

impl std::error::Error for MintError {}
