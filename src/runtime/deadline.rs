//! Deadlines: [`within`] for look-ups, [`later`] for points in time.

use std::{
    future::Future,
    panic::catch_unwind,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};

use pin_project_lite::pin_project;
use tokio::{
    task::unconstrained,
    time::{Instant, Sleep, sleep},
};

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
pub(crate) fn within<F: Future>(limit: Duration, future: F) -> Within<F> {
    let rest = limit.checked_sub(AT_FIRST).filter(|rest| !rest.is_zero());
    Within { future, timer: sleep(limit.min(AT_FIRST)), rest }
}

pin_project! {
    /// The future of [`within`]. An `async fn` would hold `future` twice, and look-ups nest three of them.
    pub(crate) struct Within<F> {
        #[pin]
        future: F,
        #[pin]
        timer: Sleep,
        // The time after the first timer.
        rest: Option<Duration>,
    }
}

impl<F: Future> Future for Within<F> {
    type Output = Option<F::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        if let Poll::Ready(output) = this.future.poll(cx) {
            return Poll::Ready(Some(output));
        }
        loop {
            // A future that uses up the task's budget must not suspend its deadline.
            ready!(pin!(unconstrained(this.timer.as_mut())).poll(cx));
            match this.rest.take() {
                Some(rest) => this.timer.as_mut().reset(Instant::now() + rest),
                None => return Poll::Ready(None),
            }
        }
    }
}

/// Returns the moment `after` from now, or one 30 years from now if the sum exceeds the range of the clock.
#[cfg(feature = "_sql")]
pub(crate) fn later(after: Duration) -> std::time::Instant {
    let now = std::time::Instant::now();
    now.checked_add(after).unwrap_or_else(|| now + FAR)
}

/// A time after which no process of today runs.
#[cfg(feature = "_sql")]
const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 3600);
