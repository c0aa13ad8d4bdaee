//! Usage and leases in memory.

use std::{
    collections::{BTreeMap, HashMap},
    time::SystemTime,
};

use chrono::{DateTime, NaiveDate, TimeDelta, Utc};

use super::Tables;
use crate::{
    record::{KeyId, UsageTotals},
    store::{self, DailyUsage, GrantedLease, Lease, LeaseRequest, UsageBatch},
};

/// The accounting data that the SQL stores keep beside users and keys.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Sequence number of the last counted batch of each writer.
    writers: HashMap<String, u64>,
    /// Usage of each key on each day.
    days: HashMap<KeyId, BTreeMap<NaiveDate, DailyUsage>>,
    /// Leases by key and holder.
    leases: HashMap<KeyId, HashMap<String, GrantedLease>>,
}

impl Tables {
    /// Counts a batch that was not counted before.
    pub(super) fn count(&mut self, batch: &UsageBatch, now: SystemTime) {
        let last = self.ledger.writers.entry(batch.writer.clone()).or_default();
        if *last >= batch.sequence {
            return;
        }
        *last = batch.sequence;
        let day = batch.day(now);
        for used in &batch.entries {
            // Usage of a deleted key is not counted.
            let Some(row) = self.keys.get_mut(&used.key) else { continue };
            let record = &mut row.value.record;
            let cost = used.cost_micro_cents.max(0);
            let UsageTotals { requests, tokens, cost_micro_cents } = &mut record.usage;
            *requests = requests.saturating_add(used.requests);
            *tokens = tokens.saturating_add(used.tokens);
            *cost_micro_cents = cost_micro_cents.saturating_add(cost);
            note_use(&mut record.last_used_at, used.last_used_at);
            if let Some(grace) = &mut record.grace {
                note_use(&mut grace.last_used_at, used.previous_last_used_at);
            }
            let days = self.ledger.days.entry(used.key.clone()).or_default();
            let of_day = days.entry(day).or_insert_with(|| DailyUsage::new(day));
            of_day.requests = of_day.requests.saturating_add(used.requests);
            of_day.tokens = of_day.tokens.saturating_add(used.tokens);
            of_day.cost_micro_cents = of_day.cost_micro_cents.saturating_add(cost);
            let leases = self.ledger.leases.get_mut(&used.key);
            if let Some(granted) = leases.and_then(|leases| leases.get_mut(&batch.writer)) {
                let left = granted.amount.saturating_sub(used.settled_micro_cents.max(0));
                granted.amount = left.max(0);
            }
        }
    }

    /// Returns the usage of a key on the days from `from` to `to`.
    pub(super) fn usage_between(
        &self,
        key: &KeyId,
        from: NaiveDate,
        to: NaiveDate,
    ) -> Vec<DailyUsage> {
        let days = self.ledger.days.get(key).into_iter().flatten();
        days.map(|(_, day)| *day).filter(|day| (from..=to).contains(&day.day)).collect()
    }

    /// Grants a lease, which replaces the holder's current one.
    pub(super) fn lease(&mut self, request: &LeaseRequest, now: SystemTime) -> Lease {
        let Some(row) = self.keys.get(&request.key) else { return Lease::new(0, now) };
        let record = &row.value.record;
        let days = record.budget.and_then(|budget| budget.period.days(now));
        let spent = match days {
            None => record.usage.cost_micro_cents,
            Some((first, after)) => {
                let days = self.ledger.days.get(&request.key).map(|days| days.range(first..after));
                let costs = days.into_iter().flatten().map(|(_, day)| day.cost_micro_cents);
                costs.fold(0, i64::saturating_add)
            }
        };
        let leases = self.ledger.leases.entry(request.key.clone()).or_default();
        leases.retain(|_, granted| granted.expires_at > now);
        let own = leases.remove(&request.holder).unwrap_or(GrantedLease::NONE);
        let others = leases.values().fold(0, |sum: i64, it| sum.saturating_add(it.amount));
        let entry = store::LedgerEntry { spent, others, own };
        let granted = store::grant(record.budget, &entry, request, now);
        leases.insert(request.holder.clone(), granted);
        granted.lease(record.budget, now)
    }
}

/// Sets the time of the last use of a secret, in steps of a minute.
fn note_use(written: &mut Option<DateTime<Utc>>, used_at: Option<SystemTime>) {
    let Some(used_at) = used_at.map(DateTime::<Utc>::from) else { return };
    if written.is_none_or(|written| used_at - written >= TimeDelta::seconds(60)) {
        *written = Some(used_at);
    }
}
