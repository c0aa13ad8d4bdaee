//! The migrations of the other service work in an adopted database as before, in sessions that are open before and
//! after them, and changes arrive all the same.

use std::time::Duration;

use tokio_postgres::Client;
use tower_api_key::{Authenticator, Denial, backend::MigrateError, denial::InvalidKey};

use crate::support::{
    self,
    database::{
        Database, Key, caches, connect, database, database_with, denial_of, is_denied, run,
        store_at,
    },
    feed::{eventually, in_sync},
    servers::Postgres,
};

/// As an ORM makes them.
const ORM_TABLES: &str = "
    CREATE TYPE userrole AS ENUM ('ADMIN', 'user');
    CREATE TABLE users (
        id SERIAL NOT NULL PRIMARY KEY, email VARCHAR(255) NOT NULL UNIQUE, role userrole NOT NULL DEFAULT 'user',
        is_active BOOLEAN NOT NULL DEFAULT true, phone VARCHAR(20),
        created_at TIMESTAMP WITHOUT TIME ZONE NOT NULL DEFAULT timezone('utc', now())
    );
    CREATE TABLE api_keys (
        id SERIAL NOT NULL PRIMARY KEY, user_id INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
        name VARCHAR(100) NOT NULL, key_prefix VARCHAR(12) NOT NULL, key_hash VARCHAR(255) NOT NULL UNIQUE,
        is_active BOOLEAN NOT NULL DEFAULT true, permissions JSON, scopes JSON, rate_limit_per_minute INTEGER,
        expires_at TIMESTAMP WITHOUT TIME ZONE, metadata JSON, team VARCHAR(10),
        total_requests INTEGER NOT NULL DEFAULT 0
    );
    CREATE INDEX ix_api_keys_key_prefix ON api_keys (key_prefix);";

async fn adopted() -> Database {
    let server = Postgres::start();
    run(&server.client().await, ORM_TABLES).await;
    database_with(server).await
}

/// The statements of a session that was opened before a migration, in all the ways that write rows.
async fn statements(session: &Client, n: usize) -> Vec<String> {
    let all = [
        format!("INSERT INTO users (email) VALUES ('orm{n}@example.com')"),
        format!(
            "INSERT INTO api_keys (user_id, name, key_prefix, key_hash)
            SELECT id, 'orm', 'orm{n}', 'hash{n}' FROM users WHERE email = 'orm{n}@example.com'"
        ),
        format!(
            "UPDATE api_keys SET name = name || 'x', total_requests = 1 WHERE key_hash = 'hash{n}'"
        ),
        format!("UPDATE api_keys SET total_requests = 2 WHERE key_hash = 'hash{n}'"),
        format!("UPDATE users SET is_active = NOT is_active WHERE email = 'orm{n}@example.com'"),
        format!("UPDATE users SET created_at = created_at WHERE email = 'orm{n}@example.com'"),
        format!("DELETE FROM api_keys WHERE key_hash = 'hash{n}'"),
        format!("DELETE FROM users WHERE email = 'orm{n}@example.com'"),
    ];
    let mut failed = Vec::new();
    for statement in all {
        if let Err(error) = session.batch_execute(&statement).await {
            failed.push(format!("{statement}: {error:?}"));
        }
    }
    failed
}

/// Runs each migration, and after each the statements of the sessions that were open before, and a revoke.
async fn go_on(db: &Database, migrations: &[&str]) {
    let url = db.server.url();
    let sessions = [connect(&url).await, connect(&url).await];
    let node = Authenticator::new(store_at(&url, Duration::from_millis(100)));
    for (n, migration) in migrations.iter().enumerate() {
        for session in &sessions {
            assert_eq!(statements(session, n).await, [""; 0], "before {migration}");
        }
        let key = db.key().await;
        let outcome = db.admin.batch_execute(migration).await;
        assert!(outcome.is_ok(), "{migration}: {outcome:?}");
        let new = connect(&url).await;
        for session in sessions.iter().chain([&new]) {
            assert_eq!(statements(session, n).await, [""; 0], "after {migration}");
        }
        revoked_by(&sessions[0], &node, &key, migration).await;
    }
}

