//! Deadlines: [`within`] for look-ups, [`later`] for points in time.

#[cfg(feature = "_sql")]
use std::time::Instant;
use std::{future::Future, panic::catch_unwind, pin::pin, time::Duration};

use tokio::time::{Sleep, sleep, timeout};

/// First timer of a deadline. Nearly every look-up ends earlier.
const AT_FIRST: Duration = Duration::from_millis(50);

/// Returns a timer, or `None` if the current Tokio runtime has none. tokio offers no other way to find out than its panic.
pub(crate) fn timer(duration: Duration) -> Option<Sleep> {
    catch_unwind(|| sleep(duration)).ok()
}

/// Returns the output of `future`, or `None` if it takes longer than `limit`.
///
/// A look-up has several nested deadlines, the longest outermost. A timer that expires before all others makes tokio
/// wake its driver, which is a system call, so that each deadline would cost one. Therefore all of them start with the
/// same short timer, which a quick answer never reaches.
///
/// # Panics
///
/// In a runtime without a timer.
pub(crate) async fn within<F: Future>(limit: Duration, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    if let Ok(output) = timeout(limit.min(AT_FIRST), future.as_mut()).await {
        return Some(output);
    }
    timeout(limit.saturating_sub(AT_FIRST), future).await.ok()
}

/// Returns the moment `after` from now, or one 30 years from now if the sum exceeds the range of the clock.
#[cfg(feature = "_sql")]
pub(crate) fn later(after: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(after).unwrap_or_else(|| now + FAR)
}

/// A time after which no process of today runs.
#[cfg(feature = "_sql")]
const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 3600);
