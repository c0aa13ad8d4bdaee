//! Budget leases of one node: [`BudgetLeases`].

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::BuildHasher,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::task::JoinSet;

use super::{
    key_lease::{KeyLease, LeaseState},
    reservation::{Reservation, held_for},
    usage_counter::UsageCounter,
};
use crate::{
    denial::Denial,
    error::StoreError,
    record::KeyId,
    runtime::{Clock, Moment, within},
    store::{DynKeyStore, KeyStore, LeaseRequest},
};

/// Leases of the keys that have a budget and were used recently.
pub(crate) struct BudgetLeases {
    shards: [Mutex<HashMap<KeyId, Arc<KeyLease>>>; SHARDS],
    hasher: RandomState,
    store: DynKeyStore,
    clock: Arc<dyn Clock>,
    /// Name of this node, the same as in usage batches.
    holder: String,
    /// Sequence number of the last lease request, so that the store can ignore requests that arrive late.
    sequence: AtomicU64,
    lifetime: Duration,
    is_closed: AtomicBool,
}

/// Number of shards. Sharded to avoid contention.
const SHARDS: usize = 16;
/// Maximum time that a reservation waits for the store.
const DEADLINE: Duration = Duration::from_secs(5);
/// Maximum number of leases that are renewed concurrently.
const MAX_CONCURRENT_RENEWALS: usize = 16;
/// Maximum pause between two rounds of renewals.
const MAX_PAUSE: Duration = Duration::from_secs(1);
/// Maximum number of lease requests for one reservation: concurrent reservations may use up the granted lease.
const ATTEMPTS: usize = 5;
/// Pause before a lease request is retried.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

impl BudgetLeases {
    pub(crate) fn new(
        store: DynKeyStore,
        clock: Arc<dyn Clock>,
        holder: String,
        lifetime: Duration,
    ) -> Self {
        let shards = std::array::from_fn(|_| Mutex::default());
        Self {
            shards,
            hasher: RandomState::new(),
            store,
            clock,
            holder,
            sequence: AtomicU64::new(0),
            lifetime,
            is_closed: AtomicBool::new(false),
        }
    }

    /// Holds `estimate` from the current lease, without I/O. Returns `None` if the lease does not cover it.
    pub(crate) fn reserve_now(
        &self,
        key: &KeyId,
        estimate: u64,
        counter: &Arc<UsageCounter>,
    ) -> Option<Reservation> {
        let lease = self.lease(key);
        (!self.is_closed() && lease.hold(held_for(estimate), self.now(), self.lifetime))
            .then(|| Reservation::held(estimate, lease, Arc::clone(counter)))
    }

    /// Holds `estimate`, and requests a lease from the store if needed.
    pub(crate) async fn reserve(
        &self,
        key: &KeyId,
        estimate: u64,
        counter: &Arc<UsageCounter>,
    ) -> Result<Reservation, Denial> {
        let lease = self.lease(key);
        let held = within(DEADLINE, self.hold(&lease, held_for(estimate))).await;
        held.unwrap_or_else(|| Err(StoreError::timeout(DEADLINE).into()))?;
        Ok(Reservation::held(estimate, lease, Arc::clone(counter)))
    }

