//! Reads of many keys, for a [`Replica`](crate::Replica).

use diesel::{Connection, SqliteConnection};
use serde_json::json;

use super::{BytesRow, SqliteStore, load, run::load_rows, select};
use crate::{
    backend::sql::{
        fault::Failure,
        statement::{Bind, KeyRow, Statement, TextRow},
    },
    error::StoreError,
    record::{Revision, User, UserId},
    store::{KeySelection, KeysRead, ReadOwner, ReadRow},
};

/// The last change under each of the lookup ids in the JSON array `$1`.
const LATEST: &str = "
    SELECT json_array(a.value, coalesce((SELECT max(revision) FROM api_key_changes WHERE key_prefix = a.value), 0)) AS row
    FROM json_each($1) AS a";

/// The users in the JSON array `$1`, with the revisions of their last changes and of the deletion of earlier users with
/// their ids. A user whose flag is invalid is left out.
const USERS: &str = "
    SELECT CAST(json_array(u.id, CAST(coalesce(u.email, '') AS TEXT), CAST(coalesce(u.role, 'user') AS TEXT),
        coalesce(u.is_active, 0), max(u.api_key_revision, coalesce(
            (SELECT max(c.revision) FROM api_key_changes c WHERE c.user_id = u.id), 0)),
        coalesce((SELECT max(d.revision) FROM api_key_deleted_users d WHERE d.user_id = u.id), 0)) AS BLOB) AS row
    FROM users u WHERE u.id IN (SELECT value FROM json_each($1)) AND coalesce(u.is_active, 0) IN (0, 1)";

impl SqliteStore {
    pub(super) async fn many_keys(&self, selection: &KeySelection) -> Result<KeysRead, StoreError> {
        let as_of = self.0.clock.now();
        match selection {
            KeySelection::Page { after, limit } => {
                // Ids of this schema are integers.
                let after = after.as_ref().and_then(|id| id.as_i64()).unwrap_or(i64::MIN);
                let binds = [Bind::Integer(after), Bind::Integer((*limit).into())];
                let select = select::keys("k.id > $1 ORDER BY k.id LIMIT $2");
                let rows: Vec<KeyRow> = self.read_rows(Statement::new(select, binds)).await?;
                Ok(KeysRead::new(rows.iter().map(read_row).collect(), as_of))
            }
            KeySelection::Under(lookup_ids) => {
                let ids = json!(lookup_ids).to_string();
                let read = move |connection: &mut SqliteConnection| under(connection, &ids);
                let (rows, latest) = self.0.run(read).await?;
                Ok(KeysRead::new(rows.iter().map(read_row).collect(), as_of).with_latest(latest))
            }
        }
    }

    /// Returns owners of keys.
    pub(super) async fn owners_of_keys(
        &self,
        owners: &[UserId],
    ) -> Result<Vec<ReadOwner>, StoreError> {
        let ids: Vec<_> = owners.iter().filter_map(UserId::as_i64).collect();
        let binds = [Bind::Text(json!(ids).to_string())];
        let rows: Vec<BytesRow> = self.read_rows(Statement::new(USERS, binds)).await?;
        let decode = |row: &BytesRow| {
            let (id, email, role, is_active, revision, since): (i64, _, _, u8, _, _) =
                serde_json::from_slice(&row.row).ok()?;
            let mut user = User::new(id, String::new());
            (user.email, user.role, user.is_active) = (email, role, is_active == 1);
            Some(ReadOwner::new(user, Revision(revision)).with_since(Revision(since)))
        };
        // One that can't be decoded is left out, so that its keys are looked up in the store.
        Ok(rows.iter().filter_map(decode).collect())
    }
}

type Under = (Vec<KeyRow>, Vec<(String, Revision)>);

/// Reads the keys under lookup ids, and the last changes, from one snapshot.
fn under(connection: &mut SqliteConnection, ids: &str) -> Result<Under, StoreError> {
    let bind = || [Bind::Text(ids.to_owned())];
    let read = |connection: &mut SqliteConnection| {
        let keys = Statement::new(select::keys(select::UNDER_IDS), bind());
        let rows = load_rows(connection, &keys)?;
        let latest: Vec<TextRow> = load(connection, &Statement::new(LATEST, bind()))?;
        let decode = |row: &TextRow| {
            let decoded = serde_json::from_str(&row.row);
            decoded.map(|(id, revision)| (id, Revision(revision))).map_err(StoreError::rejected)
        };
        Ok((rows, latest.iter().map(decode).collect::<Result<_, _>>()?))
    };
    let outcome = connection.transaction(|connection| read(connection).map_err(Failure));
    outcome.map_err(|Failure(error)| error)
}

fn read_row(row: &KeyRow) -> ReadRow {
    match row.key() {
        Ok(key) => ReadRow::new(key),
        Err(error) => {
            let columns = row.lossy_columns().unwrap_or_default();
            let text = |name: &str| columns.get(name)?.as_str().map(str::to_owned);
            let lookup_ids = text("key_prefix").into_iter().chain(text("previous_key_prefix"));
            ReadRow::unreadable(row.id(), lookup_ids, error)
        }
    }
}
