//! Attribution of changes, and the audit.

use chrono::{DateTime, Datelike, Utc};
use serde_json::json;

use super::{PostgresStore, connections::Isolation};
use crate::{
    backend::sql::statement::{Bind, Statement, TextRow},
    error::StoreError,
    record::{KeyId, UserId},
    store::{Attribution, AuditEntry, AuditPage, ListAudit},
};

/// A part of a statement that passes the attribution, `$1`, to the triggers. A change reads from it. The setting is that
/// of the transaction, so that it needs no session of its own and no further round trip.
pub(super) const BY: &str = "by AS MATERIALIZED (
    SELECT set_config('api_key.attribution', $1, TRUE) IS NOT NULL AS is_set)";

/// Encodes an attribution as the triggers decode it.
pub(super) fn attribution(by: &Attribution) -> Bind {
    // jsonb can't hold a NUL character, and what the triggers can't decode is ignored.
    let text = |text: &Option<String>| text.as_ref().map(|text| text.replace('\0', "\u{fffd}"));
    let encoded = json!({
        "actor": text(&by.actor),
        "key": by.key.as_ref().and_then(KeyId::as_i64),
        "reason": text(&by.reason),
        "request_id": text(&by.request_id),
    });
    Bind::Text(encoded.to_string())
}

/// Encodes a time as the text of a `timestamptz`. Years that PostgreSQL does not know are cut off.
fn timestamp(time: DateTime<Utc>) -> Bind {
    let text = match time.year() {
        ..1 => "-infinity".to_owned(),
        1..=9999 => time.format("%Y-%m-%d %H:%M:%S%.6fZ").to_string(),
        _ => "infinity".to_owned(),
    };
    Bind::Text(text)
}

pub(super) async fn list(store: &PostgresStore, page: &ListAudit) -> Result<AuditPage, StoreError> {
    let Some(statement) = statement(page) else { return Ok(AuditPage::default()) };
    let rows = store.load::<TextRow>(&store.0.management, &statement).await?;
    let decode = |row: &TextRow| {
        serde_json::from_str::<AuditEntry>(&row.row).map_err(|error| {
            StoreError::bad_row("an entry of api_key_audit can't be decoded").caused_by(error)
        })
    };
    let entries: Result<Vec<_>, _> = rows.iter().map(decode).collect();
    Ok(AuditPage::from_entries(page, entries?))
}

/// Returns the statement that lists a page; `None` if an id is not an integer, so that no entry can have it.
fn statement(page: &ListAudit) -> Option<Statement> {
    let mut binds = vec![
        Bind::Integer(page.before.unwrap_or(i64::MAX)),
        Bind::Integer(i64::from(page.limit) + 1),
    ];
    // The highest id is not below the bound of the first page, but no sequence reaches it.
    let mut conditions = vec!["id < $1".to_owned()];
    let mut add = |condition: &str, value: Bind| {
        binds.push(value);
        conditions.push(condition.replace('?', &format!("${}", binds.len())));
    };
    if let Some(key) = &page.key {
        add("api_key_id = ?", Bind::Integer(KeyId::as_i64(key)?));
    }
    if let Some(user) = &page.user {
        add("user_id = ?", Bind::Integer(UserId::as_i64(user)?));
    }
    if let Some(actor) = &page.actor {
        add("actor = ?", Bind::Text(actor.replace('\0', "\u{fffd}")));
    }
    if let Some(since) = page.since {
        add("at >= ?::timestamptz", timestamp(since));
    }
    if let Some(until) = page.until {
        add("at < ?::timestamptz", timestamp(until));
    }
    let select = format!(
        "SELECT json_build_object('id', id, 'at', at, 'action', action, 'actor', actor, 'actor_key', actor_key,
            'database_role', database_role, 'key', api_key_id, 'user', user_id, 'before', before, 'after', after,
            'reason', reason, 'request_id', request_id)::text AS row
        FROM api_key_audit WHERE {} ORDER BY id DESC LIMIT $2",
        conditions.join(" AND ")
    );
    Some(Statement::new(select, binds))
}

/// Number of entries that one statement deletes.
const CHUNK: u64 = 5_000;

/// Deletes the entries from before a time, in short statements.
pub(super) async fn prune(store: &PostgresStore, before: DateTime<Utc>) -> Result<u64, StoreError> {
    let delete = format!(
        "WITH pruned AS (
            DELETE FROM api_key_audit WHERE (id, at) IN (
                SELECT id, at FROM api_key_audit WHERE at < $1::timestamptz ORDER BY at LIMIT {CHUNK} FOR UPDATE
            ) RETURNING 1
        ) SELECT count(*)::text AS row FROM pruned"
    );
    let delete = Statement::new(delete, [timestamp(before)]);
    let mut pruned = 0;
    loop {
        let rows: Vec<TextRow> =
            store.load_in(&store.0.management, Isolation::ReadCommitted, &delete).await?;
        let count = rows.first().and_then(|row| row.row.parse().ok()).unwrap_or(0);
        pruned += count;
        if count < CHUNK {
            return Ok(pruned);
        }
    }
}
