//! Failures of commands, with their exit codes: [`Failure`].

use std::{fmt, io, process::ExitCode};

use tower_api_key::{
    StoreError, backend::MigrateError, error::StoreErrorKind, management::ManageError,
};

/// The exit codes, as the man page lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Failure = 1,
    Usage = 2,
    NotFound = 3,
    Conflict = 4,
    NotPermitted = 5,
    Unavailable = 6,
}

/// Exit codes and their meaning.
pub(crate) const EXIT_CODES: [(u8, &str); 7] = [
    (0, "success"),
    (1, "failure; for migrate --check: migrations are pending; for doctor: at least one error"),
    (2, "wrong usage, or a value that is not accepted; nothing was done"),
    (3, "there is no such key or user"),
    (
        4,
        "conflict with stored data, for example an e-mail address that is taken or another revision",
    ),
    (5, "a ceiling or a right forbids it; for explain: the request is denied"),
    (6, "the database or Redis is unavailable"),
];

/// The reason why a command did not succeed: one sentence, with what to do.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    pub(crate) message: String,
    /// Whether the database rejected a statement, for a reason that [`connect`](crate::connect) may find out.
    pub(crate) is_rejected: bool,
    /// Whether the reader of standard output has ended, which needs no message.
    is_closed_pipe: bool,
}

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), is_rejected: false, is_closed_pipe: false }
    }

    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self::new(Exit::Failure, message)
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// A failure whose message was printed already.
    pub(crate) fn silent(exit: Exit) -> Self {
        Self::new(exit, "")
    }

    /// Prints the message, and returns the exit code.
    pub(crate) fn report(self) -> ExitCode {
        if self.is_closed_pipe {
            return ExitCode::SUCCESS;
        }
        if !self.message.is_empty() {
            crate::output::note(format_args!("error: {}", self.message));
        }
        ExitCode::from(self.exit as u8)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        let is_closed_pipe = error.kind() == io::ErrorKind::BrokenPipe;
        Self { is_closed_pipe, ..Self::failed(format!("the output can't be written: {error}")) }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        use StoreErrorKind::{Conflict, Overloaded, Rejected, Timeout, Unavailable};
        let exit = match error.kind() {
            Conflict => Exit::Conflict,
            Unavailable | Timeout | Overloaded => Exit::Unavailable,
            _ => Exit::Failure,
        };
        Self { is_rejected: error.kind() == Rejected, ..Self::new(exit, error.to_string()) }
    }
}

impl From<ManageError> for Failure {
    fn from(error: ManageError) -> Self {
        let exit = match &error {
            ManageError::NotFound(_) => Exit::NotFound,
            ManageError::Conflict { .. } => Exit::Conflict,
            ManageError::ExceedsCeiling(_) | ManageError::NotPermitted(_) => Exit::NotPermitted,
            ManageError::Invalid { .. } => Exit::Usage,
            ManageError::Store(error) => return error.clone().into(),
            _ => Exit::Failure,
        };
        Self::new(exit, error.to_string())
    }
}

impl From<MigrateError> for Failure {
    fn from(error: MigrateError) -> Self {
        match error {
            MigrateError::Store(error) => error.into(),
            error => Self::failed(error.to_string()),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}
