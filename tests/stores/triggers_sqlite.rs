//! What other programs do to the tables in an SQLite file: rebuild them, replace rows, give ids again.

use std::{path::Path, time::Duration};

use diesel::{
    Connection, QueryableByName, RunQueryDsl, SqliteConnection, connection::SimpleConnection,
    sql_query, sql_types::Text,
};
use tower_api_key::{
    Authenticator, Denial, KeyManager, NewKey, SqliteStore,
    denial::InvalidKey,
    management::IssuedKey,
    store::{Change, FeedFault, KeyStore},
};

use crate::support::{
    self,
    eventually::eventually,
    feed::{FeedRecorder, in_sync},
    log,
};

/// A program beside this crate, with SQLite's default settings.
struct Other(SqliteConnection);

impl Other {
    fn at(folder: &Path) -> Self {
        let file = folder.join("keys.db");
        let mut connection = SqliteConnection::establish(file.to_str().unwrap()).unwrap();
        connection.batch_execute("PRAGMA busy_timeout = 5000; PRAGMA foreign_keys = OFF").unwrap();
        Self(connection)
    }

    fn run(&mut self, sql: &str) {
        self.0.batch_execute(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    fn text(&mut self, sql: &str) -> String {
        #[derive(QueryableByName)]
        struct OneText {
            #[diesel(sql_type = Text)]
            text: String,
        }
        sql_query(format!("SELECT CAST(({sql}) AS TEXT) AS text"))
            .get_result::<OneText>(&mut self.0)
            .unwrap()
            .text
    }
}

async fn store(folder: &Path) -> SqliteStore {
    let store = SqliteStore::open(folder.join("keys.db")).unwrap();
    store.migrate().await.unwrap();
    store
}

async fn key_of(store: &SqliteStore, email: &str, role: &str) -> IssuedKey {
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user(email, role).await.unwrap();
    manager.issue(NewKey::new(user.id, "k")).await.unwrap()
}

async fn denial_of(node: &Authenticator, key: &IssuedKey) -> Option<InvalidKey> {
    match node.authenticate(key.expose_secret()).await {
        Ok(_) => None,
        Err(Denial::InvalidKey(reason)) => Some(reason),
        Err(other) => panic!("{other:?}"),
    }
}

/// A node that has the key in its cache.
async fn node_with(store: &SqliteStore, key: &IssuedKey) -> Authenticator {
    let node = Authenticator::builder(store.clone()).max_staleness(Duration::from_secs(2)).build();
    assert_eq!(denial_of(&node, key).await, None);
    in_sync(&node).await;
    assert_eq!(denial_of(&node, key).await, None);
    node
}

/// As an ORM alters a table: a new one, the rows, and the name.
fn rebuild(other: &mut Other, table: &str) {
    let columns =
        other.text(&format!("SELECT group_concat(name) FROM pragma_table_info('{table}')"));
    let definition = other.text(&format!("SELECT sql FROM sqlite_master WHERE name = '{table}'"));
    let definition = definition.replacen(table, &format!("new_{table}"), 1);
    other.run(&format!(
        "BEGIN; {definition}; INSERT INTO new_{table} ({columns}) SELECT {columns} FROM {table};
        DROP TABLE {table}; ALTER TABLE new_{table} RENAME TO {table}; COMMIT"
    ));
}

#[tokio::test]
async fn a_table_that_an_orm_rebuilds_is_reported_bounded_and_repaired() {
    for table in ["users", "api_keys"] {
        let folder = tempfile::tempdir().unwrap();
        let (log, _guard) = log::capture();
        let store = store(folder.path()).await;
        let key = key_of(&store, "ada@example.com", "user").await;
        let node = node_with(&store, &key).await;
        let recorder = FeedRecorder::listen(store.changes(std::time::SystemTime::now()));
        recorder.all().await;
        let mut other = Other::at(folder.path());
        rebuild(&mut other, table);
        let revoke = match table {
            "users" => "UPDATE users SET is_active = 0",
            _ => "UPDATE api_keys SET is_active = 0",
        };
        other.run(revoke);
        eventually("the fault", async || {
            matches!(node.health().feed.fault, Some(FeedFault::Incomplete(_)))
        })
        .await;
        let fault = node.health().feed.fault.unwrap().to_string();
        assert!(fault.contains("api_key_note"), "{fault}");
        // No trigger has recorded the revoke: the rule of age bounds it.
        eventually("the revoke", async || denial_of(&node, &key).await.is_some()).await;

        other.run(&revoke.replace("= 0", "= 1"));
        eventually("the key", async || denial_of(&node, &key).await.is_none()).await;
        store.migrate().await.unwrap();
        eventually("no fault", async || node.health().feed.fault.is_none()).await;
        assert!(recorder.all().await.contains(&Change::Reset), "{table}");
        in_sync(&node).await;
        assert_eq!(denial_of(&node, &key).await, None);
        other.run(revoke);
        let took = eventually_took(async || denial_of(&node, &key).await.is_some()).await;
        assert!(took < Duration::from_secs(1), "{table}: {took:?}");
        let errors = log.text().matches("changes of API keys may be missed").count();
        assert_eq!(errors, 1, "{table}: {}", log.text());
    }
}

async fn eventually_took(is_so: impl AsyncFnMut() -> bool) -> Duration {
    support::feed::eventually("it", is_so).await
}

#[tokio::test(flavor = "multi_thread")]
async fn triggers_that_are_dropped_and_put_back_between_two_reads_are_a_reset() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path()).await;
    let key = key_of(&store, "ada@example.com", "user").await;
    let node = node_with(&store, &key).await;
    let mut other = Other::at(folder.path());
    let trigger = other.text("SELECT sql FROM sqlite_master WHERE name = 'api_key_note'");
    other.run(&format!(
        "BEGIN; DROP TRIGGER api_key_note; UPDATE api_keys SET is_active = 0; {trigger}; COMMIT"
    ));
    let took = eventually_took(async || denial_of(&node, &key).await.is_some()).await;
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert_eq!(node.health().feed.fault, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn migrating_makes_whatever_is_missing_anew() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path()).await;
    let mut other = Other::at(folder.path());
    let everything = "SELECT group_concat(name || sql) FROM (
        SELECT name, sql FROM sqlite_master WHERE name LIKE 'api\\_key\\_%' ESCAPE '\\' ORDER BY name)";
    let whole = other.text(everything);
    for name in
        other.text("SELECT group_concat(name) FROM sqlite_master WHERE type = 'trigger'").split(',')
    {
        other.run(&format!("DROP TRIGGER {name}"));
        store.migrate().await.unwrap();
        assert_eq!(other.text(everything), whole, "{name}");
    }
    // Another trigger by the name.
    other.run("DROP TRIGGER api_key_note; CREATE TRIGGER api_key_note AFTER UPDATE ON api_keys BEGIN SELECT 1; END");
    store.migrate().await.unwrap();
    assert_eq!(other.text(everything), whole);
    for table in [
        "api_key_changes",
        "api_key_horizons",
        "api_key_usage",
        "api_key_leases",
        "api_key_deleted_users",
        "api_key_audit",
        "api_key_attribution",
        "api_key_replaced",
        "api_key_owners",
    ] {
        other.run(&format!("DROP TABLE {table}"));
        store.migrate().await.unwrap();
        let count = format!("SELECT count(*) FROM sqlite_master WHERE name = '{table}'");
        assert_eq!(other.text(&count), "1", "{table}");
    }
    // As an ORM makes the tables anew, without columns of this crate.
    other.run(
        "DROP TABLE users; DROP TABLE api_keys;
        CREATE TABLE users (id INTEGER PRIMARY KEY, email TEXT UNIQUE);
        CREATE TABLE api_keys (id INTEGER PRIMARY KEY, user_id INTEGER, key_prefix TEXT, key_hash TEXT)",
    );
    store.migrate().await.unwrap();
    let key = key_of(&store, "bob@example.com", "user").await;
    node_with(&store, &key).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_is_replaced_by_one_with_the_same_address_loses_the_keys() {
    for table in [
        "id INTEGER PRIMARY KEY, email TEXT UNIQUE, phone TEXT",
        "id INTEGER PRIMARY KEY, email TEXT COLLATE NOCASE UNIQUE, phone TEXT",
        "id INTEGER PRIMARY KEY, email TEXT, phone TEXT, UNIQUE (phone, email)",
        "id INTEGER PRIMARY KEY, email TEXT, phone TEXT); CREATE UNIQUE INDEX x ON users (lower(email)",
    ] {
        for replace in [
            "REPLACE INTO users (email, phone, role, is_active) VALUES ('$MAIL', '1', 'admin', 1)",
            "INSERT INTO users (id, email, phone, role, is_active) VALUES (77, 'b', '1', 'admin', 1);
             UPDATE OR REPLACE users SET email = '$MAIL' WHERE id = 77",
        ] {
            let folder = tempfile::tempdir().unwrap();
            let mut other = Other::at(folder.path());
            other.run(&format!(
                "CREATE TABLE users ({table});
                CREATE TABLE api_keys (id INTEGER PRIMARY KEY, user_id INTEGER, key_prefix TEXT, key_hash TEXT)"
            ));
            let store = store(folder.path()).await;
            let key = key_of(&store, "ada@example.com", "user").await;
            other.run("UPDATE users SET phone = '1'");
            let node = node_with(&store, &key).await;
            let mail = if table.contains("NOCASE") || table.contains("lower") { "ADA@example.com" } else { "ada@example.com" };
            other.run(&replace.replace("$MAIL", mail));
            assert_eq!(other.text("SELECT count(*) FROM users"), "1", "{table}");
            eventually("the end of the key", async || denial_of(&node, &key).await.is_some()).await;
            // An upsert, which deletes nobody, takes nothing away.
            let next = key_of(&store, "eve@example.com", "user").await;
            let node = node_with(&store, &next).await;
            other.run("INSERT OR IGNORE INTO users (id, email) SELECT id, email FROM users");
            other.run("INSERT INTO users (id, email) SELECT id, email FROM users WHERE true
                ON CONFLICT (id) DO UPDATE SET phone = excluded.id");
            in_sync(&node).await;
            assert_eq!(denial_of(&node, &next).await, None, "{table}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_a_deleted_user_is_not_that_of_the_next_one_with_the_id() {
    let folder = tempfile::tempdir().unwrap();
    let mut other = Other::at(folder.path());
    // SQLite gives the ids of these again.
    other.run(
        "CREATE TABLE users (id INTEGER PRIMARY KEY, email TEXT UNIQUE);
        CREATE TABLE api_keys (id INTEGER PRIMARY KEY, user_id INTEGER, key_prefix TEXT, key_hash TEXT)",
    );
    let store = store(folder.path()).await;
    let old = key_of(&store, "ada@example.com", "user").await;
    let node = node_with(&store, &old).await;
    other.run("DELETE FROM users");
    let new = key_of(&store, "root@example.com", "admin").await;
    assert_eq!(new.record().user.id, old.record().user.id, "or this tests nothing");
    eventually("the new key", async || denial_of(&node, &new).await.is_none()).await;
    in_sync(&node).await;
    assert_eq!(denial_of(&node, &old).await, Some(InvalidKey::Unknown));
    let fresh = Authenticator::new(store.clone());
    assert_eq!(denial_of(&fresh, &old).await, Some(InvalidKey::Unknown));
    // Nor does an edit of the row revive it.
    other.run("UPDATE api_keys SET name = 'x'");
    in_sync(&node).await;
    assert_eq!(denial_of(&node, &old).await, Some(InvalidKey::Unknown));
    assert_eq!(denial_of(&node, &new).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_key_does_not_inherit_what_a_deleted_one_has_spent() {
    let folder = tempfile::tempdir().unwrap();
    let mut other = Other::at(folder.path());
    other.run(
        "CREATE TABLE users (id INTEGER PRIMARY KEY, email TEXT UNIQUE);
        CREATE TABLE api_keys (id INTEGER PRIMARY KEY, user_id INTEGER, key_prefix TEXT, key_hash TEXT)",
    );
    let store = store(folder.path()).await;
    let old = key_of(&store, "ada@example.com", "user").await;
    let id = old.record().id.as_i64().unwrap();
    for _ in 0..2 {
        other.run(&format!(
            "INSERT INTO api_key_usage (api_key_id, day, requests, cost_micro_cents) VALUES ({id}, '2026-01-01', 2, 5);
            INSERT INTO api_key_leases VALUES ({id}, 'node', 1, 5, 0);
            DELETE FROM api_keys WHERE id = {id}"
        ));
        let user = old.record().user.id.clone();
        let new = KeyManager::new(store.clone()).issue(NewKey::new(user, "k")).await.unwrap();
        assert_eq!(new.record().id, old.record().id, "or this tests nothing");
        let spent = format!("SELECT count(*) FROM api_key_usage WHERE api_key_id = {id}");
        assert_eq!(other.text(&spent), "0");
        assert_eq!(other.text("SELECT count(*) FROM api_key_leases"), "0");
    }
    // What was spent is still on record.
    let kept = format!(
        "SELECT requests || ' ' || cost_micro_cents FROM api_key_usage WHERE api_key_id = -{id}"
    );
    assert_eq!(other.text(&kept), "4 10");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_starts_reads_what_a_long_transaction_has_committed_lately() {
    let folder = tempfile::tempdir().unwrap();
    let store = store(folder.path()).await;
    let (long, old) =
        (key_of(&store, "a@b.c", "user").await, key_of(&store, "d@e.f", "user").await);
    let mut other = Other::at(folder.path());
    // Written three hours ago and committed after a horizon of two hours ago.
    other.run(&format!(
        "UPDATE api_keys SET name = 'x' WHERE key_prefix = '{}';
        INSERT INTO api_key_horizons (taken_at, revision)
            SELECT julianday('now') - 2 / 24.0, max(revision) FROM api_key_changes;
        UPDATE api_keys SET is_active = 0 WHERE key_prefix = '{}';
        UPDATE api_key_changes SET changed_at = julianday('now') - 3 / 24.0",
        old.record().prefix,
        long.record().prefix,
    ));
    let recorder = FeedRecorder::listen(
        store.changes(std::time::SystemTime::now() - Duration::from_secs(3900)),
    );
    let subjects = recorder.subjects().await;
    assert!(subjects.contains(&format!("prefix {}", long.record().prefix)), "{subjects:?}");
    assert!(!subjects.contains(&format!("prefix {}", old.record().prefix)), "{subjects:?}");
    // It was not pruned either: it has not been there for two hours.
    let kept = format!(
        "SELECT count(*) FROM api_key_changes WHERE key_prefix = '{}'",
        long.record().prefix
    );
    eventually("the old rows are pruned", async || {
        other.text("SELECT min(revision) > 1 FROM api_key_changes") == "1"
    })
    .await;
    assert_ne!(other.text(&kept), "0");
    eventually("the size of the table", async || {
        let status = recorder.status();
        status.rows.is_some() && status.oldest.is_some()
    })
    .await;
}
