//! The budgets of keys as one node sees them: [`BudgetLeases`].

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::BuildHasher,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::task::JoinSet;

use super::{
    reservation::{Reservation, held_for},
    usage_counter::UsageCounter,
};
use crate::{
    denial::{BudgetExceeded, Denial},
    error::StoreError,
    key::KeyScheme,
    record::KeyId,
    runtime::{Moment, within},
    store::{DynKeyStore, KeyStore, Lease, LeaseRequest},
};

/// The accounts of the keys that have a budget and were used of late.
pub(crate) struct BudgetLeases {
    shards: [Mutex<HashMap<KeyId, Arc<Account>>>; SHARDS],
    hasher: RandomState,
    store: DynKeyStore,
    scheme: KeyScheme,
    /// Names this node, as it does in usage.
    holder: String,
    /// Of the last ask for a lease: one that the store comes to late is then known to be old.
    sequence: AtomicU64,
    lifetime: Duration,
    is_closed: AtomicBool,
}

/// A slice of a key's budget, and what was done with it. Amounts are in micro-cents.
pub(crate) struct Account {
    key: KeyId,
    state: Mutex<State>,
    /// Held while the store is asked: the others wait for the answer.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    leased: i64,
    /// By this moment the lease may have expired. It was asked for a lifetime before: the store counts from later.
    asked_at: Option<Moment>,
    /// By reservations that live.
    held: i64,
    /// Charged here, but not in the store yet.
    settled: i64,
    /// All that was ever written to the store.
    written: i64,
    /// How much was last asked for beside what was needed.
    slice: i64,
    resets_at: Option<SystemTime>,
    used_at: Option<Moment>,
    /// The store had less than this left.
    refused: Option<(Moment, i64)>,
    /// It could not be asked.
    failed: Option<(Moment, StoreError)>,
}

/// So that cores seldom meet.
const SHARDS: usize = 16;
/// The longest that a reservation waits for the store.
const DEADLINE: Duration = Duration::from_secs(5);
/// So many leases are renewed at once.
const AT_ONCE: usize = 16;
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A lease that others have used up is asked for again so often.
const ATTEMPTS: usize = 5;
const PAUSE: Duration = Duration::from_millis(20);
/// What was refused is refused for so long without asking.
const REFUSED_FOR: Duration = Duration::from_millis(250);
/// A slice is for about so many reservations at first.
const RESERVATIONS: i64 = 16;

impl BudgetLeases {
    pub(crate) fn new(
        store: DynKeyStore,
        scheme: KeyScheme,
        holder: String,
        lifetime: Duration,
    ) -> Self {
        let shards = std::array::from_fn(|_| Mutex::default());
        Self {
            shards,
            hasher: RandomState::new(),
            store,
            scheme,
            holder,
            sequence: AtomicU64::new(0),
            lifetime,
            is_closed: AtomicBool::new(false),
        }
    }

    /// Holds `estimate` from the lease in hand, with no I/O.
    pub(crate) fn reserve_now(
        &self,
        key: &KeyId,
        estimate: u64,
        counter: &Arc<UsageCounter>,
    ) -> Option<Reservation> {
        let account = self.account(key);
        (!self.is_closed() && account.hold(held_for(estimate), self.now(), self.lifetime))
            .then(|| Reservation::held(estimate, account, Arc::clone(counter)))
    }

    /// Holds `estimate`, asking the store for a lease if need be.
    pub(crate) async fn reserve(
        &self,
        key: &KeyId,
        estimate: u64,
        counter: &Arc<UsageCounter>,
    ) -> Result<Reservation, Denial> {
        let account = self.account(key);
        let held = within(DEADLINE, self.hold(&account, held_for(estimate))).await;
        held.unwrap_or_else(|| Err(StoreError::timeout(DEADLINE).into()))?;
        Ok(Reservation::held(estimate, account, Arc::clone(counter)))
    }

