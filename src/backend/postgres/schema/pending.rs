//! What a migration would do, without doing it.

use diesel::{Connection, connection::SimpleConnection};

use super::{BlockingConnection, LOCK, SET_SEARCH_PATH, TRIGGERS, VERSION, missing, tag};
use crate::backend::{
    postgres::adopt,
    sql::{fault::Failure, health::SchemaVersion, migrate::MigrateError},
};

/// The text of each migration, in their order.
const UP: [(&str, &str); 5] = [
    (
        "2026-11-22-000001_users_and_keys",
        include_str!("../../../../schema/postgres/2026-11-22-000001_users_and_keys/up.sql"),
    ),
    (
        "2026-11-22-000002_revisions",
        include_str!("../../../../schema/postgres/2026-11-22-000002_revisions/up.sql"),
    ),
    (
        "2026-11-23-000003_usage",
        include_str!("../../../../schema/postgres/2026-11-23-000003_usage/up.sql"),
    ),
    (
        "2026-11-23-000004_budgets",
        include_str!("../../../../schema/postgres/2026-11-23-000004_budgets/up.sql"),
    ),
    (
        "2026-11-26-000005_management",
        include_str!("../../../../schema/postgres/2026-11-26-000005_management/up.sql"),
    ),
];

/// Returns what a migration would create.
pub(in crate::backend::postgres) fn pending(
    connection: &mut BlockingConnection,
) -> Result<Vec<String>, MigrateError> {
    let outcome = connection.transaction(|connection| {
        connection.batch_execute("SET TRANSACTION READ ONLY")?;
        connection.batch_execute(SET_SEARCH_PATH)?;
        let faults = adopt::faults(connection)?;
        if !faults.is_empty() {
            return Err(Failure(MigrateError::NotAdoptable(faults)));
        }
        Ok(missing(connection)?)
    });
    outcome.map_err(|Failure(error)| error)
}

/// Returns the statements of a migration as one script.
pub(in crate::backend::postgres) fn script() -> String {
    let mut script = format!("BEGIN;\nSELECT pg_advisory_xact_lock({LOCK});\n{SET_SEARCH_PATH};\n");
    for (name, sql) in UP {
        script += &format!("\n-- {name}\n{}\n", sql.trim_end());
    }
    script +=
        &format!("\n-- Functions and triggers\n{}\n\n{};\nCOMMIT;\n", TRIGGERS.trim_end(), tag());
    script
}

/// An SQL expression: the version of the schema, -1 without a schema, or NULL if the comment with the version was removed.
pub(in crate::backend::postgres) const STORED_VERSION: &str = r"
    CASE WHEN to_regclass('api_key_changes') IS NULL THEN -1 ELSE (
        SELECT split_part(tag, ' ', 2)::bigint
        FROM (SELECT obj_description(to_regclass('api_key_changes'), 'pg_class') AS tag) AS s
        WHERE tag ~ '^tower-api-key \d+ \w+$') END";

/// Returns what the value of [`STORED_VERSION`] means.
pub(in crate::backend::postgres) fn schema_version(stored: Option<i64>) -> SchemaVersion {
    match stored {
        Some(-1) => SchemaVersion::None,
        Some(stored) => SchemaVersion::of(stored, VERSION),
        // A migration writes the comment again.
        None => SchemaVersion::Current,
    }
}

#[cfg(test)]
mod tests {
    use diesel::{
        migration::{Migration, MigrationSource},
        pg::Pg,
    };

    use super::*;
    use crate::backend::postgres::schema::MIGRATIONS;

    #[test]
    fn the_script_has_every_migration() {
        let migrations: Vec<Box<dyn Migration<Pg>>> = MIGRATIONS.migrations().unwrap();
        let names: Vec<_> = migrations.iter().map(|it| it.name().to_string()).collect();
        assert_eq!(names, UP.map(|(name, _)| name.to_owned()));
    }
}
