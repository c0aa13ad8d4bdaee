//! What goes wrong below the layer: [`StoreError`]. A refusal is not an error but a
//! [`Denial`](crate::Denial).

use std::{borrow::Cow, error::Error, fmt, sync::Arc, time::Duration};

/// A fault of a store or of what it stands on. Never an authentication failure: "no such key" is an
/// [`Answer`](crate::Answer).
///
/// It is cheap to clone, because everybody who waits for one look-up gets the same error, and keeps
/// what caused it as [`source`](Error::source). `Display` contains the cause, for logs; a caller never sees it. The
/// stores of this crate put no value of a row and no password of a URL into either.
#[derive(Clone)]
pub struct StoreError {
    kind: StoreErrorKind,
    message: Cow<'static, str>,
    retry_after: Duration,
    source: Option<Arc<dyn Error + Send + Sync>>,
    /// What to do about it.
    hint: Option<&'static str>,
}

/// What sort of fault a [`StoreError`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreErrorKind {
    /// The store can't be reached, or broke off.
    Unavailable,
    /// No answer within the deadline.
    Timeout,
    /// There is more to do than the bounds allow: a full queue, a busy pool, a used-up ration.
    Overloaded,
    /// A row that can't be decoded. The request is answered 500, and the log names the row.
    BadRow,
    /// A write that contradicts what is stored, such as an e-mail address that is taken.
    Conflict,
    /// The store does not do this at all. The request is answered 500.
    Unsupported,
    /// The store answered, but refused the request: a missing table, a missing right.
    Rejected,
}

impl StoreError {
    /// The store can't be reached. Trying again helps.
    pub fn unavailable(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(StoreErrorKind::Unavailable, "the key store is out of reach").caused_by(source)
    }

    /// There was no answer within `limit`. Trying again helps.
    pub fn timeout(limit: Duration) -> Self {
        Self::new(StoreErrorKind::Timeout, format!("no answer from the key store within {limit:?}"))
    }

    /// There is more to do than the bounds allow; `retry_after` says when to come again.
    pub fn overloaded(message: impl Into<Cow<'static, str>>, retry_after: Duration) -> Self {
        Self { retry_after, ..Self::new(StoreErrorKind::Overloaded, message) }
    }

    /// A row that can't be decoded: `message` names the row and the column, never a value.
    pub fn bad_row(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StoreErrorKind::BadRow, message)
    }

    /// A write that contradicts what is stored.
    pub fn conflict(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StoreErrorKind::Conflict, message)
    }

    /// The store does not do `what` at all.
    pub fn unsupported(what: &'static str) -> Self {
        Self::new(StoreErrorKind::Unsupported, format!("this key store does not support {what}"))
    }

    /// The store answered, but refused the request. Trying again does not help.
    pub fn rejected(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(StoreErrorKind::Rejected, "the key store refused the request").caused_by(source)
    }

    /// The settings exclude what the request needs.
    pub(crate) fn missing(message: &'static str) -> Self {
        Self::new(StoreErrorKind::Unsupported, message)
    }

    fn new(kind: StoreErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        let (message, retry_after) = (message.into(), Duration::from_secs(1));
        Self { kind, message, retry_after, source: None, hint: None }
    }

    /// Adds what caused it.
    #[must_use]
    pub fn caused_by(self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { source: Some(Arc::from(source.into())), ..self }
    }

    /// Adds what to do about it.
    #[cfg(feature = "_sql")]
    pub(crate) fn with_hint(self, hint: &'static str) -> Self {
        Self { hint: Some(hint), ..self }
    }

    /// What sort of fault this is.
    pub fn kind(&self) -> StoreErrorKind {
        self.kind
    }

    /// Whether the same question may be answered a little later.
    pub fn is_transient(&self) -> bool {
        use StoreErrorKind::{Overloaded, Timeout, Unavailable};
        matches!(self.kind, Unavailable | Timeout | Overloaded)
    }

    /// How long a caller should wait before it asks again.
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
