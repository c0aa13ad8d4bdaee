//! What limits and accounts cost, beside what they stand on.
//!
//! `cargo bench --bench enforcement` starts a PostgreSQL and a Redis of its own, on the loopback address: a hit
//! through the layer alone, and with a scope, a local rate limit and usage; a decision of the rate limiter in Redis,
//! beside the same script on one multiplexed connection; recording usage, on one thread and on all cores for keys of
//! their own; writing the usage of 10,000 keys to PostgreSQL; a hold and settle from a lease in hand. Contenders
//! take turns in each round; the figures are medians of the rounds, the ratios medians of the rounds' ratios. The
//! last line is JSON.

mod call;
mod figures;
#[path = "../tests/support/servers/mod.rs"]
#[allow(dead_code, unused_imports, unreachable_pub)]
mod servers;

use std::{
    future::Future,
    hint::black_box,
    pin::pin,
    sync::Barrier,
    task::{Context, Poll, Waker},
    time::{Duration, Instant, SystemTime},
};

use call::{Call, Inner, request};
use figures::{median, median_ratio, take_turns};
use http::HeaderValue;
use servers::{Postgres, Redis};
use tokio::runtime;
use tower::{Service, ServiceBuilder};
use tower_api_key::{
    ApiKeyAuthLayer, AuthContext, Authenticator, KeyManager, MemoryStore, NewKey, PostgresStore,
    RateLimitLayer, RequireLayer,
    management::IssuedKey,
    metering::Usage,
    rate_limit::{LocalRateLimiter, RateLimiter, RedisRateLimiter},
    record::{Budget, BudgetPeriod, KeyId, RateLimits},
    redis::RedisState,
    store::{KeyRepository, KeyStore, KeyUsage, UsageBatch},
};

const ROUNDS: usize = 15;
const KEYS: usize = 1_000;
const CALLS: usize = 100_000;
const REDIS_CALLS: usize = 2_000;

fn main() {
    let here = runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (alone, stack, stack_over_auth) = here.block_on(stacks());
    println!("{KEYS} keys in the local cache, one thread       ns a call     ratio");
    println!("  the layer alone                  {alone:>18.1}");
    println!("  with scope, rate limit, usage    {stack:>18.1} {stack_over_auth:>9.3}");

    let redis = Redis::start();
    let (eval, limit, redis_limit_over_eval) = here.block_on(limits(&redis));
    println!("rate limits in Redis                       µs a call     ratio");
    println!("  the script alone                 {eval:>18.1}");
    println!("  RedisRateLimiter                 {limit:>18.1} {redis_limit_over_eval:>9.3}");

    let (record_ns, record_scaling) = here.block_on(recording());
    println!("recording usage: {record_ns:.1} ns, scaling {record_scaling:.3}");
    let reserve_ns = here.block_on(reserving());
    println!("a hold and settle from a lease in hand: {reserve_ns:.1} ns");

    let postgres = Postgres::start();
    let flush_10k_ms = here.block_on(flushing(&postgres));
    println!("writing the usage of 10,000 keys: {flush_10k_ms:.1} ms");
    println!(
        "{{\"stack_over_auth\":{stack_over_auth:.3},\"redis_limit_over_eval\":{redis_limit_over_eval:.3},\
         \"record_ns\":{record_ns:.1},\"record_scaling\":{record_scaling:.3},\
         \"flush_10k_ms\":{flush_10k_ms:.1},\"reserve_ns\":{reserve_ns:.1}}}"
    );
}

/// A store with a key for each of `keys`, which all have the same limits and budget.
async fn keys_of(manager: &KeyManager<impl KeyRepository>, keys: usize) -> Vec<IssuedKey> {
    let user = manager.create_user("ada@example.com", "user").await.unwrap();
    let limits = RateLimits::default().per_minute(1_000_000).per_day(100_000_000);
    let budget = Budget { limit_cents: 1 << 40, period: BudgetPeriod::Monthly };
    let mut issued = Vec::new();
    for _ in 0..keys {
        let new = NewKey::new(user.id.clone(), "k").scopes(["chat:*"]).rate_limits(limits);
        issued.push(manager.issue(new.budget(budget)).await.unwrap());
    }
    issued
}

async fn stacks() -> (f64, f64, f64) {
    let store = MemoryStore::new();
    let issued = keys_of(&KeyManager::new(store.clone()), KEYS).await;
    let node = |recorded: bool| {
        let builder =
            Authenticator::builder(store.clone()).max_staleness(Duration::from_secs(3600));
        if recorded { builder.build() } else { builder.without_usage().build() }
    };
    let (silent, counting) = (node(false), node(true));
    let mut fields = Vec::new();
    for key in &issued {
        let token = key.expose_secret();
        silent.authenticate(token).await.unwrap();
        counting.authenticate(token).await.unwrap();
        fields.push(HeaderValue::try_from(format!("Bearer {token}")).unwrap());
    }
    let alone = ServiceBuilder::new().layer(ApiKeyAuthLayer::from(silent)).service(Inner);
    let stack = ServiceBuilder::new()
        .layer(ApiKeyAuthLayer::from(counting))
        .layer(RequireLayer::scope("chat:write"))
        .layer(RateLimitLayer::new(LocalRateLimiter::new()))
        .service(Inner);
    let (mut of_alone, mut of_stack) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        take_turns(
            round,
            [&mut || of_alone.push(time(alone.clone(), &fields)), &mut || {
                of_stack.push(time(stack.clone(), &fields));
            }],
        );
    }
    (median(&of_alone), median(&of_stack), median_ratio(&of_stack, &of_alone))
}

