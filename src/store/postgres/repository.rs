//! The write side of [`PostgresStore`].
//!
//! Values go to the server as one JSON object, from which `jsonb_populate_record` makes whatever the
//! columns of an adopted table are.

use serde_json::{Map, Value, json};

use super::{KEY_COLUMNS, KEY_TABLES, PostgresStore};
use crate::{
    error::StoreError,
    record::{KeyId, KeyRecord, StoredKey, User},
    store::{
        Change, KeyRepository, ListKeys, row,
        statement::{Bind, Statement, TextRow},
    },
};

/// The object that is bound first, with the time in columns that have it; as text in UTC it fits a
/// time stamp with a zone and one without.
const VALUES: &str = "$1::jsonb || jsonb_build_object(
    'created_at', to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'),
    'updated_at', to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'))";

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
        self.update("users", &["email", "role", "is_active"], user.id.as_i64(), &values).await
    }

    async fn insert_key(&self, key: &StoredKey) -> Result<KeyRecord, StoreError> {
        let mut values = without_nulls(row::encode(&key.record));
        values.insert("key_hash".to_owned(), json!(key.hash.expose_hash()));
        let columns = row::INSERTED.iter().chain(&row::EDITED).copied();
        let columns: Vec<_> = columns.chain(["created_at", "updated_at"]).collect();
        // The row comes back from the statement itself: an answer that is lost leaves no question open.
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
            FROM ({KEY_COLUMNS} FROM k JOIN users u ON u.id = k.user_id) AS found",
            columns.join(", "),
            columns.join(", n."),
        );
        let binds = [Bind::Text(Value::Object(values).to_string())];
        let inserted = self.insert(&Statement::new(insert, binds)).await?;
        let refused = "there is no such user, or the same key is stored already";
        let inserted = inserted.ok_or_else(|| StoreError::conflict(refused))?;
        Ok(row::decode(&inserted.row)?.record)
    }

    async fn find_key(&self, id: &KeyId) -> Result<Option<KeyRecord>, StoreError> {
        let Some(id) = id.as_i64() else { return Ok(None) };
        let select = format!("{KEY_COLUMNS} {KEY_TABLES} WHERE k.id = $1");
        Ok(self.records(select, [Bind::Integer(id)]).await?.pop())
    }

    async fn list_keys(&self, page: &ListKeys) -> Result<Vec<KeyRecord>, StoreError> {
        let Some(binds) = page.binds() else { return Ok(Vec::new()) };
        let filter = "($1 = 0 OR k.user_id = $2) AND k.id > $3 ORDER BY k.id LIMIT $4";
        self.records(format!("{KEY_COLUMNS} {KEY_TABLES} WHERE {filter}"), binds).await
    }

    async fn update_key(&self, record: &KeyRecord) -> Result<Option<Change>, StoreError> {
        let values = Value::Object(without_nulls(row::encode(record)));
        self.update("api_keys", &row::EDITED, record.id.as_i64(), &values).await
    }

    async fn revoke_key(&self, id: &KeyId) -> Result<Option<Change>, StoreError> {
        self.update("api_keys", &["is_active"], id.as_i64(), &json!({ "is_active": false })).await
    }
}

impl PostgresStore {
    /// The records that `select`, [`KEY_COLUMNS`] from somewhere, finds.
    async fn records(
        &self,
        select: String,
        binds: impl IntoIterator<Item = Bind>,
    ) -> Result<Vec<KeyRecord>, StoreError> {
        let sql = format!("SELECT row_to_json(k)::text AS row FROM ({select}) AS k");
        let rows = self.load::<TextRow>(&Statement::new(sql, binds)).await?;
        rows.iter().map(|found| row::decode(&found.row).map(|key| key.record)).collect()
    }

    /// Writes `columns` of the row with this id, if there is one.
    async fn update(
        &self,
        table: &str,
        columns: &[&str],
        id: Option<i64>,
        values: &Value,
    ) -> Result<Option<Change>, StoreError> {
        let Some(id) = id else { return Ok(None) };
        let set: Vec<_> = columns.iter().map(|column| format!("{column} = n.{column}")).collect();
        let update = format!(
            "UPDATE {table} AS t SET {}, updated_at = n.updated_at
            FROM jsonb_populate_record(NULL::{table}, {VALUES}) AS n WHERE t.id = $2
            RETURNING json_build_array(t.{}, t.api_key_revision)::text AS row",
            set.join(", "),
            if table == "users" { "id" } else { "key_prefix" },
        );
        let binds = [Bind::Text(values.to_string()), Bind::Integer(id)];
        let rows = self.load::<TextRow>(&Statement::new(update, binds)).await?;
        rows.as_slice().first().map(TextRow::change).transpose()
    }
}

/// A JSON null would become the JSON value `null` in a JSON column, instead of no value.
fn without_nulls(values: Map<String, Value>) -> Map<String, Value> {
    values.into_iter().filter(|(_, value)| !value.is_null()).collect()
}
