//! Users: the statements of [`KeyRepository`](crate::store::KeyRepository) on them.

use serde_json::json;

use super::{
    PostgresStore,
    audit::{self, BY},
    repository::{CONFLICT, values},
};
use crate::{
    backend::sql::statement::{Bind, Statement, TextRow},
    error::StoreError,
    record::{User, UserId},
    store::{Attribution, Change, ListUsers, UserPage},
};

const IS_TAKEN: &str = "the e-mail address is taken";

pub(super) async fn insert(
    store: &PostgresStore,
    (email, role): (&str, &str),
    by: &Attribution,
) -> Result<User, StoreError> {
    let user = json!({ "email": email, "role": role, "is_active": true });
    let insert = format!(
        "WITH {BY} INSERT INTO users (email, role, is_active, created_at, updated_at)
        SELECT n.email, n.role, n.is_active, n.created_at, n.updated_at
        FROM by, jsonb_populate_record(NULL::users, {}) AS n
        -- An adopted table may have no unique index.
        WHERE by.is_set AND NOT EXISTS (SELECT FROM users AS u WHERE u.email = n.email)
        RETURNING id::text AS row",
        values("$2::jsonb", &["created_at", "updated_at"])
    );
    let binds = [audit::attribution(by), Bind::Text(user.to_string())];
    let inserted = store.change(&Statement::new(insert, binds)).await?;
    let id: Option<i64> = inserted.and_then(|id| id.parse().ok());
    let id = id.ok_or_else(|| StoreError::conflict(IS_TAKEN))?;
    Ok(User { role: role.to_owned(), ..User::new(id, email) })
}

/// Returns the users that a condition selects, ordered by id.
async fn select(
    store: &PostgresStore,
    condition: &str,
    limit: i64,
    bind: Bind,
) -> Result<Vec<User>, StoreError> {
    // OFFSET 0 keeps the planner from walking the primary key for a condition with another index.
    let select = format!(
        "SELECT json_build_object('id', u.id, 'email', coalesce(u.email::text, ''),
            'role', coalesce(u.role::text, 'user'), 'is_active', coalesce(u.is_active, FALSE))::text AS row
        FROM ({condition}) AS u ORDER BY u.id LIMIT $2"
    );
    let statement = Statement::new(select, [bind, Bind::Integer(limit)]);
    let rows = store.load::<TextRow>(&store.0.management, &statement).await?;
    let decode = |row: &TextRow| {
        serde_json::from_str(&row.row).map_err(|error| {
            StoreError::bad_row("a row of users can't be decoded").caused_by(error)
        })
    };
    rows.iter().map(decode).collect()
}

pub(super) async fn find(store: &PostgresStore, id: &UserId) -> Result<Option<User>, StoreError> {
    let Some(id) = id.as_i64() else { return Ok(None) };
    let found = select(store, "SELECT * FROM users WHERE id = $1", 1, Bind::Integer(id)).await?;
    Ok(found.into_iter().next())
}

pub(super) async fn find_by_email(
    store: &PostgresStore,
    email: &str,
) -> Result<Option<User>, StoreError> {
    let by_email = "SELECT * FROM users WHERE email = $1 OFFSET 0";
    let found = select(store, by_email, 1, Bind::Text(email.to_owned())).await?;
    Ok(found.into_iter().next())
}

pub(super) async fn list(store: &PostgresStore, page: &ListUsers) -> Result<UserPage, StoreError> {
    let after = page.after.as_ref().map_or(Some(i64::MIN), UserId::as_i64);
    let Some(after) = after else { return Ok(UserPage::default()) };
    let limit = i64::from(page.limit) + 1;
    let users =
        select(store, "SELECT * FROM users WHERE id > $1", limit, Bind::Integer(after)).await?;
    Ok(UserPage::from_users(page, users))
}

pub(super) async fn update(
    store: &PostgresStore,
    user: &User,
    by: &Attribution,
) -> Result<Option<Change>, StoreError> {
    let Some(id) = user.id.as_i64() else { return Ok(None) };
    let new = json!({ "email": user.email, "role": user.role, "is_active": user.is_active });
    // An adopted table may have no unique index, and several users with one address. An address that is not changed is
    // no conflict.
    let update = format!(
        "WITH {BY}, updated AS (
            UPDATE users AS t
            SET email = n.email, role = n.role, is_active = n.is_active, updated_at = n.updated_at
            FROM by, jsonb_populate_record(NULL::users, {}) AS n
            WHERE by.is_set AND t.id = $3 AND (t.email = n.email
                OR NOT EXISTS (SELECT FROM users AS u WHERE u.email = n.email))
            RETURNING json_build_array(t.id, t.api_key_revision)::text AS row
        )
        SELECT row FROM updated UNION ALL SELECT '{CONFLICT}'
        WHERE NOT EXISTS (SELECT FROM updated) AND EXISTS (SELECT FROM users WHERE id = $3)",
        values("$2::jsonb", &["updated_at"])
    );
    let binds = [audit::attribution(by), Bind::Text(new.to_string()), Bind::Integer(id)];
    let updated = store.repeatable(&Statement::new(update, binds)).await?;
    changed(updated, IS_TAKEN)
}

pub(super) async fn delete(
    store: &PostgresStore,
    id: &UserId,
    by: &Attribution,
) -> Result<Option<Change>, StoreError> {
    let Some(id) = id.as_i64() else { return Ok(None) };
    // The lock comes first: a key that is inserted meanwhile is then visible, or its foreign key fails. In an adopted
    // table, the deletion could otherwise delete that key as well.
    let lock = "SELECT id::text AS row FROM users WHERE id = $1 FOR UPDATE";
    let lock = Statement::new(lock, [Bind::Integer(id)]);
    let delete = format!(
        "WITH {BY}, gone AS (
            DELETE FROM users AS t USING by
            WHERE by.is_set AND t.id = $2 AND NOT EXISTS (SELECT FROM api_keys AS k WHERE k.user_id = t.id)
            RETURNING json_build_array(t.id, t.api_key_revision + 1)::text AS row
        )
        SELECT row FROM gone UNION ALL SELECT '{CONFLICT}'
        WHERE NOT EXISTS (SELECT FROM gone) AND EXISTS (SELECT FROM users WHERE id = $2)"
    );
    let delete = Statement::new(delete, [audit::attribution(by), Bind::Integer(id)]);
    let management = &store.0.management;
    let timeout = management.statement_timeout();
    let work = management.transact::<TextRow>(timeout, Some(&lock), |_| delete);
    let deleted = store.in_time(work).await?.into_iter().next();
    changed(deleted.map(|deleted| deleted.row), "the user owns keys")
}

/// Returns the change in a row, or the conflict.
fn changed(row: Option<String>, conflict: &'static str) -> Result<Option<Change>, StoreError> {
    match row {
        Some(row) if row == CONFLICT => Err(StoreError::conflict(conflict)),
        row => row.map(|row| TextRow { row }.change()).transpose(),
    }
}
