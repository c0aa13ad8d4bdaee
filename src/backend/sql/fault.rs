//! Conversion of database errors to [`StoreError`]s.

use diesel::result::{DatabaseErrorInformation, DatabaseErrorKind, Error};

use crate::error::StoreError;

/// The error of a diesel transaction that fails with an error of this crate or of diesel.
pub(in crate::backend) struct Failure<E>(pub(in crate::backend) E);

impl<E: From<StoreError>> From<Error> for Failure<E> {
    fn from(error: Error) -> Self {
        Self(store_error(error).into())
    }
}

/// Prefixes of SQLite's messages for SQLITE_BUSY and SQLITE_LOCKED. diesel does not expose these codes, and SQLite has
/// its messages in one language. PostgreSQL has them in many languages, so that none of its errors is classified by
/// text.
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

pub(in crate::backend) fn store_error(error: Error) -> StoreError {
    use DatabaseErrorKind::{
        ClosedConnection, ForeignKeyViolation, ReadOnlyTransaction, SerializationFailure,
        UnableToSendCommand, UniqueViolation, Unknown,
    };
    match &error {
        Error::DatabaseError(UniqueViolation | ForeignKeyViolation, _) => {
            StoreError::conflict("the row contradicts stored data").caused_by(error)
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
        Error::DatabaseError(Unknown, info) if lacks_schema(&**info) => {
            StoreError::rejected(error).with_hint(CALL_MIGRATE)
        }
        _ => StoreError::rejected(error),
    }
}

/// Hint for a missing table, column or function of the schema.
pub(in crate::backend) const CALL_MIGRATE: &str = "call migrate() of the store";

/// Prefixes of SQLite's messages for a name that the schema lacks.
#[cfg(feature = "sqlite")]
const UNDEFINED: [&str; 3] = ["no such table", "no such column", "no such function"];

/// Returns whether the schema lacks a name in a statement. diesel does not expose PostgreSQL's SQLSTATE (42P01, 42703,
/// 42883), and the message is in the server's language. But only an error that is found while a statement is analysed
/// has a position in it, and the statements of this crate are fixed and take their values as parameters: so the schema
/// differs from the one that they are written for.
fn lacks_schema(info: &(dyn DatabaseErrorInformation + Send + Sync)) -> bool {
    #[cfg(feature = "sqlite")]
    if UNDEFINED.iter().any(|start| info.message().starts_with(start)) {
        return true;
    }
    cfg!(feature = "postgres") && info.statement_position().is_some()
}
