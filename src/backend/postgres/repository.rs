//! The write side of [`PostgresStore`].
//!
//! Values are sent as one JSON object, from which `jsonb_populate_record` makes the types of the columns of an adopted
//! table.

use chrono::{DateTime, NaiveDate, Utc};
use serde_json::{Map, Value};

use super::{
    PostgresStore,
    audit::{self, BY},
    bulk,
    select::{FILTER, KEY_TABLES, SELECT_KEY},
    users,
};
use crate::{
    backend::sql::{
        columns, review, row,
        statement::{Bind, KeyRow, Statement, TextRow},
    },
    error::StoreError,
    record::{KeyId, KeyRecord, User, UserId},
    store::{
        Attribution, AuditPage, CHANGED_SINCE, Change, DailyUsage, Inserted, KeyFilter, KeyPage,
        KeyRepository, ListAudit, ListKeys, ListUsers, StoredKey, UserPage,
    },
};

/// Returns an SQL expression: the JSON object `object`, with the present time in the columns `times`. The time is text in
/// UTC, which is valid for a time stamp with and without a time zone. Metadata for a text column is JSON in text, even
/// if it is a JSON text itself.
pub(super) fn values(object: &str, times: &[&str]) -> String {
    const NOW: &str =
        "(SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'))";
    const IS_JSON: &str = "(
        SELECT coalesce(nullif(t.typbasetype, 0), t.oid) IN ('json'::regtype, 'jsonb'::regtype)
        FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
        WHERE a.attrelid = 'api_keys'::regclass AND a.attname = 'metadata')";
    let times: Vec<_> = times.iter().map(|column| format!("'{column}', {NOW}")).collect();
    format!(
        "{object} || CASE WHEN {object} ? 'metadata' AND NOT {IS_JSON}
            THEN jsonb_build_object('metadata', ({object} -> 'metadata')::text) ELSE '{{}}' END
        || jsonb_build_object({})",
        times.join(", ")
    )
}

/// The assignments of a revocation, from the values `n`.
pub(super) const REVOKE: &str =
    "is_active = FALSE, revoked_at = n.revoked_at, revoked_by = n.revoked_by,
    revoke_reason = n.revoke_reason, updated_at = n.updated_at";

/// Result of a change, instead of its row, if it contradicts the stored row.
pub(super) const CONFLICT: &str = "conflict";

impl KeyRepository for PostgresStore {
    async fn insert_user(
        &self,
        email: &str,
        role: &str,
        by: &Attribution,
    ) -> Result<User, StoreError> {
        users::insert(self, (email, role), by).await
    }

    async fn find_user(&self, id: &UserId) -> Result<Option<User>, StoreError> {
        users::find(self, id).await
    }

    async fn find_user_by_email(&self, email: &str) -> Result<Option<User>, StoreError> {
        users::find_by_email(self, email).await
    }

    async fn list_users(&self, page: &ListUsers) -> Result<UserPage, StoreError> {
        users::list(self, page).await
    }

    async fn update_user(
        &self,
        user: &User,
        by: &Attribution,
    ) -> Result<Option<Change>, StoreError> {
        users::update(self, user, by).await
    }

    async fn delete_user(
        &self,
        id: &UserId,
        by: &Attribution,
    ) -> Result<Option<Change>, StoreError> {
        users::delete(self, id, by).await
    }

