//! What other programs write, in whatever way and order they do it, reaches a node that caches keys.

use std::path::Path;

use diesel::{Connection, SqliteConnection, connection::SimpleConnection};
use tower_api_key::{Authenticator, PostgresStore, SqliteStore, key::KeyHash, store::KeyStore};

use crate::support::{
    eventually::eventually, feed::in_sync, scripted::status, servers::Postgres,
    unknown_key as some_key,
};

/// A node that is in sync with its store.
struct Node(Authenticator);

impl Node {
    /// The node has received all that was before, and caches what becomes of this key.
    async fn with_cached(store: impl KeyStore, key: &str, expected: u16) -> Self {
        let node = Self(Authenticator::new(store));
        assert_eq!(status(&node.0, key).await, expected);
        eventually("it is in sync", async || node.0.health().last_sync.is_some()).await;
        assert_eq!(status(&node.0, key).await, expected);
        node
    }

    async fn answers(&self, key: &str, expected: u16) {
        let what = format!("it is answered {expected}");
        eventually(&what, async || status(&self.0, key).await == expected).await;
    }
}

const USER: &str =
    "INSERT INTO users (id, email, role, is_active) VALUES (7, 'ada@example.com', 'user', true);";

/// The statement that stores [`some_key`] for that user.
fn insert_key() -> String {
    let hash = KeyHash::sha256(&some_key()).expose_hash();
    format!(
        "INSERT INTO api_keys (user_id, name, key_prefix, key_hash)
        VALUES (7, 'k', 'zzzzzzzzzz', '{hash}');"
    )
}

/// A migrated file, and another program at it, whose connection checks no foreign keys: that is SQLite's
/// default.
async fn sqlite(folder: &Path) -> (SqliteStore, impl FnMut(&str)) {
    let file = folder.join("keys.db");
    let store = SqliteStore::open(&file).unwrap();
    store.migrate().await.unwrap();
    let mut other = SqliteConnection::establish(file.to_str().unwrap()).unwrap();
    let mut run = move |sql: &str| other.batch_execute(sql).unwrap();
    run("PRAGMA busy_timeout = 5000; PRAGMA foreign_keys = OFF");
    (store, run)
}

/// A server with tables that have no foreign keys, adopted, and another program at it.
async fn postgres() -> (Postgres, PostgresStore, tokio_postgres::Client) {
    let server = Postgres::start();
    let other = server.client().await;
    let tables = "
        CREATE TABLE users (id BIGINT PRIMARY KEY, email TEXT, role TEXT, is_active BOOLEAN);
        CREATE TABLE api_keys (id BIGSERIAL PRIMARY KEY, user_id BIGINT NOT NULL, name TEXT,
            key_prefix TEXT NOT NULL, key_hash TEXT NOT NULL);";
    other.batch_execute(tables).await.unwrap();
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    (server, store, other)
}

#[tokio::test]
async fn a_user_who_is_replaced_by_an_inactive_one_in_sqlite_is_denied() {
    let (folder, key) = (tempfile::tempdir().unwrap(), some_key());
    let (store, mut run) = sqlite(folder.path()).await;
    run(&(USER.to_owned() + &insert_key()));
    let node = Node::with_cached(store, &key, 200).await;
    run("REPLACE INTO users (id, email, role, is_active) SELECT id, email, role, false FROM users");
    node.answers(&key, 401).await;
}

