//! Statements that read keys.

use std::{sync::LazyLock, time::SystemTime};

use chrono::{DateTime, Utc};

use crate::{
    backend::sql::{
        columns::{ColumnKind, KEY_COLUMNS, KeyColumn},
        filter::FilterDialect,
        statement::{Bind, Statement},
    },
    store::{KeyFilter, ListKeys, Lookup, MAX_CANDIDATES},
};

/// Returns the statement of a look-up. It reads the keys under the lookup id, and the last change under it, also of a
/// deleted key, from one snapshot.
///
/// A previous secret is not read from a day after its grace period on, so that it does not count towards the maximum of
/// candidates. A second more is read, because SQLite compares times in milliseconds.
pub(super) fn look_up(lookup: &Lookup) -> Statement {
    under_id(lookup.id(), lookup.asked_at().wall())
}

fn under_id(id: &str, now: SystemTime) -> Statement {
    let binds = [Bind::Text(id.to_owned()), Bind::Text(time_text(now.into()))];
    let limit = MAX_CANDIDATES + 1;
    let under_either = format!(
        "k.id IN (
            SELECT id FROM (SELECT id FROM api_keys WHERE key_prefix = $1 ORDER BY id LIMIT {limit})
            UNION ALL SELECT id FROM (
                SELECT id FROM api_keys WHERE previous_key_prefix = $1
                    AND coalesce(julianday(previous_expires_at) > julianday($2, '-1 day', '-1 seconds'), TRUE)
                ORDER BY id LIMIT {limit}))
        ORDER BY k.id LIMIT {limit}"
    );
    let select = format!(
        "SELECT row FROM ({}) UNION ALL
        SELECT CAST(coalesce(max(revision), 0) AS TEXT) FROM api_key_changes WHERE key_prefix = $1",
        keys_where(&under_either)
    );
    Statement::new(select, binds)
}

/// The condition of the keys under the lookup ids in the JSON array `$1`, current or previous, at most nine of each.
/// Ended secrets are removed by the reader.
pub(super) const UNDER_IDS: &str = "k.id IN (
    SELECT k.id FROM json_each($1) AS a JOIN api_keys k ON k.id IN (
        SELECT id FROM (SELECT id FROM api_keys WHERE key_prefix = a.value ORDER BY id LIMIT 9)
        UNION ALL SELECT id FROM (SELECT id FROM api_keys WHERE previous_key_prefix = a.value ORDER BY id LIMIT 9)))";

/// The filter's SQL. Times are texts, which other writers may have stored with another separator or with a time zone:
/// two days more are selected, and the decoded records are checked again.
const DIALECT: FilterDialect = FilterDialect {
    time: |_, at| format!("coalesce(strftime('%Y-%m-%d', ${at}, '+2 days'), '~')"),
    estimated: |_, _| None,
    text: |column| format!("CAST(k.{column} AS TEXT)"),
    position: |text, at| format!("instr({text}, ${at})"),
    // The collation of an adopted column may order letters in another way: the last character is after all of them.
    range: |from, _| format!("k.key_prefix >= ${from} AND k.key_prefix < ${from} || char(1114111)"),
};

/// Returns the statement that lists keys, and one key more; `None` if no row can match.
pub(super) fn list(page: &ListKeys) -> Option<Statement> {
    let (filter, binds) = page.sql(&DIALECT)?;
    let KeyFilter { owner, created_by_key, prefix, expires_before, .. } = &page.filter;
    let has_index = owner.is_some() || created_by_key.is_some();
    if !has_index && (prefix.is_some() || expires_before.is_some()) {
        // The few keys in the range are sorted. Without the sign, SQLite reads all keys by their ids.
        let filter =
            filter.replace("k.id > ", "+k.id > ").replace("ORDER BY k.id", "ORDER BY +k.id");
        let ids = format!("SELECT k.id FROM api_keys k JOIN {OWNERS} WHERE {filter}");
        return Some(Statement::new(keys(&format!("k.id IN ({ids})")), binds));
    }
    Some(Statement::new(keys(&filter), binds))
}