/// A revoke by the other service's session reaches the node, and its update of usage is no change.
async fn revoked_by(session: &Client, node: &Authenticator, key: &Key, migration: &str) {
    let answer = node.authenticate(&key.secret).await;
    assert!(answer.is_ok(), "{migration}: {answer:?}");
    eventually("a sync", async || node.health().last_sync.is_some()).await;
    in_sync(node).await;
    node.authenticate(&key.secret).await.unwrap();
    let revision = format!("SELECT api_key_revision FROM api_keys WHERE id = {}", key.id);
    let before = support::database::number(session, &revision).await;
    run(session, &format!("UPDATE api_keys SET total_requests = 5 WHERE id = {}", key.id)).await;
    assert_eq!(support::database::number(session, &revision).await, before, "{migration}");
    run(session, &key.revoke()).await;
    is_denied(node, key, InvalidKey::Revoked).await;
    assert_eq!(node.health().feed.fault, None, "{migration}");
}

#[tokio::test(flavor = "multi_thread")]
async fn types_of_columns_can_be_altered_while_sessions_are_open() {
    go_on(
        &adopted().await,
        &[
            "ALTER TABLE api_keys ALTER COLUMN key_prefix TYPE VARCHAR(32)",
            "ALTER TABLE api_keys ALTER COLUMN key_prefix TYPE TEXT",
            "ALTER TABLE users ALTER COLUMN id TYPE BIGINT",
            "ALTER TABLE api_keys ALTER COLUMN user_id TYPE BIGINT, ALTER COLUMN id TYPE BIGINT",
            "ALTER TABLE api_keys ALTER COLUMN expires_at TYPE TIMESTAMPTZ USING expires_at AT TIME ZONE 'UTC'",
            "ALTER TABLE api_keys ALTER COLUMN metadata TYPE JSONB, ALTER COLUMN scopes TYPE JSONB",
            "ALTER TABLE users ALTER COLUMN role TYPE VARCHAR(20) USING role::text,
                ALTER COLUMN role SET DEFAULT 'user'",
            "ALTER TABLE users ALTER COLUMN email TYPE TEXT",
        ],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn columns_of_the_other_service_can_be_dropped_renamed_and_generated() {
    go_on(
        &adopted().await,
        &[
            "ALTER TABLE api_keys DROP COLUMN team",
            "ALTER TABLE users RENAME COLUMN phone TO mobile",
            "ALTER TABLE users DROP COLUMN mobile CASCADE",
            "ALTER TABLE users ADD COLUMN domain TEXT GENERATED ALWAYS AS (split_part(email, '@', 2)) STORED",
            "ALTER TABLE api_keys ADD COLUMN label TEXT GENERATED ALWAYS AS (name || ' ' || key_prefix) STORED",
            "ALTER TABLE api_keys ADD COLUMN place POINT DEFAULT '(1,2)', ADD COLUMN note JSON DEFAULT '{}'",
            "CREATE INDEX CONCURRENTLY ix_names ON api_keys (name)",
            "ALTER TABLE api_keys ADD CONSTRAINT has_name CHECK (name <> '')",
            "ALTER TABLE users DROP COLUMN domain, ADD COLUMN domain VARCHAR(9)",
        ],
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_script_of_an_orm_works_as_a_whole() {
    let script = "BEGIN;
        CREATE TABLE IF NOT EXISTS alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY);
        ALTER TABLE api_keys ADD COLUMN environment VARCHAR(10) DEFAULT 'live' NOT NULL;
        ALTER TABLE api_keys ALTER COLUMN key_prefix TYPE VARCHAR(32);
        ALTER TABLE api_keys ALTER COLUMN metadata TYPE JSONB USING metadata::jsonb;
        UPDATE api_keys SET environment = 'test' WHERE name LIKE 'test%';
        ALTER TABLE api_keys DROP COLUMN team;
        ALTER TABLE users ALTER COLUMN phone TYPE TEXT;
        UPDATE users SET phone = coalesce(phone, '');
        ALTER TABLE users ALTER COLUMN phone SET NOT NULL, ALTER COLUMN phone SET DEFAULT '';
        CREATE UNIQUE INDEX uq_names ON api_keys (user_id, name);
        INSERT INTO alembic_version VALUES ('b7d3');
        COMMIT";
    go_on(&adopted().await, &[script]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn json_that_jsonb_cannot_hold_is_written_as_before() {
    let db = adopted().await;
    let orm = connect(&db.server.url()).await;
    let key = db.key().await;
    let node =
        caches(Authenticator::new(store_at(&db.server.url(), Duration::from_millis(100))), &key)
            .await;
    for metadata in [r#"{"a":"\u0000"}"#, r#"{"a":1e200000}"#, r#"{"a":"\ud800"}"#] {
        let of_key = format!("WHERE id = {}", key.id);
        run(&orm, &format!("UPDATE api_keys SET is_active = TRUE, metadata = NULL {of_key}")).await;
        eventually("the key", async || node.authenticate(&key.secret).await.is_ok()).await;
        for statement in [
            format!("UPDATE api_keys SET metadata = '{metadata}' {of_key}"),
            format!("UPDATE api_keys SET total_requests = 9 {of_key}"),
            format!(
                "INSERT INTO api_keys (user_id, name, key_prefix, key_hash, metadata)
                VALUES ({}, 'x', 'other', random(), '{metadata}')",
                key.owner
            ),
            "UPDATE api_keys SET name = 'y' WHERE name = 'x'".to_owned(),
            "DELETE FROM api_keys WHERE name = 'y'".to_owned(),
            format!("UPDATE api_keys SET metadata = '{metadata}', is_active = FALSE {of_key}"),
        ] {
            run(&orm, &statement).await;
        }
        eventually("the revoke", async || node.authenticate(&key.secret).await.is_err()).await;
    }
}

#[tokio::test]
async fn a_renamed_column_is_not_made_anew_with_a_default_that_revives_revoked_keys() {
    let db = database().await;
    let key = db.key().await;
    db.run(&key.revoke()).await;
    for table in ["api_keys", "users"] {
        db.run(&format!("ALTER TABLE {table} RENAME COLUMN is_active TO enabled")).await;
        let error = db.store.migrate().await.unwrap_err();
        assert!(error.to_string().contains(&format!("{table}.is_active is missing")), "{error}");
        let node = Authenticator::new(db.store.clone());
        let denial = node.authenticate(&key.secret).await.unwrap_err();
        assert!(matches!(denial, Denial::Unavailable(_)), "{denial:?}");
        db.run(&format!("ALTER TABLE {table} RENAME COLUMN enabled TO is_active")).await;
        db.store.migrate().await.unwrap();
        assert_eq!(denial_of(&node, &key).await, Some(InvalidKey::Revoked));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_column_that_decisions_depend_on_stops_no_statement_of_open_sessions() {
    let db = database().await;
    let session = connect(&db.server.url()).await;
    let key = db.key().await;
    for column in ["metadata", "allowed_ips", "rate_limit_per_day", "expires_at", "scopes"] {
        run(
            &session,
            "UPDATE api_keys SET name = name || 'x'; UPDATE users SET role = role || 'x'",
        )
        .await;
        db.run(&format!("ALTER TABLE api_keys DROP COLUMN {column}")).await;
        run(&session, "UPDATE api_keys SET name = name || 'x', total_requests = 1").await;
        run(&session, "INSERT INTO users (email) VALUES (random())").await;
        run(&session, "UPDATE users SET role = 'user'").await;
    }
    // What restricts keys is not made up.
    let error = db.store.migrate().await.unwrap_err();
    let MigrateError::NotAdoptable(faults) = &error else { panic!("{error:?}") };
    let mut missing: Vec<_> = faults.iter().map(|fault| fault.column.as_str()).collect();
    missing.sort_unstable();
    assert_eq!(missing, ["allowed_ips", "expires_at", "rate_limit_per_day"]);
    db.run(
        "ALTER TABLE api_keys ADD COLUMN allowed_ips JSONB, ADD COLUMN expires_at TIMESTAMPTZ,
            ADD COLUMN rate_limit_per_day BIGINT",
    )
    .await;
    db.store.migrate().await.unwrap();
    let node =
        caches(Authenticator::new(store_at(&db.server.url(), Duration::from_millis(100))), &key)
            .await;
    run(&session, &key.revoke()).await;
    is_denied(&node, &key, InvalidKey::Revoked).await;
    assert!(denial_of(&node, &key).await.is_some());
}