    async fn hold(&self, lease: &KeyLease, wanted: i64) -> Result<(), Denial> {
        let arrived_at = self.now();
        let _request_guard = lease.request_lock.lock().await;
        // Checked under the lock: a lease that is granted after `return_all` would not be returned.
        if self.is_closed() {
            return Err(Self::closed());
        }
        for attempt in 0..ATTEMPTS {
            let now = self.now();
            // The previous request may have requested more than it needed, or may have failed.
            if lease.hold(wanted, now, self.lifetime) {
                return Ok(());
            }
            lease.check_recent_failure(wanted, arrived_at, now)?;
            let has_room = self.request_lease(lease, |state| state.grow(wanted)).await?;
            if !has_room {
                // Settled costs may already be charged in the store, although this node has not received the
                // acknowledgement yet.
                if attempt > 0 || lease.state().settled == 0 {
                    return Err(lease.deny(wanted, self.now()));
                }
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
        // Concurrent reservations have used up the lease each time.
        Err(StoreError::overloaded("too many concurrent reservations", Duration::from_secs(1))
            .into())
    }

    /// Subtracts settled costs from the lease: they have been written to the store, which has subtracted them from
    /// the lease, or they were dropped.
    pub(crate) fn written(&self, key: &KeyId, settled: i64) {
        let lease = lock(self.shard(key)).get(key).cloned();
        let Some(lease) = lease else { return };
        let mut state = lease.state();
        // Saturated sums are written one by one, so the total may exceed `settled`.
        state.settled = state.settled.saturating_sub(settled).max(0);
        state.leased = state.leased.saturating_sub(settled).max(0);
        state.written = state.written.saturating_add(settled);
    }

    /// Renews the leases that are in use, and returns the others, until `leases` is dropped.
    pub(crate) async fn maintain(leases: Weak<Self>) {
        loop {
            let Some(all) = leases.upgrade() else { return };
            let mut renewals = JoinSet::new();
            for lease in all.all() {
                if renewals.len() == MAX_CONCURRENT_RENEWALS {
                    renewals.join_next().await;
                }
                let all = Arc::clone(&all);
                // A failed request is retried in the next round; other leases do not wait for it.
                renewals.spawn(async move { all.maintain_lease(&lease).await });
            }
            while renewals.join_next().await.is_some() {}
            let pause = all.lifetime / 6;
            drop(all);
            tokio::time::sleep(pause.min(MAX_PAUSE)).await;
        }
    }

    async fn maintain_lease(&self, lease: &Arc<KeyLease>) {
        let Ok(_request_guard) = lease.request_lock.try_lock() else { return };
        let now = self.now();
        let (is_idle, is_old) = {
            let state = lease.state();
            let passed = |moment: Option<Moment>| {
                moment.is_none_or(|moment| now.since(moment) > self.lifetime / 3)
            };
            (state.due() == 0 && passed(state.used_at), passed(state.requested_at))
        };
        if is_idle && self.request_lease(lease, LeaseState::shrink).await.is_ok() {
            self.remove(lease);
        } else if !is_idle && is_old {
            // If the error persists, it is logged when usage is written.
            let _ = self.request_lease(lease, LeaseState::renew).await;
        }
    }

    /// Rejects further reservations.
    pub(crate) fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
    }

    /// Returns all leased amounts that are not held.
    pub(crate) async fn return_all(&self) {
        for lease in self.all() {
            let _request_guard = lease.request_lock.lock().await;
            // A lease that is not returned expires.
            let _ = self.request_lease(&lease, LeaseState::shrink).await;
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst)
    }

    pub(crate) fn closed() -> Denial {
        StoreError::unavailable("this node is shutting down").into()
    }

    /// Requests a lease of the amounts that `amounts` returns: the requested and the needed one. Returns whether the
    /// needed amount was granted.
    async fn request_lease(
        &self,
        lease: &KeyLease,
        amounts: impl FnOnce(&mut LeaseState) -> (i64, i64),
    ) -> Result<bool, StoreError> {
        let requested_at = self.now();
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        let (request, written) = {
            let mut state = lease.state();
            let (requested, needed) = amounts(&mut state);
            let request = LeaseRequest::new(lease.key.clone(), &*self.holder, sequence, requested);
            let request =
                LeaseRequest { needed_micro_cents: needed, lifetime: self.lifetime, ..request };
            (request, state.written)
        };
        let outcome = within(DEADLINE, self.store.lease(&request)).await;
        let outcome = outcome.unwrap_or_else(|| Err(StoreError::timeout(DEADLINE)));
        let mut state = lease.state();
        match &outcome {
            Ok(lease) => state.take(lease, &request, requested_at, written),
            Err(error) => state.failed = Some((self.now(), error.clone())),
        }
        Ok(outcome?.amount_micro_cents >= request.needed_micro_cents)
    }

    fn all(&self) -> Vec<Arc<KeyLease>> {
        self.shards.iter().flat_map(|it| lock(it).values().cloned().collect::<Vec<_>>()).collect()
    }

    fn lease(&self, key: &KeyId) -> Arc<KeyLease> {
        let mut shard = lock(self.shard(key));
        if let Some(lease) = shard.get(key) {
            return Arc::clone(lease);
        }
        let lease = Arc::new(KeyLease {
            key: key.clone(),
            state: Mutex::default(),
            request_lock: tokio::sync::Mutex::default(),
        });
        shard.insert(key.clone(), Arc::clone(&lease));
        lease
    }

    /// Removes a lease, unless a reservation has obtained it in the meantime.
    fn remove(&self, lease: &Arc<KeyLease>) {
        let mut shard = lock(self.shard(&lease.key));
        let state = lease.state();
        // Two references: one of the shard, one of `maintain`.
        if state.due() == 0 && Arc::strong_count(lease) <= 2 {
            shard.remove(&lease.key);
        }
    }

    fn shard(&self, key: &KeyId) -> &Mutex<HashMap<KeyId, Arc<KeyLease>>> {
        &self.shards[self.hasher.hash_one(key) as usize % SHARDS]
    }

    fn now(&self) -> Moment {
        self.clock.read()
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
