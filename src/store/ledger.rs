//! The rule of the ledger, for stores that keep it in this process.

use std::time::SystemTime;

use chrono::{DateTime, Datelike, Days, Months, NaiveDate, Utc};

use super::account::{Lease, LeaseRequest};
use crate::record::{Budget, BudgetPeriod};

/// What counts for a lease beside the budget, in micro-cents.
pub(crate) struct LedgerEntry {
    /// What the period has cost.
    pub(crate) spent: i64,
    /// The leases of others that have not expired.
    pub(crate) others: i64,
    /// What the one who asks has.
    pub(crate) own: Slice,
}

/// What stands in the ledger of a lease: until it expires, also when it was handed back, so that an ask that was on
/// its way for long is known to be old.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slice {
    pub(crate) amount: i64,
    /// Of the ask that it was granted for.
    pub(crate) sequence: u64,
    pub(crate) expires_at: SystemTime,
}

impl Slice {
    /// Of a holder that has none, or one that has expired.
    pub(crate) const NONE: Self =
        Self { amount: 0, sequence: 0, expires_at: SystemTime::UNIX_EPOCH };

    /// As its holder sees it.
    pub(crate) fn lease(self, budget: Option<Budget>, now: SystemTime) -> Lease {
        let resets_at = budget.and_then(|budget| budget.period.end(now));
        Lease { resets_at, ..Lease::new(self.amount, self.expires_at) }
    }
}

/// A slice for the one who asks, in place of the one that it has: what it asks for, but no more than it needs and a
/// quarter of what is left then. If there is less left than it needs, it keeps what it has. An ask that is not newer
/// than the last one changes nothing.
pub(crate) fn grant(
    budget: Option<Budget>,
    books: &LedgerEntry,
    ask: &LeaseRequest,
    now: SystemTime,
) -> Slice {
    if ask.sequence <= books.own.sequence {
        return books.own;
    }
    let limit = budget.map_or(i64::MAX, Budget::micro_cents);
    let room = limit.saturating_sub(books.spent).saturating_sub(books.others).max(0);
    let (asked, needed) = (ask.amount_micro_cents.max(0), ask.needed_micro_cents.max(0));
    let amount = if needed > room {
        books.own.amount.min(room)
    } else {
        asked.min(needed + (room - needed) / 4)
    };
    let expires_at = now.checked_add(ask.lifetime).unwrap_or(now);
    Slice { amount, sequence: ask.sequence, expires_at }
}

impl Budget {
    /// The limit.
    pub(crate) fn micro_cents(self) -> i64 {
        i64::try_from(self.limit_cents).unwrap_or(i64::MAX).saturating_mul(1_000_000)
    }
}

impl BudgetPeriod {
    /// The first day of the period that `time` is in, and the first one after it; `None` for the whole life of a
    /// key.
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

    /// When the period ends that `time` is in: at midnight UTC.
    pub(crate) fn end(self, time: SystemTime) -> Option<SystemTime> {
        let (_, after) = self.days(time)?;
        Some(after.and_hms_opt(0, 0, 0)?.and_utc().into())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn ask(asked: i64, needed: i64) -> LeaseRequest {
        let mut ask = LeaseRequest::new(1.into(), "node", 2, asked);
        ask.needed_micro_cents = needed;
        ask
    }

    fn granted(limit_cents: u64, spent: i64, others: i64, own: i64, ask: &LeaseRequest) -> i64 {
        let budget = Budget { limit_cents, period: BudgetPeriod::Total };
        let own = Slice { amount: own, sequence: 1, ..Slice::NONE };
        let books = LedgerEntry { spent, others, own };
        grant(Some(budget), &books, ask, SystemTime::UNIX_EPOCH).amount
    }

    #[test]
    fn a_grant_is_never_more_than_what_is_left() {
        assert_eq!(granted(1, 0, 0, 0, &ask(100, 10)), 100);
        // What is needed, and a quarter of what is left.
        assert_eq!(granted(1, 0, 0, 0, &ask(900_000, 20)), 250_015);
        assert_eq!(granted(1, 0, 0, 0, &ask(900_000, 600_000)), 700_000);
        assert_eq!(granted(1, 400_000, 600_000, 0, &ask(10, 1)), 0);
        // What it has, as far as there is room for it.
        assert_eq!(granted(1, 400_000, 500_000, 90_000, &ask(300_000, 200_000)), 90_000);
        assert_eq!(granted(1, 400_000, 550_000, 90_000, &ask(300_000, 200_000)), 50_000);
        assert_eq!(granted(0, 0, 0, 0, &ask(10, 1)), 0);
        assert_eq!(granted(1, 5_000_000, 0, 0, &ask(10, 1)), 0);
        assert_eq!(granted(1, 0, 0, 70, &ask(0, 0)), 0);
        assert_eq!(granted(u64::MAX, i64::MAX - 5, 0, 0, &ask(10, 1)), 2);
        let books = LedgerEntry { spent: i64::MAX, others: 0, own: Slice::NONE };
        assert_eq!(grant(None, &books, &ask(10, 0), SystemTime::UNIX_EPOCH).amount, 0);
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
        assert_eq!(ask(1, 1).lifetime, Duration::from_secs(30));
    }
}
