//! Selection of keys: [`KeyFilter`].

use chrono::{DateTime, Utc};

use crate::record::{KeyId, KeyRecord, UserId};

/// Selects keys. A key is selected if it meets every condition that is set; the default selects all keys.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeyFilter {
    /// Keys of this user.
    pub owner: Option<UserId>,
    /// Keys that were revoked (`false`), or were not (`true`).
    pub is_active: Option<bool>,
    /// Keys that expire before this time.
    pub expires_before: Option<DateTime<Utc>>,
    /// Keys whose current secret was not used from this time on.
    pub unused_since: Option<DateTime<Utc>>,
    /// Keys that were created before this time.
    pub created_before: Option<DateTime<Utc>>,
    /// Keys whose name or description contains this text. ASCII letters match in both cases.
    pub contains: Option<String>,
    /// Keys that have exactly this scope in their list.
    pub scope: Option<String>,
    /// Keys that were created with this key.
    pub created_by_key: Option<KeyId>,
    /// Keys whose lookup id starts with this text.
    pub prefix: Option<String>,
}

impl KeyFilter {
    /// Selects keys of one user.
    #[must_use]
    pub fn owner(self, owner: impl Into<UserId>) -> Self {
        Self { owner: Some(owner.into()), ..self }
    }

    /// Selects keys that were not revoked.
    #[must_use]
    pub fn active(self) -> Self {
        Self { is_active: Some(true), ..self }
    }

    /// Selects keys that were revoked.
    #[must_use]
    pub fn revoked(self) -> Self {
        Self { is_active: Some(false), ..self }
    }

    /// Selects keys that expire before a time.
    #[must_use]
    pub fn expires_before(self, time: DateTime<Utc>) -> Self {
        Self { expires_before: Some(time), ..self }
    }

    /// Selects keys whose current secret was not used from a time on.
    #[must_use]
    pub fn unused_since(self, time: DateTime<Utc>) -> Self {
        Self { unused_since: Some(time), ..self }
    }

    /// Selects keys that were created before a time.
    #[must_use]
    pub fn created_before(self, time: DateTime<Utc>) -> Self {
        Self { created_before: Some(time), ..self }
    }

    /// Selects keys whose name or description contains a text.
    #[must_use]
    pub fn contains(self, text: impl Into<String>) -> Self {
        Self { contains: Some(text.into()), ..self }
    }

    /// Selects keys that have exactly this scope in their list.
    #[must_use]
    pub fn scope(self, scope: impl Into<String>) -> Self {
        Self { scope: Some(scope.into()), ..self }
    }

    /// Selects keys that were created with one key.
    #[must_use]
    pub fn created_by_key(self, key: impl Into<KeyId>) -> Self {
        Self { created_by_key: Some(key.into()), ..self }
    }

    /// Selects keys whose lookup id starts with a text.
    #[must_use]
    pub fn prefix(self, prefix: impl Into<String>) -> Self {
        Self { prefix: Some(prefix.into()), ..self }
    }

    /// Returns whether the filter selects every key.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Returns whether the filter selects a key.
    pub fn selects(&self, key: &KeyRecord) -> bool {
        let contains = |text: &String| {
            let text = text.to_ascii_lowercase();
            [&key.name, &key.description].iter().any(|it| it.to_ascii_lowercase().contains(&text))
        };
        self.owner.as_ref().is_none_or(|owner| key.user.id == *owner)
            && self.is_active.is_none_or(|is_active| key.is_active == is_active)
            && self.expires_before.is_none_or(|time| key.expires_at.is_some_and(|it| it < time))
            && self.unused_since.is_none_or(|time| key.last_used_at.is_none_or(|it| it < time))
            && self.created_before.is_none_or(|time| key.created_at < time)
            && self.contains.as_ref().is_none_or(contains)
            && self.scope.as_ref().is_none_or(|scope| key.scopes.contains(scope))
            && self.created_by_key.as_ref().is_none_or(|it| key.created_by_key.as_ref() == Some(it))
            && self.prefix.as_ref().is_none_or(|prefix| key.prefix.starts_with(prefix))
    }
}
