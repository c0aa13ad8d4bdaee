//! What a request pays for a Redis that hangs.
//!
//! `cargo bench --bench outage` starts a PostgreSQL and a Redis of its own, on the loopback address, freezes
//! the Redis (SIGSTOP), and asks for keys through two authenticators that remember nothing themselves: one with
//! that Redis in front of PostgreSQL, once its breaker is open, and one with PostgreSQL alone. They take turns
//! in each round; the 99th percentiles are medians of the rounds, the ratio the median of the rounds' ratios.
//! The last line is JSON.

mod figures;
#[path = "../tests/support/servers/mod.rs"]
#[allow(dead_code, unused_imports, unreachable_pub)]
mod servers;

use std::time::{Duration, Instant};

use figures::{median, median_ratio, percentile};
use servers::{Postgres, Redis};
use tokio::task::JoinSet;
use tower_api_key::{
    Authenticator, KeyManager, NewKey, PostgresStore, RedisCache, redis::RedisState,
};

const ROUNDS: usize = 25;
const CALLERS: usize = 4;
const CALLS: usize = 500;

#[tokio::main]
async fn main() {
    let (postgres, redis) = (Postgres::start(), Redis::start());
    let store = || PostgresStore::new(&postgres.tcp_url("")).unwrap();
    store().migrate().await.unwrap();
    let manager = KeyManager::new(store());
    let user = manager.create_user("ada@example.com", "user").await.unwrap();
    let mut keys = Vec::new();
    for _ in 0..CALLERS {
        let issued = manager.issue(NewKey::new(user.id.clone(), "service")).await.unwrap();
        keys.push(issued.expose_secret().to_owned());
    }

    let tier = RedisCache::new(store(), redis.url()).unwrap();
    let state = tier.clone();
    let frozen = Authenticator::builder(tier).cache_capacity(0).build();
    let without = Authenticator::builder(store()).cache_capacity(0).build();
    while state.state() != RedisState::Up {
        ask(&frozen, &keys).await;
    }
    ask(&without, &keys).await;
    redis.freeze();
    let begin = Instant::now();
    let mut before = Vec::new();
    while state.state() != RedisState::Down {
        before.extend(ask(&frozen, &keys[..1]).await);
        assert!(begin.elapsed() < Duration::from_secs(60), "the breaker never opened");
    }
    let longest_before = percentile(&before, 1.0);

    let (mut of_frozen, mut of_without) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        for at in 0..2 {
            if (round + at) % 2 == 0 {
                of_frozen.push(percentile(&ask(&frozen, &keys).await, 0.99));
            } else {
                of_without.push(percentile(&ask(&without, &keys).await, 0.99));
            }
        }
    }
    assert_eq!(
        state.state(),
        RedisState::Down,
        "the breaker has closed although Redis stands still"
    );
    let ratio = median_ratio(&of_frozen, &of_without);
    println!("{CALLERS} callers, look-ups in PostgreSQL     99th percentile, ms");
    println!("  without Redis                    {:>18.3}", median(&of_without));
    println!("  Redis frozen, breaker open       {:>18.3}", median(&of_frozen));
    println!("  ratio                            {ratio:>18.3}");
    println!("longest before the breaker opened  {longest_before:>18.3}");
    println!(
        "{{\"frozen_p99_over_without\":{ratio:.3},\"longest_before_breaker_ms\":{longest_before:.1}}}"
    );
    redis.thaw();
}

/// Milliseconds of each call, of all callers at once.
async fn ask(authenticator: &Authenticator, keys: &[String]) -> Vec<f64> {
    let mut callers = JoinSet::new();
    for key in keys {
        let (authenticator, key) = (authenticator.clone(), key.clone());
        let calls = if keys.len() == 1 { 1 } else { CALLS };
        callers.spawn(async move {
            let mut times = Vec::with_capacity(calls);
            for _ in 0..calls {
                let begin = Instant::now();
                authenticator.authenticate(&key).await.unwrap();
                times.push(begin.elapsed().as_secs_f64() * 1e3);
            }
            times
        });
    }
    callers.join_all().await.concat()
}
