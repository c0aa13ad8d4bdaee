//! Usage accounting, written in batches.

use std::time::Duration;

use chrono::{Datelike, NaiveDate};
use diesel_async::{AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection};
use serde_json::Value;

use super::{
    PostgresStore,
    connections::Isolation,
    sqlstate::{self, SqlFault},
};
use crate::{
    backend::sql::{
        fault::{Failure, store_error},
        statement::{Bind, Statement, TextRow},
    },
    error::StoreError,
    record::KeyId,
    runtime::within,
    store::{DailyUsage, UsageBatch},
    telemetry,
};

/// Returns the statement that counts a batch. `$1` is the batch in JSON, `$2` and `$3` its writer and number, `$4` when
/// it was gathered and `$5` how many milliseconds ago. It counts the batch unless it was counted before, and returns
/// whether it did and for how many keys.
///
/// The day is the database's, as it is for leases: with the wrong clock of a node, today's cost could be charged to
/// another day.
///
/// The rows of keys are locked in the order of their ids before any is written. An `UPDATE` alone locks them in the
/// order in which it finds them, and two of them could deadlock. Rows of days and leases are written only under the
/// lock of their key. Sums are capped at the largest number that their column holds.
fn count(is_gated: bool, has_totals: bool) -> String {
    let total = |column: &str, added: &str| {
        format!(
            "{column} = least(coalesce(k.{column}, 0)::numeric + b.{added},
                CASE pg_typeof(k.{column})::text
                    WHEN 'integer' THEN 2147483647 WHEN 'smallint' THEN 32767
                    ELSE 9223372036854775807 END)"
        )
    };
    // In steps of a minute.
    let used = |column: &str, is_used: &str| {
        format!(
            "{column} = CASE WHEN b.{is_used} AND (
                    k.{column} IS NULL OR k.{column} <= (time.row).{column} - INTERVAL '60 s'
                ) THEN (time.row).{column} ELSE k.{column} END"
        )
    };
    let writer = if is_gated { WRITER } else { "SELECT 1" };
    let counted = if has_totals { "TRUE" } else { "FALSE" };
    let day = |column: &str| {
        format!("{column} = least(u.{column}::numeric + excluded.{column}, 9223372036854775807)")
    };
    format!(
        "WITH batch AS (
            SELECT * FROM jsonb_to_recordset($1::jsonb)
                AS b (id BIGINT, requests BIGINT, tokens BIGINT, cost BIGINT, settled BIGINT,
                    is_last_used BOOLEAN, is_previous_used BOOLEAN)
        ), writer AS ({writer}), time AS (
            -- In the type of the column. From an existing row, because a column of an empty row may be NOT NULL.
            SELECT jsonb_populate_record(
                k, jsonb_build_object('last_used_at', $4::text, 'previous_last_used_at', $4::text)) AS row
            FROM api_keys k LIMIT 1
        ), locked AS (
            SELECT k.id FROM api_keys k JOIN batch b ON b.id = k.id WHERE EXISTS (SELECT FROM writer)
            ORDER BY k.id FOR NO KEY UPDATE OF k
        ), counted AS (
            UPDATE api_keys k SET {}, {},
                total_cost = least(coalesce(k.total_cost, 0)::numeric
                    + div(k.total_cost_rest::numeric + b.cost, cost.unit) * cost.unit / 1000000, cost.most),
                total_cost_rest = mod(k.total_cost_rest::numeric + b.cost, cost.unit),
                {}, {}
            FROM locked l JOIN batch b ON b.id = l.id, time, ({COST}) AS cost WHERE k.id = l.id AND {counted} RETURNING k.id
        ), days AS (
            INSERT INTO api_key_usage AS u (api_key_id, day, requests, tokens, cost_micro_cents)
            SELECT b.id, gathered.day, b.requests, b.tokens, b.cost
            FROM locked l JOIN batch b ON b.id = l.id,
                (SELECT ((clock_timestamp() - $5 * INTERVAL '1 ms') AT TIME ZONE 'UTC')::date AS day) AS gathered
            ORDER BY b.id
            ON CONFLICT (api_key_id, day) DO UPDATE SET {}, {}, {}
        ), leases AS (
            UPDATE api_key_leases s SET amount_micro_cents = greatest(s.amount_micro_cents - b.settled, 0)
            FROM locked l JOIN batch b ON b.id = l.id
            WHERE s.api_key_id = l.id AND s.holder = $2 AND b.settled > 0
        )
        SELECT json_build_array((SELECT count(*) FROM writer), (SELECT count(*) FROM locked))::text AS row",
        total("total_requests", "requests"),
        total("total_tokens", "tokens"),
        used("last_used_at", "is_last_used"),
        used("previous_last_used_at", "is_previous_used"),
        day("requests"),
        day("tokens"),
        day("cost_micro_cents"),
    )
}

