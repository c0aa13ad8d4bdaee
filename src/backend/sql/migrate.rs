//! What a migration did, [`MigrationReport`], and why a schema can't be brought up to date: [`MigrateError`].

use std::fmt;

use super::review::KeyReview;
use crate::{error::StoreError, telemetry};

/// What `migrate()` did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MigrationReport {
    /// The keys of a table that this call adopted: which of them fail, and which change their meaning. `None` if it
    /// adopted none; `review_keys()` reviews them at any time.
    pub adopted_keys: Option<KeyReview>,
}

impl MigrationReport {
    /// What was adopted is committed, so that a review that fails does not fail the migration.
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

/// Why `migrate()` failed.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum MigrateError {
    /// There are tables already that can't be adopted as they are. Found out before anything was
    /// changed; all the reasons at once.
    NotAdoptable(Vec<ColumnFault>),
    /// The database failed, or refused a statement. What was begun was rolled back.
    Store(StoreError),
}

/// What is wrong with a column, or with a table as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ColumnFault {
    /// The table.
    pub table: String,
    /// The column; empty if it is the table as a whole.
    pub column: String,
    /// What is wrong, and what would be right.
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
                f.write_str("the tables that are already there can't be adopted: ")?;
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
