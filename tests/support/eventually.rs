//! Waiting for what happens on its own, with a deadline.

use std::time::{Duration, Instant};

/// Long enough for a busy machine; whatever is waited for takes milliseconds.
const DEADLINE: Duration = Duration::from_secs(20);

/// Asks again and again until `done` is true.
#[track_caller]
pub fn eventually<F: AsyncFnMut() -> bool>(what: &str, mut done: F) -> impl Future<Output = ()> {
    let caller = std::panic::Location::caller();
    async move {
        let deadline = Instant::now() + DEADLINE;
        while !done().await {
            assert!(Instant::now() < deadline, "{caller}: waited in vain: {what}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Like [`eventually`] for what only other tasks of this runtime bring about: lets them run, and needs no
/// timer.
#[track_caller]
pub fn others_make(what: &str, mut done: impl FnMut() -> bool) -> impl Future<Output = ()> {
    let caller = std::panic::Location::caller();
    async move {
        let deadline = Instant::now() + DEADLINE;
        while !done() {
            assert!(Instant::now() < deadline, "{caller}: waited in vain: {what}");
            tokio::task::yield_now().await;
        }
    }
}