/// The column `total_cost`, which may be narrow and coarse in an adopted table: the largest number that fits into it,
/// NULL if every number does, and the micro-cents of its smallest step. An amount below a step is kept in
/// `total_cost_rest` until it makes one: rounding at each flush would add up. A NUMERIC's modifier has the number of
/// digits in the upper half, and the number of decimal places in the lower half, with a sign in its 11th bit.
const COST: &str = "
    SELECT CASE type WHEN 'int2' THEN 32767 WHEN 'int4' THEN 2147483647 WHEN 'int8' THEN 9223372036854775807
            WHEN 'numeric' THEN 10::numeric ^ (digits - scale) - 10::numeric ^ (-scale) END AS most,
        CASE WHEN type IN ('int2', 'int4', 'int8') THEN 1000000 WHEN type = 'numeric' AND scale < 6
            THEN (10::numeric ^ (6 - scale))::numeric(20, 0) ELSE 1 END AS unit
    FROM (
        SELECT t.typname AS type, (modifier - 4) >> 16 AS digits,
            (((modifier - 4) & 2047) # 1024) - 1024 AS scale
        FROM pg_attribute a JOIN pg_type d ON d.oid = a.atttypid
        -- A domain counts as its base type.
        JOIN pg_type t ON t.oid = CASE WHEN d.typtype = 'd' THEN d.typbasetype ELSE d.oid END,
            LATERAL (SELECT nullif(CASE WHEN d.typtype = 'd' THEN d.typtypmod ELSE a.atttypmod END, -1) AS modifier) AS m
        WHERE a.attrelid = 'api_keys'::regclass AND a.attname = 'total_cost'
    ) AS total_cost";

/// Records the batch of a writer. Returns a row if the batch was not counted before. While another attempt to send it
/// is under way, this waits for its end.
const WRITER: &str = "
    INSERT INTO api_key_usage_writers AS w (writer, sequence, seen_at)
    VALUES ($2, $3::bigint, clock_timestamp())
    ON CONFLICT (writer) DO UPDATE SET sequence = excluded.sequence, seen_at = excluded.seen_at
        WHERE w.sequence < excluded.sequence
    RETURNING 1";

/// Deletes old writers, none of which retries a batch after that time, and expired leases on keys without new requests.
/// It waits for no lock.
const DELETE_OLD: &str = "
    WITH writers AS (
        DELETE FROM api_key_usage_writers WHERE seen_at < now() - INTERVAL '30 days' RETURNING 1
    ), leases AS (
        DELETE FROM api_key_leases WHERE (api_key_id, holder) IN (
            SELECT api_key_id, holder FROM api_key_leases WHERE expires_at < now() - INTERVAL '1 day'
            FOR UPDATE SKIP LOCKED
        ) RETURNING 1
    )
    SELECT ((SELECT count(*) FROM writers) + (SELECT count(*) FROM leases))::text AS row";

impl PostgresStore {
    pub(super) async fn count_usage(&self, batch: &UsageBatch) -> Result<(), StoreError> {
        let entries = batch.encoded();
        let all = Value::from(entries.clone()).to_string();
        let statement = sqlstate::attempt(count(true, true), binds(batch, all));
        let counted =
            self.load_in(&self.0.accounting, Isolation::ReadCommitted, &statement).await?;
        // Any error that is not the fault of a row delays the batch: the recorder retries it.
        match sqlstate::outcome(&counted)? {
            Ok(counts) => report(batch, counts.as_deref()),
            Err(fault) if fault.is_of_a_row() => self.count_in_parts(batch, &entries).await?,
            Err(fault) => return Err(fault.into()),
        }
        if batch.sequence == 1
            && let Err(error) =
                self.load::<TextRow>(&self.0.accounting, &Statement::new(DELETE_OLD, [])).await
        {
            telemetry::not_pruned(&error);
        }
        Ok(())
    }

    /// Returns the usage of a key on the days from `from` to `to`.
    pub(super) async fn usage_between(
        &self,
        key: &KeyId,
        from: NaiveDate,
        to: NaiveDate,
    ) -> Result<Vec<DailyUsage>, StoreError> {
        let Some(key) = key.as_i64() else { return Ok(Vec::new()) };
        let select = "SELECT json_build_array(day, requests, tokens, cost_micro_cents)::text AS row
            FROM api_key_usage WHERE api_key_id = $1 AND day BETWEEN $2::date AND $3::date ORDER BY day";
        let binds = [Bind::Integer(key), bound(from), bound(to)];
        let rows: Vec<TextRow> =
            self.load(&self.0.management, &Statement::new(select, binds)).await?;
        let decode = |row: &TextRow| {
            let decoded = serde_json::from_str::<(NaiveDate, u64, u64, i64)>(&row.row);
            let (day, requests, tokens, cost_micro_cents) = decoded.map_err(|error| {
                StoreError::bad_row("a row of api_key_usage can't be decoded").caused_by(error)
            })?;
            Ok(DailyUsage { requests, tokens, cost_micro_cents, ..DailyUsage::new(day) })
        };
        rows.iter().map(decode).collect()
    }

    /// Counts a batch in one transaction, by halves, so that a row that can't be written does not prevent other rows
    /// from being counted.
    async fn count_in_parts(
        &self,
        batch: &UsageBatch,
        entries: &[Value],
    ) -> Result<(), StoreError> {
        let mut checkout = self.0.accounting.checkout().await?;
        let connection = checkout.connection();
        let gate = format!("WITH w AS ({WRITER}) SELECT count(*)::text AS row FROM w");
        let gate = Statement::new(gate, binds(batch, String::new()));
        let settings = self.0.accounting.local_settings();
        let mut transaction = connection.build_transaction().read_committed();
        let work = transaction.run(async |connection| {
            let set = connection.batch_execute(&settings).await;
            set.map_err(|error| Failure(store_error(error)))?;
            if load(&gate, connection).await?.iter().any(|row| row.row == "0") {
                return Ok(());
            }
            let mut parts = vec![entries];
            while let Some(part) = parts.pop() {
                let Err(fault) = count_part(connection, batch, part, true).await? else {
                    continue;
                };
                if !fault.is_of_a_row() {
                    return Err(Failure(fault.into()));
                }
                let (first, rest) = part.split_at(part.len() / 2);
                if !first.is_empty() {
                    parts.extend([rest, first]);
                    continue;
                }
                // Checks and triggers apply to the totals. The cost is charged even if they fail.
                count_part(connection, batch, rest, false)
                    .await?
                    .map_err(StoreError::from)
                    .map_err(Failure)?;
                let error = StoreError::from(fault);
                for entry in rest {
                    telemetry::usage_of_bad_row(&entry["id"], &error);
                }
            }
            Ok(())
        });
        match within(PARTS_DEADLINE, work).await {
            Some(outcome) => {
                checkout.put_back();
                outcome.map_err(|Failure::<StoreError>(error)| error)
            }
            None => Err(StoreError::timeout(PARTS_DEADLINE)),
        }
    }
}

/// Encodes a day as a bound. Years that PostgreSQL does not know are cut off.
fn bound(day: NaiveDate) -> Bind {
    Bind::Text(match day.year() {
        ..1 => "-infinity".to_owned(),
        1..=9999 => day.to_string(),
        _ => "infinity".to_owned(),
    })
}

/// Deadline of this transaction, below that of the recorder for a batch.
const PARTS_DEADLINE: Duration = Duration::from_secs(25);

async fn count_part(
    connection: &mut AsyncPgConnection,
    batch: &UsageBatch,
    entries: &[Value],
    has_totals: bool,
) -> Result<Result<(), SqlFault>, Failure<StoreError>> {
    let part = Value::from(entries.to_vec()).to_string();
    let statement = sqlstate::attempt(count(false, has_totals), binds(batch, part));
    let outcome = sqlstate::outcome(&load(&statement, connection).await?).map_err(Failure)?;
    Ok(outcome.map(drop))
}

async fn load(
    statement: &Statement,
    connection: &mut AsyncPgConnection,
) -> Result<Vec<TextRow>, Failure<StoreError>> {
    RunQueryDsl::load(statement, connection).await.map_err(|error| Failure(store_error(error)))
}

fn binds(batch: &UsageBatch, entries: String) -> [Bind; 5] {
    [
        Bind::Text(entries),
        Bind::Text(batch.writer.clone()),
        Bind::number(batch.sequence),
        Bind::Text(batch.time()),
        Bind::number(u64::try_from(batch.age().as_millis()).unwrap_or(u64::MAX)),
    ]
}

fn report(batch: &UsageBatch, counts: Option<&str>) {
    let counts = counts.and_then(|row| serde_json::from_str::<(u64, usize)>(row).ok());
    if let Some((1, counted)) = counts
        && counted < batch.entries.len()
    {
        telemetry::usage_of_deleted_keys(batch.entries.len() - counted);
    }
}
