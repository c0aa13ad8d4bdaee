//! Edits of keys and users: [`KeyPatch`] and [`UserPatch`].

use chrono::{DateTime, Utc};
use serde_json::Value;

use crate::record::{AllowedNetwork, Budget, EndpointRule, KeyRecord, User};

/// An edit of a key. Fields that are not set are kept; `None` clears a limit, a budget or a time.
///
/// ```
/// use tower_api_key::management::KeyPatch;
///
/// let patch = KeyPatch::default().name("build server").per_minute(Some(600)).expires_at(None);
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct KeyPatch {
    name: Option<String>,
    description: Option<String>,
    permissions: Option<Vec<String>>,
    scopes: Option<Vec<String>>,
    per_minute: Option<Option<u64>>,
    per_hour: Option<Option<u64>>,
    per_day: Option<Option<u64>>,
    allowed_models: Option<Vec<String>>,
    allowed_endpoints: Option<Vec<EndpointRule>>,
    allowed_ips: Option<Vec<AllowedNetwork>>,
    is_unlimited: Option<bool>,
    budget: Option<Option<Budget>>,
    expires_at: Option<Option<DateTime<Utc>>>,
    not_before: Option<Option<DateTime<Utc>>>,
    metadata: Option<Value>,
}

impl KeyPatch {
    /// Sets the name.
    #[must_use]
    pub fn name(self, name: impl Into<String>) -> Self {
        Self { name: Some(name.into()), ..self }
    }

    /// Sets what the key is for.
    #[must_use]
    pub fn description(self, description: impl Into<String>) -> Self {
        Self { description: Some(description.into()), ..self }
    }

    /// Sets the permissions.
    #[must_use]
    pub fn permissions<T: Into<String>>(self, permissions: impl IntoIterator<Item = T>) -> Self {
        Self { permissions: Some(permissions.into_iter().map(Into::into).collect()), ..self }
    }

    /// Sets the scopes.
    #[must_use]
    pub fn scopes<T: Into<String>>(self, scopes: impl IntoIterator<Item = T>) -> Self {
        Self { scopes: Some(scopes.into_iter().map(Into::into).collect()), ..self }
    }

    /// Sets the number of requests per minute; `None` means unlimited.
    #[must_use]
    pub fn per_minute(self, requests: Option<u64>) -> Self {
        Self { per_minute: Some(requests), ..self }
    }

    /// Sets the number of requests per hour; `None` means unlimited.
    #[must_use]
    pub fn per_hour(self, requests: Option<u64>) -> Self {
        Self { per_hour: Some(requests), ..self }
    }

    /// Sets the number of requests per day; `None` means unlimited.
    #[must_use]
    pub fn per_day(self, requests: Option<u64>) -> Self {
        Self { per_day: Some(requests), ..self }
    }

    /// Sets the models that the key may use; empty allows all.
    #[must_use]
    pub fn allowed_models<T: Into<String>>(self, models: impl IntoIterator<Item = T>) -> Self {
        Self { allowed_models: Some(models.into_iter().map(Into::into).collect()), ..self }
    }

    /// Sets the endpoints that the key may call; empty allows all.
    #[must_use]
    pub fn allowed_endpoints(self, rules: impl IntoIterator<Item = EndpointRule>) -> Self {
        Self { allowed_endpoints: Some(rules.into_iter().collect()), ..self }
    }

    /// Sets the networks that the key may be used from; empty allows all.
    #[must_use]
    pub fn allowed_ips(self, networks: impl IntoIterator<Item = AllowedNetwork>) -> Self {
        Self { allowed_ips: Some(networks.into_iter().collect()), ..self }
    }

    /// Sets whether rate limits do not apply to the key.
    #[must_use]
    pub fn unlimited(self, is_unlimited: bool) -> Self {
        Self { is_unlimited: Some(is_unlimited), ..self }
    }

    /// Sets the budget; `None` means unlimited.
    #[must_use]
    pub fn budget(self, budget: Option<Budget>) -> Self {
        Self { budget: Some(budget), ..self }
    }

    /// Sets the expiry; `None` means that the key never expires.
    #[must_use]
    pub fn expires_at(self, expiry: Option<DateTime<Utc>>) -> Self {
        Self { expires_at: Some(expiry), ..self }
    }

    /// Sets the time before which the key is rejected.
    #[must_use]
    pub fn not_before(self, start: Option<DateTime<Utc>>) -> Self {
        Self { not_before: Some(start), ..self }
    }

    /// Sets the metadata; `null` removes it.
    #[must_use]
    pub fn metadata(self, metadata: Value) -> Self {
        Self { metadata: Some(metadata), ..self }
    }

    /// Returns whether the patch changes nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Returns the record after the edit.
    pub(super) fn apply(&self, mut record: KeyRecord) -> KeyRecord {
        set(&mut record.name, &self.name);
        set(&mut record.description, &self.description);
        set(&mut record.permissions, &self.permissions);
        set(&mut record.scopes, &self.scopes);
        set(&mut record.rate_limits.per_minute, &self.per_minute);
        set(&mut record.rate_limits.per_hour, &self.per_hour);
        set(&mut record.rate_limits.per_day, &self.per_day);
        set(&mut record.allowed_models, &self.allowed_models);
        set(&mut record.allowed_endpoints, &self.allowed_endpoints);
        set(&mut record.allowed_ips, &self.allowed_ips);
        set(&mut record.is_unlimited, &self.is_unlimited);
        set(&mut record.budget, &self.budget);
        set(&mut record.expires_at, &self.expires_at);
        set(&mut record.not_before, &self.not_before);
        set(&mut record.metadata, &self.metadata);
        record
    }
}

/// An edit of a user. Fields that are not set are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct UserPatch {
    email: Option<String>,
    role: Option<String>,
    is_active: Option<bool>,
}

impl UserPatch {
    /// Sets the e-mail address.
    #[must_use]
    pub fn email(self, email: impl Into<String>) -> Self {
        Self { email: Some(email.into()), ..self }
    }

    /// Sets the role.
    #[must_use]
    pub fn role(self, role: impl Into<String>) -> Self {
        Self { role: Some(role.into()), ..self }
    }

    /// Sets whether the user is active. Keys of an inactive user are denied.
    #[must_use]
    pub fn active(self, is_active: bool) -> Self {
        Self { is_active: Some(is_active), ..self }
    }

    pub(super) fn apply(&self, mut user: User) -> User {
        set(&mut user.email, &self.email);
        set(&mut user.role, &self.role);
        set(&mut user.is_active, &self.is_active);
        user
    }
}

fn set<T: Clone>(field: &mut T, value: &Option<T>) {
    if let Some(value) = value {
        field.clone_from(value);
    }
}
