//! Users.

use std::collections::HashMap;

use diesel::SqliteConnection;
use serde_json::{Value, json};

use super::{BytesRow, SqliteStore, execute, load, load_rows};
use crate::{
    backend::sql::statement::{Bind, Statement, TextRow},
    error::{StoreError, StoreErrorKind},
    record::{Revision, User, UserId},
    store::{Attribution, Change, ListUsers, UserPage},
};

const SELECT: &str = "SELECT CAST(json_object('id', id, 'email', CAST(email AS TEXT), 'role', CAST(role AS TEXT),
    'is_active', json(CASE is_active WHEN 1 THEN 'true' ELSE 'false' END)) AS BLOB) AS row FROM users";

const IS_TAKEN: &str =
    "SELECT CAST(id AS TEXT) AS row FROM users WHERE email = $1 AND id <> $2 LIMIT 1";

const INSERT: &str = "
    INSERT INTO users (email, role, is_active, created_at, updated_at) VALUES ($1, $2, TRUE, $3, $3)
    RETURNING CAST(id AS TEXT) AS row";

const OWNS: &str = "SELECT CAST(id AS TEXT) AS row FROM api_keys WHERE user_id = $1 LIMIT 1";

const DELETE: &str = "DELETE FROM users WHERE id = $1";

const REVISION: &str = "
    SELECT CAST(coalesce(max(revision), 0) AS TEXT) AS row FROM api_key_changes WHERE user_id = $1";

impl SqliteStore {
    pub(super) async fn add_user(
        &self,
        email: &str,
        role: &str,
        by: &Attribution,
    ) -> Result<User, StoreError> {
        let user = User { role: role.to_owned(), ..User::new(0, email) };
        self.change(by, move |connection, now| {
            // An adopted table may have no unique index.
            check_email(connection, &user.email, -1)?;
            let texts = [user.email.as_str(), &user.role, now].map(|it| Bind::Text(it.to_owned()));
            let inserted = load(connection, &Statement::new(INSERT, texts))?;
            let id = inserted.iter().find_map(TextRow::id);
            let id = id.ok_or_else(|| StoreError::bad_row("the id of the new user is missing"))?;
            Ok(User { id: id.into(), ..user })
        })
        .await
    }

    /// Returns the user for whom `column` has this value, with the lowest id.
    pub(super) async fn user_where(
        &self,
        column: &str,
        value: Bind,
    ) -> Result<Option<User>, StoreError> {
        let select = format!("{SELECT} WHERE {column} = $1 ORDER BY id LIMIT 1");
        let rows = self.read_rows(Statement::new(select, [value])).await?;
        rows.first().map(user).transpose()
    }

    pub(super) async fn page_of_users(&self, page: &ListUsers) -> Result<UserPage, StoreError> {
        let after = page.after.as_ref().map_or(Some(i64::MIN), UserId::as_i64);
        let Some(after) = after else { return Ok(UserPage::default()) };
        let select = format!("{SELECT} WHERE id > $1 ORDER BY id LIMIT $2");
        let binds = [Bind::Integer(after), Bind::Integer(i64::from(page.limit) + 1)];
        let rows = self.read_rows(Statement::new(select, binds)).await?;
        let users: Result<Vec<_>, _> = rows.iter().map(user).collect();
        Ok(UserPage::from_users(page, users?))
    }

    /// Writes the fields that differ from the row: an adopted table may have another representation of the others.
    pub(super) async fn edit_user(
        &self,
        user: &User,
        by: &Attribution,
    ) -> Result<Option<Change>, StoreError> {
        let Some(id) = user.id.as_i64() else { return Ok(None) };
        let new = user.clone();
        self.change(by, move |connection, now| {
            let Some(old) = stored(connection, id)? else {
                return check_email(connection, &new.email, id).map(|()| None);
            };
            let mut edited = HashMap::new();
            if new.email != old.email {
                check_email(connection, &new.email, id)?;
                edited.insert("email", json!(new.email));
            }
            if new.role != old.role {
                edited.insert("role", json!(new.role));
            }
            if new.is_active != old.is_active {
                edited.insert("is_active", json!(new.is_active));
            }
            if !edited.is_empty() {
                let set: Vec<_> =
                    edited.keys().map(|column| format!("{column} = $1 ->> '{column}'")).collect();
                let update =
                    format!("UPDATE users SET {}, updated_at = $2 WHERE id = $3", set.join(", "));
                let values = json!(edited).to_string();
                let binds = [Bind::Text(values), Bind::Text(now.to_owned()), Bind::Integer(id)];
                execute(connection, &Statement::new(update, binds))?;
            }
            change(connection, id).map(Some)
        })
        .await
    }

    pub(super) async fn remove_user(
        &self,
        id: &UserId,
        by: &Attribution,
    ) -> Result<Option<Change>, StoreError> {
        let Some(id) = id.as_i64() else { return Ok(None) };
        let deleted = self.change(by, move |connection, _| {
            if !load(connection, &Statement::new(OWNS, [Bind::Integer(id)]))?.is_empty() {
                return Err(StoreError::conflict("the user owns keys"));
            }
            if execute(connection, &Statement::new(DELETE, [Bind::Integer(id)]))? == 0 {
                return Ok(None);
            }
            change(connection, id).map(Some)
        });
        deleted.await.map_err(|error| referenced(error, "the user owns keys", "user"))
    }
}

/// Returns the error for a row that can't be deleted because another table refers to it. `own` is the message of a
/// conflict that was found before.
pub(super) fn referenced(error: StoreError, own: &str, what: &str) -> StoreError {
    match error.kind() {
        StoreErrorKind::Conflict if !error.to_string().contains(own) => {
            StoreError::conflict(format!("another table refers to the {what}")).caused_by(error)
        }
        _ => error,
    }
}

fn check_email(connection: &mut SqliteConnection, email: &str, of: i64) -> Result<(), StoreError> {
    let binds = [Bind::Text(email.to_owned()), Bind::Integer(of)];
    match load(connection, &Statement::new(IS_TAKEN, binds))?.is_empty() {
        true => Ok(()),
        false => Err(StoreError::conflict("the e-mail address is taken")),
    }
}

fn stored(connection: &mut SqliteConnection, id: i64) -> Result<Option<User>, StoreError> {
    let select = Statement::new(format!("{SELECT} WHERE id = $1"), [Bind::Integer(id)]);
    let rows: Vec<BytesRow> = load_rows(connection, &select)?;
    rows.first().map(user).transpose()
}

fn change(connection: &mut SqliteConnection, id: i64) -> Result<Change, StoreError> {
    let rows = load(connection, &Statement::new(REVISION, [Bind::Integer(id)]))?;
    let revision = rows.iter().find_map(TextRow::id).and_then(|it| u64::try_from(it).ok());
    Ok(Change::Owner(id.into(), Revision(revision.unwrap_or(0))))
}

fn user(row: &BytesRow) -> Result<User, StoreError> {
    let bad = || StoreError::bad_row("a row of users can't be decoded");
    let columns: Value = serde_json::from_str(&row.json()).map_err(|_| bad())?;
    let text = |column: &str| columns[column].as_str().map(str::to_owned);
    let mut user =
        User::new(columns["id"].as_i64().ok_or_else(bad)?, text("email").unwrap_or_default());
    user.role = text("role").unwrap_or(user.role);
    user.is_active = columns["is_active"] == true;
    Ok(user)
}