    async fn insert_key(&self, key: &StoredKey, by: &Attribution) -> Result<KeyRecord, StoreError> {
        let values_of_key = Value::Object(without_nulls(row::encode(key)));
        let columns = inserted_columns();
        // The row is returned by the statement itself, so that no second query is needed to learn the result.
        let insert = format!(
            "WITH {BY}, n AS MATERIALIZED (
                SELECT n.*, EXISTS (SELECT FROM users AS u WHERE u.id = n.user_id) AS has_user, EXISTS (
                    SELECT FROM api_keys AS k WHERE k.key_prefix = n.key_prefix AND k.key_hash = n.key_hash
                ) OR EXISTS (
                    SELECT FROM api_keys AS k
                    WHERE k.previous_key_prefix = n.key_prefix AND k.previous_key_hash = n.key_hash
                ) AS is_duplicate
                FROM jsonb_populate_record(NULL::api_keys, {}) AS n
            ), k AS (
                INSERT INTO api_keys ({}) SELECT n.{} FROM by, n
                WHERE by.is_set AND n.has_user AND NOT n.is_duplicate RETURNING *
            )
            SELECT row_to_json(found)::text AS row
            FROM ({} FROM k JOIN users u ON u.id = k.user_id) AS found
            UNION ALL SELECT CASE WHEN is_duplicate THEN '{CONFLICT}' ELSE '{NO_USER}' END FROM n
            WHERE is_duplicate OR NOT has_user",
            values("$2::jsonb", &["created_at", "updated_at"]),
            columns.join(", "),
            columns.join(", n."),
            *SELECT_KEY,
        );
        let binds = [audit::attribution(by), Bind::Text(values_of_key.to_string())];
        match self.change(&Statement::new(insert, binds)).await?.as_deref() {
            Some(CONFLICT) => Err(StoreError::conflict("the same key is already stored")),
            Some(NO_USER) => Err(StoreError::conflict("the key's user does not exist")),
            Some(inserted) => Ok(row::decode(inserted)?.record),
            None => Err(StoreError::rejected("a trigger discarded the row")),
        }
    }

    async fn insert_keys(
        &self,
        keys: &[StoredKey],
        by: &Attribution,
    ) -> Result<Vec<Inserted>, StoreError> {
        bulk::insert(self, keys, by).await
    }

    async fn find_key(&self, id: &KeyId) -> Result<Option<StoredKey>, StoreError> {
        let Some(id) = id.as_i64() else { return Ok(None) };
        let select = format!("{} {KEY_TABLES} WHERE k.id = $1", *SELECT_KEY);
        let found = self.records(select, [Bind::Integer(id)]).await?;
        found.first().map(KeyRow::key).transpose()
    }

    async fn list_keys(&self, page: &ListKeys) -> Result<KeyPage, StoreError> {
        let Some((condition, binds)) = page.sql(&FILTER) else { return Ok(KeyPage::default()) };
        // Only the rows of the page are made, also if the keys are sorted.
        let select = format!(
            "{} {KEY_TABLES} WHERE k.id IN (SELECT k.id {KEY_TABLES} WHERE {condition}) ORDER BY k.id",
            *SELECT_KEY
        );
        // The best index depends on the values of the filter.
        let select = Statement::new(key_rows(&select), binds).planned_for_its_values();
        let rows: Vec<KeyRow> = self.load(&self.0.management, &select).await?;
        Ok(KeyPage::from_rows(page, rows.iter().map(KeyRow::record)))
    }

    async fn replace_key(
        &self,
        old: &StoredKey,
        new: &StoredKey,
        by: &Attribution,
    ) -> Result<Option<KeyRecord>, StoreError> {
        let Some(id) = old.record.id.as_i64() else { return Ok(None) };
        let edited: Map<_, _> =
            columns::edited(old, new).map(|(name, value)| (name.to_owned(), value)).collect();
        if edited.is_empty() {
            let Some(current) = self.find_key(&old.record.id).await? else { return Ok(None) };
            return match current.revisions.key == old.revisions.key {
                true => Ok(Some(current.record)),
                false => Err(StoreError::conflict(CHANGED_SINCE)),
            };
        }
        let set: Vec<_> = edited.keys().map(|column| format!("{column} = n.{column}")).collect();
        let replace = format!(
            "WITH {BY}, k AS (
                UPDATE api_keys AS t SET {}, updated_at = n.updated_at
                FROM by, jsonb_populate_record(NULL::api_keys, {}) AS n
                WHERE by.is_set AND t.id = $3 AND t.api_key_revision = $4 RETURNING t.*
            )
            SELECT row_to_json(found)::text AS row
            FROM ({} FROM k JOIN users u ON u.id = k.user_id) AS found
            UNION ALL SELECT '{CONFLICT}'
            WHERE NOT EXISTS (SELECT FROM k) AND EXISTS (SELECT FROM api_keys WHERE id = $3)",
            set.join(", "),
            values("$2::jsonb", &["updated_at"]),
            *SELECT_KEY,
        );
        let binds = [
            audit::attribution(by),
            Bind::Text(Value::Object(without_nulls(edited)).to_string()),
            Bind::Integer(id),
            Bind::number(old.revisions.key.0),
        ];
        match self.change(&Statement::new(replace, binds)).await?.as_deref() {
            Some(CONFLICT) => Err(StoreError::conflict(CHANGED_SINCE)),
            Some(replaced) => Ok(Some(row::decode(replaced)?.record)),
            None => Ok(None),
        }
    }

    async fn revoke_key(&self, id: &KeyId, by: &Attribution) -> Result<Option<Change>, StoreError> {
        let Some(id) = id.as_i64() else { return Ok(None) };
        // A key that was revoked before is not written.
        let revoke = format!(
            "WITH {BY}, revoked AS (
                UPDATE api_keys AS t SET {REVOKE}
                FROM by, jsonb_populate_record(NULL::api_keys, {}) AS n
                WHERE by.is_set AND t.id = $3 AND t.is_active RETURNING t.key_prefix, t.api_key_revision
            )
            SELECT json_build_array(coalesce(key_prefix, ''), api_key_revision)::text AS row FROM (
                SELECT * FROM revoked UNION ALL SELECT key_prefix, api_key_revision FROM api_keys
                WHERE id = $3 AND NOT EXISTS (SELECT FROM revoked)
            ) AS key",
            values("$2::jsonb", &["revoked_at", "updated_at"])
        );
        let binds = [audit::attribution(by), revocation(by), Bind::Integer(id)];
        let revoked = self.repeatable(&Statement::new(revoke, binds)).await?;
        revoked.map(|row| TextRow { row }.change()).transpose()
    }

    async fn revoke_keys(
        &self,
        filter: &KeyFilter,
        by: &Attribution,
    ) -> Result<Vec<(KeyId, Change)>, StoreError> {
        bulk::revoke(self, filter, by).await
    }

    async fn delete_key(&self, id: &KeyId, by: &Attribution) -> Result<Option<Change>, StoreError> {
        let Some(id) = id.as_i64() else { return Ok(None) };
        // The trigger records a higher revision than this one. Answers from before the deletion are below both.
        let delete = format!(
            "WITH {BY} DELETE FROM api_keys AS t USING by WHERE by.is_set AND t.id = $2
            RETURNING json_build_array(coalesce(t.key_prefix, ''), t.api_key_revision + 1)::text AS row"
        );
        let binds = [audit::attribution(by), Bind::Integer(id)];
        let deleted = self.change(&Statement::new(delete, binds)).await?;
        deleted.map(|row| TextRow { row }.change()).transpose()
    }

    async fn list_usage(
        &self,
        key: &KeyId,
        from: NaiveDate,
        to: NaiveDate,
    ) -> Result<Vec<DailyUsage>, StoreError> {
        self.usage_between(key, from, to).await
    }

    async fn list_audit(&self, page: &ListAudit) -> Result<AuditPage, StoreError> {
        audit::list(self, page).await
    }

    async fn prune_audit(&self, before: DateTime<Utc>) -> Result<u64, StoreError> {
        audit::prune(self, before).await
    }
}

