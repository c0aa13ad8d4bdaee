//! What the triggers cost the other service: notifications, prepared transactions, rows without a lookup id.

use std::{
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio_postgres::{AsyncMessage, NoTls};
use tower_api_key::{Authenticator, denial::InvalidKey, store::KeyStore};

use crate::support::{
    database::{
        NEVER, caches, connect, database, database_with, denial_of, is_denied, run, store_at,
    },
    feed::{FeedRecorder, eventually, in_sync, within},
    servers::Postgres,
};

/// Counts what arrives on the channel of changes.
async fn notifications(url: &str) -> (tokio_postgres::Client, Arc<AtomicUsize>) {
    let (client, mut connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    tokio::spawn(async move {
        while let Some(Ok(message)) = poll_fn(|cx| connection.poll_message(cx)).await {
            if let AsyncMessage::Notification(_) = message {
                counted.fetch_add(1, SeqCst);
            }
        }
    });
    run(&client, "LISTEN api_key_changes").await;
    (client, count)
}

#[tokio::test(flavor = "multi_thread")]
async fn users_without_keys_send_no_notification_and_others_one_a_transaction() {
    let db = database().await;
    let key = db.key().await;
    let (listener, count) = notifications(&db.server.url()).await;
    for (sql, expected) in [
        ("INSERT INTO users (email) SELECT 'u' || n FROM generate_series(1, 100) AS n".to_owned(), 0),
        ("UPDATE users SET role = 'x' WHERE email LIKE 'u%'".to_owned(), 0),
        ("UPDATE users SET updated_at = now()".to_owned(), 0),
        ("UPDATE api_keys SET total_requests = 9, last_used_at = now()".to_owned(), 0),
        (format!("UPDATE users SET role = 'y' WHERE id = {}", key.owner), 1),
        (
            format!(
                "BEGIN; UPDATE users SET role = 'z'; UPDATE api_keys SET name = 'a'; UPDATE api_keys SET name = 'b';
                INSERT INTO api_keys (user_id, key_prefix, key_hash)
                    SELECT {}, 'n' || n, 'x' FROM generate_series(1, 500) AS n; DELETE FROM users WHERE email = 'u1'; COMMIT",
                key.owner
            ),
            1,
        ),
        ("BEGIN; UPDATE api_keys SET name = 'c'; ROLLBACK".to_owned(), 0),
    ] {
        let before = count.load(SeqCst);
        db.run(&sql).await;
        // One of a transaction that is committed later arrives later.
        db.run("NOTIFY api_key_changes, 'last'").await;
        run(&listener, "SELECT 1").await;
        eventually("the last one", async || {
            run(&listener, "SELECT 1").await;
            count.load(SeqCst) > before
        })
        .await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(count.load(SeqCst) - before - 1, expected, "{sql}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_other_service_can_prepare_transactions_and_nodes_poll_for_their_changes() {
    let db = database_with(Postgres::with_settings(&["max_prepared_transactions=10"])).await;
    let keys = [db.key().await, db.key().await];
    let node = caches(Authenticator::new(store_at(&db.server.url(), NEVER)), &keys[0]).await;
    node.authenticate(&keys[1].secret).await.unwrap();
    in_sync(&node).await;
    assert_eq!(denial_of(&node, &keys[1]).await, None);
    db.run(&format!(
        "BEGIN; INSERT INTO users (email) VALUES ('new'); {};
        UPDATE users SET is_active = FALSE WHERE id = {}; PREPARE TRANSACTION 'one'",
        keys[0].revoke(),
        keys[1].owner
    ))
    .await;
    // Others commit, with higher ids, and are read, before it is committed.
    for n in 0..5 {
        db.run(&format!("INSERT INTO users (email) VALUES ('u{n}'); UPDATE users SET role = 'r{n}' WHERE email = 'u{n}'")).await;
        in_sync(&node).await;
    }
    assert_eq!(denial_of(&node, &keys[0]).await, None);
    db.run("COMMIT PREPARED 'one'").await;
    let limit = Duration::from_millis(1250);
    within(limit, "the revoke", async || denial_of(&node, &keys[0]).await.is_some()).await;
    is_denied(&node, &keys[1], InvalidKey::OwnerInactive).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_without_a_lookup_id_are_no_change_at_all() {
    let server = Postgres::start();
    let orm = server.client().await;
    run(
        &orm,
        "CREATE TABLE users (id SERIAL PRIMARY KEY, email TEXT);
        CREATE TABLE api_keys (id SERIAL PRIMARY KEY, user_id INTEGER REFERENCES users (id),
            key_prefix TEXT, key_hash TEXT, name TEXT)",
    )
    .await;
    let db = database_with(server).await;
    let key = db.key().await;
    let recorder = FeedRecorder::listen(
        store_at(&db.server.url(), Duration::from_millis(50)).changes(std::time::SystemTime::now()),
    );
    recorder.all().await;
    let orm = connect(&db.server.url()).await;
    for sql in [
        format!("INSERT INTO api_keys (user_id, key_hash) VALUES ({}, 'other')", key.owner),
        "UPDATE api_keys SET name = 'x' WHERE key_hash = 'other'".to_owned(),
        "UPDATE api_keys SET total_requests = 4 WHERE key_hash = 'other'".to_owned(),
        "DELETE FROM api_keys WHERE key_hash = 'other'".to_owned(),
    ] {
        run(&orm, &sql).await;
        assert_eq!(recorder.all().await, [], "{sql}");
    }
    // A key that loses its id, and gets it back.
    run(&orm, "UPDATE api_keys SET key_prefix = NULL").await;
    assert_eq!(recorder.subjects().await, [format!("prefix {}", key.prefix)]);
    run(&orm, &format!("UPDATE api_keys SET key_prefix = '{}'", key.prefix)).await;
    assert_eq!(recorder.subjects().await, [format!("prefix {}", key.prefix)]);
}
