//! How long a revoked key goes on working, on the node that hears of it last.
//!
//! `cargo bench --bench revocation` starts a PostgreSQL and a Redis of its own and three nodes in front of
//! them, each with its own connections and its own load: a task that asks for 50 keys, rests for about a
//! millisecond, and asks again. Fresh keys, which all nodes remember, are revoked one after the other, through a
//! [`KeyManager`] and by a plain `UPDATE`; the clock runs from the moment when that call returns, which is
//! after the commit, until the last node has refused the key. The same with Redis frozen; with notifications
//! blocked in the database, so that only polling (every second) tells of changes; and for a node that a
//! black hole cuts off from both servers (`max_staleness` and `stale_if_error` of 2 s each), until it
//! refuses or answers 503: a request that waits for the database then takes up to its timeout longer, which
//! is 0.5 s here, and the default for a second node, which the JSON leaves out. Then the same by API with a million
//! rows in the table of changes, and while and after 100,000 other keys are updated in one transaction. In the end
//! all nodes, and two that have just started, are asked for all revoked keys. The last line is JSON.

#[path = "../figures/mod.rs"]
mod figures;
#[path = "../../tests/support/proxy.rs"]
#[allow(dead_code, unused_imports, unreachable_pub)]
mod proxy;
mod scale;
#[path = "../../tests/support/servers/mod.rs"]
#[allow(dead_code, unused_imports, unreachable_pub)]
mod servers;

use std::time::{Duration, Instant};

use figures::percentile;
use proxy::Proxy;
use servers::{Postgres, Redis};
use tokio::task::{JoinHandle, JoinSet, yield_now};
use tower_api_key::{
    Authenticator, Denial, KeyManager, NewKey, PostgresStore, RedisCache,
    backend::PostgresStoreBuilder,
    denial::InvalidKey,
    record::{KeyId, UserId},
};

const HEALTHY: usize = 200;
const FROZEN: usize = 100;
const POLLED: usize = 20;
const CUT_OFF: usize = 3;
const LIMIT: Duration = Duration::from_secs(2);
/// What a request may wait for a server that does not answer, beside the limits that are looked at.
const STORE_TIMEOUT: Duration = Duration::from_millis(500);
/// Nothing that is waited for takes longer.
const PATIENCE: Duration = Duration::from_secs(20);

type Manager = KeyManager<RedisCache<PostgresStore>>;

