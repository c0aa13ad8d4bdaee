//! Usage and leases in memory.

use std::{
    collections::{BTreeMap, HashMap},
    time::SystemTime,
};

use chrono::{DateTime, NaiveDate, TimeDelta, Utc};

use super::Tables;
use crate::{
    record::{KeyId, UsageTotals},
    store::{self, GrantedLease, Lease, LeaseRequest, UsageBatch},
};

/// The accounting data that the SQL stores keep beside users and keys.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Sequence number of the last counted batch of each writer.
    writers: HashMap<String, u64>,
    /// Cost of each key on each day, in micro-cents.
    costs: HashMap<KeyId, BTreeMap<NaiveDate, i64>>,
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
            if let Some(last_used) = used.last_used_at.map(DateTime::<Utc>::from) {
                let is_due = |written| last_used - written >= TimeDelta::seconds(60);
                if record.last_used_at.is_none_or(is_due) {
                    record.last_used_at = Some(last_used);
                }
            }
            let of_day = self.ledger.costs.entry(used.key.clone()).or_default().entry(day);
            let of_day = of_day.or_default();
            *of_day = of_day.saturating_add(cost);
            let leases = self.ledger.leases.get_mut(&used.key);
            if let Some(granted) = leases.and_then(|leases| leases.get_mut(&batch.writer)) {
                let left = granted.amount.saturating_sub(used.settled_micro_cents.max(0));
                granted.amount = left.max(0);
            }
        }
    }

    /// Grants a lease, which replaces the holder's current one.
    pub(super) fn lease(&mut self, request: &LeaseRequest, now: SystemTime) -> Lease {
        let Some(row) = self.keys.get(&request.key) else { return Lease::new(0, now) };
        let record = &row.value.record;
        let days = record.budget.and_then(|budget| budget.period.days(now));
        let spent = match days {
            None => record.usage.cost_micro_cents,
            Some((first, after)) => {
                let costs =
                    self.ledger.costs.get(&request.key).map(|costs| costs.range(first..after));
                costs.into_iter().flatten().fold(0, |sum: i64, (_, cost)| sum.saturating_add(*cost))
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
