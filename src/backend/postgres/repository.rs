//! The write side of [`PostgresStore`].
//!
//! Values are sent as one JSON object, from which `jsonb_populate_record` makes the types of the columns of an adopted
//! table.

use serde_json::{Map, Value, json};

use super::{
    PostgresStore,
    select::{KEY_TABLES, SELECT_KEY},
};
use crate::{
    backend::sql::{
        columns, review, row,
        statement::{Bind, KeyRow, Statement, TextRow},
    },
    error::StoreError,
    record::{KeyId, KeyRecord, Revision, User},
    store::{CHANGED_SINCE, Change, KeyPage, KeyRepository, ListKeys, StoredKey},
};

/// The object that is bound first, with the time in its columns. The time is text in UTC, which is valid for a time
/// stamp with and without a time zone. Metadata for a text column is JSON in text, even if it is a JSON text itself.
const VALUES: &str = "$1::jsonb || CASE WHEN $1::jsonb ? 'metadata' AND NOT (
    SELECT coalesce(nullif(t.typbasetype, 0), t.oid) IN ('json'::regtype, 'jsonb'::regtype)
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
    WHERE a.attrelid = 'api_keys'::regclass AND a.attname = 'metadata'
) THEN jsonb_build_object('metadata', ($1::jsonb -> 'metadata')::text) ELSE '{}' END || jsonb_build_object(
    'created_at', to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'),
    'updated_at', to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'))";

/// Result of an update, instead of a change, if the row does not have the expected revision.
const CONFLICT: &str = "conflict";

impl KeyRepository for PostgresStore {
    async fn insert_user(&self, email: &str, role: &str) -> Result<User, StoreError> {
        let values = json!({ "email": email, "role": role, "is_active": true });
        let insert = format!(
            "INSERT INTO users (email, role, is_active, created_at, updated_at)
            SELECT n.email, n.role, n.is_active, n.created_at, n.updated_at
            FROM jsonb_populate_record(NULL::users, {VALUES}) AS n
            -- An adopted table may have no unique index.
            WHERE NOT EXISTS (SELECT FROM users AS u WHERE u.email = n.email)
            RETURNING id::text AS row"
        );
        let inserted =
            self.insert(&Statement::new(insert, [Bind::Text(values.to_string())])).await?;
        let id = inserted.and_then(|inserted| inserted.id());
        let id = id.ok_or_else(|| StoreError::conflict("the e-mail address is taken"))?;
        Ok(User { role: role.to_owned(), ..User::new(id, email) })
    }

    async fn update_user(&self, user: &User) -> Result<Option<Change>, StoreError> {
        let values = json!({ "email": user.email, "role": user.role, "is_active": user.is_active });
        self.update("users", &["email", "role", "is_active"], user.id.as_i64(), &values, None).await
    }

    async fn insert_key(&self, key: &StoredKey) -> Result<KeyRecord, StoreError> {
        let mut values = without_nulls(row::encode(&key.record));
        values.insert("key_hash".to_owned(), json!(key.hash.expose_hash()));
        let columns = columns::INSERTED.iter().copied();
        let columns: Vec<_> = columns.chain(["created_at", "updated_at"]).collect();
        // The row is returned by the statement itself, so that no second query is needed to learn the result.
        let insert = format!(
            "WITH k AS (
                INSERT INTO api_keys ({}) SELECT n.{}
                FROM jsonb_populate_record(NULL::api_keys, {VALUES}) AS n
                WHERE NOT EXISTS (
                    SELECT FROM api_keys AS k
                    WHERE k.key_prefix = n.key_prefix AND k.key_hash = n.key_hash
                ) AND EXISTS (SELECT FROM users AS u WHERE u.id = n.user_id)
                RETURNING *
            ) SELECT row_to_json(found)::text AS row
            FROM ({} FROM k JOIN users u ON u.id = k.user_id) AS found",
            columns.join(", "),
            columns.join(", n."),
            *SELECT_KEY,
        );
        let binds = [Bind::Text(Value::Object(values).to_string())];
        let inserted = self.insert(&Statement::new(insert, binds)).await?;
        let conflict = "there is no such user, or the same key is already stored";
        let inserted = inserted.ok_or_else(|| StoreError::conflict(conflict))?;
        Ok(row::decode(&inserted.row)?.record)
    }

    async fn find_key(&self, id: &KeyId) -> Result<Option<KeyRecord>, StoreError> {
        let Some(id) = id.as_i64() else { return Ok(None) };
        let select = format!("{} {KEY_TABLES} WHERE k.id = $1", *SELECT_KEY);
        let found = self.records(select, [Bind::Integer(id)]).await?;
        found.first().map(|row| row.record().1).transpose()
    }

    async fn list_keys(&self, page: &ListKeys) -> Result<KeyPage, StoreError> {
        let Some(binds) = page.binds() else { return Ok(KeyPage::default()) };
        let filter = "($1 = 0 OR k.user_id = $2) AND k.id > $3 ORDER BY k.id LIMIT $4";
        let rows =
            self.records(format!("{} {KEY_TABLES} WHERE {filter}", *SELECT_KEY), binds).await?;
        Ok(KeyPage::from_rows(page, rows.iter().map(KeyRow::record)))
    }

    async fn update_key(
        &self,
        record: &KeyRecord,
        expected: Option<Revision>,
    ) -> Result<Option<Change>, StoreError> {
        let values = Value::Object(without_nulls(row::encode(record)));
        self.update("api_keys", &columns::EDITED, record.id.as_i64(), &values, expected).await
    }

    async fn revoke_key(&self, id: &KeyId) -> Result<Option<Change>, StoreError> {
        let values = json!({ "is_active": false });
        self.update("api_keys", &["is_active"], id.as_i64(), &values, None).await
    }
}