#[tokio::test]
async fn a_key_that_is_replaced_by_one_with_another_prefix_in_sqlite_is_denied() {
    let (folder, key) = (tempfile::tempdir().unwrap(), some_key());
    let (store, mut run) = sqlite(folder.path()).await;
    run(&(USER.to_owned() + &insert_key()));
    let node = Node::with_cached(store, &key, 200).await;
    run("REPLACE INTO api_keys (id, user_id, name, key_prefix, key_hash)
        SELECT id, user_id, name, 'yyyyyyyyyy', key_hash FROM api_keys");
    node.answers(&key, 401).await;
}

#[tokio::test]
async fn the_keys_of_a_user_who_is_deleted_in_sqlite_are_not_those_of_the_next_user_with_the_id() {
    let (folder, key) = (tempfile::tempdir().unwrap(), some_key());
    let (store, mut run) = sqlite(folder.path()).await;
    run(&(USER.to_owned() + &insert_key()));
    let node = Node::with_cached(store, &key, 200).await;
    run("DELETE FROM users");
    node.answers(&key, 401).await;
    run(USER);
    in_sync(&node.0).await;
    assert_eq!(status(&node.0, &key).await, 401);
    // The same key, issued to the new user, is another row.
    run(&insert_key());
    node.answers(&key, 200).await;
}

#[tokio::test]
async fn the_keys_of_a_user_who_is_deleted_and_stored_again_in_postgresql_work_again() {
    let ((_server, store, other), key) = (postgres().await, some_key());
    other.batch_execute(&(USER.to_owned() + &insert_key())).await.unwrap();
    let node = Node::with_cached(store, &key, 200).await;
    other.batch_execute("DELETE FROM users").await.unwrap();
    node.answers(&key, 401).await;
    other.batch_execute(USER).await.unwrap();
    node.answers(&key, 200).await;
}

#[tokio::test]
async fn a_user_who_is_deleted_and_stored_again_at_once_is_no_outage() {
    let ((_server, store, other), key) = (postgres().await, some_key());
    other.batch_execute(&(USER.to_owned() + &insert_key())).await.unwrap();
    let node = Node::with_cached(store, &key, 200).await;
    let again = USER.replace("ada@example.com", "bob@example.com");
    other.batch_execute(&format!("BEGIN; DELETE FROM users; {again} COMMIT")).await.unwrap();
    eventually("the new user is seen", async || {
        let outcome = node.0.authenticate(&key).await;
        outcome.expect("the key is valid all along").user().email == "bob@example.com"
    })
    .await;
}

#[tokio::test]
async fn a_key_that_is_stored_before_its_user_in_sqlite_works_when_the_user_is_there() {
    let (folder, key) = (tempfile::tempdir().unwrap(), some_key());
    let (store, mut run) = sqlite(folder.path()).await;
    run(&insert_key());
    let node = Node::with_cached(store, &key, 401).await;
    run(USER);
    node.answers(&key, 200).await;
}

/// As it may come about by replication, which checks no foreign keys and takes table after table.
#[tokio::test]
async fn a_key_that_is_stored_before_its_user_in_postgresql_works_when_the_user_is_there() {
    let ((_server, store, other), key) = (postgres().await, some_key());
    other.batch_execute(&insert_key()).await.unwrap();
    let node = Node::with_cached(store, &key, 401).await;
    other.batch_execute(USER).await.unwrap();
    node.answers(&key, 200).await;
}

#[tokio::test]
async fn a_change_in_a_transaction_that_commits_after_a_later_change_is_not_missed() {
    let ((server, store, other), key) = (postgres().await, some_key());
    other.batch_execute(&(USER.to_owned() + &insert_key())).await.unwrap();
    let node = Node::with_cached(store, &key, 200).await;
    let slow = server.client().await;
    slow.batch_execute("BEGIN; UPDATE api_keys SET is_active = false").await.unwrap();
    for n in 0..3 {
        other
            .batch_execute(&format!("UPDATE users SET email = 'ada{n}@example.com'"))
            .await
            .unwrap();
        // The node has received the later change, and the earlier one is not there yet.
        eventually("the later change is seen", async || {
            let outcome = node.0.authenticate(&key).await;
            outcome.expect("it is not committed").user().email == format!("ada{n}@example.com")
        })
        .await;
    }
    slow.batch_execute("COMMIT").await.unwrap();
    node.answers(&key, 401).await;
}

#[tokio::test]
async fn what_replication_writes_and_what_is_truncated_counts() {
    let ((_server, store, other), key) = (postgres().await, some_key());
    other.batch_execute(&(USER.to_owned() + &insert_key())).await.unwrap();
    let node = Node::with_cached(store, &key, 200).await;
    other.batch_execute("SET session_replication_role = replica").await.unwrap();
    other.batch_execute("UPDATE users SET is_active = false").await.unwrap();
    node.answers(&key, 401).await;
    other.batch_execute("UPDATE users SET is_active = true").await.unwrap();
    node.answers(&key, 200).await;
    other.batch_execute("TRUNCATE api_keys").await.unwrap();
    node.answers(&key, 401).await;
    other.batch_execute(&insert_key()).await.unwrap();
    node.answers(&key, 200).await;
    other.batch_execute("TRUNCATE users").await.unwrap();
    node.answers(&key, 401).await;
}
