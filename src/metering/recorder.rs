//! Writes usage counters to the store: [`Recorder`].

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
    record::KeyId,
    runtime::{Background, Clock, hex, within},
    store::{DynKeyStore, KeyStore, KeyUsage},
    telemetry::{self, FirstTime},
};

/// Collects the counters that have changed, and writes their usage to the store asynchronously.
pub(crate) struct Recorder {
    /// Counters that have changed since they were last taken.
    dirty: [Mutex<Vec<Arc<UsageCounter>>>; SHARDS],
    next_shard: AtomicUsize,
    /// False if usage recording is disabled, or the store does not support it.
    is_on: AtomicBool,
    /// Reason for which recording is off, unless the node is shutting down.
    off: OnceLock<Off>,
    /// Whether an unsupported reservation was logged.
    warned: FirstTime,
    interval: Duration,
    store: DynKeyStore,
    clock: Arc<dyn Clock>,
    queue: tokio::sync::Mutex<UsageQueue>,
    /// Budget leases to which settled costs are charged.
    pub(crate) leases: Arc<BudgetLeases>,
    flushing: Background,
    maintaining: Background,
}

/// Reason for which no usage is recorded.
#[derive(Debug)]
struct Off {
    error: StoreError,
    remedy: &'static str,
}

/// Number of shards. Sharded to avoid contention.
const SHARDS: usize = 16;
/// Deadline of a write. When it is exceeded, the batch is retried.
const DEADLINE: Duration = Duration::from_secs(30);
/// Deadline of the last flush on shutdown. Usage that is not written by then is dropped.
const LAST_FLUSH: Duration = Duration::from_secs(10);
/// Pause between two attempts of the last flush.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

impl Recorder {
    /// Creates a recorder. `None` for `interval` disables usage recording.
    pub(crate) fn new(
        store: DynKeyStore,
        clock: Arc<dyn Clock>,
        interval: Option<Duration>,
        lease_lifetime: Duration,
    ) -> Arc<Self> {
        let mut name = [0; 16];
        // Without a unique name, the store would treat batches of different nodes as duplicates, so nothing is
        // recorded.
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
        let leases =
            BudgetLeases::new(store.clone(), Arc::clone(&clock), name.clone(), lease_lifetime);
        let leases = Arc::new(leases);
        Arc::new(Self {
            dirty: std::array::from_fn(|_| Mutex::default()),
            next_shard: AtomicUsize::new(0),
            is_on: AtomicBool::new(is_on),
            off: off.map_or_else(OnceLock::new, OnceLock::from),
            warned: FirstTime::default(),
            // Without a pause, the task would keep a core busy.
            interval: interval.unwrap_or(Duration::from_secs(1)).max(Duration::from_millis(1)),
            store,
            clock,
            queue: tokio::sync::Mutex::new(UsageQueue::new(name)),
            leases,
            flushing: Background::default(),
            maintaining: Background::default(),
        })
    }

    /// Creates the counter of a key; `None` if no usage is recorded.
    pub(crate) fn counter(self: &Arc<Self>, key: &KeyId) -> Option<Arc<UsageCounter>> {
        let is_on = self.is_on.load(Ordering::Relaxed);
        is_on.then(|| UsageCounter::new(key.clone(), Arc::downgrade(self)))
    }

    /// Holds `estimate` of a key's budget from the current lease, without I/O. Returns `None` if the lease does not
    /// cover it.
    pub(crate) fn reserve_now(
        &self,
        key: &KeyId,
        estimate: u64,
        counter: &Arc<UsageCounter>,
    ) -> Option<Reservation> {
        // A lease that is never charged could be spent repeatedly.
        let is_on = self.is_on.load(Ordering::Relaxed);
        is_on.then(|| self.leases.reserve_now(key, estimate, counter)).flatten()
    }

    /// Holds `estimate` of a key's budget, and requests a lease from the store if needed.
    pub(crate) async fn reserve(
        &self,
        key: &KeyId,
        estimate: u64,
        counter: Option<&Arc<UsageCounter>>,
    ) -> Result<Reservation, Denial> {
        let reserved = match (self.off.get(), counter) {
            (None, Some(counter)) => self.leases.reserve(key, estimate, counter).await,
            (Some(off), _) if !self.leases.is_closed() => Err(off.error.clone().into()),
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

    /// Queues a counter that has changed for the next flush.
    pub(super) fn mark_dirty(self: &Arc<Self>, counter: Arc<UsageCounter>) {
        if !self.is_on.load(Ordering::Relaxed) {
            return;
        }
        let at = self.next_shard.fetch_add(1, Ordering::Relaxed) % SHARDS;
        let mut dirty = self.dirty[at].lock().unwrap_or_else(PoisonError::into_inner);
        let is_first = dirty.is_empty();
        dirty.push(counter);
        drop(dirty);
        if is_first {
            self.ensure_tasks();
        }
    }

    /// Starts the tasks that write usage and renew leases, if they do not run and there is a runtime.
    pub(crate) fn ensure_tasks(self: &Arc<Self>) {
        if self.is_on.load(Ordering::Relaxed) && Handle::try_current().is_ok() {
            self.flushing.ensure(|| flush_periodically(Arc::downgrade(self), self.interval));
            self.maintaining.ensure(|| BudgetLeases::maintain(Arc::downgrade(&self.leases)));
        }
    }

    /// Writes the collected usage. Usage that the store does not accept is kept for the next flush.
    async fn flush(&self) -> Result<(), StoreError> {
        let mut queue = self.queue.lock().await;
        let now = self.clock.now();
        for shard in &self.dirty {
            let dirty = mem::take(&mut *shard.lock().unwrap_or_else(PoisonError::into_inner));
            for counter in dirty {
                if let Some(dropped) = queue.add(counter.take(), now) {
                    self.release_settled(&dropped);
                }
            }
        }
        while let Some(batch) = queue.next_batch(self.clock.now()) {
            let outcome = within(DEADLINE, self.store.record_usage(batch)).await;
            match outcome.unwrap_or_else(|| Err(StoreError::timeout(DEADLINE))) {
                Ok(()) => {
                    queue.acknowledge().iter().for_each(|usage| self.release_settled(usage));
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

    /// Subtracts settled costs, which were charged or dropped, from their lease.
    fn release_settled(&self, usage: &KeyUsage) {
        if usage.settled_micro_cents > 0 {
            self.leases.written(&usage.key, usage.settled_micro_cents);
        }
    }

    /// Stops the tasks, writes the pending usage and returns the leases, within 10 s.
    pub(crate) async fn stop(&self) {
        // First, so that no reservation is granted whose cost would not be charged.
        self.leases.close();
        self.flushing.stop();
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
                tokio::time::sleep(RETRY_PAUSE).await;
            }
            true
        });
        if written.await == Some(true) {
            let left = LAST_FLUSH.saturating_sub(began.elapsed());
            let _ = within(left, self.leases.return_all()).await;
        } else {
            telemetry::usage_lost(self.queue.lock().await.waiting());
        }
    }
}

/// Flushes every `interval`, until the recorder is dropped.
async fn flush_periodically(recorder: Weak<Recorder>, interval: Duration) {
    loop {
        tokio::time::sleep(interval).await;
        let Some(recorder) = recorder.upgrade() else { return };
        // Failures are logged, and retried at the next flush.
        let _ = recorder.flush().await;
    }
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder").field("interval", &self.interval).finish_non_exhaustive()
    }
}
