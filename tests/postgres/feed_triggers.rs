//! Triggers that are missing, disabled or of another table: the change feed reports it, cached keys are served no
//! longer than `max_staleness`, and `migrate()` restores the triggers.

use std::time::Duration;

use tower_api_key::{
    Authenticator,
    denial::InvalidKey,
    store::{Change, KeyStore},
};

use crate::support::{
    self,
    database::{
        Database, Key, caches, connect, database, denial_of, incomplete, is_denied, run, store_at,
        url_with_path,
    },
    feed::{eventually, in_sync, within},
    log::capture,
};

const POLL: Duration = Duration::from_millis(100);
const MAX_STALENESS: Duration = Duration::from_millis(1500);

fn node(url: &str) -> Authenticator {
    Authenticator::builder(store_at(url, POLL)).max_staleness(MAX_STALENESS).build()
}

/// The statements of an ORM that rebuilds a table: a new one, the rows, and the name of the old one.
fn rebuild(table: &str) -> String {
    format!(
        "BEGIN;
        CREATE TABLE new_{table} (LIKE {table} INCLUDING ALL);
        INSERT INTO new_{table} SELECT * FROM {table};
        SELECT setval(pg_get_serial_sequence('new_{table}', 'id'), max(id)) FROM {table};
        DROP TABLE {table} CASCADE;
        ALTER TABLE new_{table} RENAME TO {table};
        COMMIT"
    )
}

/// Does `damage`, after which changes don't arrive: the node reports it once and revokes within `max_staleness`.
/// After `migrate()`, it is notified again.
async fn is_reported_and_restored(db: &Database, damage: &str) {
    let (log, _guard) = capture();
    let keys = [db.key().await, db.key().await, db.key().await];
    let node = caches(node(&db.server.url()), &keys[0]).await;
    node.authenticate(&keys[1].secret).await.unwrap();
    let recorder = db.listen(POLL);
    recorder.all().await;
    assert_eq!(node.health().feed.fault, None);

    db.run(damage).await;
    db.run(&keys[0].revoke()).await;
    // Or a 503, where a look-up can't read the key either.
    within(MAX_STALENESS + Duration::from_secs(1), "the revoke", async || {
        node.authenticate(&keys[0].secret).await.is_err()
    })
    .await;
    let reason = incomplete(&node).unwrap_or_else(|| panic!("no fault after {damage}"));
    let age = node.health().last_sync.unwrap();
    tokio::time::sleep(4 * POLL).await;
    assert!(node.health().last_sync.unwrap() >= age + 3 * POLL, "Synced although {reason}");
    let errors = log.lines().into_iter().filter(|line| line.contains("ERROR"));
    let errors: Vec<_> = errors.collect();
    // Two feeds: the node's, and the one that is listened to, which logs nothing.
    assert_eq!(errors.len(), 1, "{errors:#?}");
    recorder.so_far();

    db.store.migrate().await.unwrap();
    eventually("a node without a fault", async || node.health().feed.fault.is_none()).await;
    in_sync(&node).await;
    assert!(recorder.all().await.contains(&Change::Reset), "{damage}");
    assert_eq!(recorder.status().fault, None);
    notified(db, &node, &keys[1]).await;
    // For the next damage.
    notified(db, &node, &keys[2]).await;
}

/// A revoke reaches the node long before `max_staleness`.
async fn notified(db: &Database, node: &Authenticator, key: &Key) {
    node.authenticate(&key.secret).await.unwrap();
    in_sync(node).await;
    node.authenticate(&key.secret).await.unwrap();
    db.run(&key.revoke()).await;
    is_denied(node, key, InvalidKey::Revoked).await;
}

#[tokio::test]
async fn a_table_that_an_orm_rebuilds_is_reported_until_migrate_restores_its_triggers() {
    let db = database().await;
    is_reported_and_restored(&db, &rebuild("api_keys")).await;
    is_reported_and_restored(&db, &rebuild("users")).await;
}

#[tokio::test]
async fn triggers_that_a_bulk_change_disabled_and_enabled_are_reported() {
    let db = database().await;
    for table in ["api_keys", "users"] {
        let bulk = format!(
            "ALTER TABLE {table} DISABLE TRIGGER ALL; UPDATE {table} SET updated_at = now();
            ALTER TABLE {table} ENABLE TRIGGER ALL"
        );
        // By themselves they fire, but not for what replication writes.
        let one = format!("{bulk}; SET session_replication_role = replica");
        is_reported_and_restored(&db, &one).await;
        db.run("RESET session_replication_role").await;
        is_reported_and_restored(&db, &format!("ALTER TABLE {table} DISABLE TRIGGER ALL")).await;
    }
}

#[tokio::test]
async fn triggers_that_fall_with_a_column_or_a_function_are_reported() {
    let db = database().await;
    is_reported_and_restored(&db, "ALTER TABLE api_keys DROP COLUMN api_key_revision CASCADE")
        .await;
    for function in ["api_key_note_key", "api_key_note_all", "api_key_revise_key"] {
        is_reported_and_restored(&db, &format!("DROP FUNCTION {function} CASCADE")).await;
    }
    // A column of the other service is of no trigger.
    db.run("ALTER TABLE api_keys ADD COLUMN team TEXT").await;
    let key = db.key().await;
    let node = caches(node(&db.server.url()), &key).await;
    db.run("ALTER TABLE api_keys DROP COLUMN team CASCADE").await;
    in_sync(&node).await;
    assert_eq!(node.health().feed.fault, None);
    notified(&db, &node, &key).await;
}

