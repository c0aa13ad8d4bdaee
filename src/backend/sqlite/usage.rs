//! Usage accounting, written in batches.

use std::time::SystemTime;

use diesel::{Connection, SqliteConnection};
use serde_json::Value;

use super::{SqliteStore, ledger::millis, load};
use crate::{
    backend::sql::{
        fault::Failure,
        statement::{Bind, Statement},
    },
    error::{StoreError, StoreErrorKind},
    store::UsageBatch,
    telemetry,
};

/// Records the batch of a writer. Returns a row if the batch was not counted before.
const WRITER: &str = "
    INSERT INTO api_key_usage_writers (writer, sequence, seen_at) VALUES ($1, $2, $3)
    ON CONFLICT (writer) DO UPDATE SET sequence = excluded.sequence, seen_at = excluded.seen_at
        WHERE sequence < excluded.sequence
    RETURNING writer AS row";

/// Adds to the totals of a key. `$1` is the entry in JSON, `$2` the time. An overflow would turn an integer into a
/// float. The cost is rounded to the millionth of a cent each time, so that the sum of floats is exact up to 2^53 of
/// them.
const TOTALS: &str = "
    UPDATE api_keys SET
        total_requests = CASE WHEN total_requests > 9223372036854775807 - n.requests
            THEN 9223372036854775807 ELSE coalesce(total_requests, 0) + n.requests END,
        total_tokens = CASE WHEN total_tokens > 9223372036854775807 - n.tokens
            THEN 9223372036854775807 ELSE coalesce(total_tokens, 0) + n.tokens END,
        total_cost = round(coalesce(total_cost, 0) * 1000000.0 + n.cost) / 1000000.0,
        last_used_at = CASE
            WHEN n.is_last_used AND (last_used_at IS NULL
                OR unixepoch(last_used_at, 'subsec') <= unixepoch($2, 'subsec') - 60)
            THEN $2 ELSE last_used_at END,
        previous_last_used_at = CASE
            WHEN n.is_previous_used AND previous_key_hash IS NOT NULL AND (previous_last_used_at IS NULL
                OR unixepoch(previous_last_used_at, 'subsec') <= unixepoch($2, 'subsec') - 60)
            THEN $2 ELSE previous_last_used_at END
    FROM (SELECT $1 ->> 'id' AS id, $1 ->> 'requests' AS requests, $1 ->> 'tokens' AS tokens,
        $1 ->> 'cost' AS cost, $1 ->> 'is_last_used' AS is_last_used,
        $1 ->> 'is_previous_used' AS is_previous_used) AS n
    WHERE api_keys.id = n.id RETURNING CAST(api_keys.id AS TEXT) AS row";

/// Adds to the cost of a day. `$1` is the entry in JSON, `$2` the day.
const DAYS: &str = "
    INSERT INTO api_key_usage (api_key_id, day, requests, tokens, cost_micro_cents)
    VALUES ($1 ->> 'id', $2, $1 ->> 'requests', $1 ->> 'tokens', $1 ->> 'cost')
    ON CONFLICT (api_key_id, day) DO UPDATE SET
        requests = CASE WHEN requests > 9223372036854775807 - excluded.requests
            THEN 9223372036854775807 ELSE requests + excluded.requests END,
        tokens = CASE WHEN tokens > 9223372036854775807 - excluded.tokens
            THEN 9223372036854775807 ELSE tokens + excluded.tokens END,
        cost_micro_cents = CASE WHEN cost_micro_cents > 9223372036854775807 - excluded.cost_micro_cents
            THEN 9223372036854775807 ELSE cost_micro_cents + excluded.cost_micro_cents END
    RETURNING day AS row";

/// Reduces the lease of the writer. `$1` is the entry in JSON, `$2` the writer.
const LEASES: &str = "
    UPDATE api_key_leases SET amount_micro_cents = max(amount_micro_cents - ($1 ->> 'settled'), 0)
    WHERE api_key_id = $1 ->> 'id' AND holder = $2 RETURNING holder AS row";

/// Deletes old writers. No writer retries a batch after that time.
const DELETE_WRITERS: &str = "
    DELETE FROM api_key_usage_writers WHERE seen_at < strftime('%Y-%m-%d %H:%M:%f', $1, '-30 days')
    RETURNING writer AS row";

/// Deletes expired leases on keys without new requests.
const DELETE_LEASES: &str =
    "DELETE FROM api_key_leases WHERE expires_at < $1 RETURNING holder AS row";

impl SqliteStore {
    pub(super) async fn count_usage(&self, batch: &UsageBatch) -> Result<(), StoreError> {
        let (batch, now) = (batch.clone(), self.0.clock.now());
        self.in_silent_transaction(move |connection| count(connection, &batch, now)).await
    }
}

fn count(
    connection: &mut SqliteConnection,
    batch: &UsageBatch,
    now: SystemTime,
) -> Result<(), StoreError> {
    let sequence = Bind::number(batch.sequence);
    let writer = [Bind::Text(batch.writer.clone()), sequence, Bind::Text(batch.time())];
    if load(connection, &Statement::new(WRITER, writer))?.is_empty() {
        return Ok(());
    }
    let entries = batch.encoded();
    let mut missing = batch.entries.len() - entries.len();
    for entry in entries {
        // A row that can't be written does not prevent other rows from being counted, and its own cost is still
        // charged.
        match connection.transaction(|c| count_key(c, batch, &entry).map_err(Failure)) {
            Ok(true) => charge_key(connection, batch, now, &entry)?,
            Ok(false) => missing += 1,
            Err(Failure(error)) if is_of_a_row(&error) => {
                charge_key(connection, batch, now, &entry)?;
                telemetry::usage_of_bad_row(&entry["id"], &error);
            }
            Err(Failure(error)) => return Err(error),
        }
    }
    if missing > 0 {
        telemetry::usage_of_deleted_keys(missing);
    }
    if batch.sequence == 1 {
        load(connection, &Statement::new(DELETE_WRITERS, [Bind::Text(batch.time())]))?;
        load(connection, &Statement::new(DELETE_LEASES, [millis(now)]))?;
    }
    Ok(())
}

/// Counts the usage of one key. Returns whether the key exists.
fn count_key(
    connection: &mut SqliteConnection,
    batch: &UsageBatch,
    entry: &Value,
) -> Result<bool, StoreError> {
    let totals = [Bind::Text(entry.to_string()), Bind::Text(batch.time())];
    Ok(!load(connection, &Statement::new(TOTALS, totals))?.is_empty())
}

/// Charges the day and the lease of one key.
fn charge_key(
    connection: &mut SqliteConnection,
    batch: &UsageBatch,
    now: SystemTime,
    entry: &Value,
) -> Result<(), StoreError> {
    let day = Bind::Text(batch.day(now).to_string());
    let text = || Bind::Text(entry.to_string());
    load(connection, &Statement::new(DAYS, [text(), day]))?;
    load(connection, &Statement::new(LEASES, [text(), Bind::Text(batch.writer.clone())]))?;
    Ok(())
}

fn is_of_a_row(error: &StoreError) -> bool {
    matches!(error.kind(), StoreErrorKind::Rejected | StoreErrorKind::Conflict)
}