/// Returns the statement that reads up to 1,000 keys after one that are not revoked and that the filter's SQL selects.
pub(super) fn keys_to_revoke(filter: &KeyFilter, after: Option<i64>) -> Option<Statement> {
    let mut binds = vec![Bind::Integer(after.unwrap_or(i64::MIN))];
    let mut conditions = vec!["k.id > $1 AND coalesce(k.is_active, FALSE) IS NOT FALSE".to_owned()];
    filter.sql(&DIALECT, &mut conditions, &mut binds)?;
    let filter = format!("{} ORDER BY k.id LIMIT 1000", conditions.join(" AND "));
    Some(Statement::new(keys(&filter), binds))
}

/// Returns the statement that reads the keys for which `filter` is true, ordered by id, as
/// [`KeyRow`](crate::backend::sql::statement::KeyRow)s.
pub(super) fn keys(filter: &str) -> String {
    key_rows(&keys_where(filter))
}

/// Returns the same statement, including keys without an owner.
pub(super) fn keys_and_orphans(filter: &str) -> String {
    key_rows(&keys_and_orphans_where(filter))
}

fn key_rows(select: &str) -> String {
    format!("SELECT id, CAST(row AS BLOB) AS row FROM ({select}) ORDER BY id")
}

/// Returns a time as this crate writes it: in UTC, without a time zone, as SQLite's functions and most ORMs write it.
pub(super) fn time_text(time: DateTime<Utc>) -> String {
    time.format("%Y-%m-%d %H:%M:%S%.6f").to_string()
}

/// Returns the statement that reads the keys for which `filter` is true, each joined with its owner (`k` and `u`), as
/// the JSON that `row` decodes. A key of a deleted owner has no owner, even if another user has got the id since.
fn keys_where(filter: &str) -> String {
    format!("{} JOIN {OWNERS} WHERE {filter}", *KEYS)
}

/// Returns the same statement, including keys without an owner.
fn keys_and_orphans_where(filter: &str) -> String {
    format!("{} LEFT JOIN {OWNERS} WHERE {filter}", *KEYS)
}

/// The join with the owner. It excludes a user who got the id after the key was assigned to it.
const OWNERS: &str = "users u ON u.id = k.user_id AND NOT EXISTS (
    SELECT 1 FROM api_key_deleted_users d WHERE d.user_id = k.user_id AND d.revision > k.api_key_owned_since)";

static KEYS: LazyLock<String> = LazyLock::new(|| {
    let columns = KEY_COLUMNS.iter().filter(|column| column.is_read);
    let columns = columns.map(|column| format!("'{}', {}", column.name, read(column)));
    format!(
        "SELECT k.id AS id, json_object({},
            'user_revision', max(u.api_key_revision, coalesce(
                (SELECT max(c.revision) FROM api_key_changes c WHERE c.user_id = u.id), 0)),
            'user_email', {}, 'user_role', {}, 'user_is_active', {}
        ) AS row FROM api_keys k",
        columns.collect::<Vec<_>>().join(", "),
        text("u.email"),
        text("u.role"),
        number("u.is_active"),
    )
});

/// Returns the SQL for the value of a column.
fn read(column: &KeyColumn) -> String {
    let name = format!("k.{}", column.name);
    match (column.name, column.kind) {
        ("user_id", _) => "u.id".to_owned(),
        ("fast_hash", _) => {
            format!("CASE WHEN k.fast_hash_of = k.key_hash THEN {} END", text(&name))
        }
        ("previous_fast_hash", _) => {
            let of = "k.previous_fast_hash_of = k.previous_key_hash";
            format!("CASE WHEN {of} THEN {} END", text(&name))
        }
        (_, ColumnKind::Number) => format!("printf('%.6f', {name})"),
        (_, ColumnKind::Integer | ColumnKind::Flag) => number(&name),
        _ => text(&name),
    }
}

