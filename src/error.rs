//! Failures of stores and of what they depend on: [`StoreError`].
//!
//! An unknown or wrong key is not an error but an [`Answer`](crate::store::Answer), and a denied request is a
//! [`Denial`](crate::Denial). A store of your own returns an error when it could not complete a look-up; the kind
//! decides the response: 500 for [`BadRow`](StoreErrorKind::BadRow) and [`Unsupported`](StoreErrorKind::Unsupported),
//! 503 with `Retry-After` for the others.
//!
//! ```
//! use tower_api_key::StoreError;
//!
//! let error = StoreError::unavailable(std::io::Error::other("connection reset"));
//! assert!(error.is_transient());
//! ```

use std::{borrow::Cow, error::Error, fmt, sync::Arc, time::Duration};

/// A fault of a store or of a system that it depends on. It is never an authentication failure: "no such key" is an
/// [`Answer`](crate::store::Answer).
///
/// It is cheap to clone, because all waiters of one look-up get the same error. It keeps its cause as
/// [`source`](Error::source). `Display` contains the cause, for logs; callers never see it. The stores of this crate
/// put no value of a row and no password of a URL into either.
#[derive(Clone)]
pub struct StoreError {
    kind: StoreErrorKind,
    message: Cow<'static, str>,
    retry_after: Duration,
    source: Option<Arc<dyn Error + Send + Sync>>,
    /// What to do about the error.
    hint: Option<&'static str>,
}

/// Kind of a [`StoreError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreErrorKind {
    /// The store can't be reached, or the connection broke.
    Unavailable,
    /// The store did not answer within the deadline.
    Timeout,
    /// A bound is exceeded: a full queue, a busy pool, or the failure limiter.
    Overloaded,
    /// A row that can't be decoded. The request is answered 500, and the log names the row.
    BadRow,
    /// A write that contradicts stored data, such as an e-mail address that is taken.
    Conflict,
    /// The store does not support the operation. The request is answered 500.
    Unsupported,
    /// The store answered, but rejected the request, for example because a table or a privilege is missing.
    Rejected,
}

impl StoreError {
    /// Creates an error for a store that can't be reached. A retry helps.
    pub fn unavailable(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(StoreErrorKind::Unavailable, "the key store can't be reached").caused_by(source)
    }

    /// Creates an error for a store that did not answer within `limit`. A retry helps.
    pub fn timeout(limit: Duration) -> Self {
        Self::new(StoreErrorKind::Timeout, format!("no answer from the key store within {limit:?}"))
    }

    /// Creates an error for an exceeded bound. `retry_after` is the time to wait before a retry.
    pub fn overloaded(message: impl Into<Cow<'static, str>>, retry_after: Duration) -> Self {
        Self { retry_after, ..Self::new(StoreErrorKind::Overloaded, message) }
    }

    /// Creates an error for a row that can't be decoded. `message` names the row and the column, never a value.
    pub fn bad_row(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StoreErrorKind::BadRow, message)
    }

    /// Creates an error for a write that contradicts stored data.
    pub fn conflict(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StoreErrorKind::Conflict, message)
    }

    /// Creates an error for a store that does not support `what`.
    pub fn unsupported(what: &'static str) -> Self {
        Self::new(StoreErrorKind::Unsupported, format!("this key store does not support {what}"))
    }

    /// Creates an error for a request that the store rejected. A retry does not help.
    pub fn rejected(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(StoreErrorKind::Rejected, "the key store rejected the request").caused_by(source)
    }

    /// Creates an error for settings that exclude what the request needs.
    pub(crate) fn missing(message: &'static str) -> Self {
        Self::new(StoreErrorKind::Unsupported, message)
    }

    fn new(kind: StoreErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        let (message, retry_after) = (message.into(), Duration::from_secs(1));
        Self { kind, message, retry_after, source: None, hint: None }
    }

    /// Sets the cause.
    #[must_use]
    pub fn caused_by(self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { source: Some(Arc::from(source.into())), ..self }
    }

    /// Adds a hint on how to resolve the error.
    #[cfg(feature = "_sql")]
    pub(crate) fn with_hint(self, hint: &'static str) -> Self {
        Self { hint: Some(hint), ..self }
    }

    /// Returns the kind of the error.
    pub fn kind(&self) -> StoreErrorKind {
        self.kind
    }

    /// Returns whether a retry may succeed a little later.
    pub fn is_transient(&self) -> bool {
        use StoreErrorKind::{Overloaded, Timeout, Unavailable};
        matches!(self.kind, Unavailable | Timeout | Overloaded)
    }

    /// Returns how long a caller should wait before a retry.
    pub fn retry_after(&self) -> Duration {
        self.retry_after
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        self.hint.map_or(Ok(()), |hint| write!(f, "; {hint}"))
    }
}

impl fmt::Debug for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreError")
            .field("kind", &self.kind)
            .field("message", &self.message)
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl Error for StoreError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