#[tokio::main]
async fn main() {
    let (postgres, redis) = (Postgres::start(), Redis::start());
    let (postgres_url, redis_url) = (postgres.tcp_url(""), redis.url());
    let store = PostgresStore::builder(&postgres_url);
    store.clone().build().unwrap().migrate().await.unwrap();
    let tier = |store: PostgresStoreBuilder, redis: &str| {
        RedisCache::new(store.max_connections(4).build().unwrap(), redis).unwrap()
    };
    let tiers = [(); 3].map(|()| tier(store.clone(), &redis_url));
    let manager = KeyManager::new(tiers[0].clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap().id;
    let (mut loaded, mut revoked) = (Vec::new(), Vec::new());
    for _ in 0..50 {
        loaded.push(issue(&manager, &user).await.token);
    }
    let mut nodes = Vec::new();
    for tier in tiers {
        nodes.push(Node::start(Authenticator::new(tier), &loaded));
    }
    let sql = postgres.client().await;
    all_in_sync(&nodes, &loaded[0]).await;

    println!(
        "milliseconds until the last of 3 nodes refuses   median       p99       max  call, p99"
    );
    let mut p99s = Vec::new();
    for (redis_is_frozen, count) in [(false, HEALTHY), (true, FROZEN)] {
        let mut keys = Vec::new();
        for _ in 0..2 * count {
            keys.push(issue(&manager, &user).await);
        }
        remember(&nodes, &keys).await;
        if redis_is_frozen {
            redis.freeze();
        }
        let (by_api, by_sql) = keys.split_at(count);
        for (name, keys) in [("API", by_api), ("SQL", by_sql)] {
            let (mut times, mut calls) = (Vec::new(), Vec::new());
            for key in keys {
                for node in &nodes {
                    assert!(node.accepts(&key.token).await, "a valid key is refused");
                }
                let begin = Instant::now();
                match name {
                    "API" => manager.revoke(&key.id).await.unwrap(),
                    _ => revoke_by_hand(&sql, key).await,
                }
                calls.push(begin.elapsed().as_secs_f64() * 1e3);
                times.push(until_all_refuse(&nodes, &key.token).await * 1e3);
            }
            let name = format!("{name}{}", if redis_is_frozen { ", Redis frozen" } else { "" });
            let (median, p99, max) =
                (percentile(&times, 0.5), percentile(&times, 0.99), percentile(&times, 1.0));
            let call = percentile(&calls, 0.99);
            println!("  {name:<44} {median:>8.2} {p99:>9.2} {max:>9.2} {call:>10.2}");
            if redis_is_frozen {
                // The first ones wait for it until the breakers open.
                println!("    the first 10: {:.1?}", &times[..10]);
            }
            p99s.push(p99);
        }
        redis.thaw();
        revoked.extend(keys);
    }

    let polling: Vec<_> = (0..3)
        .map(|_| {
            let store = store.clone().poll_interval(Duration::from_secs(1));
            Node::start(Authenticator::new(tier(store, &redis_url)), &loaded)
        })
        .collect();
    all_in_sync(&polling, &loaded[0]).await;
    let functions = block_notifications(&sql).await;
    let (times, keys) = polled(&manager, &user, &sql, &polling).await;
    revoked.extend(keys);
    let polling_max = percentile(&times, 1.0);
    assert!(polling_max > 0.2, "notifications came although they are blocked");
    println!("seconds until the last of 3 nodes refuses, polling every second");
    println!("  median {:.3}, max {polling_max:.3}", percentile(&times, 0.5));
    for function in functions {
        sql.batch_execute(&function).await.unwrap();
    }

    let [to_postgres, to_redis] = [postgres.port(), redis.port()].map(Proxy::start);
    let far_store = PostgresStore::builder(&to_postgres.url(&postgres_url));
    let far_stores = [far_store.clone().timeout(STORE_TIMEOUT), far_store];
    let far = far_stores.map(|store| {
        let far = Authenticator::builder(tier(store, &to_redis.url(&redis_url)));
        Node::start(far.max_staleness(LIMIT).stale_if_error(LIMIT).build(), &loaded)
    });
    println!("seconds that nodes cut off from both servers go on   last accepted    refused");
    let mut isolated_max: f64 = 0.0;
    for round in 1..=3 {
        all_in_sync(&far, &loaded[0]).await;
        let mut keys = Vec::new();
        for _ in 0..CUT_OFF {
            keys.push(issue(&manager, &user).await);
        }
        remember(&far, &keys).await;
        to_postgres.black_hole();
        to_redis.black_hole();
        let mut watched = [(); 2].map(|()| JoinSet::new());
        for key in &keys {
            revoke_by_hand(&sql, key).await;
            for (node, watched) in far.iter().zip(&mut watched) {
                watched.spawn(until_let_in_no_more(node.authenticator.clone(), key.token.clone()));
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        let names = ["store timeout 0.5 s", "default timeouts"];
        for (at, (watched, name)) in watched.into_iter().zip(names).enumerate() {
            let outcomes = watched.join_all().await;
            let accepted = outcomes.iter().map(|(accepted, _)| *accepted).fold(0.0, f64::max);
            let refused = outcomes.iter().map(|(_, refused)| *refused).fold(0.0, f64::max);
            println!("  cut {round}, {name:<42} {accepted:>16.3} {refused:>10.3}");
            assert!(accepted > LIMIT.as_secs_f64() / 2.0, "the node was not cut off");
            if at == 0 {
                isolated_max = isolated_max.max(refused);
            }
        }
        to_postgres.pass();
        to_redis.pass();
        revoked.extend(keys);
    }

    let (million, keys) = scale::with_a_million_changes(&manager, &user, &sql, &nodes).await;
    revoked.extend(keys);
    let updater = postgres.client().await;
    let (bulk, keys) = scale::during_a_bulk_update(&manager, &user, updater, &nodes).await;
    revoked.extend(keys);

    let fresh: Vec<_> = (0..2)
        .map(|_| Node::start(Authenticator::new(tier(store.clone(), &redis_url)), &loaded))
        .collect();
    let mut all = nodes;
    all.extend(polling.into_iter().chain(far).chain(fresh));
    all_in_sync(&all, &loaded[0]).await;
    let (mut resurrected, mut unavailable) = (0, 0);
    for key in &revoked {
        for node in &all {
            match node.authenticator.authenticate(&key.token).await {
                Ok(_) => resurrected += 1,
                Err(Denial::InvalidKey(_)) => {}
                Err(_) => unavailable += 1,
            }
        }
    }
    println!(
        "{} revoked keys on {} nodes: {resurrected} let in, {unavailable} answers of 503",
        revoked.len(),
        all.len()
    );
    println!(
        "{{\"api_p99_ms\":{:.2},\"sql_p99_ms\":{:.2},\"polling_max_s\":{polling_max:.3},\
         \"isolated_max_s\":{isolated_max:.3},\"api_p99_ms_million\":{million:.2},\"bulk_p99_ms\":{bulk:.2},\
         \"resurrected\":{resurrected}}}",
        p99s[0], p99s[1],
    );
}

struct Node {
    authenticator: Authenticator,
    load: JoinHandle<()>,
}

impl Node {
    /// A node that is asked for these keys all the time.
    fn start(authenticator: Authenticator, loaded: &[String]) -> Self {
        let (asked, loaded) = (authenticator.clone(), loaded.to_vec());
        let load = tokio::spawn(async move {
            loop {
                for key in &loaded {
                    let _ = asked.authenticate(key).await;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        Self { authenticator, load }
    }

    async fn accepts(&self, token: &str) -> bool {
        self.authenticator.authenticate(token).await.is_ok()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.load.abort();
    }
}

struct Key {
    id: KeyId,
    token: String,
}

async fn issue(manager: &Manager, user: &UserId) -> Key {
    let issued = manager.issue(NewKey::new(user.clone(), "laptop")).await.unwrap();
    Key { id: issued.record().id.clone(), token: issued.expose_secret().to_owned() }
}

/// As an operator would.
async fn revoke_by_hand(sql: &tokio_postgres::Client, key: &Key) {
    let update = "UPDATE api_keys SET is_active = FALSE WHERE id = $1";
    let id = key.id.as_i64().unwrap();
    assert_eq!(sql.execute(update, &[&id]).await.unwrap(), 1);
}

/// Has the nodes ask for all of the keys, and for some time again, because what was read while the news of
/// the key itself was on its way is not kept.
async fn remember(nodes: &[Node], keys: &[Key]) {
    for _ in 0..2 {
        for node in nodes {
            for key in keys {
                assert!(node.accepts(&key.token).await, "a valid key is refused");
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Waits until all the nodes let the key in and are in sync with the database.
async fn all_in_sync(nodes: &[Node], token: &str) {
    let begin = Instant::now();
    let deadline = begin + PATIENCE;
    for node in nodes {
        // In sync since the wait began: a node that hears of nothing asks every 5 s.
        while !node.accepts(token).await
            || node.authenticator.health().last_sync.is_none_or(|ago| ago > begin.elapsed())
        {
            assert!(
                Instant::now() < deadline,
                "a node does not come into sync: {:?}",
                node.authenticator.health()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// The seconds until each node has refused the key. All are asked at the same time, all the time.
async fn until_all_refuse(nodes: &[Node], token: &str) -> f64 {
    let begin = Instant::now();
    let mut asked = JoinSet::new();
    for node in nodes {
        let (node, token) = (node.authenticator.clone(), token.to_owned());
        asked.spawn(async move {
            loop {
                match node.authenticate(&token).await {
                    Err(Denial::InvalidKey(InvalidKey::Revoked)) => {
                        return begin.elapsed().as_secs_f64();
                    }
                    Err(Denial::Unavailable(error)) => println!("    503: {error}"),
                    Err(denial) => panic!("refused for another reason: {denial}"),
                    Ok(_) => {}
                }
                assert!(begin.elapsed() < PATIENCE, "a revoked key goes on working");
                yield_now().await;
            }
        });
    }
    asked.join_all().await.into_iter().fold(0.0, f64::max)
}

/// Revokes keys at moments that have nothing to do with those of the polls.
async fn polled(
    manager: &Manager,
    user: &UserId,
    sql: &tokio_postgres::Client,
    nodes: &[Node],
) -> (Vec<f64>, Vec<Key>) {
    let mut keys = Vec::new();
    for _ in 0..POLLED {
        keys.push(issue(manager, user).await);
    }
    // Until the nodes have heard of these keys, a poll or two later.
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    remember(nodes, &keys).await;
    let mut watched = JoinSet::new();
    for key in &keys {
        revoke_by_hand(sql, key).await;
        let begin = Instant::now();
        for node in nodes {
            let (node, token) = (node.authenticator.clone(), key.token.clone());
            watched.spawn(async move {
                while node.authenticate(&token).await.is_ok() {
                    assert!(begin.elapsed() < PATIENCE, "a revoked key goes on working");
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                (token, begin.elapsed().as_secs_f64())
            });
        }
        tokio::time::sleep(Duration::from_millis(130)).await;
    }
    let times = watched.join_all().await;
    let last = |key: &Key| {
        let of_key = times.iter().filter(|(token, _)| *token == key.token);
        of_key.fold(0.0, |last: f64, (_, time)| last.max(*time))
    };
    (keys.iter().map(last).collect(), keys)
}

/// Takes the notifications out of the triggers. Returns the functions as they were.
async fn block_notifications(sql: &tokio_postgres::Client) -> Vec<String> {
    let select = "SELECT pg_get_functiondef(oid) FROM pg_proc WHERE proname LIKE 'api\\_key\\_%'
        AND prosrc LIKE '%PERFORM pg_notify(%'";
    let rows = sql.query(select, &[]).await.unwrap();
    let functions: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    assert!(!functions.is_empty(), "no trigger notifies");
    for function in &functions {
        let silent = function.replace("PERFORM pg_notify(", "PERFORM concat(");
        sql.batch_execute(&silent).await.unwrap();
    }
    functions
}

/// The seconds until the last answer that let the key in, and until the first after it that did not.
async fn until_let_in_no_more(node: Authenticator, token: String) -> (f64, f64) {
    let begin = Instant::now();
    let (mut accepted, mut refused) = (0.0, None);
    // Past the bound, in case that a refusal is not the end.
    while refused.is_none() || begin.elapsed() < 2 * LIMIT + Duration::from_secs(1) {
        let answer = node.authenticate(&token).await;
        let now = begin.elapsed().as_secs_f64();
        if answer.is_ok() {
            (accepted, refused) = (now, None);
        } else {
            refused.get_or_insert(now);
        }
        assert!(begin.elapsed() < PATIENCE, "a revoked key goes on working");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    (accepted, refused.unwrap_or_default())
}
