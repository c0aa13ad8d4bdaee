//! Background tasks: [`Background`], [`poll_or_spawn`].

use std::{
    fmt,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Mutex, PoisonError},
    task::{Context, Poll, Waker},
};

use tokio::task::JoinHandle;

/// A task that starts when it is first needed, starts again if its runtime has shut down, and ends when this value is
/// dropped.
#[derive(Default)]
pub(crate) struct Background(Mutex<State>);

#[derive(Default)]
enum State {
    #[default]
    Idle,
    Running(JoinHandle<()>),
    Stopped,
}

impl Background {
    /// Starts the task if it is not running. Requires a runtime.
    pub(crate) fn ensure<F: Future<Output = ()> + Send + 'static>(&self, task: impl FnOnce() -> F) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_needed = match &*state {
            State::Idle => true,
            State::Running(running) => running.is_finished(),
            State::Stopped => false,
        };
        if is_needed {
            *state = State::Running(tokio::spawn(task()));
        }
    }

    /// Ends the task permanently.
    pub(crate) fn stop(&self) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Running(running) = std::mem::replace(&mut *state, State::Stopped) {
            running.abort();
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Runs `work` to its end: on a task, unless it ends at its first poll, which is done here. Requires a runtime. A panic
/// drops `work`, as it does on a task.
pub(crate) fn poll_or_spawn(mut work: Pin<Box<dyn Future<Output = ()> + Send>>) {
    // The task polls again, so that no wake of this waker is missed.
    let mut context = Context::from_waker(Waker::noop());
    let first = catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(&mut context)));
    if let Ok(Poll::Pending) = first {
        tokio::spawn(work);
    }
}

impl fmt::Debug for Background {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Background")
    }
}
