//! bcrypt checks, counted in the whole process: they run on threads of the pool, where no subscriber of a test's own
//! thread is set.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use tokio::sync::{Mutex, MutexGuard};
use tracing::{Id, Subscriber};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt},
    registry::LookupSpan,
};

static BEGUN: AtomicUsize = AtomicUsize::new(0);
static RUNNING: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

/// The right to count checks. One test of a process has it at a time; a test that checks bcrypt hashes beside tests that
/// count takes it as well.
pub struct Checks(MutexGuard<'static, ()>);

impl Checks {
    pub async fn alone() -> Self {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());
        let guard = ONE_AT_A_TIME.lock().await;
        subscribe();
        let checks = Self(guard);
        checks.take();
        checks.take_most();
        checks
    }

    /// How many began since this was last called.
    pub fn take(&self) -> usize {
        BEGUN.swap(0, SeqCst)
    }

    /// How many ran at the same time at most since this was last called.
    pub fn take_most(&self) -> usize {
        MOST.swap(0, SeqCst)
    }
}

/// Sets the subscriber of the process, once. Where there is none, `tracing` caches that a call site has no subscriber when
/// a thread without one reaches it first, and another thread that captures its log lines misses that one.
pub fn subscribe() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    // Not `init`, which also forwards the records of the `log` crate, with the statements of database clients.
    ONCE.call_once(|| {
        let subscriber = tracing_subscriber::registry().with(CountChecks);
        tracing::subscriber::set_global_default(subscriber).unwrap();
    });
}

struct CountChecks;

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for CountChecks {
    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        if is_check(id, &context) {
            BEGUN.fetch_add(1, SeqCst);
            MOST.fetch_max(RUNNING.fetch_add(1, SeqCst) + 1, SeqCst);
        }
    }

    fn on_exit(&self, id: &Id, context: Context<'_, S>) {
        if is_check(id, &context) {
            RUNNING.fetch_sub(1, SeqCst);
        }
    }
}

fn is_check<S: Subscriber + for<'a> LookupSpan<'a>>(id: &Id, context: &Context<'_, S>) -> bool {
    context.span(id).is_some_and(|span| span.name() == "bcrypt_check")
}
