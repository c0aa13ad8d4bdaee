//! Connections for migrations, and the check whether existing tables can be adopted.

use std::time::Duration;

use diesel::{
    QueryableByName, RunQueryDsl, sql_query,
    sql_types::{Bool, Text},
};
use diesel_async::{AsyncPgConnection, async_connection_wrapper::AsyncConnectionWrapper};
use tokio::time::timeout;

use super::{connect::Target, schema};
use crate::{
    backend::sql::{
        columns::{ColumnKind as Kind, KEY_COLUMNS},
        migrate::{ColumnFault, MigrateError},
    },
    error::StoreError,
};

/// Statement timeout of a migration, including the wait for other nodes.
pub(super) const STATEMENT_TIMEOUT: Duration = Duration::from_secs(60);

pub(super) type BlockingConnection = AsyncConnectionWrapper<AsyncPgConnection>;

/// Returns whether a table of keys was adopted.
pub(super) async fn migrate(target: &Target, deadline: Duration) -> Result<bool, MigrateError> {
    // The connection is not from the pool: it has another timeout, and is closed with its lock.
    let connection = target.connect(STATEMENT_TIMEOUT, deadline).await.map_err(StoreError::from)?;
    // Migrations are blocking code. On a thread of their own they work on any runtime.
    let migrated = tokio::task::spawn_blocking(move || {
        schema::migrate(&mut BlockingConnection::from(connection))
    });
    // The server ends statements that take longer. This limit is for a server that does not answer at all.
    let limit = STATEMENT_TIMEOUT.saturating_add(deadline);
    let migrated = timeout(limit, migrated).await.map_err(|_| StoreError::timeout(limit))?;
    migrated.map_err(StoreError::unavailable)?
}

/// A column that is read.
pub(super) struct ReadColumn {
    pub(super) table: &'static str,
    pub(super) name: &'static str,
    kind: Kind,
    /// Whether the column has no possible default.
    is_required: bool,
    /// See [`KeyColumn::is_restriction`](crate::backend::sql::columns::KeyColumn).
    is_restriction: bool,
}

const USER_COLUMNS: [(&str, Kind, bool); 6] = [
    ("id", Kind::Integer, true),
    ("email", Kind::Word, true),
    ("role", Kind::Word, false),
    ("is_active", Kind::Flag, false),
    ("created_at", Kind::Time, false),
    ("updated_at", Kind::Time, false),
];

/// Returns the columns of both tables that are read.
pub(super) fn read_columns() -> impl Iterator<Item = ReadColumn> {
    let users = USER_COLUMNS.into_iter().map(|(name, kind, is_required)| {
        let is_restriction = name == "is_active";
        ReadColumn { table: "users", name, kind, is_required, is_restriction }
    });
    users.chain(KEY_COLUMNS.iter().map(|column| ReadColumn {
        table: "api_keys",
        name: column.name,
        kind: column.kind,
        is_required: column.definition.is_none(),
        is_restriction: column.is_restriction,
    }))
}

impl Kind {
    fn accepts(self, column: &Column) -> bool {
        let is_text = column.category == "S";
        let is_integer = matches!(column.base_type.as_str(), "int2" | "int4" | "int8");
        let is_json = matches!(column.base_type.as_str(), "json" | "jsonb");
        match self {
            Self::Integer => is_integer,
            Self::Number => {
                is_integer || matches!(column.base_type.as_str(), "numeric" | "float4" | "float8")
            }
            Self::Flag => column.base_type == "bool",
            Self::PlainText => matches!(column.base_type.as_str(), "text" | "varchar"),
            Self::Word => is_text || column.category == "E",
            Self::List => {
                is_json || is_text || matches!(column.base_type.as_str(), "_text" | "_varchar")
            }
            Self::Json => is_json || is_text,
            Self::Time => matches!(column.base_type.as_str(), "timestamp" | "timestamptz"),
        }
    }

    fn wanted(self) -> &'static str {
        match self {
            Self::Integer => "smallint, integer or bigint",
            Self::Number => "numeric, double precision, real or an integer",
            Self::Flag => "boolean",
            Self::PlainText => "text or varchar",
            Self::Word => "text, varchar or an enum",
            Self::List => "json, jsonb, an array of text, or text",
            Self::Json => "json, jsonb or text",
            Self::Time => "timestamp or timestamptz",
        }
    }
}

