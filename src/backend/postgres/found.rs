//! Reads what is stored under lookup ids.

use std::time::{Duration, SystemTime};

use diesel::{
    QueryableByName,
    sql_types::{Array, BigInt, Nullable, Text},
};
use serde_json::json;

use super::{
    connections::{Connections, Isolation},
    select,
};
use crate::{
    backend::sql::{
        found::{Found, Texts},
        row,
        statement::{Bind, Statement},
    },
    error::StoreError,
    record::Revision,
    store::ReadRow,
};

#[derive(QueryableByName)]
struct FoundRow {
    /// Microseconds since the Unix epoch.
    #[diesel(sql_type = BigInt)]
    as_of: i64,
    #[diesel(sql_type = BigInt)]
    latest: i64,
    #[diesel(sql_type = Nullable<Array<Nullable<Text>>>)]
    row: Option<Texts>,
}

#[derive(QueryableByName)]
struct AskedRow {
    /// Number of the lookup id, from 1 on.
    #[diesel(sql_type = BigInt)]
    asked: i64,
    #[diesel(embed)]
    found: FoundRow,
}

impl Found {
    /// Reads what is stored under a lookup id. It is retried once if the connection was dead.
    pub(super) async fn read(pool: &Connections, id: &str) -> Result<Self, StoreError> {
        let statement = Statement::new(select::LOOK_UP.as_str(), [Bind::Text(id.to_owned())]);
        Self::of(pool.load(Isolation::Any, &statement).await?)
    }

    /// Reads what is stored under each of these lookup ids, in their order, in one statement. It is retried once if the
    /// connection was dead.
    pub(super) async fn read_many(
        pool: &Connections,
        ids: &[impl AsRef<str>],
    ) -> Result<Vec<Self>, StoreError> {
        let ids: Vec<_> = ids.iter().map(AsRef::as_ref).collect();
        let statement =
            Statement::new(select::LOOK_UP_MANY.as_str(), [Bind::Text(json!(ids).to_string())]);
        let rows: Vec<AskedRow> = pool.load(Isolation::Any, &statement).await?;
        let mut of_each: Vec<Vec<FoundRow>> = Vec::new();
        of_each.resize_with(ids.len(), Vec::new);
        for AskedRow { asked, found } in rows {
            let at = usize::try_from(asked).ok().and_then(|number| number.checked_sub(1));
            if let Some(of_one) = at.and_then(|at| of_each.get_mut(at)) {
                of_one.push(found);
            }
        }
        of_each.into_iter().map(Self::of).collect()
    }

    /// Reads a page of at most `limit` keys after one, ordered by id. It is retried once if the connection was dead.
    /// `None` if there are none.
    pub(super) async fn read_page(
        pool: &Connections,
        after: i64,
        limit: u32,
    ) -> Result<Option<Self>, StoreError> {
        let binds = [Bind::Integer(after), Bind::Integer(limit.into())];
        let statement = Statement::new(select::PAGE.as_str(), binds);
        let rows: Vec<FoundRow> = pool.load(Isolation::Any, &statement).await?;
        if rows.is_empty() { Ok(None) } else { Self::of(rows).map(Some) }
    }

    /// Returns the rows of the keys.
    pub(super) fn read_rows(self) -> impl Iterator<Item = ReadRow> {
        self.rows.into_iter().map(|texts| {
            let text = |name: &str| {
                let at = row::READ.iter().position(|(column, _)| *column == name)?;
                texts.get(at)?.clone()
            };
            let id = text("id").and_then(|id| id.parse::<i64>().ok()).unwrap_or_default();
            let lookup_ids = [text("key_prefix"), text("previous_key_prefix")];
            row::decode_texts(texts).map_or_else(
                |error| ReadRow::unreadable(id, lookup_ids.into_iter().flatten(), error),
                ReadRow::new,
            )
        })
    }

    fn of(rows: Vec<FoundRow>) -> Result<Self, StoreError> {
        // Without a row, nothing was read.
        let first = rows.first();
        let first = first.ok_or_else(|| StoreError::rejected("a look-up returned no row"))?;
        let number = |value: i64| u64::try_from(value).unwrap_or(0);
        Ok(Self {
            as_of: SystemTime::UNIX_EPOCH + Duration::from_micros(number(first.as_of)),
            latest: Revision(number(first.latest)),
            rows: rows.into_iter().filter_map(|found| found.row).collect(),
        })
    }
}
