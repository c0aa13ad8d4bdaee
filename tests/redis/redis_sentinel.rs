//! Redis behind sentinels in front of a store, and a failover meanwhile.

use std::time::Duration;

use tower_api_key::{denial::InvalidKey, redis::RedisState};

use crate::support::{fleet::*, servers::RedisSentinel};

#[tokio::test]
async fn nodes_share_what_they_know_through_the_master() {
    let (servers, keys) = (RedisSentinel::start(), sqlite().await);
    nodes_share_what_they_know(&servers, &keys).await;
    nodes_notify_each_other(&servers).await;
    let master = servers.master().port();
    let replicas = servers.nodes().iter().filter(|node| node.port() != master);
    assert!(replicas.into_iter().all(|node| !node.command_counts().contains_key("mget")));
}

#[tokio::test]
async fn a_master_that_is_killed_costs_hits_until_the_failover() {
    fails_over(RedisSentinel::kill_master).await;
}

#[tokio::test]
async fn a_master_that_hangs_and_comes_back_as_a_replica_brings_no_revoked_key_back() {
    fails_over(RedisSentinel::freeze_master).await;
}

async fn fails_over(lose: fn(&mut RedisSentinel) -> u16) {
    let (mut servers, keys) = (RedisSentinel::start(), sqlite().await);
    let limit = Duration::from_millis(100);
    let store = Counting::over(keys.store.clone());
    let node = Node::with(
        store,
        servers.servers(),
        |cache| cache.timeout(limit),
        |authenticator| authenticator,
    );
    let (other, revoked) = (keys.issue().await, keys.issue().await);
    let valid = [keys.key.as_str(), other.expose_secret()];
    for key in valid.iter().chain([&revoked.expose_secret()]) {
        node.until_hit(key).await;
    }
    let lost = lose(&mut servers);
    keys.manager.revoke(&revoked.record().id).await.unwrap();
    node.until_denied(revoked.expose_secret(), InvalidKey::Revoked).await;
    let failover = move || {
        servers.wait_for_new_master();
        servers
    };
    let mut servers = while_it_goes_on(&node, &valid, revoked.expose_secret(), failover).await;
    assert_ne!(servers.master().port(), lost);
    for key in &valid {
        node.until_hit_within(Duration::from_secs(30), key).await;
    }
    let hits = servers.master().command_counts()["mget"];
    assert!(hits > 0, "the new master was not asked");

    let back = move || {
        servers.bring_back_lost_master();
        servers.wait_for_new_master();
        servers
    };
    let servers = while_it_goes_on(&node, &valid, revoked.expose_secret(), back).await;
    for key in &valid {
        node.until_hit_within(Duration::from_secs(30), key).await;
    }
    assert_eq!(node.cache.state(), RedisState::Up);
    nodes_share_what_they_know(&servers, &keys).await;
}
