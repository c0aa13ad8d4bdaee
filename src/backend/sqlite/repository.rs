//! The write side of [`SqliteStore`].

use chrono::{DateTime, Datelike, NaiveDate, Utc};

use super::{
    SqliteStore,
    select::{self, keys, keys_and_orphans},
};
use crate::{
    backend::sql::{
        review,
        statement::{Bind, KeyRow, Statement},
    },
    error::StoreError,
    record::{KeyId, KeyRecord, User, UserId},
    store::{
        Attribution, AuditPage, Change, DailyUsage, Inserted, KeyFilter, KeyPage, KeyRepository,
        ListAudit, ListKeys, ListUsers, StoredKey, UserPage,
    },
};

const USAGE: &str = "
    SELECT json_array(day, requests, tokens, cost_micro_cents) AS row FROM api_key_usage
    WHERE api_key_id = $1 AND day >= $2 AND day <= $3 ORDER BY day";

impl KeyRepository for SqliteStore {
    async fn insert_user(
        &self,
        email: &str,
        role: &str,
        by: &Attribution,
    ) -> Result<User, StoreError> {
        self.add_user(email, role, by).await
    }

    async fn find_user(&self, id: &UserId) -> Result<Option<User>, StoreError> {
        let Some(id) = id.as_i64() else { return Ok(None) };
        self.user_where("id", Bind::Integer(id)).await
    }

    async fn find_user_by_email(&self, email: &str) -> Result<Option<User>, StoreError> {
        self.user_where("email", Bind::Text(email.to_owned())).await
    }

    async fn list_users(&self, page: &ListUsers) -> Result<UserPage, StoreError> {
        self.page_of_users(page).await
    }

    async fn update_user(
        &self,
        user: &User,
        by: &Attribution,
    ) -> Result<Option<Change>, StoreError> {
        self.edit_user(user, by).await
    }

    async fn delete_user(
        &self,
        id: &UserId,
        by: &Attribution,
    ) -> Result<Option<Change>, StoreError> {
        self.remove_user(id, by).await
    }

    async fn insert_key(&self, key: &StoredKey, by: &Attribution) -> Result<KeyRecord, StoreError> {
        self.add_key(key, by).await
    }

    async fn insert_keys(
        &self,
        keys: &[StoredKey],
        by: &Attribution,
    ) -> Result<Vec<Inserted>, StoreError> {
        self.add_keys(keys, by).await
    }

    async fn find_key(&self, id: &KeyId) -> Result<Option<StoredKey>, StoreError> {
        let Some(id) = id.as_i64() else { return Ok(None) };
        let select = Statement::new(keys("k.id = $1"), [Bind::Integer(id)]);
        let found: Vec<KeyRow> = self.read_rows(select).await?;
        found.first().map(KeyRow::key).transpose()
    }

    async fn list_keys(&self, page: &ListKeys) -> Result<KeyPage, StoreError> {
        let Some(select) = select::list(page) else { return Ok(KeyPage::default()) };
        let rows: Vec<KeyRow> = self.read_rows(select).await?;
        Ok(KeyPage::from_rows(page, rows.iter().map(KeyRow::record)))
    }

    async fn replace_key(
        &self,
        old: &StoredKey,
        new: &StoredKey,
        by: &Attribution,
    ) -> Result<Option<KeyRecord>, StoreError> {
        self.edit_key(old, new, by).await
    }

    async fn revoke_key(&self, id: &KeyId, by: &Attribution) -> Result<Option<Change>, StoreError> {
        self.deactivate_key(id, by).await
    }

    async fn revoke_keys(
        &self,
        filter: &KeyFilter,
        by: &Attribution,
    ) -> Result<Vec<(KeyId, Change)>, StoreError> {
        self.deactivate_keys(filter, by).await
    }

    async fn delete_key(&self, id: &KeyId, by: &Attribution) -> Result<Option<Change>, StoreError> {
        self.remove_key(id, by).await
    }

    async fn list_usage(
        &self,
        key: &KeyId,
        from: NaiveDate,
        to: NaiveDate,
    ) -> Result<Vec<DailyUsage>, StoreError> {
        let Some(id) = key.as_i64() else { return Ok(Vec::new()) };
        // Days are compared as texts, which are in the order of days from the year 0 to the year 9999.
        let day = |day: NaiveDate| match day.year() {
            ..0 => Bind::Text(String::new()),
            10_000.. => Bind::Text("~".to_owned()),
            _ => Bind::Text(day.to_string()),
        };
        let select = Statement::new(USAGE, [Bind::Integer(id), day(from), day(to)]);
        let bad =
            |error| StoreError::bad_row("a row of api_key_usage can't be decoded").caused_by(error);
        let decode = |row: &str| {
            let (day, requests, tokens, cost): (_, i64, i64, _) =
                serde_json::from_str(row).map_err(bad)?;
            let count = |number| u64::try_from(number).unwrap_or(0);
            Ok(DailyUsage {
                requests: count(requests),
                tokens: count(tokens),
                cost_micro_cents: cost,
                ..DailyUsage::new(day)
            })
        };
        self.read(select).await?.iter().map(|row| decode(&row.row)).collect()
    }

    async fn list_audit(&self, page: &ListAudit) -> Result<AuditPage, StoreError> {
        self.audit_page(page).await
    }

    async fn prune_audit(&self, before: DateTime<Utc>) -> Result<u64, StoreError> {
        self.remove_audit(before).await
    }
}

impl SqliteStore {
    /// Returns a page of rows for a review, including keys without an owner.
    pub(super) async fn reviewed(&self, after: i64) -> Result<Vec<KeyRow>, StoreError> {
        let page = format!("k.id > $1 ORDER BY k.id LIMIT {}", review::PAGE);
        self.read_rows(Statement::new(keys_and_orphans(&page), [Bind::Integer(after)])).await
    }
}
