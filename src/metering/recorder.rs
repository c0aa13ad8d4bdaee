//! From counters to the store: [`Recorder`].

use std::{
    fmt, mem,
    sync::{
        Arc, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::runtime::Handle;

use super::{
    leases::BudgetLeases, reservation::Reservation, usage_counter::UsageCounter,
    usage_queue::UsageQueue,
};
use crate::{
    denial::Denial,
    error::{StoreError, StoreErrorKind},
    key::KeyScheme,
    record::KeyId,
    runtime::{Background, hex, within},
    store::{DynKeyStore, KeyStore, KeyUsage},
    telemetry::{self, FirstTime},
};

/// Hears of counters that have moved, and writes what they say behind.
pub(crate) struct Recorder {
    /// Those that have moved since they were last taken.
    moved: [Mutex<Vec<Arc<UsageCounter>>>; SHARDS],
    next_shard: AtomicUsize,
    /// Off if nobody wants to know, or the store has no place for it.
    is_on: AtomicBool,
    /// Why it is off, unless the node is shutting down.
    off: OnceLock<Off>,
    /// Whether it was logged that no budget can be reserved.
    warned: FirstTime,
    interval: Duration,
    store: DynKeyStore,
    scheme: KeyScheme,
    queue: tokio::sync::Mutex<UsageQueue>,
    /// The budgets that what is settled is charged to.
    pub(crate) accounts: Arc<BudgetLeases>,
    work: Background,
    maintaining: Background,
}

/// Why no usage is recorded.
#[derive(Debug)]
struct Off {
    error: StoreError,
    remedy: &'static str,
}

/// So that cores seldom meet.
const SHARDS: usize = 16;
/// A store that takes longer has failed; the batch is sent again.
const DEADLINE: Duration = Duration::from_secs(30);
/// At the end, what the store does not take in this time is given up.
const LAST_FLUSH: Duration = Duration::from_secs(10);
/// Between two attempts then.
const PAUSE: Duration = Duration::from_millis(100);

impl Recorder {
    /// `None` for `interval` records nothing.
    pub(crate) fn new(
        store: DynKeyStore,
        scheme: KeyScheme,
        interval: Option<Duration>,
        lease_lifetime: Duration,
    ) -> Arc<Self> {
        let mut name = [0; 16];
        // Nothing is counted twice under a name that others have as well.
        let off = if interval.is_none() {
            Some(Off {
                error: StoreError::missing("the authenticator was built with without_usage()"),
                remedy: "build it without without_usage(), or remove the budgets of the keys",
            })
        } else {
            getrandom::fill(&mut name).err().map(|error| Off {
                error: StoreError::unavailable(error),
                remedy: "restart the process",
            })
        };
        let is_on = off.is_none();
        let name = hex(&name);
        let accounts =
            BudgetLeases::new(store.clone(), scheme.clone(), name.clone(), lease_lifetime);
        let accounts = Arc::new(accounts);
        Arc::new(Self {
            moved: std::array::from_fn(|_| Mutex::default()),
            next_shard: AtomicUsize::new(0),
            is_on: AtomicBool::new(is_on),
            off: off.map_or_else(OnceLock::new, OnceLock::from),
            warned: FirstTime::default(),
            // Without a pause, the worker would keep a core busy.
            interval: interval.unwrap_or(Duration::from_secs(1)).max(Duration::from_millis(1)),
            store,
            scheme,
            queue: tokio::sync::Mutex::new(UsageQueue::new(name)),
            accounts,
            work: Background::default(),
            maintaining: Background::default(),
        })
    }

    /// Counters for a key; `None` if nothing is recorded.
    pub(crate) fn counter(self: &Arc<Self>, key: &KeyId) -> Option<Arc<UsageCounter>> {
        let is_on = self.is_on.load(Ordering::Relaxed);
        is_on.then(|| UsageCounter::new(key.clone(), Arc::downgrade(self)))
    }

    /// Holds `estimate` of a key's budget from the lease in hand, with no I/O.
    pub(crate) fn reserve_now(
        &self,
        key: &KeyId,
        estimate: u64,
        counter: &Arc<UsageCounter>,
    ) -> Option<Reservation> {
        // A lease that is never charged would be spent again and again.
        let is_on = self.is_on.load(Ordering::Relaxed);
        is_on.then(|| self.accounts.reserve_now(key, estimate, counter)).flatten()
    }

    /// Holds `estimate` of a key's budget, with a new lease from the store if need be.
    pub(crate) async fn reserve(
        &self,
        key: &KeyId,
        estimate: u64,
        counter: Option<&Arc<UsageCounter>>,
    ) -> Result<Reservation, Denial> {
        let reserved = match (self.off.get(), counter) {
            (None, Some(counter)) => self.accounts.reserve(key, estimate, counter).await,
            (Some(off), _) if !self.accounts.is_closed() => Err(off.error.clone().into()),
            _ => Err(BudgetLeases::closed()),
        };
        reserved.inspect_err(|denial| {
            if let Denial::Unsupported(error) = denial {
                let lease = "implement KeyStore::lease, or remove the budgets of the keys";
                let remedy = self.off.get().map_or(lease, |off| off.remedy);
                telemetry::budget_unsupported(error, remedy, &self.warned);
            }
        })
    }

    /// A counter has moved that was still.
    pub(super) fn mark_dirty(self: &Arc<Self>, counter: Arc<UsageCounter>) {
        if !self.is_on.load(Ordering::Relaxed) {
            return;
        }
        let at = self.next_shard.fetch_add(1, Ordering::Relaxed) % SHARDS;
        let mut moved = self.moved[at].lock().unwrap_or_else(PoisonError::into_inner);
        let is_first = moved.is_empty();
        moved.push(counter);
        drop(moved);
        if is_first {
            self.ensure_work();
        }
    }

    /// Sees to it that somebody writes, where there is a runtime.
    pub(crate) fn ensure_work(self: &Arc<Self>) {
        if self.is_on.load(Ordering::Relaxed) && Handle::try_current().is_ok() {
            self.work.ensure(|| work(Arc::downgrade(self), self.interval));
            self.maintaining.ensure(|| BudgetLeases::maintain(Arc::downgrade(&self.accounts)));
        }
    }

    /// Writes what has come together. What the store does not take now is kept for the next time.
    async fn flush(&self) -> Result<(), StoreError> {
        let mut queue = self.queue.lock().await;
        let clock = self.scheme.clock();
        let now = clock.now();
        for shard in &self.moved {
            let moved = mem::take(&mut *shard.lock().unwrap_or_else(PoisonError::into_inner));
            for counter in moved {
                if let Some(dropped) = queue.add(counter.take(), now) {
                    self.settled(&dropped);
                }
            }
        }
        while let Some(batch) = queue.next_batch(clock.now()) {
            let outcome = within(DEADLINE, self.store.record_usage(batch)).await;
            match outcome.unwrap_or_else(|| Err(StoreError::timeout(DEADLINE))) {
                Ok(()) => {
                    queue.arrived().iter().for_each(|usage| self.settled(usage));
                }
                Err(error) if error.kind() == StoreErrorKind::Unsupported => {
                    telemetry::usage_unsupported(&error);
                    let remedy =
                        "implement KeyStore::record_usage, or remove the budgets of the keys";
                    let _ = self.off.set(Off { error, remedy });
                    self.is_on.store(false, Ordering::Relaxed);
                    queue.clear();
                    return Ok(());
                }
                Err(error) => {
                    telemetry::usage_not_written(&error, queue.waiting());
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// What was settled from a lease is charged, or given up.
    fn settled(&self, usage: &KeyUsage) {
        if usage.settled_micro_cents > 0 {
            self.accounts.written(&usage.key, usage.settled_micro_cents);
        }
    }

    /// Ends the work, writes what is left and hands back the leases, within 10 s.
    pub(crate) async fn stop(&self) {
        // First, so that nothing is granted that would not be charged.
        self.accounts.close();
        self.work.stop();
        self.maintaining.stop();
        if !self.is_on.swap(false, Ordering::Relaxed) {
            return;
        }
        let began = Instant::now();
        let written = within(LAST_FLUSH, async {
            while let Err(error) = self.flush().await {
                if !error.is_transient() {
                    return false;
                }
                tokio::time::sleep(PAUSE).await;
            }
            true
        });
        if written.await == Some(true) {
            let left = LAST_FLUSH.saturating_sub(began.elapsed());
            let _ = within(left, self.accounts.return_all()).await;
        } else {
            telemetry::usage_lost(self.queue.lock().await.waiting());
        }
    }
}

/// Writes every `interval`, until nobody wants it any more.
async fn work(recorder: Weak<Recorder>, interval: Duration) {
    loop {
        tokio::time::sleep(interval).await;
        let Some(recorder) = recorder.upgrade() else { return };
        // What failed was logged, and is tried again.
        let _ = recorder.flush().await;
    }
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder").field("interval", &self.interval).finish_non_exhaustive()
    }
}
