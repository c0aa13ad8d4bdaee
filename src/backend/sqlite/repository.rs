//! The write side of [`SqliteStore`].

use serde_json::{Map, Value, json};

use super::{
    SqliteStore, load,
    select::{keys_and_orphans_where, keys_where},
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

/// The current time in UTC and milliseconds, without a time zone, as ORMs read it.
const NOW: &str = "strftime('%Y-%m-%d %H:%M:%f')";

impl KeyRepository for SqliteStore {
    async fn insert_user(&self, email: &str, role: &str) -> Result<User, StoreError> {
        let insert = format!(
            "INSERT INTO users (email, role, is_active, created_at, updated_at)
            -- An adopted table may have no unique index.
            SELECT $1, $2, 1, {NOW}, {NOW} WHERE NOT EXISTS (SELECT 1 FROM users WHERE email = $1)
            RETURNING CAST(id AS TEXT) AS row"
        );
        let binds = [Bind::Text(email.to_owned()), Bind::Text(role.to_owned())];
        let inserted = self.write(Statement::new(insert, binds)).await?;
        let id = inserted.first().and_then(TextRow::id);
        let id = id.ok_or_else(|| StoreError::conflict("the e-mail address is taken"))?;
        Ok(User { role: role.to_owned(), ..User::new(id, email) })
    }

    async fn update_user(&self, user: &User) -> Result<Option<Change>, StoreError> {
        let values = json!({ "email": user.email, "role": user.role, "is_active": user.is_active });
        self.update("users", &["email", "role", "is_active"], user.id.as_i64(), &values, None).await
    }

    async fn insert_key(&self, key: &StoredKey) -> Result<KeyRecord, StoreError> {
        let mut values = encode(&key.record);
        values.insert("key_hash".to_owned(), json!(key.hash.expose_hash()));
        let columns = &*columns::INSERTED;
        let fields: Vec<_> = columns.iter().map(|column| field(column)).collect();
        let insert = format!(
            "INSERT INTO api_keys ({}, created_at, updated_at)
            SELECT {}, {NOW}, {NOW} FROM (SELECT $1 AS row) AS n
            WHERE EXISTS (SELECT 1 FROM users WHERE id = {}) AND NOT EXISTS (
                SELECT 1 FROM api_keys WHERE key_prefix = {} AND key_hash = {}
            ) RETURNING CAST(id AS TEXT) AS row",
            columns.join(", "),
            fields.join(", "),
            field("user_id"),
            field("key_prefix"),
            field("key_hash"),
        );
        let binds = [Bind::Text(Value::Object(values).to_string())];
        let insert = Statement::new(insert, binds);
        let inserted = self.in_transaction(move |connection| {
            let inserted = load(connection, &insert)?;
            let conflict = "there is no such user, or the same key is already stored";
            let id = inserted.first().and_then(TextRow::id);
            let id = id.ok_or_else(|| StoreError::conflict(conflict))?;
            let select = keys_where("k.id = $1");
            load(connection, &Statement::new(select, [Bind::Integer(id)]))
        });
        let found = inserted.await?;
        let found = found.first().map(|found| row::decode(&found.row)).transpose()?;
        // The row was read in the transaction that wrote it.
        found
            .map(|key| key.record)
            .ok_or_else(|| StoreError::bad_row("the new row can't be decoded"))
    }

    async fn find_key(&self, id: &KeyId) -> Result<Option<KeyRecord>, StoreError> {
        let Some(id) = id.as_i64() else { return Ok(None) };
        let select = keys_where("k.id = $1");
        let found = self.records(select, [Bind::Integer(id)]).await?;
        found.first().map(|row| row.record().1).transpose()
    }

    async fn list_keys(&self, page: &ListKeys) -> Result<KeyPage, StoreError> {
        let Some(binds) = page.binds() else { return Ok(KeyPage::default()) };
        let filter = "($1 = 0 OR k.user_id = $2) AND k.id > $3 ORDER BY k.id LIMIT $4";
        let rows = self.records(keys_where(filter), binds).await?;
        Ok(KeyPage::from_rows(page, rows.iter().map(KeyRow::record)))
    }

    async fn update_key(
        &self,
        record: &KeyRecord,
        expected: Option<Revision>,
    ) -> Result<Option<Change>, StoreError> {
        let values = Value::Object(encode(record));
        self.update("api_keys", &columns::EDITED, record.id.as_i64(), &values, expected).await
    }

    async fn revoke_key(&self, id: &KeyId) -> Result<Option<Change>, StoreError> {
        let values = json!({ "is_active": false });
        self.update("api_keys", &["is_active"], id.as_i64(), &values, None).await
    }
}

impl SqliteStore {
    /// Returns the rows that `select` finds, ordered by id. It is a [`keys_where`] with a condition.
    async fn records(
        &self,
        select: String,
        binds: impl IntoIterator<Item = Bind>,
    ) -> Result<Vec<KeyRow>, StoreError> {
        let select = format!("SELECT id, CAST(row AS BLOB) AS row FROM ({select}) ORDER BY id");
        self.read_rows(Statement::new(select, binds)).await
    }

    /// Returns a page of rows for a review, including keys without an owner.
    pub(super) async fn reviewed(&self, after: i64) -> Result<Vec<KeyRow>, StoreError> {
        let page = format!("k.id > $1 ORDER BY k.id LIMIT {}", review::PAGE);
        self.records(keys_and_orphans_where(&page), [Bind::Integer(after)]).await
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
        let set: Vec<_> =
            columns.iter().map(|column| format!("{column} = {}", field(column))).collect();
        let update = format!(
            "UPDATE {table} SET {}, updated_at = {NOW}
            FROM (SELECT $1 AS row) AS n WHERE id = $2 {} RETURNING CAST(id AS TEXT) AS row",
            set.join(", "),
            if expected.is_some() { "AND api_key_revision = $3" } else { "" },
        );
        let revision = expected.map(|revision| Bind::number(revision.0));
        let binds = [Bind::Text(values.to_string()), Bind::Integer(id)];
        let update = Statement::new(update, binds.into_iter().chain(revision));
        // RETURNING returns the row as it was before its triggers.
        let subject = if table == "users" { "id" } else { "key_prefix" };
        let select = format!(
            "SELECT json_array({subject}, api_key_revision) AS row FROM {table} WHERE id = $1"
        );
        let select = Statement::new(select, [Bind::Integer(id)]);
        let changed = self.in_transaction(move |connection| {
            let is_written = !load(connection, &update)?.is_empty();
            let found = load(connection, &select)?;
            if expected.is_some() && !is_written && !found.is_empty() {
                return Err(StoreError::conflict(CHANGED_SINCE));
            }
            Ok(found)
        });
        changed.await?.first().map(TextRow::change).transpose()
    }
}

/// Encodes a record, with time stamps as SQLite's functions and most ORMs write them.
fn encode(record: &KeyRecord) -> Map<String, Value> {
    let mut values = row::encode(record);
    if let Some(expiry) = record.expires_at {
        let text = expiry.format("%Y-%m-%d %H:%M:%S%.6f").to_string();
        values.insert("expires_at".to_owned(), json!(text));
    }
    values
}

/// Returns the SQL for the value of a column in the JSON object that is bound first.
fn field(column: &str) -> String {
    if column == "metadata" {
        // The value is kept as JSON: a text or a number would be taken for SQLite's own.
        return "nullif(n.row -> '$.metadata', 'null')".to_owned();
    }
    format!("json_extract(n.row, '$.{column}')")
}
