//! Rate limits of a fleet, in a Redis that the test owns.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant, SystemTime},
};

use tokio::{sync::Barrier, task::JoinSet};
use tower_api_key::{
    clock::ManualClock,
    rate_limit::{OnRedisFailure, RateLimiter, RedisRateLimiter},
    record::{KeyId, RateLimits},
    redis::RedisState,
};

use crate::support::{eventually::eventually, servers::Redis};

fn per_minute(limit: u64) -> RateLimits {
    RateLimits::default().per_minute(limit)
}

fn per_hour(limit: u64) -> RateLimits {
    RateLimits::default().per_hour(limit)
}

async fn is_up(limiter: &RedisRateLimiter) {
    eventually("Redis counts", async || {
        // One may deny everything until then.
        let _ = limiter.count(&KeyId::from(-1), per_hour(1_000_000)).await;
        limiter.state() == RedisState::Up
    })
    .await;
}

/// No window of `limits` ends in the next `length`.
async fn far_from_a_boundary(limiter: &RedisRateLimiter, limits: RateLimits, length: Duration) {
    let quota = limiter.count(&KeyId::from(-2), limits).await.unwrap();
    let left = quota.windows().next().unwrap().resets_in;
    if left < length {
        tokio::time::sleep(left).await;
    }
}

/// So many of `callers` on each of the nodes get through, who ask until they are denied, and what was left
/// each time.
async fn crowd(
    nodes: &[RedisRateLimiter],
    callers: usize,
    key: i64,
    limits: RateLimits,
) -> Vec<u64> {
    let begin = Arc::new(Barrier::new(nodes.len() * callers));
    let mut crowd = JoinSet::new();
    for node in nodes {
        for _ in 0..callers {
            let (node, begin) = (node.clone(), Arc::clone(&begin));
            crowd.spawn(async move {
                begin.wait().await;
                let mut left = Vec::new();
                loop {
                    let quota = node.count(&KeyId::from(key), limits).await.unwrap();
                    if !quota.is_allowed() {
                        return left;
                    }
                    left.push(quota.windows().next().unwrap().remaining);
                }
            });
        }
    }
    crowd.join_all().await.concat()
}

