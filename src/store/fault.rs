//! A database's errors as [`StoreError`]s.

use diesel::result::{DatabaseErrorKind, Error};

use crate::error::StoreError;

/// Lets a diesel transaction fail with an error of ours, which diesel's own turn into as well.
pub(super) struct Failure<E>(pub(super) E);

impl<E: From<StoreError>> From<Error> for Failure<E> {
    fn from(error: Error) -> Self {
        Self(store_error(error).into())
    }
}

/// The start of SQLite's messages for SQLITE_BUSY and SQLITE_LOCKED. diesel does not pass on these codes, and SQLite
/// has its messages in one language. PostgreSQL has them in many, so that none of its errors is decided by text.
#[cfg(feature = "sqlite")]
const LOCKED: [&str; 3] =
    ["database is locked", "database table is locked", "database schema is locked"];

#[cfg(feature = "sqlite")]
fn is_locked(message: &str) -> bool {
    LOCKED.iter().any(|start| message.starts_with(start))
}

#[cfg(not(feature = "sqlite"))]
fn is_locked(_message: &str) -> bool {
    false
}

pub(super) fn store_error(error: Error) -> StoreError {
    use DatabaseErrorKind::{
        ClosedConnection, ForeignKeyViolation, ReadOnlyTransaction, SerializationFailure,
        UnableToSendCommand, UniqueViolation, Unknown,
    };
    match &error {
        Error::DatabaseError(UniqueViolation | ForeignKeyViolation, _) => {
            StoreError::conflict("the row contradicts what is stored").caused_by(error)
        }
        Error::DatabaseError(
            ClosedConnection | UnableToSendCommand | SerializationFailure | ReadOnlyTransaction,
            _,
        ) => StoreError::unavailable(error),
        Error::DatabaseError(Unknown, info) if is_locked(info.message()) => {
            StoreError::unavailable(error)
        }
        Error::DeserializationError(_) => {
            StoreError::bad_row("a row of api_keys is not UTF-8").caused_by(error)
        }
        _ => StoreError::rejected(error),
    }
}
