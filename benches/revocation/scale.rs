//! Revokes beside many other changes.

use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tower_api_key::record::UserId;

use super::{
    Key, Manager, Node, all_in_sync, figures::percentile, issue, remember, until_all_refuse,
};

const COUNT: usize = 200;
const BULK_KEYS: u32 = 100_000;
/// For how long revokes are measured after the bulk update has committed.
const AFTERWARDS: Duration = Duration::from_secs(3);

/// The 99th percentile in ms with 1,000,000 rows in the table of changes, and the keys that were revoked.
pub(super) async fn with_a_million_changes(
    manager: &Manager,
    user: &UserId,
    sql: &Client,
    nodes: &[Node],
) -> (f64, Vec<Key>) {
    for _ in 0..200 {
        // Only triggers write there; this stands in for a million changes of keys.
        sql.batch_execute(
            "BEGIN; ALTER TABLE api_key_changes DISABLE TRIGGER api_key_skip_foreign;
            INSERT INTO api_key_changes (key_prefix) SELECT 'p' || n FROM generate_series(1, 5000) AS n;
            ALTER TABLE api_key_changes ENABLE ALWAYS TRIGGER api_key_skip_foreign; COMMIT",
        )
        .await
        .unwrap();
    }
    let rows: i64 =
        sql.query_one("SELECT count(*) FROM api_key_changes", &[]).await.unwrap().get(0);
    assert!(rows >= 1_000_000, "{rows} rows");
    let mut keys = Vec::new();
    for _ in 0..COUNT {
        keys.push(issue(manager, user).await);
    }
    all_in_sync(nodes, &keys[0].token).await;
    remember(nodes, &keys).await;
    let mut times = Vec::new();
    for key in &keys {
        times.push(revoke(manager, key, nodes).await);
    }
    (report("API, a million rows of changes", &times), keys)
}

/// The 99th percentile in ms while and after 100,000 other keys are updated in one transaction.
pub(super) async fn during_a_bulk_update(
    manager: &Manager,
    user: &UserId,
    sql: Client,
    nodes: &[Node],
) -> (f64, Vec<Key>) {
    let insert = format!(
        "INSERT INTO api_keys (user_id, name, key_prefix, key_hash)
        SELECT {user}, 'bulk', 'bulk' || n, 'x' || n FROM generate_series(1, {BULK_KEYS}) AS n"
    );
    sql.batch_execute(&insert).await.unwrap();
    let mut keys = Vec::new();
    for _ in 0..5 * COUNT {
        keys.push(issue(manager, user).await);
    }
    all_in_sync(nodes, &keys[0].token).await;
    remember(nodes, &keys).await;
    let update = tokio::spawn(async move {
        let update = "UPDATE api_keys SET name = 'bulk, updated' WHERE name = 'bulk'";
        assert_eq!(sql.execute(update, &[]).await.unwrap(), u64::from(BULK_KEYS));
        Instant::now()
    });
    let (mut during, mut after, mut ended) = (Vec::new(), Vec::new(), None);
    let mut left = keys.iter();
    while ended.is_none_or(|ended: Instant| ended.elapsed() < AFTERWARDS)
        && let Some(key) = left.next()
    {
        let is_over = update.is_finished();
        if is_over {
            ended.get_or_insert_with(Instant::now);
        }
        let times = if is_over { &mut after } else { &mut during };
        times.push(revoke(manager, key, nodes).await);
    }
    update.await.unwrap();
    assert!(!during.is_empty() && !after.is_empty(), "the update took no or all the time");
    report("API, while 100,000 keys are updated", &during);
    report("API, after that", &after);
    let all = [during, after].concat();
    let revoked = all.len();
    keys.truncate(revoked);
    (percentile(&all, 0.99), keys)
}

async fn revoke(manager: &Manager, key: &Key, nodes: &[Node]) -> f64 {
    for node in nodes {
        assert!(node.accepts(&key.token).await, "a valid key is refused");
    }
    manager.revoke(&key.id).await.unwrap();
    until_all_refuse(nodes, &key.token).await * 1e3
}

fn report(name: &str, times: &[f64]) -> f64 {
    let (median, p99, max) =
        (percentile(times, 0.5), percentile(times, 0.99), percentile(times, 1.0));
    println!("  {name:<44} {median:>8.2} {p99:>9.2} {max:>9.2}  ({} revokes)", times.len());
    p99
}
