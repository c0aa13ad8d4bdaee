//! SQL of a [`KeyFilter`].

use chrono::{DateTime, Utc};

use super::{
    row::Row,
    statement::{Bind, KeyRow},
};
use crate::{
    record::{KeyId, UserId},
    store::KeyFilter,
};

/// SQL that differs between the databases.
pub(in crate::backend) struct FilterDialect {
    /// Returns the bound time as a value of the type of a column of `api_keys`.
    pub(in crate::backend) time: fn(column: &str, placeholder: usize) -> String,
    /// Returns a condition that is wider than that the column is before the bound time, if the planner can estimate only
    /// this one.
    pub(in crate::backend) estimated: fn(column: &str, placeholder: usize) -> Option<String>,
    /// Returns a column of `api_keys` as text.
    pub(in crate::backend) text: fn(column: &str) -> String,
    /// Returns the position of a bound text in a text, or 0.
    pub(in crate::backend) position: fn(text: &str, placeholder: usize) -> String,
    /// Returns the condition that a lookup id is at least a bound text, and less than a text after all that start with it.
    pub(in crate::backend) range: fn(from: usize, to: usize) -> String,
}

impl KeyFilter {
    /// Adds the conditions on the row `k` to `conditions`, and their values to `binds`. A condition on text is wider than
    /// the filter's: a decoded record is checked again with [`KeyFilter::selects`]. Returns `None` if no row can match,
    /// because an id is not an integer.
    pub(in crate::backend) fn sql(
        &self,
        dialect: &FilterDialect,
        conditions: &mut Vec<String>,
        binds: &mut Vec<Bind>,
    ) -> Option<()> {
        let mut bind = |value: Bind| {
            binds.push(value);
            binds.len()
        };
        if let Some(owner) = &self.owner {
            conditions
                .push(format!("k.user_id = ${}", bind(Bind::Integer(UserId::as_i64(owner)?))));
        }
        if let Some(key) = &self.created_by_key {
            let at = bind(Bind::Integer(KeyId::as_i64(key)?));
            conditions.push(format!("k.created_by_key = ${at}"));
        }
        match self.is_active {
            Some(true) => conditions.push("k.is_active".to_owned()),
            Some(false) => conditions.push("NOT coalesce(k.is_active, FALSE)".to_owned()),
            None => {}
        }
        let mut before = |column: &str, time: DateTime<Utc>| {
            let at = bind(Bind::Text(time.format("%Y-%m-%d %H:%M:%S%.6f").to_string()));
            let exact = format!("k.{column} < {}", (dialect.time)(column, at));
            match (dialect.estimated)(column, at) {
                Some(estimated) => format!("{exact} AND {estimated}"),
                None => exact,
            }
        };
        if let Some(time) = self.expires_before {
            conditions.push(before("expires_at", time));
        }
        if let Some(time) = self.created_before {
            conditions.push(before("created_at", time));
        }
        if let Some(time) = self.unused_since {
            conditions
                .push(format!("(k.last_used_at IS NULL OR {})", before("last_used_at", time)));
        }
        if let Some(prefix) = &self.prefix {
            let at = bind(Bind::Text(prefix.clone()));
            conditions.push(format!("{} = 1", (dialect.position)("k.key_prefix", at)));
            // A range, which an index serves.
            if let Some(end) = end_of_range(prefix) {
                let end = bind(Bind::Text(end));
                conditions.push((dialect.range)(at, end));
            }
        }
        if let Some(text) = &self.contains {
            let at = bind(Bind::Text(text.to_ascii_lowercase()));
            let found = ["name", "description"].map(|column| {
                let text = format!("lower({})", (dialect.text)(column));
                format!("{} > 0", (dialect.position)(&text, at))
            });
            conditions.push(format!("({})", found.join(" OR ")));
        }
        if let Some(scope) = self.scope.as_ref().filter(|scope| is_plain(scope)) {
            let at = bind(Bind::Text(scope.clone()));
            conditions.push(format!("{} > 0", (dialect.position)(&(dialect.text)("scopes"), at)));
        }
        Some(())
    }

    /// Returns whether the filter selects the key in a row that its SQL selects. Of a row that can't be decoded, only the
    /// columns that the filter compares are. If one of them can't be decoded either, the SQL decides: such a key is denied
    /// in any case.
    pub(in crate::backend) fn selects_row(&self, row: &KeyRow) -> bool {
        if let Ok(key) = row.key() {
            return self.selects(&key.record);
        }
        match row
            .lossy_columns()
            .map(|columns| Row::from_json(columns).decode_some(&self.columns()))
        {
            Some(Ok(record)) => self.selects(&record),
            _ => self.scope.as_ref().is_none_or(|scope| is_plain(scope)),
        }
    }

    /// Returns the columns that the filter compares.
    fn columns(&self) -> Vec<&'static str> {
        let columns = [
            ("user_id", self.owner.is_some()),
            ("is_active", self.is_active.is_some()),
            ("expires_at", self.expires_before.is_some()),
            ("last_used_at", self.unused_since.is_some()),
            ("created_at", self.created_before.is_some()),
            ("name", self.contains.is_some()),
            ("description", self.contains.is_some()),
            ("scopes", self.scope.is_some()),
            ("created_by_key", self.created_by_key.is_some()),
            ("key_prefix", self.prefix.is_some()),
        ];
        columns.into_iter().filter(|(_, is_compared)| *is_compared).map(|(name, _)| name).collect()
    }
}

/// Returns whether a scope is written in JSON as it is. Others may be escaped, and have no condition in SQL.
fn is_plain(scope: &str) -> bool {
    scope.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\' | b'/'))
}

/// Returns a text that is greater than every text with this prefix, in the order of bytes. Only ASCII characters change,
/// so that it holds in each encoding of a database. `None` if there is no such text.
fn end_of_range(prefix: &str) -> Option<String> {
    let is_last = |c: char| c >= '\u{7f}';
    let mut end = prefix.trim_end_matches(is_last).to_owned();
    let last = u8::try_from(end.pop()?).ok()?;
    end.push(char::from(last + 1));
    Some(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_range_is_after_every_text_with_the_prefix() {
        for (prefix, end) in
            [("abc", Some("abd")), ("ab~", Some("ab\u{7f}")), ("a\u{7f}é", Some("b")), ("é", None)]
        {
            assert_eq!(end_of_range(prefix).as_deref(), end);
            let last = format!("{prefix}\u{10ffff}");
            assert!(end.is_none_or(|end| *last < *end && *prefix < *end));
        }
    }
}
