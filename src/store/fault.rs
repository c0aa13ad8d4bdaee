//! What a database says that went wrong, as a [`StoreError`].

use diesel::result::{DatabaseErrorKind, Error};

use crate::error::StoreError;

/// Lets a diesel transaction fail with an error of ours, which diesel's own turn into as well.
pub(super) struct Failure<E>(pub(super) E);

impl<E: From<StoreError>> From<Error> for Failure<E> {
    fn from(error: Error) -> Self {
        Self(store_error(error).into())
    }
}

/// PostgreSQL's 57014, 55P03 and 40P01, and SQLITE_BUSY.
const TRANSIENT: [&str; 4] = ["statement timeout", "lock timeout", "deadlock detected", "locked"];

pub(super) fn store_error(error: Error) -> StoreError {
    use DatabaseErrorKind::{
        ClosedConnection, ForeignKeyViolation, ReadOnlyTransaction, SerializationFailure,
        UnableToSendCommand, UniqueViolation,
    };
    match &error {
        Error::DatabaseError(UniqueViolation | ForeignKeyViolation, _) => {
            StoreError::conflict("the row contradicts what is stored").caused_by(error)
        }
        Error::DatabaseError(
            ClosedConnection | UnableToSendCommand | SerializationFailure | ReadOnlyTransaction,
            _,
        ) => StoreError::unavailable(error),
        // diesel passes these on as text alone.
        Error::DatabaseError(_, info) if TRANSIENT.iter().any(|it| info.message().contains(it)) => {
            StoreError::unavailable(error)
        }
        Error::DeserializationError(_) => {
            StoreError::bad_row("a row of api_keys is not UTF-8").caused_by(error)
        }
        _ => StoreError::rejected(error),
    }
}
