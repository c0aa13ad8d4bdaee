//! Deadlines: [`within`] for look-ups, [`later`] for moments.

#[cfg(feature = "_sql")]
use std::time::Instant;
use std::{future::Future, pin::pin, time::Duration};

use tokio::time::timeout;

/// Nearly every look-up has ended by then.
const AT_FIRST: Duration = Duration::from_millis(50);

/// The output of `future`, or `None` if it takes longer than `limit`.
///
/// A look-up is under several deadlines, the longest outermost. A timer that ends before all others makes
/// tokio wake its driver, which is a system call, so that each of them would cost one. Therefore all of them
/// begin with the same short timer, which a quick answer never sees the end of.
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

/// A moment so far away that it does not come, where the sum is more than the clock can hold.
#[cfg(feature = "_sql")]
pub(crate) fn later(after: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(after).unwrap_or_else(|| now + FAR)
}

/// 30 years.
#[cfg(feature = "_sql")]
const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 3600);