fn patient(redis: &Redis) -> RedisRateLimiter {
    // 600 callers at once on two cores are more than 100 ms of work.
    RedisRateLimiter::builder(redis.url())
        .timeout(Duration::from_secs(20))
        .on_redis_failure(OnRedisFailure::Deny)
        .build()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_let_exactly_the_limit_through_and_the_fields_add_up() {
    let redis = Redis::start();
    let nodes = [(); 3].map(|()| patient(&redis));
    for node in &nodes {
        is_up(node).await;
    }
    far_from_a_boundary(&nodes[0], per_minute(1_000_000), Duration::from_secs(30)).await;
    let began = Instant::now();
    let mut left = crowd(&nodes, 200, 7, per_minute(1_000)).await;
    assert!(began.elapsed() < Duration::from_secs(30), "it took too long to be in one window");
    left.sort_unstable();
    // Each number of requests that are left was returned once.
    assert_eq!(left, (0..1_000).collect::<Vec<_>>());
}

/// So many get through a limit of 1,000 an hour, of 200 callers on each of 3 nodes who go on asking while Redis is
/// disturbed, until it counts again and denies them.
async fn through_a_disturbance(
    on_redis_failure: OnRedisFailure,
    disturb: impl AsyncFnOnce(&mut Redis, &[RedisRateLimiter], &AtomicU64),
) -> u64 {
    let mut redis = Redis::start();
    let nodes = [(); 3].map(|()| {
        let builder = RedisRateLimiter::builder(redis.url());
        builder
            .timeout(Duration::from_millis(500))
            .nodes(3)
            .on_redis_failure(on_redis_failure)
            .build()
            .unwrap()
    });
    for node in &nodes {
        is_up(node).await;
    }
    far_from_a_boundary(&nodes[0], per_hour(1_000_000), Duration::from_secs(60)).await;
    let (through, is_over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let mut crowd = JoinSet::new();
    for node in nodes.iter().cycle().take(600) {
        let (node, through, is_over) = (node.clone(), Arc::clone(&through), Arc::clone(&is_over));
        crowd.spawn(async move {
            loop {
                let quota = node.count(&KeyId::from(7), per_hour(1_000)).await;
                let is_denied = quota.as_ref().is_ok_and(|quota| !quota.is_allowed());
                if is_denied && node.state() == RedisState::Up && is_over.load(SeqCst) {
                    return;
                }
                through.fetch_add(u64::from(quota.is_ok_and(|it| it.is_allowed())), SeqCst);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
    }
    eventually("the crowd gets through", async || through.load(SeqCst) > 200).await;
    disturb(&mut redis, &nodes, &through).await;
    for node in &nodes {
        eventually("Redis counts again", async || node.state() == RedisState::Up).await;
    }
    is_over.store(true, SeqCst);
    crowd.join_all().await;
    through.load(SeqCst)
}

async fn freeze(redis: &mut Redis, nodes: &[RedisRateLimiter], through: &AtomicU64) {
    redis.freeze();
    nobody_gets_through(nodes, through).await;
    redis.thaw();
}

/// It comes back with nothing.
async fn restart(redis: &mut Redis, nodes: &[RedisRateLimiter], through: &AtomicU64) {
    redis.stop();
    nobody_gets_through(nodes, through).await;
    redis.start_again();
}

/// The nodes have noticed that Redis fails, and their shares are used up.
async fn nobody_gets_through(nodes: &[RedisRateLimiter], through: &AtomicU64) {
    for node in nodes {
        eventually("it is down", async || node.state() == RedisState::Down).await;
    }
    eventually("nobody gets through any more", async || {
        let before = through.load(SeqCst);
        // The crowd asks ten times a second.
        tokio::time::sleep(Duration::from_millis(300)).await;
        through.load(SeqCst) == before
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_shares_a_crowd_gets_through_up_to_twice_while_redis_is_frozen() {
    let through = through_a_disturbance(OnRedisFailure::Share, freeze).await;
    assert!((999..=2_003).contains(&through), "{through}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_redis_that_lost_its_memory_counts_the_crowd_once_more() {
    let through = through_a_disturbance(OnRedisFailure::Share, restart).await;
    assert!((1_000..=3_003).contains(&through), "{through}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_deny_a_crowd_never_gets_more_through_than_redis_has_counted() {
    let through = through_a_disturbance(OnRedisFailure::Deny, freeze).await;
    assert!((200..=1_000).contains(&through), "{through}");
    let through = through_a_disturbance(OnRedisFailure::Deny, restart).await;
    assert!((1_000..=2_000).contains(&through), "{through}");
}

#[tokio::test]
async fn a_decision_is_one_round_trip() {
    let redis = Redis::start();
    let limiter = RedisRateLimiter::builder(redis.url()).nodes(1).build().unwrap();
    is_up(&limiter).await;
    let before = redis.command_counts();
    for _ in 0..50 {
        assert!(limiter.count(&KeyId::from(1), per_hour(1_000)).await.unwrap().is_allowed());
    }
    let after = redis.command_counts();
    let sent = |counts: &BTreeMap<String, u64>, name| counts.get(name).copied().unwrap_or(0);
    assert_eq!(sent(&after, "evalsha") - sent(&before, "evalsha"), 50);
    for name in ["eval", "ping", "get", "script|load"] {
        assert_eq!(sent(&after, name), sent(&before, name), "{name}");
    }
}

#[tokio::test]
async fn what_one_window_denies_is_counted_in_none() {
    let redis = Redis::start();
    let limiter = patient(&redis);
    is_up(&limiter).await;
    far_from_a_boundary(&limiter, per_hour(1_000_000), Duration::from_secs(5)).await;
    let mut limits = per_hour(10);
    (limits.per_minute, limits.per_day) = (Some(1), Some(20));
    for at in 0..5 {
        let quota = limiter.count(&KeyId::from("a {text}"), limits).await.unwrap();
        assert_eq!(quota.is_allowed(), at == 0);
        let left: Vec<_> = quota.windows().map(|window| window.remaining).collect();
        assert_eq!(left, [0, 9, 19]);
    }
    // An integer and a text that look the same are two keys.
    for key in [KeyId::from(5), KeyId::from("5")] {
        assert!(limiter.count(&key, per_hour(1)).await.unwrap().is_allowed());
        assert!(!limiter.count(&key, per_hour(1)).await.unwrap().is_allowed());
    }
    // 0 and the largest number that there is.
    assert!(!limiter.count(&KeyId::from(6), per_hour(0)).await.unwrap().is_allowed());
    assert!(limiter.count(&KeyId::from(7), per_hour(u64::MAX)).await.unwrap().is_allowed());
}

#[tokio::test]
async fn counters_end_with_their_windows_and_a_strangers_value_is_replaced() {
    let redis = Redis::start();
    let limiter = patient(&redis);
    is_up(&limiter).await;
    let name = format!("api_key:rate:{{{}}}", "6938"); // i8
    redis.command(&["SET", &name, "something else"]);
    assert!(limiter.count(&KeyId::from(8), per_hour(1)).await.unwrap().is_allowed());
    let life: i64 = redis.command(&["PTTL", &name]).trim().parse().unwrap();
    assert!((1..=3_600_000).contains(&life), "{life}");
}

#[tokio::test]
async fn a_node_that_has_had_its_share_lets_nothing_more_through_without_redis() {
    let mut redis = Redis::start();
    let nodes = [(); 2].map(|()| {
        let builder = RedisRateLimiter::builder(redis.url());
        builder.nodes(2).timeout(Duration::from_secs(2)).build().unwrap()
    });
    for node in &nodes {
        is_up(node).await;
    }
    far_from_a_boundary(&nodes[0], per_hour(1_000_000), Duration::from_secs(20)).await;
    let key = KeyId::from(7);
    for _ in 0..60 {
        assert!(nodes[0].count(&key, per_hour(100)).await.unwrap().is_allowed());
    }
    redis.stop();
    let mut through = [0; 2];
    for (node, through) in nodes.iter().zip(&mut through) {
        for _ in 0..200 {
            let quota = node.count(&key, per_hour(100)).await.unwrap();
            *through += usize::from(quota.is_allowed());
        }
    }
    // The one has had more than its 50, the other none of them.
    assert_eq!(through, [0, 50]);
    // A share is never nothing, and nothing has no share.
    assert!(nodes[0].count(&KeyId::from(8), per_hour(1)).await.unwrap().is_allowed());
    assert!(!nodes[0].count(&KeyId::from(9), per_hour(0)).await.unwrap().is_allowed());
}

#[tokio::test]
async fn a_frozen_redis_costs_little_and_comes_back_by_itself() {
    let redis = Redis::start();
    let limiter = RedisRateLimiter::new(redis.url()).unwrap();
    is_up(&limiter).await;
    far_from_a_boundary(&limiter, per_hour(1_000_000), Duration::from_secs(20)).await;
    redis.freeze();
    let began = Instant::now();
    let mut through = 0;
    for _ in 0..200 {
        let quota = limiter.count(&KeyId::from(7), per_hour(100)).await.unwrap();
        through += usize::from(quota.is_allowed());
    }
    assert_eq!(through, 100);
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert_eq!(limiter.state(), RedisState::Down);
    redis.thaw();
    eventually("Redis counts again", async || {
        limiter.count(&KeyId::from(8), per_hour(1_000_000)).await.unwrap();
        limiter.state() == RedisState::Up
    })
    .await;
}

#[tokio::test]
async fn what_happens_without_redis_is_a_choice() {
    let mut redis = Redis::start();
    let with =
        |when| RedisRateLimiter::builder(redis.url()).on_redis_failure(when).build().unwrap();
    let (allows, denies) = (with(OnRedisFailure::Allow), with(OnRedisFailure::Deny));
    for limiter in [&allows, &denies] {
        is_up(limiter).await;
    }
    redis.stop();
    for _ in 0..20 {
        let quota = allows.count(&KeyId::from(7), per_hour(1)).await.unwrap();
        assert!(quota.is_allowed() && quota.windows().next().is_none());
        let error = denies.count(&KeyId::from(7), per_hour(1)).await.unwrap_err();
        assert!(error.is_transient());
    }
    redis.start_again();
    is_up(&denies).await;
}

#[tokio::test]
async fn the_windows_of_shares_end_by_the_clock_of_the_limiter() {
    let clock = Arc::new(ManualClock::at(SystemTime::UNIX_EPOCH + Duration::from_secs(45)));
    let mut redis = Redis::start();
    let limiter = RedisRateLimiter::builder(redis.url()).nodes(1).clock(clock.clone()).build();
    let limiter = limiter.unwrap();
    redis.stop();
    let key = KeyId::from(1);
    let passes = async || limiter.count(&key, per_minute(1)).await.unwrap().is_allowed();
    assert!(passes().await);
    clock.advance(Duration::from_millis(14_999));
    assert!(!passes().await);
    clock.advance(Duration::from_millis(1));
    assert!(passes().await);
}

#[tokio::test]
async fn a_redis_that_lost_its_memory_counts_anew() {
    let redis = Redis::start();
    let limiter = patient(&redis);
    is_up(&limiter).await;
    far_from_a_boundary(&limiter, per_hour(1_000_000), Duration::from_secs(10)).await;
    let key = KeyId::from(7);
    assert!(limiter.count(&key, per_hour(1)).await.unwrap().is_allowed());
    assert!(!limiter.count(&key, per_hour(1)).await.unwrap().is_allowed());
    redis.command(&["FLUSHALL"]);
    redis.command(&["SCRIPT", "FLUSH"]);
    assert!(limiter.count(&key, per_hour(1)).await.unwrap().is_allowed());
    assert!(!limiter.count(&key, per_hour(1)).await.unwrap().is_allowed());
}

#[tokio::test]
async fn nodes_count_each_other() {
    let redis = Redis::start();
    let nodes = [(); 3].map(|()| RedisRateLimiter::new(redis.url()).unwrap());
    for node in &nodes {
        assert_eq!(node.nodes(), 1);
    }
    eventually("all are heard of", async || {
        for node in &nodes {
            node.count(&KeyId::from(7), per_hour(1_000_000)).await.unwrap();
        }
        nodes.iter().any(|node| node.nodes() == 3)
    })
    .await;
    assert_eq!(redis.command(&["ZCARD", "api_key:rate:nodes"]).trim(), "3");
}

#[tokio::test]
async fn services_with_a_namespace_each_count_keys_and_nodes_of_their_own() {
    let redis = Redis::start();
    let limiter = |name: &str| {
        let builder = RedisRateLimiter::builder(redis.url()).timeout(Duration::from_secs(2));
        builder.namespace(name).build().unwrap()
    };
    let [a, b, other_node_of_b] = [limiter("a"), limiter("b"), limiter("b")];
    let (key, limits) = (KeyId::from(2), per_hour(2));
    let allowed = async |limiter: &RedisRateLimiter| {
        is_up(limiter).await;
        let mut allowed = 0;
        for _ in 0..3 {
            allowed += usize::from(limiter.count(&key, limits).await.unwrap().is_allowed());
        }
        allowed
    };
    assert_eq!(allowed(&a).await, 2);
    assert_eq!(allowed(&b).await, 2, "the other service has used its own key 2");
    assert_eq!(allowed(&other_node_of_b).await, 0, "the nodes of a service count together");
    let nodes = |name: &str| {
        let hex: String = name.bytes().map(|byte| format!("{byte:02x}")).collect();
        redis.command(&["ZCARD", &format!("api_key:rate:{hex}:nodes")])
    };
    eventually("the nodes are counted", async || nodes("a") == "1" && nodes("b") == "2").await;
}

/// Asks each node until it denies, and a while longer; returns how many requests got through.
async fn all_that_get_through(nodes: &[RedisRateLimiter], limits: RateLimits) -> u64 {
    let mut through = 0;
    for node in nodes {
        let mut denied = 0;
        while denied < 10 {
            let is_allowed = node.count(&KeyId::from(7), limits).await.unwrap().is_allowed();
            through += u64::from(is_allowed);
            denied = if is_allowed { 0 } else { denied + 1 };
        }
    }
    through
}

#[tokio::test]
async fn two_restarts_of_redis_and_four_of_nodes_let_as_many_through_as_is_documented() {
    const LIMIT: u64 = 100;
    const NODES: u64 = 3;
    let mut redis = Redis::start();
    let url = redis.url();
    let start = || {
        let builder = RedisRateLimiter::builder(url.as_str()).timeout(Duration::from_secs(2));
        builder.nodes(NODES).build().unwrap()
    };
    let mut nodes = [(); NODES as usize].map(|()| start());
    for node in &nodes {
        is_up(node).await;
    }
    far_from_a_boundary(&nodes[0], per_hour(1_000_000), Duration::from_secs(60)).await;
    // Nothing is lost yet. The worst order: shares first, which do not count what Redis lets through later.
    redis.stop();
    let mut through = all_that_get_through(&nodes, per_hour(LIMIT)).await;
    redis.start_again();
    for restart in 0..3 {
        for node in &nodes {
            is_up(node).await;
        }
        through += all_that_get_through(&nodes, per_hour(LIMIT)).await;
        if restart < 2 {
            redis.stop();
            nodes[..2].fill_with(start);
            through += all_that_get_through(&nodes, per_hour(LIMIT)).await;
            redis.start_again();
        }
    }
    let (losses, started, share) = (2, 4, LIMIT / NODES);
    assert_eq!(through, (1 + losses) * LIMIT + (NODES + started) * share);
}

#[tokio::test]
async fn nodes_go_on_counting_each_other_when_redis_loses_its_memory() {
    let mut redis = Redis::start();
    let nodes = [(); 3].map(|()| RedisRateLimiter::new(redis.url()).unwrap());
    let ask_all = async || {
        for node in &nodes {
            node.count(&KeyId::from(7), per_hour(1_000_000)).await.unwrap();
        }
    };
    eventually("each has counted all", async || {
        ask_all().await;
        nodes.iter().all(|node| node.nodes() == 3)
    })
    .await;
    redis.stop();
    redis.start_again();
    eventually("all are in the new memory", async || {
        ask_all().await;
        assert_eq!(nodes.each_ref().map(RedisRateLimiter::nodes), [3; 3]);
        redis.command(&["ZCARD", "api_key:rate:nodes"]) == "3"
    })
    .await;
}
