//! The audit: lists and retention.

use chrono::{DateTime, NaiveDateTime, Utc};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{BytesRow, SqliteStore, execute, select::time_text};
use crate::{
    backend::sql::{
        columns::{ColumnKind, KEY_COLUMNS},
        statement::{Bind, Statement},
    },
    error::StoreError,
    record::{KeyId, UserId},
    store::{AuditAction, AuditEntry, AuditPage, ListAudit},
};

/// Number of entries that are deleted in one transaction.
const CHUNK: usize = 10_000;

const PRUNE: &str = "
    DELETE FROM api_key_audit WHERE id IN (SELECT id FROM api_key_audit WHERE at < $1 ORDER BY at LIMIT $2)";

/// An entry with the texts of its columns.
#[derive(Deserialize)]
struct EntryColumns {
    id: i64,
    at: String,
    action: String,
    actor: Option<String>,
    actor_key: Option<KeyId>,
    key: Option<KeyId>,
    user: Option<UserId>,
    before: Option<String>,
    after: Option<String>,
    reason: Option<String>,
    request_id: Option<String>,
}

impl SqliteStore {
    pub(super) async fn audit_page(&self, page: &ListAudit) -> Result<AuditPage, StoreError> {
        let Some(statement) = select(page) else { return Ok(AuditPage::default()) };
        let rows: Vec<BytesRow> = self.read_rows(statement).await?;
        let entries: Result<Vec<_>, _> = rows.iter().map(entry).collect();
        Ok(AuditPage::from_entries(page, entries?))
    }

    /// Deletes old entries in several transactions, so that no other writer waits long.
    pub(super) async fn remove_audit(&self, before: DateTime<Utc>) -> Result<u64, StoreError> {
        let mut removed = 0;
        loop {
            let binds = [Bind::Text(time_text(before)), Bind::number(CHUNK as u64)];
            let prune = Statement::new(PRUNE, binds);
            let chunk = self.in_silent_transaction(move |it| execute(it, &prune)).await?;
            removed += chunk as u64;
            if chunk < CHUNK {
                return Ok(removed);
            }
        }
    }
}

/// Returns the statement of a page, and one entry more; `None` if an id is not an integer, so that no row can have it.
pub(super) fn select(page: &ListAudit) -> Option<Statement> {
    let (mut conditions, mut binds) = (Vec::new(), Vec::new());
    let mut add = |condition: &str, bind: Bind| {
        binds.push(bind);
        conditions.push(format!("{condition} ${}", binds.len()));
    };
    if let Some(key) = &page.key {
        add("api_key_id =", Bind::Integer(key.as_i64()?));
    }
    if let Some(user) = &page.user {
        add("user_id =", Bind::Integer(user.as_i64()?));
    }
    if let Some(actor) = &page.actor {
        add("actor =", Bind::Text(actor.clone()));
    }
    // The entries of a key, a user or an actor are in the order of their index. Only without them, the index of times
    // is used: the sign keeps SQLite from reading all entries by their ids.
    let is_by_time = conditions.is_empty() && (page.since.is_some() || page.until.is_some());
    let mut add = |condition: &str, bind: Bind| {
        binds.push(bind);
        conditions.push(format!("{condition} ${}", binds.len()));
    };
    let time = |at| if is_by_time { format!("at {at}") } else { format!("+at {at}") };
    if let Some(since) = page.since {
        add(&time(">="), Bind::Text(time_text(since)));
    }
    if let Some(until) = page.until {
        add(&time("<"), Bind::Text(time_text(until)));
    }
    let id = if is_by_time { "+id" } else { "id" };
    if let Some(before) = page.before {
        add(&format!("{id} <"), Bind::Integer(before));
    }
    let filter = if conditions.is_empty() { "TRUE".to_owned() } else { conditions.join(" AND ") };
    binds.push(Bind::Integer(i64::from(page.limit) + 1));
    let select = format!(
        "SELECT CAST(json_object('id', id, 'at', at, 'action', action, 'actor', CAST(actor AS TEXT),
            'actor_key', actor_key, 'key', api_key_id, 'user', user_id, 'before', CAST(\"before\" AS TEXT),
            'after', CAST(\"after\" AS TEXT), 'reason', CAST(reason AS TEXT),
            'request_id', CAST(request_id AS TEXT)) AS BLOB) AS row
        FROM api_key_audit WHERE id IN (
            SELECT id FROM api_key_audit WHERE {filter} ORDER BY {id} DESC LIMIT ${}
        ) ORDER BY id DESC",
        binds.len()
    );
    Some(Statement::new(select, binds))
}

fn entry(row: &BytesRow) -> Result<AuditEntry, StoreError> {
    let bad = || StoreError::bad_row("a row of api_key_audit can't be decoded");
    let it: EntryColumns = serde_json::from_str(&row.json()).map_err(|_| bad())?;
    let is_user = it.key.is_none();
    let document = |text: String| document(text, is_user);
    Ok(AuditEntry {
        id: it.id,
        at: time(&it.at).ok_or_else(bad)?,
        action: AuditAction::from_name(&it.action).ok_or_else(bad)?,
        actor: it.actor,
        actor_key: it.actor_key,
        database_role: None,
        key: it.key,
        user: it.user,
        before: it.before.map(document),
        after: it.after.map(document),
        reason: it.reason,
        request_id: it.request_id,
    })
}

/// Decodes a row before or after a change into the form of [`audited_key`](crate::store::audited_key): times with a time
/// zone, and the values of columns that may be NULL. A value that can't be decoded is kept as it is.
fn document(text: String, is_user: bool) -> Value {
    // SQLite accepts numbers that JSON can't represent.
    let Ok(mut document) = serde_json::from_str::<Value>(&text) else { return Value::String(text) };
    let Some(columns) = document.as_object_mut() else { return document };
    for (name, value) in columns {
        let kind = KEY_COLUMNS.iter().find(|column| column.name == name).map(|it| it.kind);
        match (kind, &*value) {
            (Some(ColumnKind::Time), Value::String(text)) => {
                if let Some(time) = time(text) {
                    *value = json!(time);
                }
            }
            (Some(ColumnKind::List), Value::Null) => *value = json!([]),
            (Some(ColumnKind::Flag), Value::Null) => *value = json!(false),
            (_, Value::Null) if name == "name" || name == "description" => *value = json!(""),
            (_, Value::Null) if is_user && name == "role" => *value = json!("user"),
            (_, Value::Null) if is_user && name == "is_active" => *value = json!(false),
            _ => {}
        }
    }
    document
}

/// Decodes a time. One without a time zone is UTC.
fn time(text: &str) -> Option<DateTime<Utc>> {
    let zoned = DateTime::parse_from_rfc3339(text).map(|time| time.to_utc()).ok();
    zoned.or_else(|| {
        let time =
            NaiveDateTime::parse_from_str(&text.replacen('T', " ", 1), "%Y-%m-%d %H:%M:%S%.f");
        time.ok().map(|time| time.and_utc())
    })
}
