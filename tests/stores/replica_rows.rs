//! [`Replica`](tower_api_key::Replica) over databases whose rows are written by hand.

use std::sync::Mutex;

use diesel::{Connection, SqliteConnection, connection::SimpleConnection};
use tower_api_key::{KeyManager, NewKey, PostgresStore, SqliteStore, store::KeyRepository};

use super::replica::{Gated, Node};
use crate::support::{
    feed::{eventually, in_sync},
    log::capture,
    servers::Postgres,
};

/// A row that can't be decoded when it is loaded, or becomes one later.
async fn a_bad_row_fails_alone<S: KeyRepository + Clone>(store: S, run: impl AsyncFn(&str)) {
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap().id;
    let other = manager.create_user("bob@example.com", "user").await.unwrap().id;
    let mut keys = Vec::new();
    for owner in [&user, &user, &other] {
        keys.push(manager.issue(NewKey::new(owner.clone(), "k")).await.unwrap());
    }
    let [broken, whole, moved] = keys.as_slice() else { unreachable!() };
    let id = &broken.record().id;
    for (column, bad, good) in [
        ("budget_limit_cents", "-2", "NULL"),
        ("rate_limit_per_day", "-2", "NULL"),
        ("key_hash", "'hunter2'", ""),
    ] {
        let kept = format!("CREATE TABLE kept AS SELECT * FROM api_keys WHERE id = {id}");
        run(&kept).await;
        run(&format!("UPDATE api_keys SET {column} = {bad} WHERE id = {id}")).await;
        let (log, _guard) = capture();
        let lines = || {
            let lines = log.take();
            let of_row = lines.lines().filter(|line| line.contains("row can't be decoded"));
            of_row.map(str::to_owned).collect::<Vec<_>>()
        };
        let node = Node::new(Gated::new(store.clone())).loaded().await;
        let of_load = lines();
        assert_eq!(of_load.len(), 1, "{of_load:?}");
        assert!(of_load[0].contains(&format!("api_keys row {id}, column {column}")), "{of_load:?}");
        assert!(!of_load[0].contains("hunter2"));
        assert_eq!(node.ask(broken.expose_secret()).await.0, 500);
        node.settles(whole.expose_secret(), 200).await;
        // It was read again, because the node knows of a change and the row shows no revision.
        eventually("a read", async || node.replica.status().keys == 3).await;
        let good =
            if good.is_empty() { format!("(SELECT {column} FROM kept)") } else { good.into() };
        run(&format!("UPDATE api_keys SET {column} = {good} WHERE id = {id}")).await;
        run("DROP TABLE kept").await;
        in_sync(&node.node).await;
        node.becomes(broken.expose_secret(), 500, 200).await;
        // And after the load.
        run(&format!("UPDATE api_keys SET rate_limit_per_hour = -2 WHERE id = {id}")).await;
        node.becomes_without_memory(broken.expose_secret(), 200, 500).await;
        node.settles(whole.expose_secret(), 200).await;
        run(&format!("UPDATE api_keys SET rate_limit_per_hour = NULL WHERE id = {id}")).await;
        node.becomes(broken.expose_secret(), 500, 200).await;
    }
    // The row of the owner.
    let node = Node::new(Gated::new(store.clone())).loaded().await;
    run(&format!("UPDATE users SET is_active = FALSE WHERE id = {user}")).await;
    node.becomes(whole.expose_secret(), 200, 401).await;
    node.settles(broken.expose_secret(), 401).await;
    assert_eq!(node.ask(moved.expose_secret()).await, (200, 0));
    // Another owner: to an inactive one and back.
    let to =
        |owner| format!("UPDATE api_keys SET user_id = {owner} WHERE id = {}", moved.record().id);
    run(&to(&user)).await;
    node.becomes(moved.expose_secret(), 200, 401).await;
    run(&to(&other)).await;
    node.becomes(moved.expose_secret(), 401, 200).await;
    // Another lookup id, by hand.
    let prefix = &moved.record().prefix;
    run(&format!("UPDATE api_keys SET key_prefix = 'elsewhere1' WHERE key_prefix = '{prefix}'"))
        .await;
    node.becomes(moved.expose_secret(), 200, 401).await;
    run(&format!("UPDATE api_keys SET key_prefix = '{prefix}' WHERE key_prefix = 'elsewhere1'"))
        .await;
    node.becomes(moved.expose_secret(), 401, 200).await;
    // All at once.
    run("UPDATE api_keys SET is_active = FALSE").await;
    node.becomes(moved.expose_secret(), 200, 401).await;
    run("DELETE FROM api_keys").await;
    in_sync(&node.node).await;
    node.settles(moved.expose_secret(), 401).await;
    assert_eq!(node.replica.status().keys, 0);
}

