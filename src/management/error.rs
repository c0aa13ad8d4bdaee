//! Errors of key management: [`ManageError`].

use std::fmt;

use crate::{
    error::{StoreError, StoreErrorKind},
    key::MintError,
    policy::CeilingField,
    record::Revision,
};

/// Reason for which a user or a key could not be read or changed.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ManageError {
    /// There is no such user or key, or the caller may not see it.
    NotFound(&'static str),
    /// The change contradicts stored data. It names what to do.
    Conflict {
        /// What it contradicts.
        message: String,
        /// The current revision of the key, if the change required another one.
        current: Option<Revision>,
    },
    /// The change would grant more than the caller's key has.
    ExceedsCeiling(CeilingField),
    /// The caller's role does not allow the operation.
    NotPermitted(&'static str),
    /// A field has a value that is not accepted.
    Invalid {
        /// The field, by the name of its column.
        field: &'static str,
        /// Why the value is not accepted.
        reason: String,
    },
    /// No key could be minted.
    Mint(MintError),
    /// The store failed, or rejected the request.
    Store(StoreError),
}

impl ManageError {
    pub(super) fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { field, reason: reason.into() }
    }

    pub(super) fn conflict(message: impl Into<String>) -> Self {
        Self::Conflict { message: message.into(), current: None }
    }

    /// Returns whether a retry may succeed a little later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Store(error) if error.is_transient())
    }
}

impl From<MintError> for ManageError {
    fn from(error: MintError) -> Self {
        Self::Mint(error)
    }
}

impl From<CeilingField> for ManageError {
    fn from(field: CeilingField) -> Self {
        Self::ExceedsCeiling(field)
    }
}

impl From<StoreError> for ManageError {
    fn from(error: StoreError) -> Self {
        match error.kind() {
            StoreErrorKind::Conflict => Self::conflict(error.to_string()),
            _ => Self::Store(error),
        }
    }
}

impl fmt::Display for ManageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound(what) => write!(f, "there is no such {what}"),
            Self::Conflict { message, current: None } => f.write_str(message),
            Self::Conflict { message, current: Some(revision) } => {
                write!(f, "{message}; its revision is now {}", revision.0)
            }
            Self::ExceedsCeiling(field) => {
                write!(f, "the key would grant more than the caller's key has: {field}")
            }
            Self::NotPermitted(what) => write!(f, "the caller's role does not allow to {what}"),
            Self::Invalid { field, reason } => write!(f, "{field} {reason}"),
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
            _ => None,
        }
    }
}
