//! A database's errors as [`StoreError`]s.

use diesel::result::{DatabaseErrorInformation, DatabaseErrorKind, Error};

use crate::error::StoreError;

/// Lets a diesel transaction fail with an error of ours, which diesel's own turn into as well.
pub(in crate::backend) struct Failure<E>(pub(in crate::backend) E);

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

pub(in crate::backend) fn store_error(error: Error) -> StoreError {
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
        Error::DatabaseError(Unknown, info) if lacks_schema(&**info) => {
            StoreError::rejected(error).with_hint(CALL_MIGRATE)
        }
        _ => StoreError::rejected(error),
    }
}

/// What to do if a table, a column or a function of the schema is missing.
pub(in crate::backend) const CALL_MIGRATE: &str = "call migrate() of the store";

/// The start of SQLite's messages for what a statement names and the schema lacks.
#[cfg(feature = "sqlite")]
const UNDEFINED: [&str; 3] = ["no such table", "no such column", "no such function"];

/// Whether the schema lacks what a statement names. diesel does not pass on PostgreSQL's SQLSTATE (42P01, 42703, 42883),
/// and the message is in the server's language. But only an error that is found while a statement is analysed has a
/// position in it, and the statements of this crate are fixed and take their values as parameters: the schema is not
/// the one that they are written for.
fn lacks_schema(info: &(dyn DatabaseErrorInformation + Send + Sync)) -> bool {
    #[cfg(feature = "sqlite")]
    if UNDEFINED.iter().any(|start| info.message().starts_with(start)) {
        return true;
    }
    cfg!(feature = "postgres") && info.statement_position().is_some()
}
