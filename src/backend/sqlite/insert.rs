//! The insertion of keys.

use std::{collections::HashSet, sync::LazyLock};

use diesel::SqliteConnection;
use serde_json::{Map, Value, json};

use super::{
    SqliteStore, execute, load, load_rows,
    select::{keys, time_text},
};
use crate::{
    backend::sql::{
        columns::{ColumnKind, INSERTED, KEY_COLUMNS, KeyColumn, Written},
        statement::{Bind, KeyRow, Statement},
    },
    error::StoreError,
    record::KeyRecord,
    store::{Attribution, Inserted, StoredKey},
};

/// Number of keys that are checked per statement.
const CHUNK: usize = 500;

/// For each key in the JSON array `$1` 1 if it is stored already, and 2 if its user does not exist.
const CHECK: &str = "
    SELECT json_group_array(outcome) AS row FROM (
        SELECT CASE
            WHEN EXISTS (SELECT 1 FROM api_keys AS k WHERE k.key_prefix = n.value ->> 0 AND k.key_hash = n.value ->> 1)
                OR EXISTS (SELECT 1 FROM api_keys AS k WHERE k.previous_key_prefix = n.value ->> 0
                    AND k.previous_key_hash = n.value ->> 1)
                THEN 1
            WHEN NOT EXISTS (SELECT 1 FROM users AS u WHERE u.id = n.value ->> 2) THEN 2 ELSE 0 END AS outcome
        FROM json_each($1) AS n ORDER BY n.key)";

/// Number of keys per statement. SQLite journals the pages of each statement that has triggers.
const ROWS: usize = 100;

static INSERT_ONE: LazyLock<String> = LazyLock::new(|| insert_rows(1));
static INSERT_MANY: LazyLock<String> = LazyLock::new(|| insert_rows(ROWS));

/// Returns the statement that inserts keys at the time `$1`. JSON would have to be parsed for each of the columns.
fn insert_rows(count: usize) -> String {
    let row = |row: usize| {
        let first = 2 + row * INSERTED.len();
        let values: Vec<_> = (first..).take(INSERTED.len()).map(|at| format!("${at}")).collect();
        format!("($1, $1, {})", values.join(", "))
    };
    let rows: Vec<_> = (0..count).map(row).collect();
    format!(
        "INSERT INTO api_keys (created_at, updated_at, {}) VALUES {}",
        INSERTED.join(", "),
        rows.join(", ")
    )
}

impl SqliteStore {
    pub(super) async fn add_key(
        &self,
        key: &StoredKey,
        by: &Attribution,
    ) -> Result<KeyRecord, StoreError> {
        let key = key.clone();
        let inserted = self.change(by, move |connection, now| {
            let conflict = match insert(connection, std::slice::from_ref(&key), now)?.first() {
                Some(Inserted::Stored) => None,
                Some(Inserted::NoUser) => Some("the key's user does not exist"),
                _ => Some("the same key is already stored"),
            };
            if let Some(conflict) = conflict {
                return Err(StoreError::conflict(conflict));
            }
            // Triggers of the table don't change it.
            let select = keys("k.id = last_insert_rowid()");
            load_rows(connection, &Statement::new(select, []))
        });
        let found = inserted.await?;
        let found = found.first().map(KeyRow::key).transpose()?;
        // The row was read in the transaction that wrote it.
        let key = found.ok_or_else(|| StoreError::bad_row("the new row can't be decoded"))?;
        Ok(key.record)
    }

    pub(super) async fn add_keys(
        &self,
        keys: &[StoredKey],
        by: &Attribution,
    ) -> Result<Vec<Inserted>, StoreError> {
        let keys = keys.to_vec();
        self.change_many(by, move |connection, now| {
            let mut inserted = Vec::with_capacity(keys.len());
            for chunk in keys.chunks(CHUNK) {
                inserted.extend(insert(connection, chunk, now)?);
            }
            Ok(inserted)
        })
        .await
    }
}

