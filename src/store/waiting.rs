//! The requests that wait for a look-up, and what it holds: [`Waiting`], [`HoldsNothing`].

use std::fmt;
#[cfg(feature = "_sql")]
use std::{future::Future, pin::Pin};

/// The requests that wait for the result of a look-up.
pub(crate) trait Waiting: fmt::Debug + Send + Sync {
    /// Completes when no request waits for the result any more. No request joins after that.
    #[cfg(feature = "_sql")]
    fn have_left(&self) -> Left<'_>;

    /// Sets whether the look-up holds something that other look-ups wait for, such as a connection. Initially it does.
    /// While it does not, a request may poll it, and may stop doing so for a while.
    #[cfg(any(feature = "_sql", feature = "redis"))]
    fn set_holding(&self, is_holding: bool);
}

#[cfg(feature = "_sql")]
pub(crate) type Left<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// The time in which a look-up holds nothing that other look-ups wait for.
#[cfg(any(feature = "_sql", feature = "redis"))]
pub(crate) struct HoldsNothing<'a>(Option<&'a dyn Waiting>);

#[cfg(any(feature = "_sql", feature = "redis"))]
impl<'a> HoldsNothing<'a> {
    pub(super) fn begin(waiters: Option<&'a dyn Waiting>) -> Self {
        waiters.inspect(|waiters| waiters.set_holding(false));
        Self(waiters)
    }
}

#[cfg(any(feature = "_sql", feature = "redis"))]
impl Drop for HoldsNothing<'_> {
    fn drop(&mut self) {
        self.0.inspect(|waiters| waiters.set_holding(true));
    }
}
