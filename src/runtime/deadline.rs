//! Deadlines: [`within`] for look-ups, [`later`] for points in time.

#[cfg(feature = "_sql")]
use std::time::Instant;
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
    time::{Sleep, sleep},
};

/// Longest first timer of a deadline. When it expires, the look-up is polled once more: with 50 ms, most of 10,000 look-ups
/// that waited at once were.
const AT_FIRST: Duration = Duration::from_secs(1);

/// Returns a timer, or `None` if the current Tokio runtime has none. tokio offers no other way to find out than its panic.
pub(crate) fn timer(duration: Duration) -> Option<Sleep> {
    catch_unwind(|| sleep(duration)).ok()
}

/// Returns the output of `future`, or `None` if it takes longer than `limit`.
///
/// A look-up has several nested deadlines, the longest outermost. A timer that expires before all others makes tokio
/// wake its driver, which is a system call, so that each deadline would cost one. Therefore all of them that are longer
/// than [`AT_FIRST`] start with a timer of that length, which nearly every look-up ends before. A shorter limit, as that of
/// Redis, has its own.
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
                // `sleep` accepts a time that exceeds the range of the clock.
                Some(rest) => this.timer.set(sleep(rest)),
                None => return Poll::Ready(None),
            }
        }
    }
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

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_deadline_has_the_length_that_was_set() {
        for limit in [0, 1, 999, 1_000, 1_001, 5_000].map(Duration::from_millis) {
            let began = tokio::time::Instant::now();
            assert_eq!(within(limit, pending::<()>()).await, None);
            assert!(began.elapsed() >= limit, "{limit:?}");
            assert!(began.elapsed() <= limit + Duration::from_millis(2), "{limit:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_future_that_takes_longer_than_the_first_timer_ends_within_any_limit() {
        let work = sleep(AT_FIRST * 3);
        assert_eq!(within(Duration::MAX, work).await, Some(()));
    }
}
