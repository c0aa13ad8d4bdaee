//! The audit of changes: [`AuditEntry`].

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::stored_key::StoredKey;
use crate::record::{KeyId, KeyRecord, User, UserId};

/// A recorded change of a key or a user. It contains no hash and no secret.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct AuditEntry {
    /// Position in the audit. A later change has a higher one.
    pub id: i64,
    /// Time of the change, by the clock of the store.
    pub at: DateTime<Utc>,
    /// What was done.
    pub action: AuditAction,
    /// The actor; `None` for a statement that was not made by a [`KeyManager`](crate::KeyManager).
    pub actor: Option<String>,
    /// The key with which the actor made the change.
    pub actor_key: Option<KeyId>,
    /// The role of the database under which the statement ran; `None` if the store has no roles.
    pub database_role: Option<String>,
    /// The changed key; `None` for a change of a user.
    pub key: Option<KeyId>,
    /// The changed user, or the owner of the changed key.
    pub user: Option<UserId>,
    /// The row before the change; `None` for a new row.
    pub before: Option<Value>,
    /// The row after the change; `None` for a deleted row.
    pub after: Option<Value>,
    /// Why the change was made.
    pub reason: Option<String>,
    /// The id of the request that made the change.
    pub request_id: Option<String>,
}

/// What was done to a key or a user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum AuditAction {
    /// A key was issued or imported.
    Issue,
    /// Fields of a key were changed.
    Update,
    /// A key got a new secret.
    Rotate,
    /// The grace period of a previous secret was ended.
    EndGrace,
    /// A key was revoked.
    Revoke,
    /// A revoked key was made active again.
    Reactivate,
    /// A key was deleted.
    Delete,
    /// A user was created.
    CreateUser,
    /// Fields of a user were changed.
    UpdateUser,
    /// A user was deleted.
    DeleteUser,
    /// All rows of a table were deleted by `TRUNCATE`.
    Truncate,
}

impl AuditAction {
    const NAMES: [(&str, Self); 11] = [
        ("issue", Self::Issue),
        ("update", Self::Update),
        ("rotate", Self::Rotate),
        ("end_grace", Self::EndGrace),
        ("revoke", Self::Revoke),
        ("reactivate", Self::Reactivate),
        ("delete", Self::Delete),
        ("create_user", Self::CreateUser),
        ("update_user", Self::UpdateUser),
        ("delete_user", Self::DeleteUser),
        ("truncate", Self::Truncate),
    ];

    /// Returns the name of the action in the column `action`.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, action)| *action == self).map_or("", |(name, _)| name)
    }

    /// Returns the action with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, action)| *action)
    }
}

impl AuditAction {
    /// Returns the action that turns `old` into `new`. The triggers of the SQL stores have the same rule.
    pub(crate) fn of_edit(old: &StoredKey, new: &StoredKey) -> Self {
        match (old.record.is_active, new.record.is_active) {
            _ if old.hash != new.hash => Self::Rotate,
            (true, false) => Self::Revoke,
            (false, true) => Self::Reactivate,
            _ if old.record.grace.is_some() && new.record.grace.is_none() => Self::EndGrace,
            _ => Self::Update,
        }
    }
}

/// Returns a key as the audit contains it: under the names of the columns, without hashes, usage and the times of use.
pub(crate) fn audited_key(key: &KeyRecord) -> Value {
    json!({
        "id": key.id,
        "user_id": key.user.id,
        "key_prefix": key.prefix,
        "previous_key_prefix": key.grace.as_ref().map(|grace| &grace.prefix),
        "previous_expires_at": key.grace.as_ref().map(|grace| grace.ends_at),
        "name": key.name,
        "description": key.description,
        "is_active": key.is_active,
        "permissions": key.permissions,
        "scopes": key.scopes,
        "rate_limit_per_minute": key.rate_limits.per_minute,
        "rate_limit_per_hour": key.rate_limits.per_hour,
        "rate_limit_per_day": key.rate_limits.per_day,
        "allowed_models": key.allowed_models,
        "allowed_endpoints": key.allowed_endpoints,
        "allowed_ips": key.allowed_ips,
        "is_unlimited": key.is_unlimited,
        "budget_limit_cents": key.budget.map(|budget| budget.limit_cents),
        "budget_type": key.budget.map(|budget| budget.period.name()),
        "expires_at": key.expires_at,
        "not_before": key.not_before,
        "metadata": key.metadata,
        "created_by": key.created_by,
        "created_by_key": key.created_by_key,
        "revoked_at": key.revoked_at,
        "revoked_by": key.revoked_by,
        "revoke_reason": key.revoke_reason,
    })
}

