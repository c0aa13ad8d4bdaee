//! A Redis cluster in front of a store, and one of its masters lost.

use std::time::Duration;

use tower_api_key::{SqliteStore, denial::InvalidKey, management::IssuedKey, redis::RedisState};

use crate::support::{
    fleet::*,
    servers::{Redis, RedisCluster},
};

#[tokio::test]
async fn nodes_share_what_they_know_through_a_cluster() {
    let (cluster, keys) = (RedisCluster::start(), sqlite().await);
    nodes_share_what_they_know(&cluster, &keys).await;
    nodes_notify_each_other(&cluster).await;
}

#[tokio::test]
async fn both_entries_of_a_key_lie_in_one_slot_and_keys_in_all_of_them() {
    let (cluster, keys) = (RedisCluster::start(), sqlite().await);
    let node = keys.node(&cluster);
    let mut masters = Vec::new();
    for _ in 0..30 {
        let key = keys.issue().await;
        node.until_hit(key.expose_secret()).await;
        let [data, verified] = both_under(&cluster, &key.record().prefix);
        assert_eq!(cluster.slot_of(&data), cluster.slot_of(&verified));
        masters.push(cluster.master_of(&data).port());
    }
    masters.sort_unstable();
    masters.dedup();
    assert_eq!(masters.len(), 3, "{masters:?}");
    // Replicas may lag: they are not asked.
    let replicas = cluster.nodes().iter().filter(|node| !masters.contains(&node.port()));
    let reads = |node: &Redis| node.command_counts().get("mget").copied().unwrap_or(0);
    assert_eq!(replicas.map(reads).sum::<u64>(), 0);
}

#[tokio::test]
async fn a_master_that_is_killed_costs_hits_until_its_replica_takes_over() {
    let (mut cluster, keys) = (RedisCluster::start(), sqlite().await);
    let node = keys_node(&keys, &cluster);
    let revoked = keys.issue().await;
    let others = futures_util::future::join_all((0..6).map(|_| keys.issue())).await;
    let valid: Vec<_> = [keys.key.as_str()]
        .into_iter()
        .chain(others.iter().map(IssuedKey::expose_secret))
        .collect();
    for key in valid.iter().chain([&revoked.expose_secret()]) {
        node.until_hit(key).await;
    }
    let data = data_of(&cluster, &revoked.record().prefix);
    let killed = cluster.kill_master_of(&data);
    // While nobody serves its slot.
    keys.manager.revoke(&revoked.record().id).await.unwrap();
    node.until_denied(revoked.expose_secret(), InvalidKey::Revoked).await;
    let failover = move || {
        cluster.wait_until_ok();
        cluster
    };
    let mut cluster = while_it_goes_on(&node, &valid, revoked.expose_secret(), failover).await;
    assert_ne!(cluster.master_of(&data).port(), killed);
    for key in &valid {
        node.until_hit_within(Duration::from_secs(30), key).await;
    }
    let back = move || {
        cluster.start_killed_again();
        cluster.wait_until_ok();
        cluster
    };
    let cluster = while_it_goes_on(&node, &valid, revoked.expose_secret(), back).await;
    for key in &valid {
        node.until_hit_within(Duration::from_secs(30), key).await;
    }
    assert_eq!(node.cache.state(), RedisState::Up);
    nodes_share_what_they_know(&cluster, &keys).await;
}

/// With the default time limit: a lost master is one that hangs.
fn keys_node(keys: &Keys<SqliteStore>, cluster: &RedisCluster) -> Node<SqliteStore> {
    let limit = Duration::from_millis(100);
    let store = Counting::over(keys.store.clone());
    Node::with(
        store,
        cluster.servers(),
        |cache| cache.timeout(limit),
        |authenticator| authenticator,
    )
}
