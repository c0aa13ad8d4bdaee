//! The statements that select keys.

use std::sync::LazyLock;

use tokio_postgres::types::Type;

use crate::{
    backend::sql::{
        columns::{ColumnKind, KEY_COLUMNS, KeyColumn},
        filter::FilterDialect,
        row::READ,
    },
    store::MAX_CANDIDATES,
};

/// Selects a key's row, joined with its owner's row, in the form that `row` decodes. PostgreSQL converts every possible
/// type of a column to JSON, and time stamps to ISO 8601.
pub(super) static SELECT_KEY: LazyLock<String> = LazyLock::new(|| {
    let columns: Vec<_> = KEY_COLUMNS.iter().filter(|column| column.is_read).map(read).collect();
    format!(
        "SELECT {},
            greatest(u.api_key_revision, (SELECT max(c.revision) FROM api_key_changes c WHERE c.user_id = u.id))
                AS user_revision,
            u.email AS user_email, u.role AS user_role, u.is_active AS user_is_active",
        columns.join(", ")
    )
});

/// The tables of these columns.
pub(super) const KEY_TABLES: &str = "FROM api_keys k JOIN users u ON u.id = k.user_id";

/// A statement that reads keys. Its first two columns are `row`, the texts that `row` decodes, and `as_of`.
///
/// The versions of the rows are found by an index for each of the two lookup ids of a key; an `OR` leaves it to the
/// statistics, and a `UNION ALL` of whole rows takes longer. A previous secret is not read from two days after its grace
/// period on, so that it does not count towards the maximum of candidates. A time stamp without a time zone is compared
/// in that of the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyRead {
    /// The keys under the lookup id `$1`, current or previous. One row has the as-of alone, because "unknown" has an as-of
    /// too.
    One,
    /// The same for each of the lookup ids in the JSON array `$1`: at least one row for each, whose third column is its
    /// number in the array from 1 on. All rows are of one snapshot. The planner expects the same number of ids whatever the
    /// array contains, so that the plan of the prepared statement suits every array.
    Many,
    /// [`Many`](Self::Many) in the order of the ids of the keys, with the revisions of the last changes in the table of
    /// changes: that of the lookup id in the fourth column, and that of the owner in the row. A row has the same revisions,
    /// unless another row under the lookup id was deleted or moved to another one, or a user was inserted after the keys. The order and the changes cost the
    /// server about 20 µs.
    ManyInFull,
    /// A page of `$2` keys after `$1`, ordered by id.
    Page,
}

impl KeyRead {
    pub(super) const ALL: [Self; 4] = [Self::One, Self::Many, Self::ManyInFull, Self::Page];

    pub(super) fn sql(self) -> &'static str {
        static SQL: LazyLock<[String; 4]> = LazyLock::new(|| KeyRead::ALL.map(KeyRead::format));
        &SQL[self as usize]
    }

    /// Returns the types of the parameters.
    pub(super) fn parameters(self) -> &'static [Type] {
        match self {
            Self::Page => &[Type::INT8, Type::INT8],
            Self::One | Self::Many | Self::ManyInFull => &[Type::TEXT],
        }
    }

    fn format(self) -> String {
        const AS_OF: &str = "statement_timestamp() AS as_of";
        let texts = texts(self != Self::One && self != Self::Many);
        match self {
            Self::One => format!(
                "SELECT NULL::text[] AS row, {AS_OF} UNION ALL
                (SELECT {texts}, NULL {KEY_TABLES} WHERE {} LIMIT {})",
                is_under("$1"),
                MAX_CANDIDATES + 1
            ),
            Self::Many | Self::ManyInFull => format!(
                "SELECT found.row, {AS_OF}, asked.number AS asked, {} AS latest
                FROM json_array_elements_text($1::json) WITH ORDINALITY AS asked (id, number) LEFT JOIN LATERAL (
                    SELECT {texts} AS row {KEY_TABLES} WHERE {} {} LIMIT {}
                ) AS found ON TRUE",
                if self == Self::Many { "0::bigint" } else { LATEST },
                is_under("asked.id"),
                if self == Self::Many { "" } else { "ORDER BY k.id" },
                MAX_CANDIDATES + 1
            ),
            Self::Page => {
                format!("SELECT {texts} AS row, {AS_OF} {KEY_TABLES} WHERE k.id > $1 ORDER BY k.id LIMIT $2")
            }
        }
    }
}

