//! Queue of usage that is not yet written, in batches: [`UsageQueue`].

use std::{
    collections::{HashMap, VecDeque},
    mem,
    time::{Duration, SystemTime},
};

use chrono::{DateTime, Utc};

use crate::{
    record::{KeyId, Secret},
    store::{KeyUsage, UsageBatch},
    telemetry,
};

/// Usage that is not in the store yet, as far as this node knows.
pub(super) struct UsageQueue {
    /// Name of this process in usage batches. It never changes.
    writer: String,
    /// Sequence number of the last batch.
    sequence: u64,
    /// Batch that was sent and not yet acknowledged. Its entries never change.
    sent: Option<UsageBatch>,
    today: Day,
    /// Earlier days, the oldest first. Empty unless the store is unavailable.
    earlier: VecDeque<Day>,
    /// Time at which the last use of each secret was last written.
    last_used: HashMap<(KeyId, Secret), SystemTime>,
    /// Time at which old entries of `last_used` were last removed.
    swept_at: SystemTime,
}

/// Usage of one day (UTC). A store charges a batch to the day on which it was gathered.
#[derive(Default)]
struct Day {
    /// Time of the last addition.
    at: Option<SystemTime>,
    usage: HashMap<KeyId, KeyUsage>,
}

/// Maximum number of keys per batch, so that a write finishes within the statement deadline of a store.
const MAX_BATCH: usize = 1_000;
/// Maximum number of keys whose usage is kept while the store fails. Usage of further keys is dropped and counted.
const MAX_WAITING: usize = 200_000;
/// Minimum interval between two writes of the last use of a key.
const LAST_USED_EVERY: Duration = Duration::from_secs(60);

impl UsageQueue {
    pub(super) fn new(writer: String) -> Self {
        Self {
            writer,
            sequence: 0,
            sent: None,
            today: Day::default(),
            earlier: VecDeque::new(),
            last_used: HashMap::new(),
            swept_at: SystemTime::UNIX_EPOCH,
        }
    }

    /// Adds usage. Returns it if the queue is full and it is dropped.
    pub(super) fn add(&mut self, usage: KeyUsage, now: SystemTime) -> Option<KeyUsage> {
        self.roll_over(now);
        let is_full = self.waiting() >= MAX_WAITING;
        if is_full && !self.today.usage.contains_key(&usage.key) {
            log_dropped(&usage);
            return Some(usage);
        }
        let key = usage.key.clone();
        let sum = self.today.usage.entry(key).or_insert_with_key(|key| KeyUsage::new(key.clone()));
        sum.requests = sum.requests.saturating_add(usage.requests);
        sum.previous_requests = sum.previous_requests.saturating_add(usage.previous_requests);
        sum.tokens = sum.tokens.saturating_add(usage.tokens);
        sum.cost_micro_cents = sum.cost_micro_cents.saturating_add(usage.cost_micro_cents);
        sum.settled_micro_cents = sum.settled_micro_cents.saturating_add(usage.settled_micro_cents);
        None
    }

    fn roll_over(&mut self, now: SystemTime) {
        let day = |time: SystemTime| DateTime::<Utc>::from(time).date_naive();
        let is_over = self.today.at.is_some_and(|at| day(at) != day(now));
        if is_over && !self.today.usage.is_empty() {
            self.earlier.push_back(mem::take(&mut self.today));
        }
        self.today.at = Some(now);
    }

    /// Returns the number of pending entries, one per key and day.
    pub(super) fn waiting(&self) -> usize {
        let sent = self.sent.as_ref().map_or(0, |batch| batch.entries.len());
        let earlier: usize = self.earlier.iter().map(|day| day.usage.len()).sum();
        sent + earlier + self.today.usage.len()
    }

    /// Returns the unacknowledged batch, or a new batch of pending usage; `None` if the queue is empty.
    pub(super) fn next_batch(&mut self, now: SystemTime) -> Option<&UsageBatch> {
        if self.sent.is_none() {
            let day = self.earlier.front_mut().unwrap_or(&mut self.today);
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
                let KeyUsage { key, requests, previous_requests, .. } = &*usage;
                // Usage without a request is that of an earlier request, of either secret.
                let is_current_used = requests > previous_requests || *previous_requests == 0;
                let is_previous_used = *previous_requests > 0;
                let mut due = |secret| self.is_due(key, secret, gathered_at);
                let current = is_current_used && due(Secret::Current);
                let previous = is_previous_used && due(Secret::Previous);
                usage.last_used_at = current.then_some(gathered_at);
                usage.previous_last_used_at = previous.then_some(gathered_at);
            }
            self.sequence += 1;
            let batch = UsageBatch::new(&*self.writer, self.sequence, gathered_at);
            self.sent = Some(UsageBatch { entries, ..batch });
        }
        let batch = self.sent.as_mut()?;
        batch.sent_at = now;
        Some(batch)
    }

    /// Removes the batch that was sent, because the store has it. Returns its entries.
    pub(super) fn acknowledge(&mut self) -> Vec<KeyUsage> {
        self.sent.take().map(|batch| batch.entries).unwrap_or_default()
    }

    /// Drops all usage, because the store does not record it.
    pub(super) fn clear(&mut self) {
        self.sent = None;
        self.earlier.clear();
        self.today.usage.clear();
    }

    /// Returns whether the last use of a secret has to be written again.
    fn is_due(&mut self, key: &KeyId, secret: Secret, now: SystemTime) -> bool {
        let key = (key.clone(), secret);
        let is_recent = |written: &SystemTime| {
            // If the clock was set back, the write is due.
            now.duration_since(*written).is_ok_and(|age| age < LAST_USED_EVERY)
        };
        if self.last_used.get(&key).is_some_and(is_recent) {
            return false;
        }
        if self.last_used.len() >= MAX_WAITING && !is_recent(&self.swept_at) {
            self.last_used.retain(|_, written| is_recent(written));
            self.swept_at = now;
        }
        if self.last_used.len() < MAX_WAITING {
            self.last_used.insert(key, now);
        }
        true
    }
}

/// Logs and counts dropped usage: the store was unavailable for too long, and the queue is full.
fn log_dropped(usage: &KeyUsage) {
    telemetry::count("api_key_usage_dropped_total");
    let KeyUsage { key, requests, tokens, cost_micro_cents, .. } = usage;
    tracing::error!(%key, requests, tokens, cost_micro_cents, "the usage queue is full: usage of an API key is lost");
}
