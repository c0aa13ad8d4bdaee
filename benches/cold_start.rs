//! What 10,000 different keys at once cost a node whose local cache is empty, as after a deployment.
//!
//! `cargo bench --bench cold_start` starts a PostgreSQL and a Redis of its own. In each round the contenders take turns:
//! one raw prepared query with `key_prefix = ANY($1)` for all keys, on one connection; and 10,000 tasks that each
//! authenticate a key of their own, through a new authenticator whose connections are open: over PostgreSQL, over an
//! empty Redis before it, over a Redis that has all keys, and over a replica that has loaded them. The figures are
//! medians of the rounds, the ratios medians of the rounds' ratios. Queries are counted in PostgreSQL's log, in a round
//! that is not timed. The last line is JSON.

mod figures;
#[path = "../tests/support/servers/mod.rs"]
#[allow(dead_code, unused_imports, unreachable_pub)]
mod servers;

use std::{
    hint::black_box,
    sync::Arc,
    time::{Duration, Instant},
};

use figures::{median, median_ratio};
use servers::{Postgres, Redis};
use tokio::task::JoinSet;
use tower_api_key::{
    Authenticator, KeyManager, KeyScheme, PostgresStore, RedisCache, Replica,
    record::KeyRecord,
    store::{Attribution, KeyRepository, KeyStore, StoredKey},
};

const KEYS: usize = 10_000;
const ROUNDS: usize = 9;

/// As somebody would write it who knows what the columns are.
const QUERY: &str = "SELECT
        k.id, k.name, k.key_prefix, k.key_hash, k.fast_hash, k.fast_hash_of, k.is_active,
        k.permissions::text, k.scopes::text, k.rate_limit_per_minute, k.rate_limit_per_hour,
        k.rate_limit_per_day, k.allowed_models::text, k.allowed_endpoints::text, k.allowed_ips::text,
        k.is_unlimited, k.budget_limit_cents, k.budget_type, k.expires_at, k.total_requests,
        k.total_tokens, k.total_cost::text, k.last_used_at, k.metadata::text, k.created_at, k.updated_at,
        u.id, u.email, u.role, u.is_active
    FROM api_keys k JOIN users u ON u.id = k.user_id WHERE k.key_prefix = ANY($1)";

struct Keys {
    secrets: Vec<String>,
    /// Keys that open connections.
    others: Vec<String>,
    prefixes: Vec<String>,
}

