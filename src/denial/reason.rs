//! Reasons for which a request is denied: [`Denial`].

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use chrono::{DateTime, Utc};
use http::StatusCode;

use super::{MalformedCredential, UnrecognizedKey};
use crate::{
    error::{StoreError, StoreErrorKind},
    record::Quota,
};

/// Reason for which a request is denied.
///
/// It is an outcome, not an error, though a handler can return it with `?`. The [module](crate::denial) lists the responses.
///
/// `Display` contains all details, for logs. Callers get fewer details (see
/// [`ApiKeyAuthLayer::verbose`](crate::ApiKeyAuthLayer::verbose)). Every response to a denied request has its denial
/// in the extensions, for trace layers.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Denial {
    /// The request has no credential: 401 without an error code (RFC 6750 §3.1).
    MissingCredential,
    /// The credential breaks the grammar: 400 `invalid_request`.
    MalformedCredential(MalformedCredential),
    /// The credential is not a valid key: 401 `invalid_token`.
    InvalidKey(InvalidKey),
    /// The key is valid, but does not allow this request: 403.
    Forbidden(Forbidden),
    /// A rate limit is used up: 429, with the remaining requests of each window in the response fields.
    RateLimited(Box<Quota>),
    /// The remaining budget of the period is smaller than the reservation: 429, with the time at which the period
    /// ends.
    BudgetExceeded(BudgetExceeded),
    /// The store is unavailable or overloaded: 503.
    Unavailable(StoreError),
    /// The key's row can't be decoded: 500.
    BadRow(StoreError),
    /// The key store, or the authenticator's settings, lack a capability that the handler requires, such as budget
    /// leases: 500. Retrying does not help.
    Unsupported(StoreError),
    /// A handler requires an [`AuthContext`](crate::AuthContext), but no auth layer wraps it: 500.
    LayerMissing,
}

/// Reason for which a key is not valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum InvalidKey {
    /// The credential is not a key of an accepted format.
    Unrecognized(UnrecognizedKey),
    /// There is no such key.
    Unknown,
    /// A key with this lookup id exists, but its secret is another one.
    WrongSecret,
    /// The key was revoked.
    Revoked,
    /// The key has expired.
    Expired,
    /// The key is not valid yet: its `not_before` is in the future.
    NotYetValid,
    /// The key was rotated, and the grace period of the presented secret has ended.
    Rotated,
    /// The owner of the key is not active.
    OwnerInactive,
}

/// Details of [`Denial::BudgetExceeded`]: when the budget resets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct BudgetExceeded {
    /// Time at which the period ends; `None` for a budget that never resets.
    pub resets_at: Option<SystemTime>,
    /// Time from the denial until the period ends.
    pub wait: Option<Duration>,
}

/// Reason for which a request with a valid key is denied.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Forbidden {
    /// The key may not call this endpoint.
    Endpoint,
    /// The key may not be used from this address, or the address is unknown.
    Address,
    /// The key may not use this model.
    Model(String),
    /// The key does not have this scope.
    Scope(String),
    /// The key does not have this permission.
    Permission(String),
    /// The owner does not have this role.
    Role(String),
}

