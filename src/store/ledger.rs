//! The ledger rule, for stores that evaluate it in this process.

use std::time::SystemTime;

use chrono::{DateTime, Datelike, Days, Months, NaiveDate, Utc};

use super::account::{Lease, LeaseRequest};
use crate::record::{Budget, BudgetPeriod};

/// The amounts that a lease is computed from beside the budget, in micro-cents.
pub(crate) struct LedgerEntry {
    /// Cost of the current period.
    pub(crate) spent: i64,
    /// Unexpired leases of other holders.
    pub(crate) others: i64,
    /// The current lease of the requesting holder.
    pub(crate) own: GrantedLease,
}

/// The ledger's row of a lease. It is kept until it expires, also after the lease was returned, so that a delayed
/// request is recognized as old.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GrantedLease {
    pub(crate) amount: i64,
    /// Sequence number of the request that it was granted for.
    pub(crate) sequence: u64,
    pub(crate) expires_at: SystemTime,
}

impl GrantedLease {
    /// The row of a holder without a lease, or with an expired one.
    pub(crate) const NONE: Self =
        Self { amount: 0, sequence: 0, expires_at: SystemTime::UNIX_EPOCH };

    /// Returns the lease as its holder receives it.
    pub(crate) fn lease(self, budget: Option<Budget>, now: SystemTime) -> Lease {
        let resets_at = budget.and_then(|budget| budget.period.end(now));
        Lease { resets_at, ..Lease::new(self.amount, self.expires_at) }
    }
}

/// Returns the lease that replaces the holder's current one: the requested amount, but at most the needed amount and a
/// quarter of what is left after it. If less than the needed amount is left, the holder keeps its current lease. A
/// request that is not newer than the last one is ignored.
pub(crate) fn grant(
    budget: Option<Budget>,
    entry: &LedgerEntry,
    request: &LeaseRequest,
    now: SystemTime,
) -> GrantedLease {
    if request.sequence <= entry.own.sequence {
        return entry.own;
    }
    let limit = budget.map_or(i64::MAX, Budget::micro_cents);
    let room = limit.saturating_sub(entry.spent).saturating_sub(entry.others).max(0);
    let (requested, needed) =
        (request.amount_micro_cents.max(0), request.needed_micro_cents.max(0));
    let amount = if needed > room {
        entry.own.amount.min(room)
    } else {
        requested.min(needed + (room - needed) / 4)
    };
    let expires_at = now.checked_add(request.lifetime).unwrap_or(now);
    GrantedLease { amount, sequence: request.sequence, expires_at }
}

impl Budget {
    /// Returns the limit in micro-cents.
    pub(crate) fn micro_cents(self) -> i64 {
        i64::try_from(self.limit_cents).unwrap_or(i64::MAX).saturating_mul(1_000_000)
    }
}

impl BudgetPeriod {
    /// Returns the first day of the period that contains `time`, and the first day after it; `None` for the whole life
    /// of a key.
    pub(crate) fn days(self, time: SystemTime) -> Option<(NaiveDate, NaiveDate)> {
        let day = DateTime::<Utc>::from(time).date_naive();
        match self {
            Self::Total => None,
            Self::Daily => Some((day, day.checked_add_days(Days::new(1))?)),
            Self::Weekly => {
                let since_monday = u64::from(day.weekday().num_days_from_monday());
                let first = day.checked_sub_days(Days::new(since_monday))?;
                Some((first, first.checked_add_days(Days::new(7))?))
            }
            Self::Monthly => {
                let first = day.with_day(1)?;
                Some((first, first.checked_add_months(Months::new(1))?))
            }
        }
    }

    /// Returns the end of the period that contains `time`, at midnight UTC.
    pub(crate) fn end(self, time: SystemTime) -> Option<SystemTime> {
        let (_, after) = self.days(time)?;
        Some(after.and_hms_opt(0, 0, 0)?.and_utc().into())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn request(requested: i64, needed: i64) -> LeaseRequest {
        let mut request = LeaseRequest::new(1.into(), "node", 2, requested);
        request.needed_micro_cents = needed;
        request
    }

    fn granted(limit_cents: u64, spent: i64, others: i64, own: i64, request: &LeaseRequest) -> i64 {
        let budget = Budget { limit_cents, period: BudgetPeriod::Total };
        let own = GrantedLease { amount: own, sequence: 1, ..GrantedLease::NONE };
        let entry = LedgerEntry { spent, others, own };
        grant(Some(budget), &entry, request, SystemTime::UNIX_EPOCH).amount
    }

    #[test]
    fn a_grant_is_never_more_than_what_is_left() {
        assert_eq!(granted(1, 0, 0, 0, &request(100, 10)), 100);
        // The needed amount, and a quarter of what is left.
        assert_eq!(granted(1, 0, 0, 0, &request(900_000, 20)), 250_015);
        assert_eq!(granted(1, 0, 0, 0, &request(900_000, 600_000)), 700_000);
        assert_eq!(granted(1, 400_000, 600_000, 0, &request(10, 1)), 0);
        // The current lease, as far as the budget has room for it.
        assert_eq!(granted(1, 400_000, 500_000, 90_000, &request(300_000, 200_000)), 90_000);
        assert_eq!(granted(1, 400_000, 550_000, 90_000, &request(300_000, 200_000)), 50_000);
        assert_eq!(granted(0, 0, 0, 0, &request(10, 1)), 0);
        assert_eq!(granted(1, 5_000_000, 0, 0, &request(10, 1)), 0);
        assert_eq!(granted(1, 0, 0, 70, &request(0, 0)), 0);
        assert_eq!(granted(u64::MAX, i64::MAX - 5, 0, 0, &request(10, 1)), 2);
        let entry = LedgerEntry { spent: i64::MAX, others: 0, own: GrantedLease::NONE };
        assert_eq!(grant(None, &entry, &request(10, 0), SystemTime::UNIX_EPOCH).amount, 0);
    }

    #[test]
    fn periods_begin_at_midnight_on_mondays_and_on_the_first() {
        let at = |text: &str| SystemTime::from(text.parse::<DateTime<Utc>>().unwrap());
        let cases = [
            (BudgetPeriod::Daily, "2026-11-22T23:59:59Z", "2026-11-23T00:00:00Z"),
            (BudgetPeriod::Daily, "2026-11-23T00:00:00Z", "2026-11-24T00:00:00Z"),
            // A Sunday, and the Monday after it.
            (BudgetPeriod::Weekly, "2026-11-22T23:59:59Z", "2026-11-23T00:00:00Z"),
            (BudgetPeriod::Weekly, "2026-11-23T00:00:00Z", "2026-11-30T00:00:00Z"),
            (BudgetPeriod::Monthly, "2026-12-31T12:00:00Z", "2027-01-01T00:00:00Z"),
            (BudgetPeriod::Monthly, "2028-02-29T12:00:00Z", "2028-03-01T00:00:00Z"),
        ];
        for (period, time, end) in cases {
            assert_eq!(period.end(at(time)), Some(at(end)), "{period:?} at {time}");
            let (first, after) = period.days(at(time)).unwrap();
            let day = DateTime::<Utc>::from(at(time)).date_naive();
            assert!(first <= day && day < after);
        }
        assert_eq!(BudgetPeriod::Total.end(at("2026-11-22T00:00:00Z")), None);
        assert_eq!(request(1, 1).lifetime, Duration::from_secs(30));
    }
}
