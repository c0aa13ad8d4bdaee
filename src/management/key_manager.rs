//! Users and keys are made and revoked here: [`KeyManager`].

use std::fmt;

use chrono::{DateTime, Utc};
use serde_json::Value;

use crate::{
    error::StoreError,
    key::{KeyScheme, MintError, MintedKey},
    record::{AllowedNetwork, Budget, EndpointRule, KeyId, KeyRecord, RateLimits, User, UserId},
    store::{KeyRepository, StoredKey},
};

/// Makes users, issues keys and revokes them.
///
/// Give it the same [`KeyScheme`] as the layer, or the layer won't know its keys.
///
/// ```
/// use tower_api_key::{KeyManager, MemoryStore, NewKey};
///
/// # async fn run() -> Result<(), tower_api_key::ManageError> {
/// let manager = KeyManager::new(MemoryStore::new());
/// let user = manager.create_user("ada@example.com", "admin").await?;
/// let issued = manager.issue(NewKey::new(user.id, "laptop").scopes(["chat:write"])).await?;
/// println!("{}", issued.expose_secret());
/// manager.revoke(&issued.record().id).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct KeyManager<R> {
    repository: R,
    scheme: KeyScheme,
}

impl<R: KeyRepository> KeyManager<R> {
    /// A manager with the default scheme.
    pub fn new(repository: R) -> Self {
        Self { repository, scheme: KeyScheme::default() }
    }

    /// Sets the scheme in which keys are minted and hashed.
    #[must_use]
    pub fn scheme(self, scheme: KeyScheme) -> Self {
        Self { scheme, ..self }
    }

    /// Makes an active user.
    ///
    /// # Errors
    ///
    /// If the e-mail address is taken, or the store fails.
    pub async fn create_user(&self, email: &str, role: &str) -> Result<User, ManageError> {
        Ok(self.repository.insert_user(email, role).await?)
    }

    /// Makes a key in the scheme's first structured format and stores its hash. This is the only
    /// time that the key itself is seen.
    ///
    /// # Errors
    ///
    /// If the scheme has no structured format, there is no such user, the operating system has no
    /// random bytes, or the store fails.
    pub async fn issue(&self, new: NewKey) -> Result<IssuedKey, ManageError> {
        let key = self.scheme.mint()?;
        let record = KeyRecord { prefix: key.lookup_id().to_owned(), ..new.record };
        let stored = StoredKey::new(record, key.hash().clone());
        let record = self.repository.insert_key(&stored).await?;
        Ok(IssuedKey { record, key })
    }

    /// Makes a key useless, for good. Returns whether there is such a key.
    ///
    /// # Errors
    ///
    /// If the store fails. Then the key may still work, or, after a timeout, be revoked a little later.
    pub async fn revoke(&self, key: &KeyId) -> Result<bool, ManageError> {
        Ok(self.repository.revoke_key(key).await?.is_some())
    }
}

/// What a new key is to be: a name, and what it may do. Everything is allowed that is not said.
#[derive(Debug, Clone)]
pub struct NewKey {
    /// Without an id and a prefix.
    record: KeyRecord,
}

impl NewKey {
    /// A key for `user` that people call `name`.
    pub fn new(user: impl Into<UserId>, name: impl Into<String>) -> Self {
        let mut record = KeyRecord::new(0, "", User::new(user, ""));
        record.name = name.into();
        Self { record }
    }

    /// Sets the scopes.
    #[must_use]
    pub fn scopes<T: Into<String>>(mut self, scopes: impl IntoIterator<Item = T>) -> Self {
        self.record.scopes = scopes.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the permissions.
    #[must_use]
    pub fn permissions<T: Into<String>>(
        mut self,
        permissions: impl IntoIterator<Item = T>,
    ) -> Self {
        self.record.permissions = permissions.into_iter().map(Into::into).collect();
        self
    }

    /// Sets how often the key may be used.
    #[must_use]
    pub fn rate_limits(mut self, limits: RateLimits) -> Self {
        self.record.rate_limits = limits;
        self
    }

    /// Sets the models that the key may name.
    #[must_use]
    pub fn allowed_models<T: Into<String>>(mut self, models: impl IntoIterator<Item = T>) -> Self {
        self.record.allowed_models = models.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the endpoints that the key may call.
    #[must_use]
    pub fn allowed_endpoints(mut self, rules: impl IntoIterator<Item = EndpointRule>) -> Self {
        self.record.allowed_endpoints = rules.into_iter().collect();
        self
    }

    /// Sets the networks that the key may be used from.
    #[must_use]
    pub fn allowed_ips(mut self, networks: impl IntoIterator<Item = AllowedNetwork>) -> Self {
        self.record.allowed_ips = networks.into_iter().collect();
        self
    }

    /// Lets the key be used without rate limits.
    #[must_use]
    pub fn unlimited(mut self) -> Self {
        self.record.is_unlimited = true;
        self
    }

    /// Sets what the key may cost in a period.
    #[must_use]
    pub fn budget(mut self, budget: Budget) -> Self {
        self.record.budget = Some(budget);
        self
    }

    /// Sets the moment from which on the key is refused.
    #[must_use]
    pub fn expires_at(mut self, expiry: DateTime<Utc>) -> Self {
        self.record.expires_at = Some(expiry);
        self
    }

    /// Sets what is carried along with the key.
    #[must_use]
    pub fn metadata(mut self, metadata: Value) -> Self {
        self.record.metadata = metadata;
        self
    }
}

/// A key that was just made. `Debug` does not show it.
pub struct IssuedKey {
    record: KeyRecord,
    key: MintedKey,
}

impl IssuedKey {
    /// What was stored.
    pub fn record(&self) -> &KeyRecord {
        &self.record
    }

    /// The key itself, to be shown to its owner once.
    pub fn expose_secret(&self) -> &str {
        self.key.expose_secret()
    }
}

impl fmt::Debug for IssuedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IssuedKey").field("record", &self.record).finish_non_exhaustive()
    }
}

/// Why a user or a key could not be made or changed.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ManageError {
    /// No key could be made.
    Mint(MintError),
    /// The store failed or refused.
    Store(StoreError),
}

impl From<MintError> for ManageError {
    fn from(error: MintError) -> Self {
        Self::Mint(error)
    }
}

impl From<StoreError> for ManageError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl fmt::Display for ManageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mint(error) => error.fmt(f),
            Self::Store(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for ManageError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Mint(error) => Some(error),
            Self::Store(error) => Some(error),
        }
    }
}