/// Inserts the keys that are not stored yet, and whose user exists.
fn insert(
    connection: &mut SqliteConnection,
    keys: &[StoredKey],
    now: &str,
) -> Result<Vec<Inserted>, StoreError> {
    let identity = |key: &StoredKey| {
        (key.record.prefix.clone(), key.hash.expose_hash(), key.record.user.id.as_i64())
    };
    let identities: Vec<_> = keys.iter().map(identity).collect();
    let check = Statement::new(CHECK, [Bind::Text(json!(identities).to_string())]);
    let checked = load(connection, &check)?;
    let checked: Vec<u8> = checked
        .first()
        .and_then(|checked| serde_json::from_str(&checked.row).ok())
        .ok_or_else(|| StoreError::rejected("the keys to insert can't be checked"))?;
    let (mut inserted, mut seen) = (Vec::with_capacity(keys.len()), HashSet::new());
    let mut stored = Vec::with_capacity(keys.len());
    for ((key, (prefix, hash, _)), checked) in keys.iter().zip(&identities).zip(checked) {
        let outcome = match checked {
            0 if seen.insert((prefix, hash)) => Inserted::Stored,
            2 => Inserted::NoUser,
            _ => Inserted::Duplicate,
        };
        if outcome == Inserted::Stored {
            stored.push(key);
        }
        inserted.push(outcome);
    }
    let (many, rest) = stored.as_chunks::<ROWS>();
    for keys in many {
        write(connection, &INSERT_MANY, keys, now)?;
    }
    for key in rest {
        write(connection, &INSERT_ONE, &[key], now)?;
    }
    Ok(inserted)
}

fn write(
    connection: &mut SqliteConnection,
    insert: &'static str,
    keys: &[&StoredKey],
    now: &str,
) -> Result<(), StoreError> {
    let written = || KEY_COLUMNS.iter().filter(|column| column.written != Written::Elsewhere);
    let values = keys.iter().flat_map(|key| written().map(|column| bind(column, key)));
    let binds = std::iter::once(Bind::Text(now.to_owned())).chain(values);
    execute(connection, &Statement::new(insert, binds)).map(|_| ())
}

/// Encodes a column of a key as [`field`] reads it from JSON.
fn bind(column: &KeyColumn, key: &StoredKey) -> Bind {
    let mut value = column.encode(key);
    if column.kind == ColumnKind::Time {
        encode_time(&mut value);
    }
    match value {
        Value::Null => Bind::Null,
        // The value is kept as JSON: a text or a number would be taken for SQLite's own.
        value if column.kind == ColumnKind::Json => Bind::Text(value.to_string()),
        Value::String(text) => Bind::Text(text),
        Value::Bool(flag) => Bind::Integer(flag.into()),
        Value::Number(number) if number.is_i64() || number.is_u64() => {
            Bind::Integer(number.as_i64().unwrap_or(i64::MAX))
        }
        value => Bind::Text(value.to_string()),
    }
}

/// Encodes edited columns for the statement that writes them.
pub(super) fn encode_times(edited: &mut Map<String, Value>) {
    let times = KEY_COLUMNS.iter().filter(|column| column.kind == ColumnKind::Time);
    for column in times {
        if let Some(value) = edited.get_mut(column.name) {
            encode_time(value);
        }
    }
}

/// Changes a time to the form that SQLite's functions and most ORMs write.
fn encode_time(value: &mut Value) {
    if let Ok(time) = serde_json::from_value(value.clone()) {
        *value = json!(time_text(time));
    }
}

/// Returns the SQL for the value of a column in a JSON object.
pub(super) fn field(row: &str, column: &str) -> String {
    if column == "metadata" {
        // The value is kept as JSON: a text or a number would be taken for SQLite's own.
        return format!("nullif({row} -> '$.metadata', 'null')");
    }
    format!("json_extract({row}, '$.{column}')")
}
