//! SQL with bound values, for both SQL stores.

use std::borrow::Cow;

use diesel::{
    QueryResult, QueryableByName, RunQueryDsl,
    backend::Backend,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    serialize::ToSql,
    sql_types::{BigInt, Binary, Nullable, Text, Untyped},
};

use super::{filter::FilterDialect, row};
use crate::{
    error::StoreError,
    record::{KeyId, KeyRecord},
    store::{HashUpgrade, ListKeys, StoredKey},
};
#[cfg(feature = "postgres")]
use crate::{record::Revision, store::Change};

/// SQL text with the placeholders `$1` and so on for the bound values.
///
/// diesel's `sql_query` prepares a statement each time. This statement is cached by the connection, so that a
/// look-up takes one round trip instead of two.
#[derive(Debug)]
pub(in crate::backend) struct Statement {
    sql: Cow<'static, str>,
    binds: Vec<Bind>,
    /// Whether the connection caches it.
    is_cached: bool,
}

impl HashUpgrade {
    /// Returns the statement that writes the fast hash, if the slow hash is still the one that was checked.
    pub(in crate::backend) fn statement(&self) -> Statement {
        let update = "UPDATE api_keys SET
                fast_hash = CASE WHEN key_hash = $2 THEN $1 ELSE fast_hash END,
                fast_hash_of = CASE WHEN key_hash = $2 THEN $2 ELSE fast_hash_of END,
                previous_fast_hash = CASE WHEN previous_key_hash = $2 THEN $1 ELSE previous_fast_hash END,
                previous_fast_hash_of = CASE WHEN previous_key_hash = $2 THEN $2 ELSE previous_fast_hash_of END
            WHERE id = $3 AND (key_hash = $2 OR previous_key_hash = $2) RETURNING CAST(id AS TEXT) AS row";
        let binds = [
            Bind::Text(self.fast.expose_hash()),
            Bind::Text(self.checked.expose_hash()),
            Bind::Integer(self.key.as_i64().unwrap_or_default()),
        ];
        Statement::new(update, binds)
    }
}

impl ListKeys {
    /// Returns the condition on the row `k`, its order, and the limit plus one row, with the bound values. `None` if an id
    /// is not an integer, so that no row can have it.
    pub(in crate::backend) fn sql(&self, dialect: &FilterDialect) -> Option<(String, Vec<Bind>)> {
        let after = self.after.as_ref().map_or(Some(i64::MIN), KeyId::as_i64)?;
        let mut binds = vec![Bind::Integer(after), Bind::Integer(i64::from(self.limit) + 1)];
        let mut conditions = vec!["k.id > $1".to_owned()];
        self.filter.sql(dialect, &mut conditions, &mut binds)?;
        Some((format!("{} ORDER BY k.id LIMIT $2", conditions.join(" AND ")), binds))
    }
}

/// A bound value.
#[derive(Debug, Clone)]
pub(in crate::backend) enum Bind {
    Text(String),
    Integer(i64),
    /// NULL in place of a text.
    #[cfg(feature = "sqlite")]
    Null,
}