#[tokio::test]
async fn in_postgresql() {
    let server = Postgres::start();
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let client = server.client().await;
    a_bad_row_fails_alone(store, async |sql: &str| client.batch_execute(sql).await.unwrap()).await;
}

#[tokio::test]
async fn in_sqlite() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.db");
    let store = SqliteStore::open(&file).unwrap();
    store.migrate().await.unwrap();
    let other = Mutex::new(SqliteConnection::establish(file.to_str().unwrap()).unwrap());
    a_bad_row_fails_alone(store, async |sql: &str| {
        other.lock().unwrap().batch_execute(&format!("PRAGMA busy_timeout = 5000; {sql}")).unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_bad_owner_in_sqlite_fails_its_keys_and_no_others_until_it_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.db");
    let store = SqliteStore::open(&file).unwrap();
    store.migrate().await.unwrap();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap().id;
    let bad = manager.issue(NewKey::new(user.clone(), "k")).await.unwrap();
    let good = manager.issue(NewKey::new(user, "k")).await.unwrap();
    let mut other = SqliteConnection::establish(file.to_str().unwrap()).unwrap();
    let mut run = |sql: &str| {
        other.batch_execute(&format!("PRAGMA busy_timeout = 5000; {sql}")).unwrap();
    };
    run("UPDATE users SET is_active = 'maybe'");
    let node = Node::new(Gated::new(store)).loaded().await;
    assert_eq!(node.ask(good.expose_secret()).await.0, 500);
    run("UPDATE users SET is_active = TRUE");
    node.becomes(good.expose_secret(), 500, 200).await;
    // The first key of the owner can't be decoded, and the owner changes.
    run("UPDATE api_keys SET rate_limit_per_day = -2 WHERE id = 1");
    node.becomes_without_memory(bad.expose_secret(), 200, 500).await;
    // The owner is being read again. Until the change event arrives, the replica may answer from that older read after the
    // store has answered with the change.
    node.settles(good.expose_secret(), 200).await;
    run("UPDATE users SET is_active = FALSE");
    node.becomes(good.expose_secret(), 200, 401).await;
    run("UPDATE users SET is_active = TRUE");
    node.becomes(good.expose_secret(), 401, 200).await;
}

/// SQLite gives the id of a deleted user to the next one, and a process without foreign keys leaves the keys behind.
#[tokio::test]
async fn a_key_of_a_deleted_user_is_not_the_next_ones() {
    for is_at_once in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("keys.db");
        let store = SqliteStore::open(&file).unwrap();
        store.migrate().await.unwrap();
        let manager = KeyManager::new(store.clone());
        let other = manager.create_user("ada@example.com", "user").await.unwrap().id;
        let user = manager.create_user("bob@example.com", "user").await.unwrap().id;
        // Of the next user later, so that it shows the owner.
        let moved = manager.issue(NewKey::new(other, "k")).await.unwrap();
        let orphan = manager.issue(NewKey::new(user.clone(), "k")).await.unwrap();
        let node = Node::new(Gated::new(store)).loaded().await;
        assert_eq!(node.ask(orphan.expose_secret()).await, (200, 0));
        let mut console = SqliteConnection::establish(file.to_str().unwrap()).unwrap();
        let mut run = |sql: &str| {
            let settings = "PRAGMA busy_timeout = 5000; PRAGMA foreign_keys = OFF;";
            console.batch_execute(&format!("{settings} {sql}")).unwrap();
        };
        let delete = format!("DELETE FROM users WHERE id = {user};");
        let insert = format!(
            "INSERT INTO users (id, email, role, is_active, created_at, updated_at)
            VALUES ({user}, 'eve@example.com', 'admin', TRUE, datetime(), datetime());
            UPDATE api_keys SET user_id = {user} WHERE id = {};",
            moved.record().id
        );
        if is_at_once {
            run(&format!("BEGIN; {delete} {insert} COMMIT;"));
        } else {
            run(&delete);
            node.becomes_without_memory(orphan.expose_secret(), 200, 401).await;
            run(&insert);
        }
        in_sync(&node.node).await;
        node.settles(moved.expose_secret(), 200).await;
        let caller = node.node.authenticate(moved.expose_secret()).await.unwrap();
        assert_eq!(caller.user().email, "eve@example.com");
        for _ in 0..20 {
            assert_eq!(node.ask(orphan.expose_secret()).await.0, 401);
        }
    }
}
