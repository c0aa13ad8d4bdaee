//! The stored data of a key: [`KeyRecord`] and its [`User`].

use std::{fmt, sync::Arc};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{endpoint_rule::EndpointRule, network::AllowedNetwork};

/// The data of a key, without its hash.
///
/// The fields are public, so that a custom store can set those that it has. [`KeyRecord::new`] creates an active key
/// that allows everything and never expires.
///
/// ```
/// use tower_api_key::record::{KeyRecord, User};
///
/// let mut record = KeyRecord::new(1, "a1b2c3d4e5", User::new(7, "a@b.c"));
/// record.scopes = vec!["chat:write".into()];
/// record.allowed_endpoints = vec!["POST /v1/chat".parse()?];
/// # Ok::<(), tower_api_key::record::EndpointRuleError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct KeyRecord {
    /// The key's id. It does not change on rotation.
    pub id: KeyId,
    /// The name of the key, for people.
    pub name: String,
    /// What the key is for, for people.
    pub description: String,
    /// The public lookup id (column `key_prefix`). It is not secret, and appears in lists and logs.
    pub prefix: String,
    /// Whether the key has not been revoked.
    pub is_active: bool,
    /// Permissions of the holder, defined by the service.
    pub permissions: Vec<String>,
    /// Permissions of the holder as OAuth-style scopes.
    pub scopes: Vec<String>,
    /// Rate limits of the key.
    pub rate_limits: RateLimits,
    /// The models that the key may use; empty allows all.
    pub allowed_models: Vec<String>,
    /// The endpoints that the key may call; empty allows all.
    pub allowed_endpoints: Vec<EndpointRule>,
    /// The networks that the key may be used from; empty allows all.
    pub allowed_ips: Vec<AllowedNetwork>,
    /// Whether rate limits do not apply to the key.
    pub is_unlimited: bool,
    /// Budget of the key; `None` means unlimited.
    pub budget: Option<Budget>,
    /// Time from which the key is rejected, by the clock of the node that checks it; `None` means that it never
    /// expires.
    pub expires_at: Option<DateTime<Utc>>,
    /// Time before which the key is rejected, by the same clock; `None` means that it is valid from its creation.
    pub not_before: Option<DateTime<Utc>>,
    /// Usage of the key at the time of the read.
    pub usage: UsageTotals,
    /// When the current secret was last used, in steps of a minute.
    pub last_used_at: Option<DateTime<Utc>>,
    /// The grace period of the previous secret; `None` if the key was not rotated, or the period was ended.
    pub grace: Option<GracePeriod>,
    /// The actor who created the key, for example an e-mail address.
    pub created_by: Option<String>,
    /// The key with which the actor created this key.
    pub created_by_key: Option<KeyId>,
    /// When the key was revoked; `None` if it was not, or if it was revoked by a statement that does not set this.
    pub revoked_at: Option<DateTime<Utc>>,
    /// The actor who revoked the key.
    pub revoked_by: Option<String>,
    /// Why the key was revoked.
    pub revoke_reason: Option<String>,
    /// When the key was created.
    pub created_at: DateTime<Utc>,
    /// When the row was last changed.
    pub updated_at: DateTime<Utc>,
    /// The revision of the row that this was read from; 0 if the store has no revisions. An update can require it.
    #[serde(default)]
    pub revision: Revision,
    /// Additional data of the service; `null` if there is none.
    pub metadata: Value,
    /// The owner of the key.
    pub user: User,
}

impl KeyRecord {
    /// Creates an active key that allows everything, never expires and has the Unix epoch as its creation time.
    pub fn new(id: impl Into<KeyId>, prefix: impl Into<String>, user: User) -> Self {
        Self {
            id: id.into(),
            name: String::new(),
            description: String::new(),
            prefix: prefix.into(),
            is_active: true,
            permissions: Vec::new(),
            scopes: Vec::new(),
            rate_limits: RateLimits::default(),
            allowed_models: Vec::new(),
            allowed_endpoints: Vec::new(),
            allowed_ips: Vec::new(),
            is_unlimited: false,
            budget: None,
            expires_at: None,
            not_before: None,
            usage: UsageTotals::default(),
            last_used_at: None,
            grace: None,
            created_by: None,
            created_by_key: None,
            revoked_at: None,
            revoked_by: None,
            revoke_reason: None,
            created_at: DateTime::UNIX_EPOCH,
            updated_at: DateTime::UNIX_EPOCH,
            revision: Revision(0),
            metadata: Value::Null,
            user,
        }
    }
}

/// The grace period after a rotation, in which the previous secret is still accepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct GracePeriod {
    /// The lookup id of the previous secret. It differs from the key's own if the key was in a legacy format.
    pub prefix: String,
    /// Time from which the previous secret is rejected, by the clock of the node that checks it.
    pub ends_at: DateTime<Utc>,
    /// When the previous secret was last used, in steps of a minute.
    pub last_used_at: Option<DateTime<Utc>>,
}

