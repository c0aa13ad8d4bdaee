//! Redis that hangs, dies, was never there or lost its memory: the store answers, nobody waits for long, and
//! Redis comes back by itself. No outage brings a revoked key back.

use std::time::{Duration, Instant};

use tower_api_key::{
    SqliteStore,
    denial::InvalidKey,
    management::IssuedKey,
    redis::{RedisServers, RedisState},
};

use crate::support::{
    fleet::*,
    key_checker::Outcome,
    log::{Log, capture},
    proxy::Proxy,
    servers::{Port, Redis},
    with_wrong_secret,
};

const LIMIT: Duration = Duration::from_millis(100);
const REVOKED: Outcome = Outcome::Invalid(InvalidKey::Revoked);

/// A node with the default time limit.
fn node_at(keys: &Keys<SqliteStore>, url: &str) -> Node<SqliteStore> {
    Node::with(
        Counting::over(keys.store.clone()),
        url,
        |cache| cache.timeout(LIMIT),
        |authenticator| authenticator,
    )
}

/// While Redis does not answer: the first few requests wait a little, the rest not at all, and all of them
/// are answered by the store.
async fn costs_little(node: &Node<SqliteStore>, keys: &Keys<SqliteStore>) {
    for n in 0..10 {
        let began = Instant::now();
        node.asks_the_store(&keys.key).await;
        assert!(began.elapsed() < 3 * LIMIT, "request {n} took {:?}", began.elapsed());
    }
    let began = Instant::now();
    for _ in 10..100 {
        node.asks_the_store(&keys.key).await;
    }
    assert!(began.elapsed() < 5 * LIMIT, "90 requests took {:?}", began.elapsed());
    assert_eq!(node.cache.state(), RedisState::Down);
    let wrong = node.try_key(&with_wrong_secret(&keys.key)).await;
    assert_eq!(wrong, (Outcome::Invalid(InvalidKey::WrongSecret), 1));
}

/// A key that was revoked meanwhile is denied from the first request on, and the others hit again.
async fn comes_back(node: &Node<SqliteStore>, keys: &Keys<SqliteStore>, revoked: &IssuedKey) {
    eventually("Redis answers again", async || {
        assert_eq!(node.try_key(revoked.expose_secret()).await.0, REVOKED);
        let (outcome, asked) = node.try_key(&keys.key).await;
        assert_eq!(outcome, Outcome::Passes);
        asked == 0
    })
    .await;
    assert_eq!(node.cache.state(), RedisState::Up);
    for _ in 0..5 {
        // By whomever: that it is revoked may lie in Redis by now.
        assert_eq!(node.try_key(revoked.expose_secret()).await.0, REVOKED);
        assert_eq!(node.try_key(&keys.key).await, (Outcome::Passes, 0));
    }
}

/// A key to revoke, which lies in Redis.
async fn victim(node: &Node<SqliteStore>, keys: &Keys<SqliteStore>) -> IssuedKey {
    let victim = keys.issue().await;
    node.until_hit(victim.expose_secret()).await;
    node.until_hit(&keys.key).await;
    victim
}

async fn revoke(node: &Node<SqliteStore>, keys: &Keys<SqliteStore>, victim: &IssuedKey) {
    let began = Instant::now();
    keys.manager.revoke(&victim.record().id).await.unwrap();
    node.until_denied(victim.expose_secret(), InvalidKey::Revoked).await;
    assert!(began.elapsed() < Duration::from_secs(1), "a revoke took {:?}", began.elapsed());
}

/// Numbers of log messages that Redis fails, and that it is connected.
fn logged(log: &Log) -> (usize, usize) {
    let text = log.text();
    let count = |text: &str, of: [&str; 2]| {
        text.lines().filter(|l| of.iter().all(|o| l.contains(o))).count()
    };
    (count(&text, ["WARN", "Redis"]), count(&text, ["INFO", "Redis is connected"]))
}