#[tokio::main]
async fn main() {
    let postgres = Postgres::with_settings(&["shared_buffers=128MB"]);
    let redis = Redis::start();
    let keys = store_keys(&postgres).await;

    let (client, driver) =
        tokio_postgres::connect(&postgres.tcp_url(""), tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(driver);
    let query = client.prepare(QUERY).await.unwrap();
    let (client, prefixes) = (Arc::new(client), Arc::new(keys.prefixes.clone()));
    let one_query = async || {
        let (client, query) = (Arc::clone(&client), query.clone());
        let prefixes = Arc::clone(&prefixes);
        let one = tokio::spawn(async move {
            let begin = Instant::now();
            let rows = client.query(&query, &[&*prefixes]).await.unwrap();
            assert_eq!(rows.len(), KEYS);
            for row in &rows {
                black_box((row.get::<_, i64>(0), row.get::<_, &str>(3), row.get::<_, &str>(27)));
            }
            millis(begin)
        });
        one.await.unwrap()
    };
    let over_postgres = async || over(store(&postgres), &keys).await;
    let over_empty_redis = async || {
        redis.command(&["FLUSHALL"]);
        over(RedisCache::new(store(&postgres), redis.url()).unwrap(), &keys).await
    };
    let over_warm_redis = async || {
        // Each key has an entry of its own and one of its lookup id.
        while redis.command(&["DBSIZE"]).trim().parse::<usize>().unwrap() < 2 * KEYS {
            over(RedisCache::new(store(&postgres), redis.url()).unwrap(), &keys).await;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        over(RedisCache::new(store(&postgres), redis.url()).unwrap(), &keys).await
    };

    let over_replica = async || {
        let replica = Replica::new(store(&postgres)).unwrap();
        replica.loaded().await;
        over(replica, &keys).await
    };

    let (mut one, mut cold, mut empty_redis, mut warm_redis) = (vec![], vec![], vec![], vec![]);
    let mut replica = vec![];
    // The first round fills caches and plans.
    for round in 0..=ROUNDS {
        for at in 0..4 {
            match (at + round) % 4 {
                0 => one.push(one_query().await),
                1 => cold.push(over_postgres().await),
                2 => replica.push(over_replica().await),
                _ => {
                    empty_redis.push(over_empty_redis().await);
                    // What was written behind the answers has arrived by then.
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    warm_redis.push(over_warm_redis().await);
                }
            }
        }
    }
    let timed = |values: &[f64]| values[1..].to_vec();
    let [one, cold, empty_redis, warm_redis, replica] =
        [&one, &cold, &empty_redis, &warm_redis, &replica].map(|values| timed(values));

    let log_statements = |which: &'static str| {
        let postgres = &postgres;
        async move {
            let set = format!("ALTER DATABASE postgres SET log_statement = '{which}'");
            postgres.client().await.batch_execute(&set).await.unwrap();
        }
    };
    let counted = async |before: usize| {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let log = postgres.log();
        // Without those that open the connections.
        log[before..].matches("AS as_of").count().saturating_sub(keys.others.len())
    };
    log_statements("all").await;
    let before = postgres.log().len();
    over_postgres().await;
    let queries = counted(before).await;
    let before = postgres.log().len();
    over_empty_redis().await;
    let queries_empty_redis = counted(before).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    over_warm_redis().await;
    let before = postgres.log().len();
    over_warm_redis().await;
    let queries_warm_redis = counted(before).await;
    let before = postgres.log().len();
    over_replica().await;
    // The pages of the load have a time, too.
    let pages = (KEYS + keys.others.len()) / 1_000 + 1;
    let queries_replica = (counted(before).await + keys.others.len()).saturating_sub(pages);
    log_statements("none").await;

    println!("{KEYS} different keys at once                     ms     ratio   queries");
    println!("  one query for all of them            {:>10.1} {:>9.3} {:>9}", median(&one), 1.0, 1);
    for (name, values, queries) in [
        ("PostgreSQL", &cold, queries),
        ("an empty Redis before PostgreSQL", &empty_redis, queries_empty_redis),
        ("a Redis that has all of them", &warm_redis, queries_warm_redis),
        ("a replica that has loaded them", &replica, queries_replica),
    ] {
        let ratio = median_ratio(values, &one);
        println!("  {name:<36} {:>10.1} {ratio:>9.3} {queries:>9}", median(values));
    }
    println!(
        "{{\"cold_over_one_query\":{:.3},\"cold_queries\":{queries},\"cold_ms\":{:.1},\"one_query_ms\":{:.1},\
         \"empty_redis_over_one_query\":{:.3},\"empty_redis_queries\":{queries_empty_redis},\
         \"warm_redis_over_one_query\":{:.3},\"warm_redis_queries\":{queries_warm_redis},\
         \"replica_over_one_query\":{:.3},\"replica_queries\":{queries_replica}}}",
        median_ratio(&cold, &one),
        median(&cold),
        median(&one),
        median_ratio(&empty_redis, &one),
        median_ratio(&warm_redis, &one),
        median_ratio(&replica, &one),
    );
}

/// Returns the milliseconds in which all keys are authenticated at once by a node that has none of them.
async fn over(store: impl KeyStore, keys: &Keys) -> f64 {
    // By default, half of the keys would be rejected: 4,096 look-ups are under way at most.
    let authenticator = Authenticator::builder(store).max_lookups(2 * KEYS).build();
    let authenticate = |key: &String| {
        let (authenticator, key) = (authenticator.clone(), key.clone());
        async move { authenticator.authenticate(&key).await.map(|_| ()) }
    };
    // A deployment serves health checks before it gets traffic, so that the connections are open.
    let mut opening: JoinSet<_> = keys.others.iter().map(authenticate).collect();
    while let Some(outcome) = opening.join_next().await {
        outcome.unwrap().unwrap();
    }
    while authenticator.health().last_sync.is_none() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let requests: Vec<_> = keys.secrets.iter().map(authenticate).collect();
    // On a worker of the runtime: the main thread would be woken at the end of each task.
    let burst = tokio::spawn(async move {
        let begin = Instant::now();
        let mut callers: JoinSet<_> = requests.into_iter().collect();
        while let Some(outcome) = callers.join_next().await {
            outcome.unwrap().expect("no key is denied");
        }
        millis(begin)
    });
    burst.await.unwrap()
}

async fn store_keys(postgres: &Postgres) -> Keys {
    let store = store(postgres);
    store.migrate().await.unwrap();
    let manager = KeyManager::new(store.clone());
    let scheme = KeyScheme::default();
    let mut keys = Keys { secrets: vec![], others: vec![], prefixes: vec![] };
    for of_user in 0..10 {
        let email = format!("user-{of_user}@example.com");
        let user = manager.create_user(&email, "user").await.unwrap();
        let mut stored = Vec::new();
        for n in 0..KEYS / 10 + 2 {
            let minted = scheme.mint().unwrap();
            let record = KeyRecord::new(0, minted.lookup_id(), user.clone());
            stored.push(StoredKey::new(record, minted.hash().clone()));
            let secret = minted.expose_secret().to_owned();
            if n < 2 {
                keys.others.push(secret);
            } else {
                keys.secrets.push(secret);
                keys.prefixes.push(minted.lookup_id().to_owned());
            }
        }
        store.insert_keys(&stored, &Attribution::default()).await.unwrap();
    }
    // The keys are older than the changes that a node reads at its start.
    let client = postgres.client().await;
    client.batch_execute("DELETE FROM api_key_changes").await.unwrap();
    client.batch_execute("VACUUM ANALYZE").await.unwrap();
    keys
}

fn store(postgres: &Postgres) -> PostgresStore {
    PostgresStore::new(&postgres.tcp_url("")).unwrap()
}

fn millis(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1e3
}
