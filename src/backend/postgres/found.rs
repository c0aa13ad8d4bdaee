//! Reads what is stored under lookup ids.

use std::time::SystemTime;

use tokio_postgres::Row;

use super::{read_connections::ReadConnections, select::KeyRead};
use crate::{
    backend::sql::found::{Found, FoundRow},
    error::StoreError,
    record::Revision,
    store::ReadRow,
};

impl Found {
    /// Reads what is stored under a lookup id. It is retried once if the connection was dead.
    pub(super) async fn read(pool: &ReadConnections, id: &str) -> Result<Self, StoreError> {
        Self::of(pool.load(KeyRead::One, &[&id]).await?)
    }

    /// Reads what is stored under each of these lookup ids, in their order, in one statement: in full
    /// ([`KeyRead::ManyInFull`]) or not. It is retried once if the connection was dead.
    pub(super) async fn read_many(
        pool: &ReadConnections,
        ids: &[impl AsRef<str>],
        is_full: bool,
    ) -> Result<Vec<Self>, StoreError> {
        let read = if is_full { KeyRead::ManyInFull } else { KeyRead::Many };
        let ids: Vec<_> = ids.iter().map(AsRef::as_ref).collect();
        // Almost always one row.
        let mut of_each: Vec<Vec<Row>> = ids.iter().map(|_| Vec::with_capacity(1)).collect();
        let ids = serde_json::to_string(&ids).map_err(StoreError::rejected)?;
        for row in pool.load(read, &[&ids]).await? {
            let asked: i64 = row.try_get(2).map_err(StoreError::rejected)?;
            let at = usize::try_from(asked).ok().and_then(|number| number.checked_sub(1));
            if let Some(of_one) = at.and_then(|at| of_each.get_mut(at)) {
                of_one.push(row);
            }
        }
        of_each.into_iter().map(Self::of).collect()
    }

    /// Reads a page of at most `limit` keys after one, ordered by id. It is retried once if the connection was dead.
    /// `None` if there are none.
    pub(super) async fn read_page(
        pool: &ReadConnections,
        after: i64,
        limit: u32,
    ) -> Result<Option<Self>, StoreError> {
        let rows = pool.load(KeyRead::Page, &[&after, &i64::from(limit)]).await?;
        if rows.is_empty() { Ok(None) } else { Self::of(rows).map(Some) }
    }

    /// Returns the rows of the keys.
    pub(super) fn read_rows(self) -> impl Iterator<Item = ReadRow> {
        self.rows.into_iter().map(|row| {
            row.key().map_or_else(
                |error| {
                    let lookup_ids = ["key_prefix", "previous_key_prefix"]
                        .map(|column| row.text(column).map(str::to_owned));
                    let lookup_ids = lookup_ids.into_iter().flatten();
                    ReadRow::unreadable(row.id(), lookup_ids, error)
                },
                ReadRow::new,
            )
        })
    }

    fn of(rows: Vec<Row>) -> Result<Self, StoreError> {
        let as_of = |row: &Row| row.try_get::<_, Option<SystemTime>>(1).ok().flatten();
        // Without a time, nothing was read.
        let as_of = rows.iter().find_map(as_of);
        let as_of = as_of.ok_or_else(|| StoreError::rejected("a look-up returned no row"))?;
        let latest = rows.first().and_then(|row| row.try_get::<_, i64>(3).ok());
        Ok(Self {
            as_of,
            latest: Revision(latest.and_then(|latest| u64::try_from(latest).ok()).unwrap_or(0)),
            rows: rows.into_iter().filter_map(FoundRow::new).collect(),
        })
    }
}