impl GracePeriod {
    /// Creates the grace period of a secret with the lookup id `prefix`, which was never used.
    pub fn new(prefix: impl Into<String>, ends_at: DateTime<Utc>) -> Self {
        Self { prefix: prefix.into(), ends_at, last_used_at: None }
    }
}

/// One of the secrets of a key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Secret {
    /// The secret of the last rotation, or of the creation of the key.
    #[default]
    Current,
    /// The secret before the last rotation, in its grace period.
    Previous,
}

/// The owner of a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct User {
    /// The owner's id.
    pub id: UserId,
    /// The owner's e-mail address.
    pub email: String,
    /// The owner's role, defined by the service; `user` by default.
    pub role: String,
    /// Whether the owner is active. Keys of an inactive owner are denied.
    pub is_active: bool,
}

impl User {
    /// Creates an active user with the role `user`.
    pub fn new(id: impl Into<UserId>, email: impl Into<String>) -> Self {
        Self { id: id.into(), email: email.into(), role: "user".to_owned(), is_active: true }
    }
}

/// Rate limits of a key. `None` means unlimited, and 0 allows no request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RateLimits {
    /// Requests per minute.
    pub per_minute: Option<u64>,
    /// Requests per hour.
    pub per_hour: Option<u64>,
    /// Requests per day.
    pub per_day: Option<u64>,
}

impl RateLimits {
    /// Sets the number of requests per minute.
    ///
    /// ```
    /// use tower_api_key::{NewKey, record::RateLimits};
    ///
    /// let limits = RateLimits::default().per_minute(60).per_day(10_000);
    /// let key = NewKey::new(1, "trial").rate_limits(limits);
    /// ```
    #[must_use]
    pub fn per_minute(self, requests: u64) -> Self {
        Self { per_minute: Some(requests), ..self }
    }

    /// Sets the number of requests per hour.
    #[must_use]
    pub fn per_hour(self, requests: u64) -> Self {
        Self { per_hour: Some(requests), ..self }
    }

    /// Sets the number of requests per day.
    #[must_use]
    pub fn per_day(self, requests: u64) -> Self {
        Self { per_day: Some(requests), ..self }
    }
}

/// The maximum cost of a key in a period.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    /// The limit, in cents (column `budget_limit_cents`).
    pub limit_cents: u64,
    /// The period of the limit (column `budget_type`).
    pub period: BudgetPeriod,
}

/// The period of a [`Budget`], in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum BudgetPeriod {
    /// The whole life of the key.
    Total,
    /// A calendar day.
    Daily,
    /// A week, from Monday.
    Weekly,
    /// A calendar month.
    Monthly,
}

impl BudgetPeriod {
    const NAMES: [(&str, Self); 4] = [
        ("total", Self::Total),
        ("daily", Self::Daily),
        ("weekly", Self::Weekly),
        ("monthly", Self::Monthly),
    ];

    /// Returns the period with this name in the column `budget_type`. Upper and lower case are equal.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|&(_, p)| p)
    }

    /// Returns the name of the period in the column `budget_type`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Total => "total",
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
        }
    }
}

/// Total usage of a key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct UsageTotals {
    /// Number of requests.
    pub requests: u64,
    /// Number of tokens.
    pub tokens: u64,
    /// Cost in micro-cents, which are millionths of a cent (the column `total_cost` is in cents).
    pub cost_micro_cents: i64,
}

/// A number that a database assigns to a row on every change of a column that a decision reads. A larger number is
/// later. It is 0 if the store has no revisions.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Revision(pub u64);

/// The revisions of the rows behind an answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Revisions {
    /// The highest revision of the key rows under the lookup id.
    pub key: Revision,
    /// The revision of the owner's row.
    pub owner: Revision,
}

macro_rules! opaque_id {
    ($(#[$docs:meta])* $name:ident) => {
        $(#[$docs])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(Id);

        impl $name {
            /// Returns the id as an integer, if it is one. Ids of the bundled schema always are.
            pub fn as_i64(&self) -> Option<i64> {
                match self.0 {
                    Id::Integer(id) => Some(id),
                    Id::Text(_) => None,
                }
            }
        }

        impl From<i64> for $name {
            fn from(id: i64) -> Self {
                Self(Id::Integer(id))
            }
        }

        impl From<&str> for $name {
            fn from(id: &str) -> Self {
                Self(Id::Text(id.into()))
            }
        }

        impl From<String> for $name {
            fn from(id: String) -> Self {
                Self(Id::Text(id.into()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match &self.0 {
                    Id::Integer(id) => fmt::Display::fmt(id, f),
                    Id::Text(id) => fmt::Display::fmt(id, f),
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(untagged)]
enum Id {
    Integer(i64),
    Text(Arc<str>),
}

opaque_id! {
    /// A key's id: an integer in the bundled schema, an integer or a text in yours.
    KeyId
}
opaque_id! {
    /// A user's id: an integer in the bundled schema, an integer or a text in yours.
    UserId
}
