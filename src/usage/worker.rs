//! From counters to the store: [`Recorder`].

use std::{
    collections::{HashMap, VecDeque},
    fmt, mem,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use chrono::{DateTime, Utc};
use tokio::runtime::Handle;

use super::Tally;
use crate::{
    budget::Accounts,
    cache::Background,
    deadline::within,
    error::{StoreError, StoreErrorKind},
    key::{KeyScheme, hex},
    record::KeyId,
    store::{DynKeyStore, KeyStore, KeyUsage, UsageBatch},
    telemetry,
};

/// Hears of counters that have moved, and writes what they say behind.
pub(crate) struct Recorder {
    /// Those that have moved since they were last taken.
    moved: [Mutex<Vec<Arc<Tally>>>; SHARDS],
    next_shard: AtomicUsize,
    /// Off if nobody wants to know, or the store has no place for it.
    is_on: AtomicBool,
    interval: Duration,
    store: DynKeyStore,
    scheme: KeyScheme,
    writer: tokio::sync::Mutex<Writer>,
    /// The budgets that what is settled is charged to.
    pub(crate) accounts: Arc<Accounts>,
    work: Background,
    tending: Background,
}

/// What is still to be written.
struct Writer {
    /// Names this process to the store, for as long as it lives.
    name: String,
    sequence: u64,
    /// The batch that was sent and may or may not have arrived. What it says never changes.
    sent: Option<UsageBatch>,
    gathered: Gathered,
    /// Of the days before, the oldest first; there is something only while the store is away.
    earlier: VecDeque<Gathered>,
    /// When the last use of a key was last written.
    last_used: HashMap<KeyId, SystemTime>,
    /// When `last_used` was last looked through for what is old.
    swept_at: SystemTime,
}

/// What was used on one day (UTC).
#[derive(Default)]
struct Gathered {
    /// The last time that something was added.
    at: Option<SystemTime>,
    usage: HashMap<KeyId, KeyUsage>,
}

/// So that cores seldom meet.
const SHARDS: usize = 16;
/// So many keys go into one batch: few enough for the deadline that a store has for a statement.
const MAX_BATCH: usize = 1_000;
/// While the store fails, what was used is kept for so many keys; that of others is dropped, and counted.
const MAX_GATHERED: usize = 200_000;
/// The last use of a key is written no more often.
const LAST_USED_EVERY: Duration = Duration::from_secs(60);
/// A store that takes longer has failed; the batch is sent again.
const DEADLINE: Duration = Duration::from_secs(30);
/// [`Recorder::flush`] at the end gives up after this.
const LAST_FLUSH: Duration = Duration::from_secs(10);

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
        let is_on = interval.is_some() && getrandom::fill(&mut name).is_ok();
        let name = hex(&name);
        let accounts = Accounts::new(store.clone(), scheme.clone(), name.clone(), lease_lifetime);
        let accounts = Arc::new(accounts);
        Arc::new(Self {
            moved: std::array::from_fn(|_| Mutex::default()),
            next_shard: AtomicUsize::new(0),
            is_on: AtomicBool::new(is_on),
            interval: interval.unwrap_or(Duration::from_secs(1)),
            store,
            scheme,
            writer: tokio::sync::Mutex::new(Writer {
                name,
                sequence: 0,
                sent: None,
                gathered: Gathered::default(),
                earlier: VecDeque::new(),
                last_used: HashMap::new(),
                swept_at: SystemTime::UNIX_EPOCH,
            }),
            accounts,
            work: Background::default(),
            tending: Background::default(),
        })
    }

    /// Counters for a key; `None` if nothing is recorded.
    pub(crate) fn tally(self: &Arc<Self>, key: &KeyId) -> Option<Arc<Tally>> {
        let is_on = self.is_on.load(Ordering::Relaxed);
        is_on.then(|| Tally::new(key.clone(), Arc::downgrade(self)))
    }

    /// A counter has moved that was still.
    pub(super) fn hear(self: &Arc<Self>, tally: Arc<Tally>) {
        if !self.is_on.load(Ordering::Relaxed) {
            return;
        }
        let at = self.next_shard.fetch_add(1, Ordering::Relaxed) % SHARDS;
        let mut moved = self.moved[at].lock().unwrap_or_else(PoisonError::into_inner);
        let is_first = moved.is_empty();
        moved.push(tally);
        drop(moved);
        if is_first {
            self.ensure_work();
        }
    }

    /// Sees to it that somebody writes, where there is a runtime.
    pub(crate) fn ensure_work(self: &Arc<Self>) {
        if self.is_on.load(Ordering::Relaxed) && Handle::try_current().is_ok() {
            self.work.ensure(|| work(Arc::downgrade(self), self.interval));
            self.tending.ensure(|| Accounts::tend(Arc::downgrade(&self.accounts)));
        }
    }

    /// Writes what has come together. What the store does not take now is kept for the next time.
    async fn flush(&self) -> Result<(), StoreError> {
        let mut writer = self.writer.lock().await;
        let clock = self.scheme.clock();
        let now = clock.now();
        for shard in &self.moved {
            let moved = mem::take(&mut *shard.lock().unwrap_or_else(PoisonError::into_inner));
            for tally in moved {
                if let Some(dropped) = writer.gather(tally.take(), now) {
                    self.settled(&dropped);
                }
            }
        }
        while let Some(batch) = writer.next_batch(clock.now()) {
            let outcome = within(DEADLINE, self.store.record_usage(batch)).await;
            match outcome.unwrap_or_else(|| Err(StoreError::timeout(DEADLINE))) {
                Ok(()) => {
                    let batch = writer.sent.take();
                    batch.iter().flat_map(|batch| &batch.entries).for_each(|it| self.settled(it));
                }
                Err(error) if error.kind() == StoreErrorKind::Unsupported => {
                    self.is_on.store(false, Ordering::Relaxed);
                    writer.gathered.usage.clear();
                    writer.earlier.clear();
                    writer.sent = None;
                    telemetry::usage_unsupported();
                    return Ok(());
                }
                Err(error) => {
                    telemetry::usage_not_written(&error, writer.waiting());
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
        self.tending.stop();
        if !self.is_on.swap(false, Ordering::Relaxed) {
            return;
        }
        let began = Instant::now();
        if let Some(Ok(())) = within(LAST_FLUSH, self.flush()).await {
            let left = LAST_FLUSH.saturating_sub(began.elapsed());
            let _ = within(left, self.accounts.hand_back()).await;
        } else {
            telemetry::usage_lost(self.writer.lock().await.waiting());
        }
    }
}

impl Writer {
    /// Gives back what there is no room for.
    fn gather(&mut self, usage: KeyUsage, now: SystemTime) -> Option<KeyUsage> {
        self.turn_to(now);
        let is_full = self.waiting() >= MAX_GATHERED;
        if is_full && !self.gathered.usage.contains_key(&usage.key) {
            telemetry::usage_dropped(&usage);
            return Some(usage);
        }
        let key = usage.key.clone();
        let sum =
            self.gathered.usage.entry(key).or_insert_with_key(|key| KeyUsage::new(key.clone()));
        sum.requests = sum.requests.saturating_add(usage.requests);
        sum.tokens = sum.tokens.saturating_add(usage.tokens);
        sum.cost_micro_cents = sum.cost_micro_cents.saturating_add(usage.cost_micro_cents);
        sum.settled_micro_cents = sum.settled_micro_cents.saturating_add(usage.settled_micro_cents);
        None
    }

    /// Keeps what was used on another day apart.
    fn turn_to(&mut self, now: SystemTime) {
        let day = |time: SystemTime| DateTime::<Utc>::from(time).date_naive();
        let is_today = self.gathered.at.is_none_or(|at| day(at) == day(now));
        if !is_today && !self.gathered.usage.is_empty() {
            self.earlier.push_back(mem::take(&mut self.gathered));
        }
        self.gathered.at = Some(now);
    }

    /// How many keys there is something to write of, by the day.
    fn waiting(&self) -> usize {
        let sent = self.sent.as_ref().map_or(0, |batch| batch.entries.len());
        let earlier: usize = self.earlier.iter().map(|day| day.usage.len()).sum();
        sent + earlier + self.gathered.usage.len()
    }

    /// The batch that was sent already, or a new one of what is there; `None` if there is nothing.
    fn next_batch(&mut self, now: SystemTime) -> Option<&UsageBatch> {
        if self.sent.is_none() {
            let day = self.earlier.front_mut().unwrap_or(&mut self.gathered);
            let gathered_at = day.at.unwrap_or(now);
            let keys: Vec<_> = day.usage.keys().take(MAX_BATCH).cloned().collect();
            let mut entries: Vec<_> = keys.iter().filter_map(|key| day.usage.remove(key)).collect();
            if self.earlier.front().is_some_and(|day| day.usage.is_empty()) {
                self.earlier.pop_front();
            }
            if entries.is_empty() {
                return None;
            }
            for usage in &mut entries {
                usage.last_used_at = self.is_due(&usage.key, gathered_at).then_some(gathered_at);
            }
            self.sequence += 1;
            let batch = UsageBatch::new(&*self.name, self.sequence);
            self.sent = Some(UsageBatch { gathered_at, entries, ..batch });
        }
        let batch = self.sent.as_mut()?;
        batch.sent_at = now;
        Some(batch)
    }

    /// Whether it is time to write the last use of a key again.
    fn is_due(&mut self, key: &KeyId, now: SystemTime) -> bool {
        let is_recent = |written: &SystemTime| {
            // A clock that was set back makes it due.
            now.duration_since(*written).is_ok_and(|age| age < LAST_USED_EVERY)
        };
        if self.last_used.get(key).is_some_and(is_recent) {
            return false;
        }
        if self.last_used.len() >= MAX_GATHERED && !is_recent(&self.swept_at) {
            self.last_used.retain(|_, written| is_recent(written));
            self.swept_at = now;
        }
        if self.last_used.len() < MAX_GATHERED {
            self.last_used.insert(key.clone(), now);
        }
        true
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
