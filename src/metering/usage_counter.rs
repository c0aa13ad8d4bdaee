//! Usage counters of one key: [`UsageCounter`].

use std::{
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};

use super::{recorder::Recorder, usage::Usage};
use crate::{
    record::{KeyId, Secret},
    store::KeyUsage,
};

/// Usage of a key since it was last taken. Stored separately from the record, which is immutable.
pub(crate) struct UsageCounter {
    key: KeyId,
    requests: AtomicU64,
    /// Part of the requests that presented the previous secret.
    previous_requests: AtomicU64,
    tokens: AtomicU64,
    cost: AtomicU64,
    /// Part of the cost that was settled from a lease.
    settled: AtomicU64,
    /// Whether the counter is queued in the recorder.
    is_queued: AtomicBool,
    recorder: Weak<Recorder>,
}

impl UsageCounter {
    pub(super) fn new(key: KeyId, recorder: Weak<Recorder>) -> Arc<Self> {
        Arc::new(Self {
            key,
            requests: AtomicU64::new(0),
            previous_requests: AtomicU64::new(0),
            tokens: AtomicU64::new(0),
            cost: AtomicU64::new(0),
            settled: AtomicU64::new(0),
            is_queued: AtomicBool::new(false),
            recorder,
        })
    }

    #[inline]
    pub(crate) fn count_request(self: &Arc<Self>, secret: Secret) {
        self.requests.fetch_add(1, SeqCst);
        if secret == Secret::Previous {
            self.previous_requests.fetch_add(1, SeqCst);
        }
        self.enqueue();
    }

    #[inline]
    pub(crate) fn add(self: &Arc<Self>, usage: Usage) {
        add(&self.tokens, usage.tokens);
        add(&self.cost, usage.cost);
        self.enqueue();
    }

    /// Adds a cost that was held. The cost is added before the settled amount, so that it is charged before it
    /// reduces a lease.
    pub(crate) fn settle(self: &Arc<Self>, cost: u64) {
        add(&self.cost, cost);
        add(&self.settled, cost);
        self.enqueue();
    }

    /// Returns the recorder; `None` if it was dropped.
    pub(crate) fn recorder(&self) -> Option<Arc<Recorder>> {
        self.recorder.upgrade()
    }

    /// Queues the counter in the recorder. Call after adding to the counters: `take` clears the flag before it swaps
    /// them, so no addition is lost.
    #[inline]
    fn enqueue(self: &Arc<Self>) {
        if !self.is_queued.load(SeqCst) && !self.is_queued.swap(true, SeqCst) {
            // If the recorder was dropped, usage is no longer written.
            if let Some(recorder) = self.recorder.upgrade() {
                recorder.mark_dirty(Arc::clone(self));
            }
        }
    }

    /// Takes the usage since the last call.
    pub(super) fn take(&self) -> KeyUsage {
        self.is_queued.store(false, SeqCst);
        let amount =
            |counter: &AtomicU64| i64::try_from(counter.swap(0, SeqCst)).unwrap_or(i64::MAX);
        // The part is taken before the whole, so that it never exceeds the whole.
        let previous_requests = self.previous_requests.swap(0, SeqCst);
        KeyUsage {
            previous_requests,
            requests: self.requests.swap(0, SeqCst),
            tokens: self.tokens.swap(0, SeqCst),
            // The settled amount is taken before the cost, so that it never exceeds the cost.
            settled_micro_cents: amount(&self.settled),
            cost_micro_cents: amount(&self.cost),
            ..KeyUsage::new(self.key.clone())
        }
    }
}

/// Adds to a counter, and saturates at the maximum.
#[inline]
fn add(counter: &AtomicU64, amount: u64) {
    if amount == 0 {
        return;
    }
    if counter.fetch_add(amount, SeqCst).checked_add(amount).is_none() {
        counter.store(u64::MAX, SeqCst);
    }
}

impl fmt::Debug for UsageCounter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UsageCounter").field("key", &self.key).finish_non_exhaustive()
    }
}
