//! The change feed with many changes: behind a transaction that stays open, in a large table, and in one statement.

use std::time::{Duration, Instant};

use tower_api_key::Authenticator;

use crate::support::{
    database::{
        Database, NEVER, caches, database_with, denial_of, in_sync_by_notification, number,
        store_at,
    },
    feed::{in_sync, within},
    servers::Postgres,
};

const POLL: Duration = Duration::from_millis(100);

/// The statement with which the feed last read the changes, and how long it took, from the server's log.
fn last_read(server: &Postgres) -> Option<(String, Duration)> {
    let log = server.log();
    let mut statements = log.rsplit("LOG:  duration: ");
    let read = statements.find(|entry| entry.contains("is_continuous") && entry.contains("\n"))?;
    let (milliseconds, statement) = read.split_once(" ms  statement: ")?;
    // The next entry begins on a line of its own, with its time.
    let end = statement.rfind("\n20").unwrap_or(statement.len());
    let took = Duration::from_secs_f64(milliseconds.parse::<f64>().ok()? / 1000.0);
    Some((statement[..end].to_owned(), took))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_stays_open_makes_no_read_larger_and_is_not_missed() {
    let db = database_with(Postgres::with_settings(&["log_min_duration_statement=0"])).await;
    let key = db.key().await;
    let node = caches(Authenticator::new(store_at(&db.server.url(), POLL)), &key).await;
    let mut open = db.server.client().await;
    let open = open.transaction().await.unwrap();
    open.batch_execute(&key.revoke()).await.unwrap();
    // Each a transaction of its own.
    db.run(&format!(
        "DO $$ BEGIN FOR n IN 1..100000 LOOP
            INSERT INTO api_keys (user_id, key_prefix, key_hash) VALUES ({}, 'p' || n, 'x'); COMMIT;
        END LOOP; END $$",
        key.owner
    ))
    .await;
    in_sync(&node).await;
    in_sync(&node).await;
    let (statement, took) = last_read(&db.server).unwrap();
    println!("{} bytes, {took:?}", statement.len());
    assert!(statement.len() < 20_000, "{} bytes", statement.len());
    assert!(took < Duration::from_millis(200), "{took:?}");
    assert_eq!(denial_of(&node, &key).await, None);
    open.commit().await.unwrap();
    within(Duration::from_secs(2), "the revoke", async || denial_of(&node, &key).await.is_some())
        .await;
}

/// A table of changes with many rows, and no statistics about it.
async fn large() -> Database {
    let settings = ["log_min_duration_statement=0", "autovacuum=off"];
    let db = database_with(Postgres::with_settings(&settings)).await;
    db.run(
        "BEGIN; ALTER TABLE api_key_changes DISABLE TRIGGER api_key_skip_foreign;
        INSERT INTO api_key_changes (key_prefix, api_key_id) SELECT 'p' || n, n FROM generate_series(1, 150000) AS n;
        ALTER TABLE api_key_changes ENABLE ALWAYS TRIGGER api_key_skip_foreign; COMMIT",
    )
    .await;
    db
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_of_a_large_table_uses_the_index_without_statistics() {
    let db = large().await;
    let key = db.key().await;
    let node = caches(Authenticator::new(store_at(&db.server.url(), NEVER)), &key).await;
    for _ in 0..5 {
        db.run("UPDATE api_keys SET name = name || 'x'").await;
        in_sync_by_notification(&db, &node).await;
    }
    let (statement, took) = last_read(&db.server).unwrap();
    println!("{took:?}");
    let plan = db.admin.query(&format!("EXPLAIN {statement}"), &[]).await.unwrap();
    let plan: Vec<String> = plan.iter().map(|row| row.get(0)).collect();
    let scans: Vec<_> = plan
        .iter()
        .filter(|line| line.contains("api_key_changes") || line.contains("Sort"))
        .collect();
    assert!(scans.iter().any(|line| line.contains("api_key_changes_xid")), "{plan:#?}");
    assert!(!scans.iter().any(|line| line.contains("Seq Scan")), "{plan:#?}");
    assert!(took < Duration::from_millis(100), "{took:?}");
    db.run(&key.revoke()).await;
    within(Duration::from_secs(2), "the revoke", async || denial_of(&node, &key).await.is_some())
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_of_many_keys_takes_one_transaction_id_and_not_one_a_row() {
    let db = database_with(Postgres::start()).await;
    let key = db.key().await;
    db.run(&format!(
        "INSERT INTO api_keys (user_id, key_prefix, key_hash)
        SELECT {}, 'p' || n, 'x' FROM generate_series(1, 20000) AS n",
        key.owner
    ))
    .await;
    let next = "SELECT pg_current_xact_id()::text";
    for update in [
        "UPDATE api_keys SET name = 'x'",
        "UPDATE api_keys SET total_requests = total_requests + 1",
        "INSERT INTO users (email) SELECT 'u' || n FROM generate_series(1, 5000) AS n",
        "UPDATE users SET role = 'x'",
        "DELETE FROM api_keys WHERE key_hash = 'x'",
        "DELETE FROM users AS u WHERE role = 'x' AND NOT EXISTS (SELECT FROM api_keys WHERE user_id = u.id)",
    ] {
        let before = number(&db.admin, next).await;
        let begun = Instant::now();
        db.run(update).await;
        let (took, used) = (begun.elapsed(), number(&db.admin, next).await - before);
        println!("{took:?} {used} {update}");
        assert!(used < 50, "{used} transaction ids for {update}");
    }
}