    async fn hold(&self, account: &Account, wanted: i64) -> Result<(), Denial> {
        let came = self.now();
        let _asking = account.asking.lock().await;
        // Under the lock: what is granted after the leases were handed back, nobody would hand back.
        if self.is_closed() {
            return Err(Self::closed());
        }
        for attempt in 0..ATTEMPTS {
            let now = self.now();
            // The one before may have asked for more than it needed, or in vain.
            if account.hold(wanted, now, self.lifetime) {
                return Ok(());
            }
            account.was_in_vain(wanted, came, now)?;
            let has_room = self.ask(account, |state| state.wish(wanted)).await?;
            if !has_room {
                // What was settled may have been charged already without our knowing it yet.
                if attempt > 0 || account.state().settled == 0 {
                    return Err(account.refuse(wanted, self.now()));
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
        // Others were quicker each time.
        Err(StoreError::overloaded("too many reservations at once", Duration::from_secs(1)).into())
    }

    /// Settled costs have been written to the store, which has taken them from the lease, or are given up.
    pub(crate) fn written(&self, key: &KeyId, settled: i64) {
        let account = lock(self.shard(key)).get(key).cloned();
        let Some(account) = account else { return };
        let mut state = account.state();
        // Two of the largest number that there is are one, but are written one by one.
        state.settled = state.settled.saturating_sub(settled).max(0);
        state.leased = state.leased.saturating_sub(settled).max(0);
        state.written = state.written.saturating_add(settled);
    }

    /// Renews the leases that are in use, and hands back those that are not, until nobody wants it any more.
    pub(crate) async fn maintain(accounts: Weak<Self>) {
        loop {
            let Some(all) = accounts.upgrade() else { return };
            let mut asked = JoinSet::new();
            for account in all.all() {
                if asked.len() == AT_ONCE {
                    asked.join_next().await;
                }
                let all = Arc::clone(&all);
                // What can't be asked for now is asked for again; the others do not wait for it.
                asked.spawn(async move { all.maintain_lease(&account).await });
            }
            while asked.join_next().await.is_some() {}
            let pause = all.lifetime / 6;
            drop(all);
            tokio::time::sleep(pause.min(LONGEST_PAUSE)).await;
        }
    }

    async fn maintain_lease(&self, account: &Arc<Account>) {
        let Ok(_asking) = account.asking.try_lock() else { return };
        let now = self.now();
        let (is_idle, is_old) = {
            let state = account.state();
            let passed = |moment: Option<Moment>| {
                moment.is_none_or(|moment| now.since(moment) > self.lifetime / 3)
            };
            (state.due() == 0 && passed(state.used_at), passed(state.asked_at))
        };
        if is_idle && self.ask(account, State::give_up).await.is_ok() {
            self.forget(account);
        } else if !is_idle && is_old {
            // Logged with the usage, if it goes on.
            let _ = self.ask(account, State::renew).await;
        }
    }

    /// Holds nothing any more.
    pub(crate) fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
    }

    /// Hands back everything that is not held.
    pub(crate) async fn return_all(&self) {
        for account in self.all() {
            let _asking = account.asking.lock().await;
            // What is not handed back expires.
            let _ = self.ask(&account, State::give_up).await;
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst)
    }

    pub(crate) fn closed() -> Denial {
        StoreError::unavailable("this node is shutting down").into()
    }

    /// Asks the store for as much as `wish` says, and needs; returns whether that much was left.
    async fn ask(
        &self,
        account: &Account,
        wish: impl FnOnce(&mut State) -> (i64, i64),
    ) -> Result<bool, StoreError> {
        let asked_at = self.now();
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        let (ask, written) = {
            let mut state = account.state();
            let (asked, needed) = wish(&mut state);
            let ask = LeaseRequest::new(account.key.clone(), &*self.holder, sequence, asked);
            let ask = LeaseRequest { needed_micro_cents: needed, lifetime: self.lifetime, ..ask };
            (ask, state.written)
        };
        let outcome = within(DEADLINE, self.store.lease(&ask)).await;
        let outcome = outcome.unwrap_or_else(|| Err(StoreError::timeout(DEADLINE)));
        let mut state = account.state();
        match &outcome {
            Ok(lease) => state.take(lease, &ask, asked_at, written),
            Err(error) => state.failed = Some((self.now(), error.clone())),
        }
        Ok(outcome?.amount_micro_cents >= ask.needed_micro_cents)
    }

    fn all(&self) -> Vec<Arc<Account>> {
        self.shards.iter().flat_map(|it| lock(it).values().cloned().collect::<Vec<_>>()).collect()
    }

    fn account(&self, key: &KeyId) -> Arc<Account> {
        let mut shard = lock(self.shard(key));
        if let Some(account) = shard.get(key) {
            return Arc::clone(account);
        }
        let account = Arc::new(Account {
            key: key.clone(),
            state: Mutex::default(),
            asking: tokio::sync::Mutex::default(),
        });
        shard.insert(key.clone(), Arc::clone(&account));
        account
    }

    /// Unless somebody has come in between.
    fn forget(&self, account: &Arc<Account>) {
        let mut shard = lock(self.shard(&account.key));
        let state = account.state();
        // The shard, `maintain` and nobody else has it.
        if state.due() == 0 && Arc::strong_count(account) <= 2 {
            shard.remove(&account.key);
        }
    }

    fn shard(&self, key: &KeyId) -> &Mutex<HashMap<KeyId, Arc<Account>>> {
        &self.shards[self.hasher.hash_one(key) as usize % SHARDS]
    }

    fn now(&self) -> Moment {
        Moment::now(self.scheme.clock())
    }
}

impl Account {
    fn hold(&self, wanted: i64, now: Moment, lifetime: Duration) -> bool {
        let mut state = self.state();
        let is_good = state.asked_at.is_some_and(|asked| now.since(asked) < lifetime);
        let free = state.leased.saturating_sub(state.due());
        let fits = is_good && wanted <= free;
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

    /// Whether somebody who asked after `came` has found out that there is no use in asking.
    fn was_in_vain(&self, wanted: i64, came: Moment, now: Moment) -> Result<(), Denial> {
        let state = self.state();
        if let Some((at, error)) = &state.failed
            && at.later(came) == *at
        {
            return Err(error.clone().into());
        }
        match state.refused {
            Some((at, least)) if wanted >= least && now.since(at) < REFUSED_FOR => {
                Err(state.exceeded(now))
            }
            _ => Ok(()),
        }
    }

    fn refuse(&self, wanted: i64, now: Moment) -> Denial {
        let mut state = self.state();
        state.refused = Some((now, wanted));
        state.exceeded(now)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl State {
    /// For a reservation, and some more: the more often it is asked, the larger.
    fn wish(&mut self, wanted: i64) -> (i64, i64) {
        let needed = self.due().saturating_add(wanted);
        let slice = self.slice.saturating_mul(2).max(wanted.saturating_mul(RESERVATIONS));
        (needed.saturating_add(slice), needed)
    }

    /// For what is held and, if anybody has held something since it was last asked, for the rest; else for half of
    /// it. Lowered before the store does it, so that nobody holds meanwhile what is handed back.
    fn renew(&mut self) -> (i64, i64) {
        let is_wanted =
            self.used_at.zip(self.asked_at).is_some_and(|(used, asked)| used.later(asked) == used);
        let free = self.leased.saturating_sub(self.due()).max(0);
        if !is_wanted {
            self.leased = self.due().saturating_add(free / 2);
            self.slice = 0;
        }
        let kept = self.leased.max(self.due());
        (kept, kept)
    }

    /// For nothing but what is held.
    fn give_up(&mut self) -> (i64, i64) {
        (self.leased, self.slice) = (self.leased.min(self.due()), 0);
        (self.due(), self.due())
    }

    /// What the lease has to be good for.
    fn due(&self) -> i64 {
        self.held.saturating_add(self.settled)
    }

    fn take(&mut self, lease: &Lease, ask: &LeaseRequest, asked_at: Moment, written: i64) {
        // What was written meanwhile has shrunk the lease before or after it was granted: it was after.
        let meanwhile = self.written.saturating_sub(written);
        self.leased = lease.amount_micro_cents.saturating_sub(meanwhile).max(0);
        if lease.amount_micro_cents >= ask.needed_micro_cents {
            self.slice = ask.amount_micro_cents.saturating_sub(ask.needed_micro_cents);
            self.refused = None;
        }
        self.asked_at = Some(asked_at);
        self.resets_at = lease.resets_at;
        self.failed = None;
    }

    fn exceeded(&self, now: Moment) -> Denial {
        let wait = self.resets_at.map(|end| end.duration_since(now.wall()).unwrap_or_default());
        Denial::BudgetExceeded(BudgetExceeded { resets_at: self.resets_at, wait })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