impl Denial {
    /// Returns the HTTP status.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::MalformedCredential(_) => StatusCode::BAD_REQUEST,
            Self::MissingCredential | Self::InvalidKey(_) => StatusCode::UNAUTHORIZED,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::RateLimited(_) | Self::BudgetExceeded(_) => StatusCode::TOO_MANY_REQUESTS,
            Self::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::BadRow(_) | Self::Unsupported(_) | Self::LayerMissing => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
        }
    }

    /// Returns the error code of RFC 6750 §3.1, if it defines one for this denial.
    pub fn error_code(&self) -> Option<&'static str> {
        match self {
            Self::MalformedCredential(_) => Some("invalid_request"),
            Self::InvalidKey(_) => Some("invalid_token"),
            Self::Forbidden(Forbidden::Scope(_)) => Some("insufficient_scope"),
            _ => None,
        }
    }

    /// Returns how long the caller should wait before it retries; `None` if retrying does not help.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited(quota) => Some(quota.retry_after()),
            Self::BudgetExceeded(budget) => budget.wait,
            Self::Unavailable(error) => Some(error.retry_after()),
            _ => None,
        }
    }

    /// Returns a sentence that is safe for the caller: it contains neither the reason for which a key is not valid
    /// nor details of the store. The default response has it as `detail`, and gRPC as message.
    pub fn detail(&self) -> String {
        match self {
            Self::InvalidKey(_) => "the API key is not valid".to_owned(),
            Self::Unavailable(_) => {
                "API keys can't be checked right now; try again later".to_owned()
            }
            Self::BadRow(_) | Self::Unsupported(_) | Self::LayerMissing => {
                "internal error".to_owned()
            }
            _ => self.to_string(),
        }
    }

    /// Returns the sentence of [`detail`](Self::detail), with the reason for which a key is not valid.
    pub(crate) fn verbose_detail(&self) -> String {
        if let Self::InvalidKey(_) = self { self.to_string() } else { self.detail() }
    }
}

impl From<StoreError> for Denial {
    fn from(error: StoreError) -> Self {
        match error.kind() {
            StoreErrorKind::BadRow => Self::BadRow(error),
            StoreErrorKind::Unsupported => Self::Unsupported(error),
            _ => Self::Unavailable(error),
        }
    }
}

impl From<InvalidKey> for Denial {
    fn from(reason: InvalidKey) -> Self {
        Self::InvalidKey(reason)
    }
}

impl From<UnrecognizedKey> for Denial {
    fn from(reason: UnrecognizedKey) -> Self {
        Self::InvalidKey(InvalidKey::Unrecognized(reason))
    }
}

impl From<MalformedCredential> for Denial {
    fn from(reason: MalformedCredential) -> Self {
        Self::MalformedCredential(reason)
    }
}

impl From<Forbidden> for Denial {
    fn from(reason: Forbidden) -> Self {
        Self::Forbidden(reason)
    }
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MissingCredential => f.write_str("an API key is required"),
            Self::MalformedCredential(reason) => reason.fmt(f),
            Self::InvalidKey(reason) => reason.fmt(f),
            Self::Forbidden(reason) => reason.fmt(f),
            Self::RateLimited(_) => f.write_str("too many requests with this API key"),
            Self::BudgetExceeded(budget) => {
                f.write_str("the API key's budget has too little left for this")?;
                let end = budget.resets_at.map(DateTime::<Utc>::from);
                end.map_or(Ok(()), |end| {
                    write!(f, "; it resets at {}", end.format("%Y-%m-%dT%H:%M:%SZ"))
                })
            }
            Self::Unavailable(error) | Self::BadRow(error) | Self::Unsupported(error) => {
                error.fmt(f)
            }
            Self::LayerMissing => f.write_str("no ApiKeyAuthLayer wraps the handler"),
        }
    }
}

impl std::error::Error for Denial {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Unavailable(error) | Self::BadRow(error) | Self::Unsupported(error) => {
                Some(error)
            }
            _ => None,
        }
    }
}

impl fmt::Display for InvalidKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unrecognized(reason) => return reason.fmt(f),
            Self::Unknown => "the API key is unknown",
            Self::WrongSecret => "the secret of the API key is wrong",
            Self::Revoked => "the API key was revoked",
            Self::Expired => "the API key has expired",
            Self::NotYetValid => "the API key is not valid yet",
            Self::Rotated => "the API key was rotated, and this secret is no longer accepted",
            Self::OwnerInactive => "the owner of the API key is not active",
        })
    }
}

impl fmt::Display for Forbidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Endpoint => f.write_str("the API key may not call this endpoint"),
            Self::Address => f.write_str("the API key may not be used from this address"),
            Self::Model(model) => write!(f, "the API key may not use the model {model:?}"),
            Self::Scope(scope) => write!(f, "the API key lacks the scope {scope:?}"),
            Self::Permission(permission) => {
                write!(f, "the API key lacks the permission {permission:?}")
            }
            Self::Role(role) => write!(f, "the owner of the API key lacks the role {role:?}"),
        }
    }
}
