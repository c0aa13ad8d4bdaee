//! Changes of many keys in one transaction.

use std::{collections::BTreeSet, time::Duration};

use serde_json::json;

use super::{
    PostgresStore,
    audit::{self, BY},
    repository::{REVOKE, inserted_columns, key_rows, revocation, values},
    select::{FILTER, KEY_TABLES, SELECT_KEY},
};
use crate::{
    backend::sql::{
        row::EncodedKey,
        statement::{Bind, KeyRow, Statement, TextRow},
    },
    error::StoreError,
    record::{KeyId, Revision},
    runtime::within,
    store::{Attribution, Change, Inserted, KeyFilter, StoredKey, import_lane},
};

/// Deadline of a change of many keys.
const DEADLINE: Duration = Duration::from_secs(60);

/// Stores keys in one transaction, and returns for each whether it was stored.
pub(super) async fn insert(
    store: &PostgresStore,
    keys: &[StoredKey],
    by: &Attribution,
) -> Result<Vec<Inserted>, StoreError> {
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    // Of two insertions of the same keys, the second one sees those of the first. There may be no unique index, and a
    // statement whose client was killed may still run. The locks are taken in one order, so that none deadlock.
    let lanes: BTreeSet<_> = keys.iter().map(|key| import_lane(&key.record.prefix)).collect();
    let lock = "SELECT count(pg_advisory_xact_lock(hashtextextended(
            'api_key_import ' || 'api_keys'::regclass::oid || ' ' || lane, 0)))::text AS row
        FROM (SELECT lane FROM jsonb_array_elements_text($1::jsonb) WITH ORDINALITY AS l (lane, number)
            ORDER BY number) AS lanes";
    let columns = inserted_columns();
    let insert = format!(
        "WITH {BY}, n AS MATERIALIZED (
            SELECT n.*, v.number, EXISTS (SELECT FROM users AS u WHERE u.id = n.user_id) AS has_user, EXISTS (
                SELECT FROM api_keys AS k WHERE k.key_prefix = n.key_prefix AND k.key_hash = n.key_hash
            ) OR EXISTS (
                SELECT FROM api_keys AS k
                WHERE k.previous_key_prefix = n.key_prefix AND k.previous_key_hash = n.key_hash
            ) AS is_duplicate
            FROM jsonb_array_elements($2::jsonb) WITH ORDINALITY AS v (value, number),
                jsonb_populate_record(NULL::api_keys, {}) AS n
        ), judged AS MATERIALIZED (
            SELECT number, CASE
                WHEN is_duplicate OR number > min(number) FILTER (WHERE has_user AND NOT is_duplicate)
                    OVER (PARTITION BY key_prefix, key_hash) THEN 'd'
                WHEN NOT has_user THEN 'u' ELSE 's' END AS outcome
            FROM n
        ), stored AS (
            INSERT INTO api_keys ({}) SELECT n.{} FROM by, n JOIN judged j ON j.number = n.number
            WHERE by.is_set AND j.outcome = 's' ORDER BY n.number
        )
        SELECT string_agg(outcome, '' ORDER BY number) AS row FROM judged",
        values("v.value", &["created_at", "updated_at"]),
        columns.join(", "),
        columns.join(", n."),
    );
    let encoded: Vec<_> = keys.iter().map(EncodedKey).collect();
    let encoded = serde_json::to_string(&encoded).map_err(StoreError::rejected)?;
    let binds = [audit::attribution(by), Bind::Text(encoded)];
    let lock = Statement::new(lock, [Bind::Text(json!(lanes).to_string())]);
    let insert = Statement::new(insert, binds);
    let work = store.0.management.transact::<TextRow>(DEADLINE, Some(&lock), |_| insert);
    let outcomes = in_time(work).await?.into_iter().next().map(|found| found.row);
    let outcomes = outcomes.unwrap_or_default().into_bytes().into_iter();
    let outcomes: Vec<_> = outcomes
        .map(|outcome| match outcome {
            b's' => Inserted::Stored,
            b'd' => Inserted::Duplicate,
            _ => Inserted::NoUser,
        })
        .collect();
    Ok(outcomes)
}