/// Result of the insertion of a key whose user does not exist.
const NO_USER: &str = "no user";

impl PostgresStore {
    /// Returns the rows that `select` finds, ordered by id. It starts with [`SELECT_KEY`].
    async fn records(
        &self,
        select: String,
        binds: impl IntoIterator<Item = Bind>,
    ) -> Result<Vec<KeyRow>, StoreError> {
        self.load(&self.0.management, &Statement::new(key_rows(&select), binds)).await
    }

    /// Returns a page of rows for a review, including keys without an owner.
    pub(super) async fn reviewed(&self, after: i64) -> Result<Vec<KeyRow>, StoreError> {
        let select = format!(
            "{} FROM api_keys k LEFT JOIN users u ON u.id = k.user_id
            WHERE k.id > $1 ORDER BY k.id LIMIT {}",
            *SELECT_KEY,
            review::PAGE
        );
        self.records(select, [Bind::Integer(after)]).await
    }
}

/// Returns a statement that selects the rows of `select` as [`KeyRow`]s, ordered by id.
pub(super) fn key_rows(select: &str) -> String {
    format!(
        "SELECT k.id::bigint AS id, convert_to(row_to_json(k)::text, 'UTF8') AS row
        FROM ({select}) AS k ORDER BY k.id"
    )
}

/// The columns that the insertion of a key writes.
pub(super) fn inserted_columns() -> Vec<&'static str> {
    columns::INSERTED.iter().copied().chain(["created_at", "updated_at"]).collect()
}

/// Returns the values of a revocation.
pub(super) fn revocation(by: &Attribution) -> Bind {
    let values = [("revoked_by", &by.actor), ("revoke_reason", &by.reason)];
    let values = values.map(|(column, text)| (column.to_owned(), serde_json::json!(text)));
    Bind::Text(Value::Object(without_nulls(values.into_iter().collect())).to_string())
}

/// Removes null values. A JSON null would become the JSON value `null` in a JSON column, instead of NULL.
pub(super) fn without_nulls(values: Map<String, Value>) -> Map<String, Value> {
    values.into_iter().filter(|(_, value)| !value.is_null()).collect()
}
