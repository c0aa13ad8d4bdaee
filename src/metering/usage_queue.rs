//! What is still to be written, in batches: [`UsageQueue`].

use std::{
    collections::{HashMap, VecDeque},
    mem,
    time::{Duration, SystemTime},
};

use chrono::{DateTime, Utc};

use crate::{
    record::KeyId,
    store::{KeyUsage, UsageBatch},
    telemetry,
};

/// What was used and is not in the store yet, as far as this node knows.
pub(super) struct UsageQueue {
    /// Names this process to the store, for as long as it lives.
    writer: String,
    /// Of the last batch.
    sequence: u64,
    /// The batch that was sent and may or may not have arrived. What it says never changes.
    sent: Option<UsageBatch>,
    today: Day,
    /// The oldest first; there is something only while the store is away.
    earlier: VecDeque<Day>,
    /// When the last use of a key was last written.
    last_used: HashMap<KeyId, SystemTime>,
    /// When that was last looked through for what is old.
    swept_at: SystemTime,
}

/// What was used on one day (UTC): a store charges it to the day that a batch was gathered on.
#[derive(Default)]
struct Day {
    /// The last time that something was added.
    at: Option<SystemTime>,
    usage: HashMap<KeyId, KeyUsage>,
}

/// So many keys go into one batch: few enough for the deadline that a store has for a statement.
const MAX_BATCH: usize = 1_000;
/// While the store fails, what was used is kept for so many keys; that of others is dropped, and counted.
const MAX_WAITING: usize = 200_000;
/// The last use of a key is written no more often.
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

    /// Gives back what there is no room for.
    pub(super) fn add(&mut self, usage: KeyUsage, now: SystemTime) -> Option<KeyUsage> {
        self.turn_to(now);
        let is_full = self.waiting() >= MAX_WAITING;
        if is_full && !self.today.usage.contains_key(&usage.key) {
            log_dropped(&usage);
            return Some(usage);
        }
        let key = usage.key.clone();
        let sum = self.today.usage.entry(key).or_insert_with_key(|key| KeyUsage::new(key.clone()));
        sum.requests = sum.requests.saturating_add(usage.requests);
        sum.tokens = sum.tokens.saturating_add(usage.tokens);
        sum.cost_micro_cents = sum.cost_micro_cents.saturating_add(usage.cost_micro_cents);
        sum.settled_micro_cents = sum.settled_micro_cents.saturating_add(usage.settled_micro_cents);
        None
    }

    fn turn_to(&mut self, now: SystemTime) {
        let day = |time: SystemTime| DateTime::<Utc>::from(time).date_naive();
        let is_over = self.today.at.is_some_and(|at| day(at) != day(now));
        if is_over && !self.today.usage.is_empty() {
            self.earlier.push_back(mem::take(&mut self.today));
        }
        self.today.at = Some(now);
    }

    /// How many keys there is something to write of, by the day.
    pub(super) fn waiting(&self) -> usize {
        let sent = self.sent.as_ref().map_or(0, |batch| batch.entries.len());
        let earlier: usize = self.earlier.iter().map(|day| day.usage.len()).sum();
        sent + earlier + self.today.usage.len()
    }

    /// The batch that was sent already, or a new one of what is there; `None` if there is nothing.
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
                usage.last_used_at = self.is_due(&usage.key, gathered_at).then_some(gathered_at);
            }
            self.sequence += 1;
            let batch = UsageBatch::new(&*self.writer, self.sequence);
            self.sent = Some(UsageBatch { gathered_at, entries, ..batch });
        }
        let batch = self.sent.as_mut()?;
        batch.sent_at = now;
        Some(batch)
    }

    /// The batch that was sent has: returns what was in it.
    pub(super) fn arrived(&mut self) -> Vec<KeyUsage> {
        self.sent.take().map(|batch| batch.entries).unwrap_or_default()
    }

    /// Nobody wants it.
    pub(super) fn clear(&mut self) {
        self.sent = None;
        self.earlier.clear();
        self.today.usage.clear();
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
        if self.last_used.len() >= MAX_WAITING && !is_recent(&self.swept_at) {
            self.last_used.retain(|_, written| is_recent(written));
            self.swept_at = now;
        }
        if self.last_used.len() < MAX_WAITING {
            self.last_used.insert(key.clone(), now);
        }
        true
    }
}

/// The store was away for so long that there is no room for the usage of more keys.
fn log_dropped(usage: &KeyUsage) {
    telemetry::count("api_key_usage_dropped_total");
    let KeyUsage { key, requests, tokens, cost_micro_cents, .. } = usage;
    tracing::error!(%key, requests, tokens, cost_micro_cents, "usage of an API key is lost");
}
