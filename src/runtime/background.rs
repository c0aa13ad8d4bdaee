//! Background tasks: [`Background`].

use std::{
    fmt,
    future::Future,
    sync::{Mutex, PoisonError},
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

impl fmt::Debug for Background {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Background")
    }
}
