//! The lease of one key on this node: [`KeyLease`].

use std::{
    sync::{Mutex, MutexGuard},
    time::{Duration, SystemTime},
};

use super::leases::lock;
use crate::{
    denial::{BudgetExceeded, Denial},
    error::StoreError,
    record::KeyId,
    runtime::Moment,
    store::{Lease, LeaseRequest},
};

/// Lease of a part of a key's budget, with the amounts that are held and settled. Amounts are in micro-cents.
pub(crate) struct KeyLease {
    pub(super) key: KeyId,
    pub(super) state: Mutex<LeaseState>,
    /// Held during a lease request. Other reservations wait for its response.
    pub(super) request_lock: tokio::sync::Mutex<()>,
}

#[derive(Default)]
pub(super) struct LeaseState {
    pub(super) leased: i64,
    /// Time of the last lease request. The lease may expire one lifetime after it; the store's lifetime starts later.
    pub(super) requested_at: Option<Moment>,
    /// Sum of the estimates of live reservations.
    pub(super) held: i64,
    /// Settled on this node, but not yet written to the store.
    pub(super) settled: i64,
    /// Total that was ever written to the store.
    pub(super) written: i64,
    /// Amount that was last requested beyond what was needed.
    pub(super) margin: i64,
    pub(super) resets_at: Option<SystemTime>,
    pub(super) used_at: Option<Moment>,
    /// Time and amount of the last reservation that the remaining budget did not cover.
    pub(super) denied: Option<(Moment, i64)>,
    /// Time and error of the last lease request that failed.
    pub(super) failed: Option<(Moment, StoreError)>,
}

/// Time for which a denied amount is denied again without a lease request.
const DENIAL_LIFETIME: Duration = Duration::from_millis(250);
/// Number of reservations of the requested amount that the first margin covers.
const MARGIN_RESERVATIONS: i64 = 16;

impl KeyLease {
    pub(super) fn hold(&self, wanted: i64, now: Moment, lifetime: Duration) -> bool {
        let mut state = self.state();
        let is_live = state.requested_at.is_some_and(|requested| now.since(requested) < lifetime);
        let free = state.leased.saturating_sub(state.due());
        let fits = is_live && wanted <= free;
        if fits {
            state.held += wanted;
            state.used_at = Some(now);
        }
        fits
    }

    pub(super) fn settle(&self, estimate: i64, cost: i64) {
        let mut state = self.state();
        state.held = state.held.saturating_sub(estimate);
        state.settled = state.settled.saturating_add(cost);
    }

    /// Returns an error if a lease request would be useless: one has failed since `arrived_at`, or a reservation of
    /// at most this amount was denied recently.
    pub(super) fn check_recent_failure(
        &self,
        wanted: i64,
        arrived_at: Moment,
        now: Moment,
    ) -> Result<(), Denial> {
        let state = self.state();
        if let Some((at, error)) = &state.failed
            && at.later(arrived_at) == *at
        {
            return Err(error.clone().into());
        }
        match state.denied {
            Some((at, least)) if wanted >= least && now.since(at) < DENIAL_LIFETIME => {
                Err(state.exceeded(now))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn deny(&self, wanted: i64, now: Moment) -> Denial {
        let mut state = self.state();
        state.denied = Some((now, wanted));
        state.exceeded(now)
    }

    pub(super) fn state(&self) -> MutexGuard<'_, LeaseState> {
        lock(&self.state)
    }
}

impl LeaseState {
    /// Returns the amounts for a reservation of `wanted`. The margin doubles with each request.
    pub(super) fn grow(&mut self, wanted: i64) -> (i64, i64) {
        let needed = self.due().saturating_add(wanted);
        let margin = self.margin.saturating_mul(2).max(wanted.saturating_mul(MARGIN_RESERVATIONS));
        (needed.saturating_add(margin), needed)
    }

    /// Returns the amounts for a renewal. If the lease was used since the last request, it keeps its whole amount;
    /// otherwise it keeps what is due and half of the rest. The local amount is lowered before the request, so that
    /// no reservation holds what is being returned.
    pub(super) fn renew(&mut self) -> (i64, i64) {
        let is_used = self
            .used_at
            .zip(self.requested_at)
            .is_some_and(|(used, requested)| used.later(requested) == used);
        let free = self.leased.saturating_sub(self.due()).max(0);
        if !is_used {
            self.leased = self.due().saturating_add(free / 2);
            self.margin = 0;
        }
        let kept = self.leased.max(self.due());
        (kept, kept)
    }

    /// Lowers the lease to the amount that is due, and returns the amounts.
    pub(super) fn shrink(&mut self) -> (i64, i64) {
        (self.leased, self.margin) = (self.leased.min(self.due()), 0);
        (self.due(), self.due())
    }

    /// Returns the amount that the lease has to cover.
    pub(super) fn due(&self) -> i64 {
        self.held.saturating_add(self.settled)
    }

    pub(super) fn take(
        &mut self,
        lease: &Lease,
        request: &LeaseRequest,
        requested_at: Moment,
        written: i64,
    ) {
        // It is not known whether the store granted the lease before or after the writes in the meantime. The safe
        // assumption is before: the writes reduce the lease.
        let meanwhile = self.written.saturating_sub(written);
        self.leased = lease.amount_micro_cents.saturating_sub(meanwhile).max(0);
        if lease.amount_micro_cents >= request.needed_micro_cents {
            self.margin = request.amount_micro_cents.saturating_sub(request.needed_micro_cents);
            self.denied = None;
        }
        self.requested_at = Some(requested_at);
        self.resets_at = lease.resets_at;
        self.failed = None;
    }

    pub(super) fn exceeded(&self, now: Moment) -> Denial {
        let wait = self.resets_at.map(|end| end.duration_since(now.wall()).unwrap_or_default());
        Denial::BudgetExceeded(BudgetExceeded { resets_at: self.resets_at, wait })
    }
}
