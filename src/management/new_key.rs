//! Settings of new keys: [`NewKey`] and [`ImportedKey`].

use std::fmt;

use chrono::{DateTime, Utc};
use serde_json::Value;

use crate::{
    key::{KeyHash, MintedKey},
    record::{
        AllowedNetwork, Budget, EndpointRule, GracePeriod, KeyRecord, RateLimits, User, UserId,
    },
    store::import_lane,
};

/// Settings of a new key. Settings that are not set allow everything.
#[derive(Debug, Clone)]
pub struct NewKey {
    /// Record without an id and a lookup id.
    pub(super) record: KeyRecord,
}

impl NewKey {
    /// Creates the settings of a key for `user` with the display name `name`.
    pub fn new(user: impl Into<UserId>, name: impl Into<String>) -> Self {
        let mut record = KeyRecord::new(0, "", User::new(user, ""));
        record.name = name.into();
        Self { record }
    }

    /// Creates the settings of a key for `user` with the display name `name` and everything that `template` allows:
    /// scopes, permissions, allow-lists, limits, budget, start, expiry, description and metadata.
    pub fn from_template(
        template: &KeyRecord,
        user: impl Into<UserId>,
        name: impl Into<String>,
    ) -> Self {
        let Self { record } = Self::new(user, name);
        Self {
            record: KeyRecord {
                id: record.id,
                prefix: record.prefix,
                name: record.name,
                user: record.user,
                is_active: record.is_active,
                usage: record.usage,
                last_used_at: record.last_used_at,
                grace: record.grace,
                created_by: record.created_by,
                created_by_key: record.created_by_key,
                revoked_at: record.revoked_at,
                revoked_by: record.revoked_by,
                revoke_reason: record.revoke_reason,
                created_at: record.created_at,
                updated_at: record.updated_at,
                revision: record.revision,
                ..template.clone()
            },
        }
    }

    /// Sets what the key is for, for people.
    #[must_use]
    pub fn description(mut self, description: impl Into<String>) -> Self {
        self.record.description = description.into();
        self
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

/// A key of another service, of which only the hash is known.
///
/// ```
/// use tower_api_key::{NewKey, key::KeyHash, management::ImportedKey};
///
/// let hash: KeyHash = "$2b$12$K9q0lq1oU9hQ4n5u0mQ3UuXyV0b3h7i1c2Zs8w9y0A1B2C3D4E5F6".parse()?;
/// let key = ImportedKey::new(NewKey::new(7, "laptop"), "a1b2c3d4", hash);
/// # Ok::<(), tower_api_key::key::HashError>(())
/// ```
#[derive(Debug, Clone)]
pub struct ImportedKey {
    pub(super) record: KeyRecord,
    pub(super) hash: KeyHash,
}

impl ImportedKey {
    /// Creates a key with the lookup id and the hash that the other service stored.
    pub fn new(key: NewKey, lookup_id: impl Into<String>, hash: KeyHash) -> Self {
        let mut record = key.record;
        record.prefix = lookup_id.into();
        Self { record, hash }
    }

    /// Returns the lane of the key, below `lanes`, which is at most 16: a hash of the lookup id.
    ///
    /// Imports of keys with the same lookup id wait for each other. To import a large file in concurrent calls of
    /// [`KeyManager::import`], divide its keys by lane.
    ///
    /// [`KeyManager::import`]: crate::KeyManager::import
    pub fn lane(&self, lanes: usize) -> usize {
        usize::from(import_lane(&self.record.prefix)) % lanes.max(1)
    }

    /// Sets that the key is imported as revoked.
    #[must_use]
    pub fn revoked(mut self) -> Self {
        self.record.is_active = false;
        self
    }
}

/// How a key is rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rotation {
    /// Time in which the previous secret is still accepted: 24 hours by default; 0 ends it at once.
    pub grace: std::time::Duration,
    /// Whether a grace period that has not ended is ended, and its secret rejected from now on. Otherwise the rotation is
    /// a conflict.
    pub ends_previous: bool,
}

impl Default for Rotation {
    fn default() -> Self {
        Self { grace: std::time::Duration::from_secs(24 * 3600), ends_previous: false }
    }
}

impl Rotation {
    /// Sets the time in which the previous secret is still accepted.
    #[must_use]
    pub fn grace(self, grace: std::time::Duration) -> Self {
        Self { grace, ..self }
    }

    /// Ends a grace period that has not ended yet, instead of failing with a conflict.
    #[must_use]
    pub fn end_previous(self) -> Self {
        Self { ends_previous: true, ..self }
    }
}

/// A key that was just issued or rotated. `Debug` does not show the key itself.
pub struct IssuedKey {
    pub(super) record: KeyRecord,
    pub(super) key: MintedKey,
}

impl IssuedKey {
    /// Returns the stored record.
    pub fn record(&self) -> &KeyRecord {
        &self.record
    }

    /// Returns the grace period of the previous secret, if there is one.
    pub fn grace(&self) -> Option<&GracePeriod> {
        self.record.grace.as_ref()
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
