//! The counters of one key: [`UsageCounter`].

use std::{
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
};

use super::{recorder::Recorder, usage::Usage};
use crate::{record::KeyId, store::KeyUsage};

/// What has come together on a key since it was last taken. It lies apart from the record, which is never
/// written to.
pub(crate) struct UsageCounter {
    key: KeyId,
    requests: AtomicU64,
    tokens: AtomicU64,
    cost: AtomicU64,
    /// As much of the cost as was settled from a lease.
    settled: AtomicU64,
    /// Whether the recorder has been told.
    is_told: AtomicBool,
    recorder: Weak<Recorder>,
}

impl UsageCounter {
    pub(super) fn new(key: KeyId, recorder: Weak<Recorder>) -> Arc<Self> {
        Arc::new(Self {
            key,
            requests: AtomicU64::new(0),
            tokens: AtomicU64::new(0),
            cost: AtomicU64::new(0),
            settled: AtomicU64::new(0),
            is_told: AtomicBool::new(false),
            recorder,
        })
    }

    #[inline]
    pub(crate) fn count_request(self: &Arc<Self>) {
        self.requests.fetch_add(1, SeqCst);
        self.tell();
    }

    #[inline]
    pub(crate) fn add(self: &Arc<Self>, usage: Usage) {
        add(&self.tokens, usage.tokens);
        add(&self.cost, usage.cost);
        self.tell();
    }

    /// Adds a cost that was held before: first as a cost, so that it is charged before it shrinks a lease.
    pub(crate) fn settle(self: &Arc<Self>, cost: u64) {
        add(&self.cost, cost);
        add(&self.settled, cost);
        self.tell();
    }

    /// `None` if it has gone.
    pub(crate) fn recorder(&self) -> Option<Arc<Recorder>> {
        self.recorder.upgrade()
    }

    /// After the counters: whoever finds the recorder told has added before it takes them, which is after it
    /// clears the mark.
    #[inline]
    fn tell(self: &Arc<Self>) {
        if !self.is_told.load(SeqCst) && !self.is_told.swap(true, SeqCst) {
            // Nobody writes any more if it is gone.
            if let Some(recorder) = self.recorder.upgrade() {
                recorder.mark_dirty(Arc::clone(self));
            }
        }
    }

    /// Takes what has come together.
    pub(super) fn take(&self) -> KeyUsage {
        self.is_told.store(false, SeqCst);
        let amount =
            |counter: &AtomicU64| i64::try_from(counter.swap(0, SeqCst)).unwrap_or(i64::MAX);
        KeyUsage {
            requests: self.requests.swap(0, SeqCst),
            tokens: self.tokens.swap(0, SeqCst),
            // In this order, for the same reason.
            settled_micro_cents: amount(&self.settled),
            cost_micro_cents: amount(&self.cost),
            ..KeyUsage::new(self.key.clone())
        }
    }
}

/// Adds, and stays at the largest number that there is.
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
