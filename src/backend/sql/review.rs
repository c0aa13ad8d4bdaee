//! The review of adopted tables: keys that fail here, or have another meaning: [`KeyReview`].

use serde_json::{Map, Value};

use super::{row::Row, statement::KeyRow, values::UNLIMITED};
use crate::{policy::wildcard, record::KeyId};

/// Review of the keys of a table before this crate checks them: the keys that fail, and those that change their
/// meaning.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeyReview {
    /// Number of keys that were reviewed.
    pub keys: u64,
    /// Number of keys that fail.
    pub failing_keys: u64,
    /// Number of keys that change their meaning without failing.
    pub changed_keys: u64,
    /// The findings, ordered by key id: the first 1,000.
    pub findings: Vec<KeyFinding>,
}

/// A finding about one column of one key. It shows no hash.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeyFinding {
    /// The key.
    pub key: KeyId,
    /// The column of `api_keys`; empty if the row can't be read at all.
    pub column: &'static str,
    /// Effect on requests.
    pub kind: FindingKind,
    /// How the value is interpreted, or why it can't be.
    pub reason: String,
}

/// Effect of a [`KeyFinding`] on requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FindingKind {
    /// Requests with the key are answered 500, or 401 where it can't be found.
    Fails,
    /// The key works, but the value may grant or limit something other than before.
    ChangesMeaning,
}

const MAX_FINDINGS: usize = 1_000;
/// Number of keys per page.
pub(in crate::backend) const PAGE: usize = 1_000;

const LIMITS: [&str; 4] =
    ["rate_limit_per_minute", "rate_limit_per_hour", "rate_limit_per_day", "budget_limit_cents"];

impl KeyReview {
    /// Adds a page of rows, each joined with its owner if there is one. Returns the last id if there may be more rows.
    pub(in crate::backend) fn add(&mut self, rows: &[KeyRow]) -> Option<i64> {
        for row in rows {
            self.keys += 1;
            let findings = findings(row);
            if findings.iter().any(|finding| finding.kind == FindingKind::Fails) {
                self.failing_keys += 1;
            } else if !findings.is_empty() {
                self.changed_keys += 1;
            }
            let room = MAX_FINDINGS - self.findings.len();
            self.findings.extend(findings.into_iter().take(room));
        }
        rows.last().filter(|_| rows.len() == PAGE).map(KeyRow::id)
    }
}

fn findings(row: &KeyRow) -> Vec<KeyFinding> {
    let found = |kind, (column, reason)| KeyFinding { key: row.id().into(), column, kind, reason };
    let Some(columns) = row.columns() else {
        let reason = "the row can't be decoded: it is not UTF-8, or has a number that is too large";
        return vec![found(FindingKind::Fails, ("", reason.to_owned()))];
    };
    let changes = changes(&columns).into_iter();
    let changes = changes.map(|change| found(FindingKind::ChangesMeaning, change));
    let fails = faults(columns).into_iter().map(|fault| found(FindingKind::Fails, fault));
    fails.chain(changes).collect()
}

/// Returns everything that can't be decoded. Each fault is removed from the row, until none is left.
fn faults(mut columns: Map<String, Value>) -> Vec<(&'static str, String)> {
    let mut faults = Vec::new();
    if matches!(columns.get("user_id"), Some(Value::Null)) {
        faults.push(("user_id", "refers to no user: the key is treated as unknown".to_owned()));
        columns.insert("user_id".to_owned(), 0.into());
    }
    if columns.get("key_prefix").is_some_and(|prefix| prefix.is_null() || prefix == "") {
        faults.push(("key_prefix", "is empty: the key can't be looked up".to_owned()));
    }
    while let Err(fault) = Row::from_json(columns.clone()).decode() {
        let is_stuck = columns.insert(fault.column.to_owned(), Value::Null) == Some(Value::Null);
        faults.push((fault.column, fault.reason));
        if is_stuck {
            break;
        }
    }
    // A required column fails again as NULL.
    faults.dedup_by(|next, fault| next.0 == fault.0);
    faults
}

/// Returns the columns that can be decoded, but may have had another meaning.
fn changes(columns: &Map<String, Value>) -> Vec<(&'static str, String)> {
    let value = |column: &str| columns.get(column).unwrap_or(&Value::Null);
    let mut changes = Vec::new();
    for column in LIMITS {
        if value(column).as_i64() == Some(UNLIMITED) {
            changes.push((column, "is -1, which means unlimited".to_owned()));
        }
    }
    let is_limited = value("budget_limit_cents").as_i64().is_some_and(|limit| limit >= 0);
    if is_limited && matches!(value("budget_type").as_str(), None | Some("")) {
        let reason = "is empty, so the budget applies to the whole life of the key";
        changes.push(("budget_type", reason.to_owned()));
    }
    for column in ["permissions", "scopes"] {
        let json = match value(column) {
            Value::String(text) => serde_json::from_str(text).unwrap_or_default(),
            json => json.clone(),
        };
        let is_nested = |entries: &Map<String, Value>| !entries.values().all(Value::is_boolean);
        let granted = crate::backend::sql::values::grants(json.clone()).unwrap_or_default();
        if json.as_object().is_some_and(is_nested) {
            let granted = abridged(&granted);
            changes.push((column, format!("is a nested object, which grants {granted}")));
        }
        if column == "scopes" {
            let wildcards: Vec<_> =
                granted.into_iter().filter(|scope| wildcard(scope).is_some()).collect();
            if !wildcards.is_empty() {
                let wildcards = abridged(&wildcards);
                changes.push((
                    column,
                    format!("has wildcards, which grant what they match: {wildcards}"),
                ));
            }
        }
    }
    changes
}

/// Returns the first few names.
fn abridged(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown = names.iter().take(SHOWN).map(|name| name.chars().take(64).collect::<String>());
    let shown: Vec<_> = shown.collect();
    match names.len() {
        0 => "nothing".to_owned(),
        all if all > SHOWN => format!("{shown:?} and {} more", all - SHOWN),
        _ => format!("{shown:?}"),
    }
}