/// Returns the SQL for a text column. SQLite accepts bytes in any column, and interprets some of them as binary JSON.
fn text(column: &str) -> String {
    format!("CAST({column} AS TEXT)")
}

fn number(column: &str) -> String {
    format!("CASE typeof({column}) WHEN 'blob' THEN 'bytes' ELSE {column} END")
}

#[cfg(test)]
mod tests {
    use diesel::{Connection, connection::SimpleConnection};

    use super::*;
    use crate::backend::sqlite::{adopt, audit, run::plan};
    use crate::store::ListAudit;

    /// A database with 20,000 keys of 100 users, and their audit.
    fn database() -> diesel::SqliteConnection {
        let mut connection = diesel::SqliteConnection::establish(":memory:").unwrap();
        adopt::migrate(&mut connection).unwrap();
        let fill = "
            WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n LIMIT 100)
            INSERT INTO users (email) SELECT n || '@b.c' FROM n;
            WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n LIMIT 20000)
            INSERT INTO api_keys (user_id, key_prefix, key_hash, previous_key_prefix, expires_at, created_by_key)
            SELECT 1 + n % 100, 'p' || n, 'h' || n, CASE n % 10 WHEN 0 THEN 'q' || n END,
                CASE n % 3 WHEN 0 THEN '2030-01-01 00:00:00' END, CASE n % 5 WHEN 0 THEN n % 7 END FROM n;";
        connection.batch_execute(fill).unwrap();
        connection
    }

    #[test]
    fn look_ups_and_lists_are_served_by_an_index() {
        let mut connection = database();
        let time = chrono::DateTime::UNIX_EPOCH;
        let list = |filter: KeyFilter| list(&ListKeys::default().filter(filter).after(7)).unwrap();
        let audit = |page: ListAudit| audit::select(&page.before(900)).unwrap();
        let filter = KeyFilter::default;
        for (what, statement, indexes) in [
            (
                "look-up",
                under_id("p1", SystemTime::UNIX_EPOCH),
                &[
                    "api_keys_lookup (key_prefix=?)",
                    "api_keys_previous_lookup (previous_key_prefix=?)",
                    "api_key_changes_prefix (key_prefix=?)",
                ][..],
            ),
            ("all", list(filter()), &["k USING INTEGER PRIMARY KEY (rowid>?)"]),
            ("owner", list(filter().owner(1)), &["api_keys_owner (user_id=? AND rowid>?)"]),
            (
                "creator",
                list(filter().created_by_key(1)),
                &["api_keys_creator (created_by_key=? AND rowid>?)"],
            ),
            (
                "prefix",
                list(filter().prefix("p1")),
                &["api_keys_lookup (key_prefix>? AND key_prefix<?)"],
            ),
            ("expiry", list(filter().expires_before(time)), &["api_keys_expiry (expires_at<?)"]),
            ("revoked", list(filter().revoked()), &["api_keys_revoked"]),
            ("audit", audit(ListAudit::default()), &["INTEGER PRIMARY KEY (rowid<?)"]),
            (
                "audit of a key",
                audit(ListAudit::default().key(1).since(time)),
                &["api_key_audit_key (api_key_id=? AND rowid<?)"],
            ),
            (
                "audit of a user",
                audit(ListAudit::default().user(1).until(time)),
                &["api_key_audit_user (user_id=? AND rowid<?)"],
            ),
            (
                "audit of an actor",
                audit(ListAudit::default().actor("ada")),
                &["api_key_audit_actor (actor=? AND rowid<?)"],
            ),
            (
                "audit of a time",
                audit(ListAudit::default().since(time)),
                &["api_key_audit_at (at>?"],
            ),
        ] {
            let plan = plan(&mut connection, &statement);
            for index in indexes {
                assert!(plan.contains(index), "{what}: {index} in {plan}");
            }
            for line in plan.lines().filter(|line| line.starts_with("SCAN")) {
                let is_of_ids = line.starts_with("SCAN (") || line.contains("CONSTANT ROW");
                assert!(is_of_ids, "{what}: {plan}");
            }
        }
    }
}