/// Revokes the active keys that a filter selects, in one transaction.
pub(super) async fn revoke(
    store: &PostgresStore,
    filter: &KeyFilter,
    by: &Attribution,
) -> Result<Vec<(KeyId, Change)>, StoreError> {
    let own = [audit::attribution(by), revocation(by)];
    let management = &store.0.management;
    let revoked = if filter.contains.is_some() || filter.scope.is_some() {
        // Conditions on text are exact only on decoded rows.
        let Some((condition, binds)) = condition(filter, []) else { return Ok(Vec::new()) };
        let select = format!(
            "{} {KEY_TABLES} WHERE {condition} ORDER BY k.id FOR NO KEY UPDATE OF k",
            *SELECT_KEY
        );
        let select = Statement::new(key_rows(&select), binds);
        let revoke = |found: Vec<KeyRow>| {
            let selected = found.iter().filter(|row| filter.selects_row(row));
            let ids: Vec<_> = selected.map(KeyRow::id).collect();
            let these =
                "k.id IN (SELECT id::bigint FROM jsonb_array_elements_text($3::jsonb) AS ids (id))";
            let ids = Bind::Text(json!(ids).to_string());
            Statement::new(revoke_where(these), own.into_iter().chain([ids]))
        };
        in_time(management.transact(DEADLINE, Some(&select), revoke)).await?
    } else {
        let Some((condition, binds)) = condition(filter, own) else { return Ok(Vec::new()) };
        let revoke = Statement::new(revoke_where(&condition), binds);
        in_time(management.transact::<TextRow>(DEADLINE, None, |_| revoke)).await?
    };
    revoked.iter().map(decode).collect()
}

/// Returns the condition on active keys `k` that the filter selects, with its values after `binds`. `None` if no row can
/// match.
fn condition(
    filter: &KeyFilter,
    binds: impl IntoIterator<Item = Bind>,
) -> Option<(String, Vec<Bind>)> {
    let mut binds = binds.into_iter().collect();
    let mut conditions = vec!["k.is_active".to_owned()];
    filter.sql(&FILTER, &mut conditions, &mut binds)?;
    Some((conditions.join(" AND "), binds))
}

/// Returns the statement that revokes the keys `k` under a condition. The rows are locked in the order of their ids, as
/// those of a batch of usage are, so that two statements don't deadlock.
fn revoke_where(condition: &str) -> String {
    format!(
        "WITH {BY}, locked AS MATERIALIZED (
            SELECT k.id FROM api_keys k WHERE {condition} ORDER BY k.id FOR NO KEY UPDATE OF k
        ), revoked AS (
            UPDATE api_keys AS t SET {REVOKE}
            FROM by, locked l, jsonb_populate_record(NULL::api_keys, {}) AS n
            WHERE by.is_set AND t.id = l.id RETURNING t.id, t.key_prefix, t.api_key_revision
        )
        SELECT json_build_array(id, coalesce(key_prefix, ''), api_key_revision)::text AS row
        FROM revoked ORDER BY id",
        values("$2::jsonb", &["revoked_at", "updated_at"])
    )
}

fn decode(row: &TextRow) -> Result<(KeyId, Change), StoreError> {
    let decoded = serde_json::from_str::<(i64, String, u64)>(&row.row);
    let (id, prefix, revision) =
        decoded.map_err(|_| StoreError::bad_row("a revoked row has no revision"))?;
    Ok((id.into(), Change::Prefix(prefix, Revision(revision))))
}

async fn in_time<T>(work: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    within(DEADLINE, work).await.unwrap_or_else(|| Err(StoreError::timeout(DEADLINE)))
}