#[tokio::test]
async fn a_column_that_look_ups_read_and_that_is_renamed_is_reported() {
    let db = database().await;
    for (table, column) in [
        ("api_keys", "is_active"),
        ("api_keys", "key_prefix"),
        ("api_keys", "api_key_revision"),
        ("users", "is_active"),
        ("users", "id"),
        ("api_keys", "user_id"),
    ] {
        let key = db.key().await;
        let node = caches(node(&db.server.url()), &key).await;
        db.run(&format!("ALTER TABLE {table} RENAME COLUMN {column} TO other")).await;
        eventually(&format!("a fault without {table}.{column}"), async || {
            incomplete(&node).is_some()
        })
        .await;
        // The other service's statements go on.
        for statement in [
            "UPDATE users SET role = 'x'",
            "UPDATE api_keys SET name = 'x'",
            "INSERT INTO users (email) VALUES ('x' || random())",
        ] {
            db.run(statement).await;
        }
        db.run(&format!("ALTER TABLE {table} RENAME COLUMN other TO {column}")).await;
        eventually("a node without a fault", async || node.health().feed.fault.is_none()).await;
        db.run("UPDATE users SET role = 'user'").await;
        notified(&db, &node, &key).await;
    }
}

#[tokio::test]
async fn tables_of_a_schema_that_comes_first_are_reported_until_migrate_adopts_them() {
    let db = database().await;
    let key = db.key().await;
    let url = url_with_path(&db.server.url(), "app,public");
    let node = caches(node(&url), &key).await;
    let recorder = support::feed::FeedRecorder::listen(
        store_at(&url, POLL).changes(std::time::SystemTime::now()),
    );
    recorder.all().await;
    db.run(
        "BEGIN; CREATE SCHEMA app;
        CREATE TABLE app.users (LIKE public.users INCLUDING ALL);
        CREATE TABLE app.api_keys (LIKE public.api_keys INCLUDING ALL);
        INSERT INTO app.users SELECT * FROM public.users;
        INSERT INTO app.api_keys SELECT * FROM public.api_keys; COMMIT",
    )
    .await;
    let app = connect(&url).await;
    run(&app, &key.revoke()).await;
    eventually("a fault", async || incomplete(&node).is_some()).await;
    within(MAX_STALENESS + Duration::from_secs(1), "the revoke", async || {
        denial_of(&node, &key).await.is_some()
    })
    .await;
    store_at(&url, POLL).migrate().await.unwrap();
    eventually("a node without a fault", async || node.health().feed.fault.is_none()).await;
    assert!(recorder.all().await.contains(&Change::Reset));
    run(&app, "UPDATE api_keys SET is_active = TRUE").await;
    eventually("the key", async || denial_of(&node, &key).await.is_none()).await;
    in_sync(&node).await;
    run(&app, &key.revoke()).await;
    is_denied(&node, &key, InvalidKey::Revoked).await;
    let indexes = "SELECT count(*) FROM pg_indexes WHERE schemaname = 'app' AND tablename = 'api_key_changes'";
    assert_eq!(db.number(indexes).await, 4, "its primary key and three more");
}

#[tokio::test]
async fn triggers_that_were_dropped_and_put_back_between_two_polls_are_a_reset() {
    let db = database().await;
    let recorder = db.listen(Duration::from_secs(1));
    recorder.all().await;
    recorder.all().await;
    let definition: String = db
        .admin
        .query_one(
            "SELECT pg_get_triggerdef(oid) FROM pg_trigger
            WHERE tgname = 'api_key_note' AND tgrelid = 'api_keys'::regclass",
            &[],
        )
        .await
        .unwrap()
        .get(0);
    // In one transaction with a change that no trigger sees.
    db.run(&format!(
        "BEGIN; DROP TRIGGER api_key_note ON api_keys; UPDATE api_keys SET is_active = FALSE;
        {definition}; ALTER TABLE api_keys ENABLE ALWAYS TRIGGER api_key_note; COMMIT"
    ))
    .await;
    assert_eq!(recorder.subjects().await, ["reset"]);
    assert_eq!(recorder.status().fault, None);
    db.run(
        "BEGIN; ALTER TABLE users DISABLE TRIGGER api_key_note;
        ALTER TABLE users ENABLE ALWAYS TRIGGER api_key_note; COMMIT",
    )
    .await;
    assert_eq!(recorder.subjects().await, ["reset"]);
    assert_eq!(recorder.subjects().await, [""; 0]);
}

#[tokio::test]
async fn a_table_that_gets_a_child_is_reported() {
    let db = database().await;
    let key = db.key().await;
    let node = caches(node(&db.server.url()), &key).await;
    db.run("CREATE TABLE more_keys () INHERITS (api_keys)").await;
    eventually("a fault", async || {
        incomplete(&node).is_some_and(|reason| reason.contains("plain table"))
    })
    .await;
    let error = db.store.migrate().await.unwrap_err();
    assert!(error.to_string().contains("api_keys"), "{error}");
    db.run("DROP TABLE more_keys").await;
    eventually("a node without a fault", async || node.health().feed.fault.is_none()).await;
    notified(&db, &node, &key).await;
}