impl Bind {
    /// Creates an integer, at most the largest one of SQL.
    pub(in crate::backend) fn number(number: u64) -> Self {
        Self::Integer(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

/// The row of most statements: a key's row in JSON, or an id.
#[derive(Debug, QueryableByName)]
pub(in crate::backend) struct TextRow {
    #[diesel(sql_type = Text)]
    pub(in crate::backend) row: String,
}

/// A key's row in JSON, and its id, which is present even if the row can't be decoded. The row is bytes, because diesel
/// fails the whole result if a text is not UTF-8.
#[derive(Debug, QueryableByName)]
pub(in crate::backend) struct KeyRow {
    #[diesel(sql_type = BigInt)]
    id: i64,
    #[diesel(sql_type = Binary)]
    row: Vec<u8>,
}

impl KeyRow {
    pub(in crate::backend) fn id(&self) -> i64 {
        self.id
    }

    /// Returns the columns; `None` if the row is not JSON that can be decoded.
    pub(in crate::backend) fn columns(&self) -> Option<serde_json::Map<String, serde_json::Value>> {
        serde_json::from_slice(&self.row).ok()
    }

    /// Returns the columns, with replacement characters for what is not UTF-8; `None` if the row is not JSON.
    pub(in crate::backend) fn lossy_columns(
        &self,
    ) -> Option<serde_json::Map<String, serde_json::Value>> {
        serde_json::from_str(&String::from_utf8_lossy(&self.row)).ok()
    }

    pub(in crate::backend) fn record(&self) -> (KeyId, Result<KeyRecord, StoreError>) {
        (self.id.into(), self.key().map(|key| key.record))
    }

    pub(in crate::backend) fn key(&self) -> Result<StoredKey, StoreError> {
        let not_utf8 = |_| StoreError::bad_row(format!("api_keys row {} is not UTF-8", self.id));
        row::decode(str::from_utf8(&self.row).map_err(not_utf8)?)
    }
}

impl TextRow {
    /// Returns the id that was written, if the row is one.
    #[cfg(feature = "sqlite")]
    pub(in crate::backend) fn id(&self) -> Option<i64> {
        self.row.parse().ok()
    }

    /// Returns the change, if the row is one: the lookup id or the user, and the revision.
    #[cfg(feature = "postgres")]
    pub(in crate::backend) fn change(&self) -> Result<Change, StoreError> {
        let prefix = |(prefix, revision)| Change::Prefix(prefix, Revision(revision));
        let owner = |(user, revision): (i64, u64)| Change::Owner(user.into(), Revision(revision));
        serde_json::from_str(&self.row)
            .map(prefix)
            .or_else(|_| serde_json::from_str(&self.row).map(owner))
            .map_err(|_| StoreError::bad_row("a row was written, but has no prefix and revision"))
    }
}

impl Statement {
    pub(in crate::backend) fn new(
        sql: impl Into<Cow<'static, str>>,
        binds: impl IntoIterator<Item = Bind>,
    ) -> Self {
        Self { sql: sql.into(), binds: binds.into_iter().collect(), is_cached: true }
    }

    /// Returns the statement without a cached plan: the database plans it for the bound values each time.
    #[cfg(feature = "postgres")]
    pub(in crate::backend) fn planned_for_its_values(self) -> Self {
        Self { is_cached: false, ..self }
    }

    /// Returns the statement that explains this one.
    #[cfg(all(test, feature = "sqlite"))]
    pub(in crate::backend) fn explained(&self) -> Self {
        Self::new(format!("EXPLAIN QUERY PLAN {}", self.sql), self.binds.clone())
    }

    /// Returns the value of the placeholder at the start of `text`, and the text after it. `None` if there is no
    /// placeholder.
    fn placeholder<'a>(&self, text: &'a str) -> Option<(Option<&Bind>, &'a str)> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, rest) = text.split_at(digits);
        let at = number.parse::<usize>().ok()?.checked_sub(1)?;
        Some((self.binds.get(at), rest))
    }
}

impl<DB> QueryFragment<DB> for Statement
where
    DB: Backend,
    str: ToSql<Text, DB>,
    i64: ToSql<BigInt, DB>,
    Option<String>: ToSql<Nullable<Text>, DB>,
{
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        if !self.is_cached {
            out.unsafe_to_cache_prepared();
        }
        let mut pieces = self.sql.split('$');
        out.push_sql(pieces.next().unwrap_or_default());
        for piece in pieces {
            let Some((bind, rest)) = self.placeholder(piece) else {
                // A `$` without a number belongs to a JSON path.
                out.push_sql("$");
                out.push_sql(piece);
                continue;
            };
            match bind {
                Some(Bind::Text(value)) => out.push_bind_param::<Text, str>(value)?,
                Some(Bind::Integer(value)) => out.push_bind_param::<BigInt, i64>(value)?,
                #[cfg(feature = "sqlite")]
                Some(Bind::Null) => out.push_bind_param::<Nullable<Text>, Option<String>>(&None)?,
                None => {
                    let missing = "a statement has a placeholder without a value";
                    return Err(diesel::result::Error::QueryBuilderError(missing.into()));
                }
            }
            out.push_sql(rest);
        }
        Ok(())
    }
}

impl QueryId for Statement {
    type QueryId = ();

    // The prepared statement is identified by the text.
    const HAS_STATIC_QUERY_ID: bool = false;
}

impl Query for Statement {
    type SqlType = Untyped;
}

impl<Conn> RunQueryDsl<Conn> for &Statement {}
