//! Creates and revokes users and keys: [`KeyManager`].

use std::fmt;

use chrono::{DateTime, Utc};
use serde_json::Value;

use crate::{
    error::StoreError,
    key::{KeyScheme, MintError, MintedKey},
    record::{AllowedNetwork, Budget, EndpointRule, KeyId, KeyRecord, RateLimits, User, UserId},
    store::{KeyRepository, StoredKey},
};

/// Creates users, and issues and revokes keys.
///
/// Use the same [`KeyScheme`] as the layer; otherwise the layer does not accept the keys.
///
/// ```
/// use tower_api_key::{KeyManager, MemoryStore, NewKey};
///
/// # async fn run() -> Result<(), tower_api_key::management::ManageError> {
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
    /// Creates a manager with the default scheme.
    pub fn new(repository: R) -> Self {
        Self { repository, scheme: KeyScheme::default() }
    }

    /// Sets the scheme with which keys are minted and hashed.
    #[must_use]
    pub fn scheme(self, scheme: KeyScheme) -> Self {
        Self { scheme, ..self }
    }

    /// Creates an active user.
    ///
    /// # Errors
    ///
    /// Returns an error if the e-mail address is taken, or the store fails.
    pub async fn create_user(&self, email: &str, role: &str) -> Result<User, ManageError> {
        Ok(self.repository.insert_user(email, role).await?)
    }

    /// Mints a key in the scheme's first structured format and stores its hash. The key itself is available only from
    /// the returned value.
    ///
    /// # Errors
    ///
    /// Returns an error if the scheme has no structured format, the user does not exist, the operating system
    /// provides no random bytes, or the store fails.
    pub async fn issue(&self, new: NewKey) -> Result<IssuedKey, ManageError> {
        let key = self.scheme.mint()?;
        let record = KeyRecord { prefix: key.lookup_id().to_owned(), ..new.record };
        let stored = StoredKey::new(record, key.hash().clone());
        let record = self.repository.insert_key(&stored).await?;
        Ok(IssuedKey { record, key })
    }

    /// Revokes a key permanently. Returns whether the key exists.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails. The key may then still be valid, or, after a timeout, be revoked a little
    /// later.
    pub async fn revoke(&self, key: &KeyId) -> Result<bool, ManageError> {
        Ok(self.repository.revoke_key(key).await?.is_some())
    }
}

/// Settings of a new key. Settings that are not set allow everything.
#[derive(Debug, Clone)]
pub struct NewKey {
    /// Record without an id and a lookup id.
    record: KeyRecord,
}

impl NewKey {
    /// Creates the settings of a key for `user` with the display name `name`.
    pub fn new(user: impl Into<UserId>, name: impl Into<String>) -> Self {
        let mut record = KeyRecord::new(0, "", User::new(user, ""));
        record.name = name.into();
        Self { record }
    }

    /// Sets the scopes of the key.
    #[must_use]
    pub fn scopes<T: Into<String>>(mut self, scopes: impl IntoIterator<Item = T>) -> Self {
        self.record.scopes = scopes.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the permissions of the key.
    #[must_use]
    pub fn permissions<T: Into<String>>(
        mut self,
        permissions: impl IntoIterator<Item = T>,
    ) -> Self {
        self.record.permissions = permissions.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the rate limits, in requests per minute, hour and day.
    #[must_use]
    pub fn rate_limits(mut self, limits: RateLimits) -> Self {
        self.record.rate_limits = limits;
        self
    }

    /// Sets the models that the key may use.
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

    /// Sets the networks from which the key may be used.
    #[must_use]
    pub fn allowed_ips(mut self, networks: impl IntoIterator<Item = AllowedNetwork>) -> Self {
        self.record.allowed_ips = networks.into_iter().collect();
        self
    }

    /// Disables the rate limits of the key.
    #[must_use]
    pub fn unlimited(mut self) -> Self {
        self.record.is_unlimited = true;
        self
    }

    /// Sets the budget of the key in each period.
    #[must_use]
    pub fn budget(mut self, budget: Budget) -> Self {
        self.record.budget = Some(budget);
        self
    }

    /// Sets the time from which on the key is denied.
    #[must_use]
    pub fn expires_at(mut self, expiry: DateTime<Utc>) -> Self {
        self.record.expires_at = Some(expiry);
        self
    }

    /// Sets the time before which the key is denied.
    #[must_use]
    pub fn not_before(mut self, start: DateTime<Utc>) -> Self {
        self.record.not_before = Some(start);
        self
    }

    /// Sets the metadata that is stored with the key.
    #[must_use]
    pub fn metadata(mut self, metadata: Value) -> Self {
        self.record.metadata = metadata;
        self
    }
}

/// Newly issued key. `Debug` does not show the key itself.
pub struct IssuedKey {
    record: KeyRecord,
    key: MintedKey,
}

impl IssuedKey {
    /// Returns the stored record.
    pub fn record(&self) -> &KeyRecord {
        &self.record
    }

    /// Returns the key itself, which is shown to its owner once.
    pub fn expose_secret(&self) -> &str {
        self.key.expose_secret()
    }
}

impl fmt::Debug for IssuedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IssuedKey").field("record", &self.record).finish_non_exhaustive()
    }
}

/// Reason for which a user or a key could not be created or changed.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ManageError {
    /// No key could be minted.
    Mint(MintError),
    /// The store failed or rejected the change.
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