/// The statement of the users in the JSON array `$1`, with the revisions of their last changes.
pub(super) const OWNERS: &str = "SELECT json_build_array(u.id, coalesce(u.email::text, ''), coalesce(u.role::text, 'user'),
        coalesce(u.is_active, FALSE), greatest(u.api_key_revision, (
            SELECT c.revision FROM api_key_changes c WHERE c.user_id = u.id ORDER BY c.revision DESC LIMIT 1)))::text AS row
    FROM users u WHERE u.id = ANY (ARRAY(SELECT o.id::bigint FROM json_array_elements_text($1::json) AS o (id)))";

/// The revision of the last change under a lookup id.
const LATEST: &str = "coalesce((
    SELECT revision FROM api_key_changes WHERE key_prefix = asked.id ORDER BY revision DESC LIMIT 1), 0)";

/// Returns the condition that the key `k` is stored under a lookup id, current or previous.
fn is_under(id: &str) -> String {
    format!(
        "k.ctid = ANY (ARRAY(
            SELECT ctid FROM api_keys WHERE key_prefix = {id}
            UNION ALL SELECT ctid FROM api_keys WHERE previous_key_prefix = {id} AND key_prefix IS DISTINCT FROM {id}
                AND coalesce(previous_expires_at > now() - INTERVAL '2 days', TRUE)))"
    )
}

/// Returns the SQL for the array of the texts that `row` decodes. With `reads_changes`, the owner's revision is the last
/// one in the table of changes, if that is later than the row's.
fn texts(reads_changes: bool) -> String {
    let columns: Vec<_> =
        READ.iter().map(|(name, kind)| read_text(name, *kind, reads_changes)).collect();
    format!("ARRAY[{}]", columns.join(", "))
}

/// Returns the SQL for the text of a column, in the form that `row` decodes.
fn read_text(name: &str, kind: ColumnKind, reads_changes: bool) -> String {
    let value = match name {
        "user_revision" if reads_changes => "greatest(u.api_key_revision, (
                SELECT c.revision FROM api_key_changes c WHERE c.user_id = u.id ORDER BY c.revision DESC LIMIT 1))"
            .to_owned(),
        "user_revision" => "u.api_key_revision".to_owned(),
        "user_email" => "u.email".to_owned(),
        "user_role" => "u.role".to_owned(),
        "user_is_active" => "u.is_active".to_owned(),
        name => value(name),
    };
    match kind {
        ColumnKind::List | ColumnKind::Time => format!("to_json({value})::text"),
        _ => format!("({value})::text"),
    }
}

/// Returns the SQL for a column.
fn read(column: &KeyColumn) -> String {
    let name = column.name;
    match column.kind {
        ColumnKind::Json => format!("k.{name}::text AS {name}"),
        _ => format!("{} AS {name}", value(name)),
    }
}

/// Returns the SQL for the value of a column.
fn value(name: &str) -> String {
    match name {
        "user_id" => "u.id".to_owned(),
        "fast_hash" => "CASE WHEN k.fast_hash_of = k.key_hash THEN k.fast_hash END".to_owned(),
        "previous_fast_hash" => "CASE WHEN k.previous_fast_hash_of = k.previous_key_hash
            THEN k.previous_fast_hash END"
            .to_owned(),
        "total_cost" => "CASE k.total_cost_rest WHEN 0 THEN k.total_cost::text ELSE
            (coalesce(k.total_cost, 0)::numeric + k.total_cost_rest::numeric / 1000000)::text END"
            .to_owned(),
        name => format!("k.{name}"),
    }
}

/// A time is converted to the type of the column, with or without a time zone, by a row of the table: a column of an empty
/// row may be NOT NULL. The subquery is evaluated once, so that an index serves the comparison. The collation makes
/// `lower` change only ASCII letters, and compares bytes.
pub(super) static FILTER: FilterDialect = FilterDialect {
    time: |column, placeholder| {
        format!(
            "(SELECT (jsonb_populate_record(t, jsonb_build_object('{column}', ${placeholder} || 'Z'))).{column}
            FROM api_keys AS t LIMIT 1)"
        )
    },
    // The value of a subquery is unknown to the planner. A column without a time zone is compared in that of the session.
    estimated: |column, placeholder| {
        Some(format!("k.{column} < (${placeholder} || 'Z')::timestamptz + INTERVAL '2 days'"))
    },
    text: |column| format!("k.{column}::text COLLATE \"C\""),
    position: |text, placeholder| format!("strpos({text} COLLATE \"C\", ${placeholder})"),
    // These operators compare bytes, whatever the collation is.
    range: |from, to| format!("k.key_prefix::text ~>=~ ${from} AND k.key_prefix::text ~<~ ${to}"),
};
