//! Reservation of a budget: [`Reservation`].

use std::{fmt, sync::Arc};

use super::{key_lease::KeyLease, usage::Usage, usage_counter::UsageCounter};

/// Part of a key's budget that is held for future work, created by
/// [`AuthContext::reserve`](crate::AuthContext::reserve).
///
/// [`settle`](Reservation::settle) it with the actual cost. If it is dropped without being settled, because the work
/// was cancelled or panicked, it charges the estimate. The amount stays held while the reservation lives.
///
/// The settled cost is charged in full, even if it exceeds the estimate, and in the period in which it is settled.
#[must_use = "a reservation that is dropped charges its estimate at once"]
pub struct Reservation {
    estimate: u64,
    /// `None` for a key without a budget.
    lease: Option<Arc<KeyLease>>,
    /// `None` if no usage is recorded.
    counter: Option<Arc<UsageCounter>>,
    is_settled: bool,
}

impl Reservation {
    pub(super) fn held(estimate: u64, lease: Arc<KeyLease>, counter: Arc<UsageCounter>) -> Self {
        Self { estimate, lease: Some(lease), counter: Some(counter), is_settled: false }
    }

    /// Creates a reservation for a key without a budget. Its cost is only counted.
    pub(crate) fn free(estimate: u64, counter: Option<Arc<UsageCounter>>) -> Self {
        Self { estimate, lease: None, counter, is_settled: false }
    }

    /// Returns the amount that is held, in micro-cents.
    pub fn estimate(&self) -> u64 {
        self.estimate
    }

    /// Charges the actual cost, in micro-cents, and releases the hold.
    pub fn settle(mut self, cost: u64) {
        self.charge(cost);
    }

    fn charge(&mut self, cost: u64) {
        if std::mem::replace(&mut self.is_settled, true) {
            return;
        }
        match (&self.lease, &self.counter) {
            (Some(lease), Some(counter)) => {
                // Before the counter is changed: costs that are taken from the counter must already be settled in the
                // lease.
                lease.settle(held_for(self.estimate), amount(cost));
                counter.settle(cost);
            }
            (_, Some(counter)) => counter.add(Usage::cost(cost)),
            (_, None) => {}
        }
    }
}

/// Returns the amount that is held for an estimate. It is at least 1, so that an estimate of 0 is denied when the
/// budget is used up.
pub(super) fn held_for(estimate: u64) -> i64 {
    amount(estimate).max(1)
}

/// Converts an amount. `i64::MAX` is larger than any budget.
fn amount(micro_cents: u64) -> i64 {
    i64::try_from(micro_cents).unwrap_or(i64::MAX)
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.charge(self.estimate);
    }
}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reservation").field("estimate", &self.estimate).finish_non_exhaustive()
    }
}