#[tokio::test]
async fn a_frozen_redis_costs_a_few_timeouts_and_then_nothing_until_it_thaws() {
    let (log, _guard) = capture();
    let (redis, keys) = (Redis::start(), sqlite().await);
    let node = node_at(&keys, &redis.url());
    let victim = victim(&node, &keys).await;
    log.take();
    redis.freeze();
    costs_little(&node, &keys).await;
    assert_eq!(logged(&log), (1, 0), "{}", log.text());
    revoke(&node, &keys, &victim).await;
    assert_eq!(logged(&log), (1, 0), "{}", log.text());
    redis.thaw();
    comes_back(&node, &keys, &victim).await;
    assert_eq!(logged(&log), (1, 1), "{}", log.text());
}

#[tokio::test]
async fn a_hundred_requests_at_once_wait_for_a_frozen_redis_no_longer_than_one() {
    let (redis, keys) = (Redis::start(), sqlite().await);
    let node = node_at(&keys, &redis.url());
    node.until_hit(&keys.key).await;
    let others = futures_util::future::join_all((0..100).map(|_| keys.issue())).await;
    redis.freeze();
    let began = Instant::now();
    let tries = others.iter().map(|key| node.authenticator.authenticate(key.expose_secret()));
    assert!(futures_util::future::join_all(tries).await.iter().all(Result::is_ok));
    assert!(began.elapsed() < 5 * LIMIT, "they took {:?}", began.elapsed());
    assert_eq!(node.cache.state(), RedisState::Down);
    redis.thaw();
}

#[tokio::test]
async fn a_redis_that_is_stopped_and_started_again_comes_back_by_itself() {
    let (log, _guard) = capture();
    let (mut redis, keys) = (Redis::start(), sqlite().await);
    let node = node_at(&keys, &redis.url());
    let victim = victim(&node, &keys).await;
    log.take();
    redis.stop();
    costs_little(&node, &keys).await;
    revoke(&node, &keys, &victim).await;
    redis.start_again();
    comes_back(&node, &keys, &victim).await;
    let (gone, back) = logged(&log);
    assert!((1..=2).contains(&gone) && back <= 2, "{}", log.text());
}

#[tokio::test]
async fn a_redis_that_is_killed_comes_back_by_itself_every_time() {
    let (mut redis, keys) = (Redis::start(), sqlite().await);
    let node = node_at(&keys, &redis.url());
    for _ in 0..3 {
        let victim = victim(&node, &keys).await;
        redis.kill();
        revoke(&node, &keys, &victim).await;
        redis.start_again();
        comes_back(&node, &keys, &victim).await;
    }
}

#[tokio::test]
async fn a_redis_that_is_not_there_at_the_start_is_used_once_it_is() {
    let (log, _guard) = capture();
    let (mut redis, keys) = (Redis::start(), sqlite().await);
    redis.stop();
    let victim = keys.issue().await;
    let node = node_at(&keys, &redis.url());
    assert_eq!(node.cache.state(), RedisState::Connecting);
    eventually("it is known to be out of reach", async || {
        node.asks_the_store(&keys.key).await;
        node.cache.state() == RedisState::Down
    })
    .await;
    costs_little(&node, &keys).await;
    assert_eq!(logged(&log), (1, 0), "{}", log.text());
    revoke(&node, &keys, &victim).await;
    redis.start_again();
    comes_back(&node, &keys, &victim).await;
    assert_eq!(logged(&log), (1, 1), "{}", log.text());
}

#[tokio::test]
async fn a_redis_that_hangs_from_the_start_costs_a_few_timeouts_and_then_nothing() {
    let (redis, keys) = (Redis::start(), sqlite().await);
    redis.freeze();
    let node = node_at(&keys, &redis.url());
    let victim = keys.issue().await;
    let began = Instant::now();
    for _ in 0..100 {
        node.asks_the_store(&keys.key).await;
    }
    let took = began.elapsed();
    assert!(took < 15 * LIMIT, "100 requests took {took:?}");
    eventually("it is known to hang", async || {
        node.asks_the_store(&keys.key).await;
        node.cache.state() == RedisState::Down
    })
    .await;
    revoke(&node, &keys, &victim).await;
    redis.thaw();
    comes_back(&node, &keys, &victim).await;
}

