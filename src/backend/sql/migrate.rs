//! The result of a migration, [`MigrationReport`], and its errors: [`MigrateError`].

use std::fmt;

use super::review::KeyReview;
use crate::{error::StoreError, telemetry};

/// Result of `migrate()`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MigrationReport {
    /// Review of the keys of a table that this call adopted: the keys that fail, and those that change their meaning.
    /// `None` if it adopted no table. `review_keys()` reviews them at any time.
    pub adopted_keys: Option<KeyReview>,
}

impl MigrationReport {
    /// The adoption is committed, so that a failed review does not fail the migration.
    pub(in crate::backend) fn of_adopted(review: Result<KeyReview, StoreError>) -> Self {
        match review {
            Ok(review) => {
                telemetry::adopted_keys(review.failing_keys, review.changed_keys);
                Self { adopted_keys: Some(review) }
            }
            Err(error) => {
                telemetry::not_reviewed(&error);
                Self::default()
            }
        }
    }
}

/// Error of `migrate()`.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum MigrateError {
    /// Existing tables can't be adopted as they are. This is detected before any change, and all reasons are reported
    /// at once.
    NotAdoptable(Vec<ColumnFault>),
    /// The database failed, or rejected a statement. The migration was rolled back.
    Store(StoreError),
}

/// A fault of a column, or of a table as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ColumnFault {
    /// The table.
    pub table: String,
    /// The column; empty for a fault of the table as a whole.
    pub column: String,
    /// The fault, and what is required instead.
    pub reason: String,
}

impl ColumnFault {
    pub(in crate::backend) fn new(table: &str, column: &str, reason: impl Into<String>) -> Self {
        Self { table: table.to_owned(), column: column.to_owned(), reason: reason.into() }
    }
}

impl From<StoreError> for MigrateError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl fmt::Display for MigrateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAdoptable(faults) => {
                f.write_str("the existing tables can't be adopted: ")?;
                for (at, fault) in faults.iter().enumerate() {
                    let separator = if at == 0 { "" } else { "; " };
                    write!(f, "{separator}{fault}")?;
                }
                Ok(())
            }
            Self::Store(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for MigrateError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Store(error) => Some(error),
            Self::NotAdoptable(_) => None,
        }
    }
}

impl fmt::Display for ColumnFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, column, reason } = self;
        match column.as_str() {
            "" => write!(f, "{table} {reason}"),
            column => write!(f, "{table}.{column} {reason}"),
        }
    }
}