/// Returns a user as the audit contains it.
pub(crate) fn audited_user(user: &User) -> Value {
    json!({ "id": user.id, "email": user.email, "role": user.role, "is_active": user.is_active })
}

/// Selects the entries of the audit to list, the latest first.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListAudit {
    /// Lists only changes of this key.
    pub key: Option<KeyId>,
    /// Lists only changes of this user and of this user's keys.
    pub user: Option<UserId>,
    /// Lists only changes by this actor.
    pub actor: Option<String>,
    /// Lists only changes from this time on.
    pub since: Option<DateTime<Utc>>,
    /// Lists only changes before this time.
    pub until: Option<DateTime<Utc>>,
    /// Lists only entries with a lower id: [`AuditPage::next`] of the previous page.
    pub before: Option<i64>,
    /// Maximum number of entries: 100 by default.
    pub limit: u32,
}

impl Default for ListAudit {
    fn default() -> Self {
        Self {
            key: None,
            user: None,
            actor: None,
            since: None,
            until: None,
            before: None,
            limit: 100,
        }
    }
}

impl ListAudit {
    /// Lists only changes of one key.
    #[must_use]
    pub fn key(self, key: impl Into<KeyId>) -> Self {
        Self { key: Some(key.into()), ..self }
    }

    /// Lists only changes of one user and of this user's keys.
    #[must_use]
    pub fn user(self, user: impl Into<UserId>) -> Self {
        Self { user: Some(user.into()), ..self }
    }

    /// Lists only changes by one actor.
    #[must_use]
    pub fn actor(self, actor: impl Into<String>) -> Self {
        Self { actor: Some(actor.into()), ..self }
    }

    /// Lists only changes from this time on.
    #[must_use]
    pub fn since(self, time: DateTime<Utc>) -> Self {
        Self { since: Some(time), ..self }
    }

    /// Lists only changes before this time.
    #[must_use]
    pub fn until(self, time: DateTime<Utc>) -> Self {
        Self { until: Some(time), ..self }
    }

    /// Lists only entries with a lower id: [`AuditPage::next`] of the previous page.
    #[must_use]
    pub fn before(self, id: i64) -> Self {
        Self { before: Some(id), ..self }
    }

    /// Sets the maximum number of entries.
    #[must_use]
    pub fn limit(self, entries: u32) -> Self {
        Self { limit: entries, ..self }
    }

    /// Returns whether the entry is selected, apart from the limit.
    pub(crate) fn selects(&self, entry: &AuditEntry) -> bool {
        self.key.as_ref().is_none_or(|key| entry.key.as_ref() == Some(key))
            && self.user.as_ref().is_none_or(|user| entry.user.as_ref() == Some(user))
            && self.actor.as_ref().is_none_or(|actor| entry.actor.as_ref() == Some(actor))
            && self.since.is_none_or(|since| entry.at >= since)
            && self.until.is_none_or(|until| entry.at < until)
            && self.before.is_none_or(|before| entry.id < before)
    }
}

/// A page of the audit, the latest entries first.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct AuditPage {
    /// The entries.
    pub entries: Vec<AuditEntry>,
    /// The value of [`ListAudit::before`] for the next page; `None` on the last page.
    pub next: Option<i64>,
}

impl AuditPage {
    /// Builds a page from entries in descending order, which are one more than the limit if there are that many.
    pub fn from_entries(list: &ListAudit, entries: impl IntoIterator<Item = AuditEntry>) -> Self {
        let limit = usize::try_from(list.limit).unwrap_or(usize::MAX);
        let mut entries: Vec<_> = entries.into_iter().take(limit.saturating_add(1)).collect();
        let has_more = entries.len() > limit;
        entries.truncate(limit);
        let next = entries.last().filter(|_| has_more).map(|last| last.id);
        Self { entries, next }
    }
}