#[derive(QueryableByName)]
struct Table {
    #[diesel(sql_type = Text)]
    name: String,
    /// `r` for a table.
    #[diesel(sql_type = Text)]
    kind: String,
    #[diesel(sql_type = Bool)]
    has_children: bool,
    #[diesel(sql_type = Bool)]
    has_unique_id: bool,
}

#[derive(QueryableByName)]
struct Column {
    #[diesel(sql_type = Text)]
    in_table: String,
    #[diesel(sql_type = Text)]
    name: String,
    #[diesel(sql_type = Text)]
    base_type: String,
    #[diesel(sql_type = Text)]
    category: String,
    #[diesel(sql_type = Text)]
    shown_type: String,
}

const TABLES: &str = "
    SELECT c.relname::text AS name, c.relkind::text AS kind,
        EXISTS (SELECT FROM pg_inherits WHERE inhparent = c.oid) AS has_children, EXISTS (
        SELECT FROM pg_index i
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
        WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indnkeyatts = 1 AND a.attname = 'id'
    ) AS has_unique_id
    FROM pg_class c WHERE c.oid IN (to_regclass('users'), to_regclass('api_keys'))";

const TABLE_COLUMNS: &str = "
    SELECT c.relname::text AS in_table, a.attname::text AS name, t.typname::text AS base_type,
        t.typcategory::text AS category, format_type(a.atttypid, a.atttypmod) AS shown_type
    FROM pg_class c
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    JOIN pg_type d ON d.oid = a.atttypid
    -- A domain counts as its base type.
    JOIN pg_type t ON t.oid = CASE WHEN d.typtype = 'd' THEN d.typbasetype ELSE d.oid END
    WHERE c.oid IN (to_regclass('users'), to_regclass('api_keys'))";

/// Fault of a partitioned table. `TRUNCATE` and `DETACH` of a partition fire no trigger of the whole table.
const PARTITIONED: &str = "is partitioned or has child tables: a part can be truncated or detached without a trigger, \
    and its keys would remain valid in caches. Keep keys and users in plain tables";

/// Returns all reasons why the existing tables can't be adopted.
pub(super) fn faults(connection: &mut BlockingConnection) -> diesel::QueryResult<Vec<ColumnFault>> {
    let tables = sql_query(TABLES).load::<Table>(connection)?;
    let columns = sql_query(TABLE_COLUMNS).load::<Column>(connection)?;
    let mut faults = Vec::new();
    let has = |name: &str| tables.iter().any(|table| table.name == name);
    if has("api_keys") && !has("users") {
        faults.push(ColumnFault::new("users", "", "is missing, although a table api_keys exists"));
    }
    let has_column = |table: &str, name: &str| {
        columns.iter().any(|column| column.in_table == table && column.name == name)
    };
    // The table was adopted with the column: by any version, or by one that already had it.
    let had = |table: &str, name: &str| match name {
        "not_before" | "previous_expires_at" => has_column(table, "previous_key_hash"),
        _ => has_column(table, "api_key_revision"),
    };
    for table in &tables {
        if table.kind == "p" || table.has_children {
            faults.push(ColumnFault::new(&table.name, "", PARTITIONED));
        } else if table.kind != "r" {
            faults.push(ColumnFault::new(&table.name, "", "is not a table"));
        } else if !table.has_unique_id {
            faults.push(ColumnFault::new(
                &table.name,
                "id",
                "is not unique: there is no primary key or unique index on this column alone",
            ));
        }
    }
    for ReadColumn { table, name, kind, is_required, is_restriction } in read_columns() {
        let column = columns.iter().find(|column| column.in_table == table && column.name == name);
        match column {
            Some(column) if !kind.accepts(column) => {
                let reason = format!("is {}, but must be {}", column.shown_type, kind.wanted());
                faults.push(ColumnFault::new(table, name, reason));
            }
            None if is_restriction && had(table, name) => {
                faults.push(ColumnFault::new(
                    table,
                    name,
                    "is missing, although the table was adopted with it: add it with its previous values",
                ));
            }
            None if is_required && has(table) => {
                faults.push(ColumnFault::new(
                    table,
                    name,
                    "is missing, and has no possible default",
                ));
            }
            _ => {}
        }
    }
    Ok(faults)
}