impl PostgresStore {
    /// Returns the rows that `select` finds, ordered by id. It starts with [`SELECT_KEY`].
    async fn records(
        &self,
        select: String,
        binds: impl IntoIterator<Item = Bind>,
    ) -> Result<Vec<KeyRow>, StoreError> {
        let sql = format!(
            "SELECT k.id::bigint AS id, convert_to(row_to_json(k)::text, 'UTF8') AS row
            FROM ({select}) AS k ORDER BY k.id"
        );
        self.load(&self.0.management, &Statement::new(sql, binds)).await
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

    /// Writes `columns` of the row with this id, if it exists and has the expected revision.
    async fn update(
        &self,
        table: &str,
        columns: &[&str],
        id: Option<i64>,
        values: &Value,
        expected: Option<Revision>,
    ) -> Result<Option<Change>, StoreError> {
        let Some(id) = id else { return Ok(None) };
        let set: Vec<_> = columns.iter().map(|column| format!("{column} = n.{column}")).collect();
        let update = format!(
            "UPDATE {table} AS t SET {}, updated_at = n.updated_at
            FROM jsonb_populate_record(NULL::{table}, {VALUES}) AS n WHERE t.id = $2 {}
            RETURNING json_build_array(t.{}, t.api_key_revision)::text AS row",
            set.join(", "),
            if expected.is_some() { "AND t.api_key_revision = $3" } else { "" },
            if table == "users" { "id" } else { "key_prefix" },
        );
        let binds = [Bind::Text(values.to_string()), Bind::Integer(id)];
        let written = if let Some(expected) = expected {
            let update = format!(
                "WITH updated AS ({update}) SELECT row FROM updated
                UNION ALL SELECT '{CONFLICT}' WHERE NOT EXISTS (SELECT FROM updated)
                    AND EXISTS (SELECT FROM {table} WHERE id = $2)"
            );
            let binds = binds.into_iter().chain([Bind::number(expected.0)]);
            self.insert(&Statement::new(update, binds)).await?
        } else {
            self.load(&self.0.management, &Statement::new(update, binds)).await?.pop()
        };
        match written {
            Some(TextRow { row }) if row == CONFLICT => Err(StoreError::conflict(CHANGED_SINCE)),
            written => written.as_ref().map(TextRow::change).transpose(),
        }
    }
}

/// Removes null values. A JSON null would become the JSON value `null` in a JSON column, instead of NULL.
fn without_nulls(values: Map<String, Value>) -> Map<String, Value> {
    values.into_iter().filter(|(_, value)| !value.is_null()).collect()
}
