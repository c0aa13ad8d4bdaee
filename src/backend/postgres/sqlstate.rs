//! Errors of statements by SQLSTATE, because the message is in the server's language and diesel does not expose most
//! codes: those of a statement that `api_key_try` ran, and those of reads without diesel.

use std::{error::Error, fmt};

use serde::Deserialize;
use tokio_postgres::error::DbError;

use crate::{
    backend::sql::{
        fault::CALL_MIGRATE,
        statement::{Bind, Statement, TextRow},
    },
    error::StoreError,
};

/// Returns a statement that runs `sql`, which has five parameters and returns one text, and returns its error as data.
pub(super) fn attempt(sql: String, binds: [Bind; 5]) -> Statement {
    let call = "SELECT api_key_try($1, $2, $3, $4, $5, $6) AS row";
    Statement::new(call, [Bind::Text(sql)].into_iter().chain(binds))
}

/// Returns the result of a statement from [`attempt`], or its error.
pub(super) fn outcome(rows: &[TextRow]) -> Result<Result<Option<String>, SqlFault>, StoreError> {
    let answer = rows.first().and_then(|row| serde_json::from_str(&row.row).ok());
    match answer.ok_or_else(|| StoreError::bad_row("api_key_try returned an unknown result"))? {
        Attempted::Done { row } => Ok(Ok(row)),
        Attempted::Failed(fault) => Ok(Err(fault)),
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Attempted {
    Failed(SqlFault),
    Done { row: Option<String> },
}

/// The error with which PostgreSQL rejected a statement.
#[derive(Debug, Deserialize)]
pub(super) struct SqlFault {
    sqlstate: String,
    message: String,
}

impl SqlFault {
    /// Returns whether the server ended the statement: at its statement timeout, at a lock timeout, or by a request.
    pub(super) fn is_cancellation(&self) -> bool {
        matches!(&*self.sqlstate, "57014" | "55P03")
    }

    /// Returns whether another connection may not have the fault: the server shuts down, the session was idle for too long,
    /// or the connection is one of a pooler's that lacks the prepared statement.
    pub(super) fn is_of_the_connection(&self) -> bool {
        self.class() == "08"
            || matches!(&*self.sqlstate, "57P01" | "57P02" | "57P03" | "57P05" | "26000")
    }

    /// Returns whether it is a fault of one of the rows: a value that does not fit its column, a constraint, or a
    /// trigger or a view of another service that rejects it.
    pub(super) fn is_of_a_row(&self) -> bool {
        matches!(self.class(), "22" | "23" | "44" | "P0")
    }

    /// Returns whether a retry helps: a lock, a deadlock, insufficient resources, a shutdown.
    fn is_transient(&self) -> bool {
        matches!(self.class(), "08" | "40" | "53" | "55" | "57" | "58")
    }

    /// Returns whether a table, a column or a function is missing.
    fn is_undefined(&self) -> bool {
        matches!(&*self.sqlstate, "42P01" | "42703" | "42883")
    }

    /// Returns the class of the SQLSTATE: <https://www.postgresql.org/docs/current/errcodes-appendix.html>
    fn class(&self) -> &str {
        self.sqlstate.get(..2).unwrap_or_default()
    }
}

/// Returns the error of a statement that ran without diesel. The text of the error itself names only its kind.
pub(super) fn statement_error(error: tokio_postgres::Error) -> StoreError {
    match error.as_db_error() {
        Some(fault) => SqlFault::from(fault).into(),
        None => StoreError::unavailable(error),
    }
}

/// Without the detail, which may contain values.
impl From<&DbError> for SqlFault {
    fn from(error: &DbError) -> Self {
        Self { sqlstate: error.code().code().to_owned(), message: error.message().to_owned() }
    }
}

impl From<SqlFault> for StoreError {
    fn from(fault: SqlFault) -> Self {
        match fault.is_transient() {
            true => Self::unavailable(fault),
            false if fault.is_undefined() => Self::rejected(fault).with_hint(CALL_MIGRATE),
            false => Self::rejected(fault),
        }
    }
}

impl fmt::Display for SqlFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (SQLSTATE {})", self.message, self.sqlstate)
    }
}

impl Error for SqlFault {}