#[tokio::test]
async fn a_network_that_loses_everything_costs_a_few_timeouts_and_heals() {
    let (redis, keys) = (Redis::start(), sqlite().await);
    let proxy = Proxy::start(redis.port());
    let node = node_at(&keys, &proxy.url(&redis.url()));
    let victim = victim(&node, &keys).await;
    proxy.black_hole();
    costs_little(&node, &keys).await;
    revoke(&node, &keys, &victim).await;
    proxy.pass();
    comes_back(&node, &keys, &victim).await;
}

#[tokio::test]
async fn a_network_that_damages_everything_lets_nobody_in_and_heals() {
    let (redis, keys) = (Redis::start(), sqlite().await);
    let proxy = Proxy::start(redis.port());
    let node = node_at(&keys, &proxy.url(&redis.url()));
    let victim = victim(&node, &keys).await;
    proxy.corrupt();
    costs_little(&node, &keys).await;
    revoke(&node, &keys, &victim).await;
    proxy.pass();
    comes_back(&node, &keys, &victim).await;
}

#[tokio::test]
async fn connections_that_are_reset_are_made_again_at_once() {
    let (redis, keys) = (Redis::start(), sqlite().await);
    let proxy = Proxy::start(redis.port());
    let node = node_at(&keys, &proxy.url(&redis.url()));
    let victim = victim(&node, &keys).await;
    for n in 0..10 {
        if n == 5 {
            revoke(&node, &keys, &victim).await;
        }
        proxy.reset();
        let began = Instant::now();
        node.until_hit(&keys.key).await;
        assert!(began.elapsed() < Duration::from_secs(2), "it took {:?}", began.elapsed());
    }
    comes_back(&node, &keys, &victim).await;
    // One at a time: none is left behind.
    eventually("one connection is open", async || proxy.open_connections() == 1).await;
}

#[tokio::test]
async fn a_network_that_refuses_everything_costs_nothing_and_heals() {
    let (redis, keys) = (Redis::start(), sqlite().await);
    let proxy = Proxy::start(redis.port());
    let node = node_at(&keys, &proxy.url(&redis.url()));
    let victim = victim(&node, &keys).await;
    proxy.refuse();
    costs_little(&node, &keys).await;
    revoke(&node, &keys, &victim).await;
    proxy.pass();
    comes_back(&node, &keys, &victim).await;
}

#[tokio::test]
async fn an_answer_that_is_lost_is_the_stores_to_give() {
    let (redis, keys) = (Redis::start(), sqlite().await);
    let proxy = Proxy::start(redis.port());
    let node = node_at(&keys, &proxy.url(&redis.url()));
    node.until_hit(&keys.key).await;
    for command in ["MGET", "EVALSHA", "MGET", "EVALSHA"] {
        redis.command(&["DEL", &keys.data(&redis)]);
        proxy.swallow_answer_to(command);
        let swallowed = proxy.swallowed();
        eventually("the answer is lost", async || {
            assert_eq!(node.try_key(&keys.key).await.0, Outcome::Passes);
            proxy.swallowed() > swallowed
        })
        .await;
        node.until_hit(&keys.key).await;
    }
}

#[tokio::test]
async fn a_redis_that_is_slower_than_the_limit_is_left_alone() {
    let (redis, keys) = (Redis::start(), sqlite().await);
    let proxy = Proxy::start(redis.port());
    let node = node_at(&keys, &proxy.url(&redis.url()));
    node.until_hit(&keys.key).await;
    proxy.delay(LIMIT);
    let began = Instant::now();
    for _ in 0..200 {
        assert_eq!(node.try_key(&keys.key).await, (Outcome::Passes, 1));
    }
    // It is tried again each time that a probe, which may take longer, has come through.
    assert!(began.elapsed() < 50 * LIMIT, "200 requests took {:?}", began.elapsed());
    proxy.pass();
    node.until_hit(&keys.key).await;
}

