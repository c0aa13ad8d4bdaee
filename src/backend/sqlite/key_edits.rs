//! Edits, revocations and deletions of keys.

use diesel::SqliteConnection;
use serde_json::{Map, Value, json};

use super::{
    BytesRow, SqliteStore, execute,
    insert::{encode_times, field},
    load, load_rows,
    select::{keys, keys_to_revoke},
    users::referenced,
};
use crate::{
    backend::sql::{
        columns,
        statement::{Bind, KeyRow, Statement, TextRow},
    },
    error::StoreError,
    record::{KeyId, KeyRecord, Revision},
    store::{Attribution, CHANGED_SINCE, Change, KeyFilter, StoredKey},
};

/// A row that can't be decoded has a value that is neither true nor false. It is revoked as well.
const REVOKE: &str = "
    UPDATE api_keys SET is_active = FALSE, revoked_at = $2, updated_at = $2,
        revoked_by = (SELECT actor FROM api_key_attribution), revoke_reason = (SELECT reason FROM api_key_attribution)
    WHERE id IN (SELECT value FROM json_each($1)) AND coalesce(is_active, FALSE) IS NOT FALSE";

/// Selects id, lookup id and revision of keys. `RETURNING` returns a row as it was before its triggers.
const CHANGED: &str = "
    SELECT CAST(json_array(id, coalesce(CAST(key_prefix AS TEXT), ''), api_key_revision) AS BLOB) AS row
    FROM api_keys WHERE id IN (SELECT value FROM json_each($1)) ORDER BY id";

const DELETE: &str = "DELETE FROM api_keys WHERE id = $1";

const LAST_REVISION: &str = "SELECT CAST(max(revision) AS TEXT) AS row FROM api_key_changes";

impl SqliteStore {
    pub(super) async fn edit_key(
        &self,
        old: &StoredKey,
        new: &StoredKey,
        by: &Attribution,
    ) -> Result<Option<KeyRecord>, StoreError> {
        let Some(id) = old.record.id.as_i64() else { return Ok(None) };
        let revision = old.revisions.key;
        let edited = edited(old, new);
        self.change(by, move |connection, now| {
            let Some(current) = stored(connection, id)? else { return Ok(None) };
            // A row that can't be decoded was changed since it was read.
            let current = match current.key() {
                Ok(key) if key.revisions.key == revision => key,
                _ => return Err(StoreError::conflict(CHANGED_SINCE)),
            };
            if edited.is_empty() {
                return Ok(Some(current.record));
            }
            let set = edited.keys().map(|column| format!("{column} = {}", field("$1", column)));
            let set = set.collect::<Vec<_>>().join(", ");
            let update = format!("UPDATE api_keys SET {set}, updated_at = $2 WHERE id = $3");
            let binds = [
                Bind::Text(Value::Object(edited).to_string()),
                Bind::Text(now.to_owned()),
                Bind::Integer(id),
            ];
            execute(connection, &Statement::new(update, binds))?;
            let replaced = stored(connection, id)?.map(|row| row.key()).transpose()?;
            Ok(replaced.map(|key| key.record))
        })
        .await
    }

    pub(super) async fn deactivate_key(
        &self,
        id: &KeyId,
        by: &Attribution,
    ) -> Result<Option<Change>, StoreError> {
        let Some(id) = id.as_i64() else { return Ok(None) };
        let revoked = self.change(by, move |connection, now| revoke(connection, &[id], now));
        Ok(revoked.await?.pop().map(|(_, change)| change))
    }

    /// Revokes the keys that the filter selects, in pages, so that the rows of many keys are not in memory at once.
    pub(super) async fn deactivate_keys(
        &self,
        filter: &KeyFilter,
        by: &Attribution,
    ) -> Result<Vec<(KeyId, Change)>, StoreError> {
        let filter = filter.clone();
        self.change_many(by, move |connection, now| {
            let (mut revoked, mut after) = (Vec::new(), None);
            while let Some(select) = keys_to_revoke(&filter, after) {
                let rows: Vec<KeyRow> = load_rows(connection, &select)?;
                let Some(last) = rows.last() else { break };
                after = Some(last.id());
                let selected = rows.iter().filter(|row| filter.selects_row(row));
                let ids: Vec<_> = selected.map(KeyRow::id).collect();
                revoked.extend(revoke(connection, &ids, now)?);
            }
            Ok(revoked)
        })
        .await
    }

    pub(super) async fn remove_key(
        &self,
        id: &KeyId,
        by: &Attribution,
    ) -> Result<Option<Change>, StoreError> {
        let Some(id) = id.as_i64() else { return Ok(None) };
        let deleted = self.change(by, move |connection, _| {
            let found = changed(connection, &[id])?.pop();
            execute(connection, &Statement::new(DELETE, [Bind::Integer(id)]))?;
            let last = load(connection, &Statement::new(LAST_REVISION, []))?;
            let last = last.iter().find_map(TextRow::id).and_then(|it| u64::try_from(it).ok());
            let revision = Revision(last.unwrap_or(0));
            Ok(found.map(|(_, prefix, _)| Change::Prefix(prefix, revision)))
        });
        deleted.await.map_err(|error| referenced(error, CHANGED_SINCE, "key"))
    }
}

/// Returns the columns that an edit writes. The times of use belong to a secret. A node may have written one since the
/// key was read, so that they are written whenever the secret changes.
fn edited(old: &StoredKey, new: &StoredKey) -> Map<String, Value> {
    let mut edited: Map<_, _> =
        columns::edited(old, new).map(|(name, value)| (name.to_owned(), value)).collect();
    for (secret, used) in
        [("key_hash", "last_used_at"), ("previous_key_hash", "previous_last_used_at")]
    {
        let column = columns::KEY_COLUMNS.iter().find(|column| column.name == used);
        if let Some(column) = column.filter(|_| edited.contains_key(secret)) {
            edited.insert(used.to_owned(), column.encode(new));
        }
    }
    encode_times(&mut edited);
    edited
}

fn stored(connection: &mut SqliteConnection, id: i64) -> Result<Option<KeyRow>, StoreError> {
    let rows = load_rows(connection, &Statement::new(keys("k.id = $1"), [Bind::Integer(id)]))?;
    Ok(rows.into_iter().next())
}

/// Revokes the keys with these ids that are active. Returns the changes of all of them.
fn revoke(
    connection: &mut SqliteConnection,
    ids: &[i64],
    now: &str,
) -> Result<Vec<(KeyId, Change)>, StoreError> {
    let binds = [Bind::Text(json!(ids).to_string()), Bind::Text(now.to_owned())];
    execute(connection, &Statement::new(REVOKE, binds))?;
    let changes = changed(connection, ids)?.into_iter();
    Ok(changes
        .map(|(id, prefix, revision)| (id.into(), Change::Prefix(prefix, revision)))
        .collect())
}

/// Returns the ids, lookup ids and revisions of the keys with these ids.
fn changed(
    connection: &mut SqliteConnection,
    ids: &[i64],
) -> Result<Vec<(i64, String, Revision)>, StoreError> {
    let binds = [Bind::Text(json!(ids).to_string())];
    let rows: Vec<BytesRow> = load_rows(connection, &Statement::new(CHANGED, binds))?;
    let bad = |error| StoreError::bad_row("a changed key can't be read").caused_by(error);
    rows.iter().map(|row| serde_json::from_str(&row.json()).map_err(bad)).collect()
}
