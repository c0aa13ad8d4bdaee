//! Listening to the store: [`follow`], on a [`Background`] task.

use std::{
    fmt,
    future::{Future, poll_fn},
    pin::Pin,
    sync::{Mutex, PoisonError, Weak},
    time::{Duration, SystemTime},
};

use futures_core::Stream;
use tokio::task::JoinHandle;

use super::{Moment, View, floors::FLOOR_LIFETIME};
use crate::{
    store::{Change, ChangeStream, DynKeyStore, KeyStore},
    telemetry,
};

/// A task that begins when it is first needed, begins anew if its runtime has died, and ends with this.
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
    /// Begins the task if it does not run. Needs a runtime.
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

    /// Ends the task for good.
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

/// How long a feed that ended is left alone before it is listened to again.
const PAUSE: Duration = Duration::from_secs(1);

/// Takes in what `store` says for as long as `view` is wanted. A store without a feed says nothing:
/// there is nothing to catch up with either, and the rule of age is all that bounds its answers.
pub(crate) async fn follow(store: DynKeyStore, view: Weak<View>, clock: impl Fn() -> Moment) {
    loop {
        // As long as a copy can live anywhere: this node knows of no change yet, or has missed some.
        let mut changes = store.changes(SystemTime::now() - FLOOR_LIFETIME);
        if let Some(view) = view.upgrade()
            && view.freshness.last_sync().is_some_and(|sync| clock().since(sync) >= FLOOR_LIFETIME)
        {
            // It looks back no further than that.
            view.learn(Change::Reset, clock());
        }
        if !changes.is_complete()
            && let Some(view) = view.upgrade()
        {
            view.floors.caught_up();
        }
        if !changes.has_feed() {
            // Not the end, or this would begin anew at each look-up.
            return std::future::pending().await;
        }
        while let Some(change) = next(&mut changes).await {
            let Some(view) = view.upgrade() else { return };
            telemetry::change(&change);
            // Whoever only hears hints is never in sync.
            if changes.is_complete() || !matches!(change, Change::Synced(_)) {
                view.learn(change, clock());
            }
        }
        if view.strong_count() == 0 {
            return;
        }
        telemetry::feed_ended();
        tokio::time::sleep(PAUSE).await;
    }
}

async fn next(changes: &mut ChangeStream) -> Option<Change> {
    poll_fn(|cx| Pin::new(&mut *changes).poll_next(cx)).await
}
