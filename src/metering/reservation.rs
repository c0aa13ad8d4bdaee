//! A hold on a budget: [`Reservation`].

use std::{fmt, sync::Arc};

use super::{leases::Account, usage::Usage, usage_counter::UsageCounter};

/// A part of a key's budget that is held for work to come, made by
/// [`AuthContext::reserve`](crate::AuthContext::reserve). [`settle`](Reservation::settle) it with what the work has
/// cost; dropped without that, because the work was given up or panicked, it charges the estimate. While it lives,
/// this node keeps what it holds.
///
/// What is settled is charged in full, also past the estimate, and in the period in which it is settled.
#[must_use = "a reservation that is dropped charges its estimate at once"]
pub struct Reservation {
    estimate: u64,
    /// `None` where there is no budget.
    account: Option<Arc<Account>>,
    /// `None` where no usage is recorded.
    counter: Option<Arc<UsageCounter>>,
    is_settled: bool,
}

impl Reservation {
    pub(super) fn held(estimate: u64, account: Arc<Account>, counter: Arc<UsageCounter>) -> Self {
        Self { estimate, account: Some(account), counter: Some(counter), is_settled: false }
    }

    /// Of a key that has no budget: its cost is counted, and that is all.
    pub(crate) fn free(estimate: u64, counter: Option<Arc<UsageCounter>>) -> Self {
        Self { estimate, account: None, counter, is_settled: false }
    }

    /// What is held, in micro-cents.
    pub fn estimate(&self) -> u64 {
        self.estimate
    }

    /// Charges what the work has cost, in micro-cents, and lets go of the rest.
    pub fn settle(mut self, cost: u64) {
        self.charge(cost);
    }

    fn charge(&mut self, cost: u64) {
        if std::mem::replace(&mut self.is_settled, true) {
            return;
        }
        match (&self.account, &self.counter) {
            (Some(account), Some(counter)) => {
                // Before the counter: what is taken from there has been settled here.
                account.settle(held_for(self.estimate), amount(cost));
                counter.settle(cost);
            }
            (_, Some(counter)) => counter.add(Usage::cost(cost)),
            (_, None) => {}
        }
    }
}

/// What is taken from a lease: for nothing as well, so that there is none where nothing is left.
pub(super) fn held_for(estimate: u64) -> i64 {
    amount(estimate).max(1)
}

/// No budget is larger.
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
