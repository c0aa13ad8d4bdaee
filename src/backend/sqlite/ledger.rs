//! Budget leases.

use std::time::{Duration, SystemTime};

use diesel::SqliteConnection;

use super::{SqliteStore, load};
use crate::{
    backend::sql::{
        statement::{Bind, Statement, TextRow},
        values,
    },
    error::StoreError,
    record::BudgetPeriod,
    store::{GrantedLease, Lease, LeaseRequest, LedgerEntry, grant},
};

const BUDGET: &str = "
    SELECT json_array(budget_limit_cents, CAST(budget_type AS TEXT),
        CAST(round(coalesce(total_cost, 0) * 1000000.0) AS INTEGER)) AS row
    FROM api_keys WHERE id = $1";

/// Selects the cost of the days from one day to before another one. A sum of integers may overflow, which is an error;
/// that of floats is exact up to 2^53.
const SPENT: &str = "
    SELECT CAST(CAST(total(cost_micro_cents) AS INTEGER) AS TEXT) AS row FROM api_key_usage
    WHERE api_key_id = $1 AND day >= $2 AND day < $3";

const EXPIRE: &str =
    "DELETE FROM api_key_leases WHERE api_key_id = $1 AND expires_at <= $2 RETURNING holder AS row";

const OTHERS: &str = "
    SELECT CAST(CAST(total(amount_micro_cents) AS INTEGER) AS TEXT) AS row FROM api_key_leases
    WHERE api_key_id = $1 AND holder <> $2";

const OWN: &str = "
    SELECT json_array(amount_micro_cents, sequence, expires_at) AS row FROM api_key_leases
    WHERE api_key_id = $1 AND holder = $2";

const WRITE: &str = "
    INSERT INTO api_key_leases (api_key_id, holder, sequence, amount_micro_cents, expires_at)
    VALUES ($1, $2, $3, $4, $5)
    ON CONFLICT (api_key_id, holder) DO UPDATE SET sequence = excluded.sequence,
        amount_micro_cents = excluded.amount_micro_cents, expires_at = excluded.expires_at
    RETURNING holder AS row";

impl SqliteStore {
    pub(super) async fn grant_lease(&self, request: &LeaseRequest) -> Result<Lease, StoreError> {
        let now = self.0.clock.now();
        let Some(key) = request.key.as_i64() else { return Ok(Lease::none(now)) };
        let request = request.clone();
        self.in_silent_transaction(move |connection| lease(connection, key, &request, now)).await
    }
}

/// Grants the lease. SQLite has one writer, so that no other lease or cost is written meanwhile.
fn lease(
    connection: &mut SqliteConnection,
    key: i64,
    request: &LeaseRequest,
    now: SystemTime,
) -> Result<Lease, StoreError> {
    let by_key = || Bind::Integer(key);
    let holder = || Bind::Text(request.holder.clone());
    let rows = load(connection, &Statement::new(BUDGET, [by_key()]))?;
    let Some(row) = rows.as_slice().first() else { return Ok(Lease::none(now)) };
    let (limit_cents, period, total_cost): (Option<i64>, Option<String>, i64) = read(row)?;
    let bad = |(column, reason)| StoreError::bad_row(format!("{column} {reason}"));
    let budget = values::budget(limit_cents, period.as_deref()).map_err(bad)?;
    let period = budget.map_or(BudgetPeriod::Total, |budget| budget.period);
    let days = period.days(now).map(|(first, after)| [first.to_string(), after.to_string()]);
    // Compared as texts, all days are between these.
    let days = days.unwrap_or_else(|| [String::new(), "~".to_owned()]).map(Bind::Text);
    let rows = load(connection, &Statement::new(SPENT, [by_key()].into_iter().chain(days)))?;
    let mut spent = rows.iter().find_map(TextRow::id).unwrap_or(0);
    if period == BudgetPeriod::Total {
        // The total includes the cost from before days were recorded, and the daily sum includes the cost that a faulty
        // row kept out of the totals.
        spent = spent.max(total_cost);
    }
    load(connection, &Statement::new(EXPIRE, [by_key(), millis(now)]))?;
    let rows = load(connection, &Statement::new(OTHERS, [by_key(), holder()]))?;
    let others = rows.iter().find_map(TextRow::id).unwrap_or(0);
    let rows = load(connection, &Statement::new(OWN, [by_key(), holder()]))?;
    let own = rows.as_slice().first().map_or(Ok(GrantedLease::NONE), own)?;
    let granted = grant(budget, &LedgerEntry { spent, others, own }, request, now);
    let (sequence, amount) = (Bind::number(granted.sequence), Bind::Integer(granted.amount));
    let binds = [by_key(), holder(), sequence, amount, millis(granted.expires_at)];
    load(connection, &Statement::new(WRITE, binds))?;
    Ok(granted.lease(budget, now))
}

fn own(row: &TextRow) -> Result<GrantedLease, StoreError> {
    let (amount, sequence, expires_at) = read(row)?;
    let expires_at = SystemTime::UNIX_EPOCH + Duration::from_millis(expires_at);
    Ok(GrantedLease { amount, sequence, expires_at })
}

fn read<T: serde::de::DeserializeOwned>(row: &TextRow) -> Result<T, StoreError> {
    let bad = |error| StoreError::bad_row("a budget or a lease can't be decoded").caused_by(error);
    serde_json::from_str(&row.row).map_err(bad)
}

/// Encodes a time for the column of leases.
pub(super) fn millis(time: SystemTime) -> Bind {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    Bind::number(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