/// Nanoseconds a call.
fn time<S: Service<Call>>(mut service: S, fields: &[HeaderValue]) -> f64 {
    let mut cx = Context::from_waker(Waker::noop());
    let begin = Instant::now();
    for field in fields.iter().cycle().take(CALLS) {
        let future = pin!(service.call(request(field.clone())));
        let Poll::Ready(response) = future.poll(&mut cx) else { panic!("a hit waits for nothing") };
        assert!(response.is_ok());
    }
    begin.elapsed().as_nanos() as f64 / CALLS as f64
}

async fn limits(redis: &Redis) -> (f64, f64, f64) {
    let limiter = RedisRateLimiter::builder(redis.url()).nodes(1).build().unwrap();
    let limits = RateLimits::default().per_minute(1_000_000).per_day(100_000_000);
    let key = KeyId::from(7);
    while limiter.state() != RedisState::Up {
        limiter.count(&key, limits).await.unwrap();
    }
    let client = redis::Client::open(redis.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let script = redis::Script::new(include_str!("../src/rate_limit/take.lua"));
    let digest: String = redis::cmd("SCRIPT")
        .arg("LOAD")
        .arg(include_str!("../src/rate_limit/take.lua"))
        .query_async(&mut connection)
        .await
        .unwrap();
    assert_eq!(script.get_hash(), digest);
    let (mut of_script, mut of_limiter) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        for at in 0..2 {
            let begin = Instant::now();
            if (round + at) % 2 == 0 {
                for _ in 0..REDIS_CALLS {
                    let mut eval = redis::cmd("EVALSHA");
                    eval.arg(&digest).arg(1).arg("api_key:rate:{raw}");
                    let limits: Vec<i64> = eval
                        .arg(1_i64 << 40)
                        .arg(-1)
                        .arg(1_i64 << 50)
                        .query_async(&mut connection)
                        .await
                        .unwrap();
                    assert_eq!(limits[0], 1);
                }
                of_script.push(begin.elapsed().as_secs_f64() * 1e6 / REDIS_CALLS as f64);
            } else {
                for _ in 0..REDIS_CALLS {
                    assert!(limiter.count(&key, limits).await.unwrap().is_allowed());
                }
                of_limiter.push(begin.elapsed().as_secs_f64() * 1e6 / REDIS_CALLS as f64);
            }
        }
    }
    (median(&of_script), median(&of_limiter), median_ratio(&of_limiter, &of_script))
}

/// Nanoseconds a call on one thread, and the throughput of all cores over that of one times their number.
async fn recording() -> (f64, f64) {
    let store = MemoryStore::new();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let issued = keys_of(&KeyManager::new(store.clone()), cores).await;
    let node = Authenticator::new(store);
    let mut callers = Vec::new();
    for key in &issued {
        callers.push(node.authenticate(key.expose_secret()).await.unwrap());
    }
    let record = |caller: &AuthContext| {
        for _ in 0..10 * CALLS {
            caller.record_usage(black_box(Usage { tokens: 3, cost: 7 }));
        }
    };
    let throughput = |threads: usize| {
        let barrier = Barrier::new(threads + 1);
        let mut begin = None;
        std::thread::scope(|scope| {
            for caller in &callers[..threads] {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    record(caller);
                });
            }
            barrier.wait();
            begin = Some(Instant::now());
        });
        (threads * 10 * CALLS) as f64 / begin.unwrap().elapsed().as_nanos() as f64
    };
    let (mut one, mut all) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        take_turns(round, [&mut || one.push(throughput(1)), &mut || all.push(throughput(cores))]);
    }
    (1.0 / median(&one), median_ratio(&all, &one) / cores as f64)
}

/// Nanoseconds a hold and settle.
async fn reserving() -> f64 {
    let store = MemoryStore::new();
    let issued = keys_of(&KeyManager::new(store.clone()), 1).await;
    let node = Authenticator::new(store);
    let caller = node.authenticate(issued[0].expose_secret()).await.unwrap();
    // The lease is for many of these.
    drop(caller.reserve(1_000_000_000).await.unwrap());
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        for _ in 0..CALLS {
            caller.reserve(100).await.unwrap().settle(10);
        }
        times.push(begin.elapsed().as_nanos() as f64 / CALLS as f64);
    }
    median(&times)
}

/// Milliseconds, in batches as the recorder makes them.
async fn flushing(postgres: &Postgres) -> f64 {
    let store = PostgresStore::new(&postgres.tcp_url("")).unwrap();
    store.migrate().await.unwrap();
    KeyManager::new(store.clone()).create_user("ada@example.com", "user").await.unwrap();
    let insert = "INSERT INTO api_keys (user_id, key_prefix, key_hash)
        SELECT 1, 'prefix' || n, 'sha256$' || repeat('0', 64) FROM generate_series(1, 10000) AS n";
    postgres.client().await.batch_execute(insert).await.unwrap();
    let mut times = Vec::new();
    for round in 0..ROUNDS as u64 {
        let batches = (0..10_u64).map(|part| {
            let mut batch = UsageBatch::new("bench", round * 10 + part + 1, SystemTime::now());
            batch.entries = (0..1_000)
                .map(|n| {
                    let mut usage = KeyUsage::new(((part * 1_000 + n) as i64 + 1).into());
                    (usage.requests, usage.tokens, usage.cost_micro_cents) = (3, 100, 25);
                    usage
                })
                .collect();
            batch
        });
        let batches: Vec<_> = batches.collect();
        let begin = Instant::now();
        for batch in &batches {
            store.record_usage(batch).await.unwrap();
        }
        times.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    let counted = "SELECT min(total_requests), max(total_requests) FROM api_keys";
    let row = postgres.client().await.query_one(counted, &[]).await.unwrap();
    let expected = 3 * ROUNDS as i64;
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (expected, expected));
    median(&times)
}