#[tokio::test]
async fn a_redis_that_comes_back_with_an_old_snapshot_brings_no_revoked_key_back() {
    let (mut redis, keys) = (Redis::start(), sqlite().await);
    let [a, b] = [node_at(&keys, &redis.url()), node_at(&keys, &redis.url())];
    let victim = victim(&a, &keys).await;
    b.until_hit(victim.expose_secret()).await;
    redis.save_snapshot();
    revoke(&a, &keys, &victim).await;
    b.until_denied(victim.expose_secret(), InvalidKey::Revoked).await;
    redis.start_again_from_snapshot();
    assert!(exists(&redis, &data_of(&redis, &victim.record().prefix)), "the snapshot has it");
    let late = node_at(&keys, &redis.url());
    for node in [&a, &b, &late] {
        comes_back(node, &keys, &victim).await;
    }

    // Nor one that was revoked while it was down.
    let second = keys.issue().await;
    a.until_hit(second.expose_secret()).await;
    redis.save_snapshot();
    redis.stop();
    revoke(&a, &keys, &second).await;
    redis.start_again();
    redis.start_again_from_snapshot();
    let late = node_at(&keys, &redis.url());
    for node in [&a, &b, &late] {
        comes_back(node, &keys, &second).await;
    }
}

#[tokio::test]
async fn a_redis_that_forgets_everything_costs_hits_alone() {
    let (redis, keys) = (Redis::start(), sqlite().await);
    let node = node_at(&keys, &redis.url());
    let victim = victim(&node, &keys).await;
    revoke(&node, &keys, &victim).await;
    for _ in 0..5 {
        assert_eq!(redis.command(&["FLUSHALL"]), "OK");
        redis.command(&["SCRIPT", "FLUSH"]);
        node.asks_the_store(&keys.key).await;
        node.until_hit(&keys.key).await;
        assert_eq!(node.try_key(victim.expose_secret()).await.0, REVOKED);
    }
    assert_eq!(node.cache.state(), RedisState::Up);
}

#[tokio::test]
async fn when_both_are_down_the_answer_is_503_and_quick() {
    let (redis, keys) = (Redis::start(), sqlite().await);
    let node = node_at(&keys, &redis.url());
    node.until_hit(&keys.key).await;
    redis.freeze();
    node.store.fail(true);
    let began = Instant::now();
    for _ in 0..100 {
        assert_eq!(node.try_key(&keys.key).await, (Outcome::Status(503), 1));
    }
    assert!(began.elapsed() < 15 * LIMIT, "100 requests took {:?}", began.elapsed());
    redis.thaw();
    // Redis has it still, and the node is in sync.
    eventually("Redis answers again", async || {
        node.try_key(&keys.key).await == (Outcome::Passes, 0)
    })
    .await;
}

#[tokio::test]
async fn a_revoke_is_carried_to_redis_once_it_is_back() {
    let (redis, keys) = (Redis::start(), sqlite().await);
    let node = node_at(&keys, &redis.url());
    let victim = victim(&node, &keys).await;
    let data = data_of(&redis, &victim.record().prefix);
    // In digits, behind version, kind and secret.
    let revision = || redis.command(&["GETRANGE", &data, "25", "44"]).parse::<u64>().unwrap();
    let before = revision();
    redis.freeze();
    revoke(&node, &keys, &victim).await;
    redis.thaw();
    // With no more requests, what is from before is gone.
    eventually("the revoke is in Redis", async || revision() > before).await;
}

#[tokio::test]
async fn nobody_who_waits_for_a_port_that_nobody_has_is_a_fault_of_the_key() {
    let keys = sqlite().await;
    let nobody = Port::claim();
    let url = format!("redis://127.0.0.1:{}", nobody.number());
    for servers in [
        RedisServers::single(url.clone()),
        RedisServers::cluster([url.clone()]),
        RedisServers::sentinel([url.clone()], "the-master"),
    ] {
        let store = Counting::over(keys.store.clone());
        let node =
            Node::with(store, servers, |cache| cache.timeout(LIMIT), |authenticator| authenticator);
        eventually("it is known to be out of reach", async || {
            node.asks_the_store(&keys.key).await;
            node.cache.state() == RedisState::Down
        })
        .await;
        let began = Instant::now();
        for _ in 0..100 {
            node.asks_the_store(&keys.key).await;
        }
        assert!(began.elapsed() < 5 * LIMIT, "100 requests took {:?}", began.elapsed());
    }
}
