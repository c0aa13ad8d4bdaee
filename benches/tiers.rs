//! What an answer costs that does not come from the local cache, beside the least that it could cost.
//!
//! `cargo bench --bench tiers` starts a PostgreSQL and a Redis of its own on the loopback address, and authenticates one
//! key, one call after the other, without a local cache: a hit in Redis, beside a raw `MGET` of the same entries on one
//! multiplexed connection; and a look-up in PostgreSQL, beside a raw prepared query of the same row. First with one thread
//! and the servers on one core, where `taskset` is there: the figures are then the work of both sides. Then on one thread
//! and on a runtime with a thread for each core, with the servers on any core: a side that waits for longer than a few
//! microseconds lets its core sleep, and the time of waking it is in the figures too. Then keys with a bcrypt hash of cost
//! 10 that are authenticated for the first time, beside bcrypt alone. The contenders take turns in each round; figures are
//! medians of the rounds, ratios medians of the rounds' ratios. Last, 1,000 requests at once for one such key, with the
//! default cache: queries are counted in PostgreSQL's log, checks by their spans. The last line is JSON.

mod figures;
#[path = "../tests/support/servers/mod.rs"]
#[allow(dead_code, unused_imports, unreachable_pub)]
mod servers;

use std::{
    convert::Infallible,
    env, fs,
    hint::black_box,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant, SystemTime},
};

use figures::{median, median_ratio};
use http::{Request, Response, header};
use redis::aio::MultiplexedConnection;
use servers::{Postgres, Redis};
use tokio::{runtime, sync::Barrier, task::JoinSet};
use tower::{Layer, ServiceExt, service_fn};
use tower_api_key::{
    ApiKeyAuthLayer, Authenticator, KeyManager, KeyScheme, NewKey, PostgresStore, RedisCache,
    StoreError,
    key::{KeyFormat, KeyHash},
    management::IssuedKey,
    record::{KeyRecord, User},
    store::{
        Answer, Attribution, CacheSecret, ChangeStream, KeyRepository, KeyStore, Lookup, StoredKey,
    },
};
use tracing_subscriber::{filter::Targets, layer, prelude::*};

const ROUNDS: usize = 15;
const REDIS_CALLS: usize = 2_000;
const POSTGRES_CALLS: usize = 500;
const CALLERS: usize = 1_000;
const COST: u32 = 10;

/// The argument of the process that is pinned to one core.
const ON_ONE_CORE: &str = "--on-one-core";

fn main() {
    if env::args().any(|argument| argument == ON_ONE_CORE) {
        let (postgres, redis) = (Postgres::start(), Redis::start());
        let one_thread = runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let figures = one_thread.block_on(async {
            let (_, key) = set_up(&postgres).await;
            sequential(&postgres, &redis, &key).await
        });
        figures.print("one core for all");
        println!("{} {}", figures.hit_over_mget, figures.look_up_over_query);
        return;
    }
    let on_one_core = on_one_core();
    let (postgres, redis) = (Postgres::start(), Redis::start());
    let one_thread = runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (user, key) = one_thread.block_on(set_up(&postgres));
    let on_one = one_thread.block_on(sequential(&postgres, &redis, &key));
    on_one.print("one thread");
    let many = runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let on_many = many.block_on(async {
        // On a worker, as a server's requests are: the thread that blocks on a future is none of them.
        let (postgres, redis) = (Arc::new(postgres), Arc::new(redis));
        let (of, and, key) = (Arc::clone(&postgres), Arc::clone(&redis), key);
        let figures = tokio::spawn(async move { sequential(&of, &and, &key).await });
        (figures.await.unwrap(), postgres, redis)
    });
    let (figures, postgres, redis) = on_many;
    figures.print("a thread for each core");

    many.block_on(slow_hashes(&postgres, &user));

    let of_this_crate = Targets::new().with_target("tower_api_key", tracing::Level::DEBUG);
    tracing_subscriber::registry().with(CountChecks.with_filter(of_this_crate)).init();
    let in_sync = many.block_on(stampede(&postgres, &redis, &user, true));
    let at_start = many.block_on(stampede(&postgres, &redis, &user, false));
    println!("{CALLERS} requests at once for one cold key      look-ups   queries    checks");
    for (name, counts) in [("node in sync", &in_sync), ("node that has just started", &at_start)] {
        let Stampede { lookups, queries, checks } = counts;
        println!("  {name:<40} {lookups:>10} {queries:>9} {checks:>9}");
        assert!(*lookups > 0 && *queries > 0 && *checks > 0, "the key was not cold");
    }
    let [redis_on_cores, postgres_on_cores] = [on_one.hit_over_mget, on_one.look_up_over_query];
    let [redis, postgres] = on_one_core.unwrap_or([redis_on_cores, postgres_on_cores]);
    println!(
        "{{\"redis_hit_over_mget\":{redis:.3},\"redis_hit_over_mget_on_cores\":{redis_on_cores:.3},\
         \"redis_round_trips\":{:.3},\"postgres_hit_over_query\":{postgres:.3},\
         \"postgres_hit_over_query_on_cores\":{postgres_on_cores:.3},\"stampede_queries\":{},\
         \"stampede_checks\":{}}}",
        on_one.round_trips, in_sync.queries, in_sync.checks,
    );
}

/// Runs this program with its servers on one core. Returns the ratios of Redis and PostgreSQL; `None` without `taskset`.
fn on_one_core() -> Option<[f64; 2]> {
    let mut taskset = Command::new("taskset");
    let pinned = taskset.args(["-c", "0"]).arg(env::current_exe().unwrap()).arg(ON_ONE_CORE);
    let output = pinned.stderr(Stdio::inherit()).output().ok().filter(|it| it.status.success())?;
    let output = String::from_utf8(output.stdout).unwrap();
    let (table, ratios) = output.trim_end().rsplit_once('\n')?;
    println!("{table}");
    let mut ratios = ratios.split(' ').map(|ratio| ratio.parse().unwrap());
    Some([ratios.next()?, ratios.next()?])
}

/// Creates the tables, a user, and a key among a thousand others.
async fn set_up(postgres: &Postgres) -> (User, IssuedKey) {
    let store = store(postgres);
    store.migrate().await.unwrap();
    let manager = KeyManager::new(store);
    let user = manager.create_user("ada@example.com", "user").await.unwrap();
    // So that the table is no smaller than an index page.
    for _ in 0..1_000 {
        manager.issue(NewKey::new(user.id.clone(), "another")).await.unwrap();
    }
    postgres.client().await.batch_execute("ANALYZE").await.unwrap();
    let issued = manager.issue(NewKey::new(user.id.clone(), "laptop")).await.unwrap();
    (user, issued)
}

/// Microseconds a call, and ratios.
struct Sequential {
    mget: f64,
    hit: f64,
    hit_over_mget: f64,
    round_trips: f64,
    query: f64,
    look_up: f64,
    look_up_over_query: f64,
}

impl Sequential {
    fn print(&self, on: &str) {
        println!("{on:<40} µs a call     ratio");
        println!("  {:<36} {:>10.1}", "raw MGET", self.mget);
        println!("  {:<36} {:>10.1} {:>9.3}", "hit in Redis", self.hit, self.hit_over_mget);
        println!("  {:<36} {:>10.1}", "raw prepared query", self.query);
        let ratio = self.look_up_over_query;
        println!("  {:<36} {:>10.1} {ratio:>9.3}", "look-up in PostgreSQL", self.look_up);
        println!("  commands to Redis a hit: {:.3}", self.round_trips);
    }
}

async fn sequential(postgres: &Postgres, redis: &Redis, key: &IssuedKey) -> Sequential {
    let token = key.expose_secret();
    let below = Counting::over(store(postgres));
    let behind_redis = RedisCache::new(below.clone(), redis.url()).unwrap();
    let behind_redis = Authenticator::builder(behind_redis).cache_capacity(0).build();
    let direct = Authenticator::builder(store(postgres)).cache_capacity(0).build();

    // The first look-ups find out the secret, connect, catch up with changes and fill Redis.
    let mut hits = 0;
    while hits < 200 {
        below.asked.store(0, SeqCst);
        behind_redis.authenticate(token).await.unwrap();
        direct.authenticate(token).await.unwrap();
        hits = if below.asked.load(SeqCst) == 0 { hits + 1 } else { 0 };
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    let names = redis.command(&["KEYS", "api_key:*"]);
    // Not the tombstone of another key: its value is smaller.
    let id: String = key.record().prefix.bytes().map(|byte| format!("{byte:02x}")).collect();
    let of_key = |kind: &str| {
        let mut names = names.lines();
        let name = names.find(|name| name.starts_with(kind) && name.contains(&id));
        name.expect("it was filled").to_owned()
    };
    let names = [of_key("api_key:data:"), of_key("api_key:verified:")];
    let client = redis::Client::open(redis.url()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let (client, driver) =
        tokio_postgres::connect(&postgres.tcp_url(""), tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(driver);
    let query = client.prepare(QUERY).await.unwrap();
    let prefix = key.record().prefix.as_str();

    below.asked.store(0, SeqCst);
    let (mut mget, mut hit, mut raw, mut look_up) = (vec![], vec![], vec![], vec![]);
    for round in 0..ROUNDS {
        for at in 0..4 {
            match (at + round) % 4 {
                0 => mget.push(time_mget(&mut connection, &names).await),
                1 => hit.push(time_authenticate(&behind_redis, token, REDIS_CALLS).await),
                2 => raw.push(time_query(&client, &query, prefix).await),
                _ => look_up.push(time_authenticate(&direct, token, POSTGRES_CALLS).await),
            }
        }
    }
    let executed = |redis: &Redis| -> u64 {
        let counts = redis.command_counts();
        counts.iter().filter(|(name, _)| *name != "info").map(|(_, count)| count).sum()
    };
    let before = executed(redis);
    for _ in 0..1_000 {
        behind_redis.authenticate(token).await.unwrap();
    }
    let round_trips = (executed(redis) - before) as f64 / 1_000.0;
    assert_eq!(below.asked.load(SeqCst), 0, "these were no hits in Redis");
    Sequential {
        mget: median(&mget),
        hit: median(&hit),
        hit_over_mget: median_ratio(&hit, &mget),
        round_trips,
        query: median(&raw),
        look_up: median(&look_up),
        look_up_over_query: median_ratio(&look_up, &raw),
    }
}

/// As somebody would write it who knows what the columns are.
const QUERY: &str = "SELECT
        k.id, k.name, k.key_prefix, k.key_hash, k.fast_hash, k.fast_hash_of, k.is_active,
        k.permissions::text, k.scopes::text, k.rate_limit_per_minute, k.rate_limit_per_hour,
        k.rate_limit_per_day, k.allowed_models::text, k.allowed_endpoints::text, k.allowed_ips::text,
        k.is_unlimited, k.budget_limit_cents, k.budget_type, k.expires_at, k.total_requests,
        k.total_tokens, k.total_cost::text, k.last_used_at, k.metadata::text, k.created_at, k.updated_at,
        u.id, u.email, u.role, u.is_active
    FROM api_keys k JOIN users u ON u.id = k.user_id WHERE k.key_prefix = $1";

async fn time_mget(connection: &mut MultiplexedConnection, names: &[String; 2]) -> f64 {
    let begin = Instant::now();
    for _ in 0..REDIS_CALLS {
        let mut mget = redis::cmd("MGET");
        let found: Vec<Option<Vec<u8>>> = mget.arg(names).query_async(connection).await.unwrap();
        assert!(found.iter().all(Option::is_some));
    }
    micros(begin, REDIS_CALLS)
}

async fn time_authenticate(authenticator: &Authenticator, token: &str, calls: usize) -> f64 {
    let begin = Instant::now();
    for _ in 0..calls {
        black_box(authenticator.authenticate(token).await.unwrap());
    }
    micros(begin, calls)
}

async fn time_query(
    client: &tokio_postgres::Client,
    query: &tokio_postgres::Statement,
    prefix: &str,
) -> f64 {
    let begin = Instant::now();
    for _ in 0..POSTGRES_CALLS {
        let row = client.query_one(query, &[&prefix]).await.unwrap();
        black_box((
            row.get::<_, i64>(0),
            row.get::<_, &str>(3).len(),
            row.get::<_, &str>(27).len(),
        ));
    }
    micros(begin, POSTGRES_CALLS)
}

async fn slow_hashes(postgres: &Postgres, user: &User) {
    let store = store(postgres);
    let authenticator = Authenticator::builder(store.clone()).scheme(old_keys()).build();
    let (mut alone, mut cold) = (Vec::new(), Vec::new());
    // The first one connects.
    for n in 0..=ROUNDS {
        let key = old_key(&store, user, &format!("slow-{n:03}")).await;
        let bcrypt = async || {
            let key = key.clone();
            let begin = Instant::now();
            let hash = tokio::task::spawn_blocking(move || KeyHash::bcrypt(&key, COST));
            black_box(hash.await.unwrap().unwrap());
            micros(begin, 1) / 1_000.0
        };
        let look_up = async || time_authenticate(&authenticator, &key, 1).await / 1_000.0;
        let (of_bcrypt, of_look_up) = if n % 2 == 0 {
            (bcrypt().await, look_up().await)
        } else {
            let of_look_up = look_up().await;
            (bcrypt().await, of_look_up)
        };
        if n > 0 {
            alone.push(of_bcrypt);
            cold.push(of_look_up);
        }
    }
    println!("bcrypt, cost {COST:<27} ms a key     ratio");
    println!("  {:<36} {:>10.1}", "alone", median(&alone));
    let ratio = median_ratio(&cold, &alone);
    println!("  {:<36} {:>10.1} {ratio:>9.3}", "cold look-up", median(&cold));
}

/// What it came to: look-ups that reached the store, queries that reached the server, hash checks.
struct Stampede {
    lookups: usize,
    queries: usize,
    checks: usize,
}

async fn stampede(postgres: &Postgres, redis: &Redis, user: &User, in_sync: bool) -> Stampede {
    let others = store(postgres);
    let key = old_key(&others, user, if in_sync { "cold-syn" } else { "cold-new" }).await;
    let other = old_key(&others, user, if in_sync { "warm-syn" } else { "warm-new" }).await;
    let log_statements = |which: &'static str| async move {
        let set = format!("ALTER DATABASE postgres SET log_statement = '{which}'");
        postgres.client().await.batch_execute(&set).await.unwrap();
    };
    // It counts for connections that are made from then on: those of this store.
    log_statements("all").await;
    let below = Counting::over(store(postgres));
    let tier = RedisCache::new(below.clone(), redis.url()).unwrap();
    let authenticator = Authenticator::builder(tier).scheme(old_keys()).build();
    if in_sync {
        authenticator.authenticate(&other).await.unwrap();
        while authenticator.health().last_sync.is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let log = || fs::read_to_string(postgres.folder().join("log")).unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let (logged, asked) = (log().len(), below.asked.load(SeqCst));
    CHECKS.store(0, SeqCst);

    let layer = ApiKeyAuthLayer::from(authenticator);
    let begin = Arc::new(Barrier::new(CALLERS));
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        let (layer, begin) = (layer.clone(), Arc::clone(&begin));
        let request = Request::builder().header(header::AUTHORIZATION, format!("Bearer {key}"));
        let request = request.body(String::new()).unwrap();
        callers.spawn(async move {
            let service = layer.layer(service_fn(|_: Request<String>| async {
                Ok::<_, Infallible>(Response::new(String::new()))
            }));
            begin.wait().await;
            service.oneshot(request).await.unwrap().status()
        });
    }
    let answers = callers.join_all().await;
    let accepted = answers.iter().filter(|status| status.is_success()).count();
    assert_eq!(accepted, CALLERS, "let in, of {CALLERS}");
    // The log is written by then, and what still was under way is counted as well.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let log = log();
    // A statement is logged when it is executed, with its text.
    let queries = log[logged..].matches("AS as_of").count();
    log_statements("none").await;
    Stampede { lookups: below.asked.load(SeqCst) - asked, queries, checks: CHECKS.load(SeqCst) }
}

fn store(postgres: &Postgres) -> PostgresStore {
    PostgresStore::new(&postgres.tcp_url("")).unwrap()
}

fn old_keys() -> KeyScheme {
    KeyScheme::builder().format(KeyFormat::first_chars(8).unwrap()).build().unwrap()
}

/// Stores a key with this prefix of 8 characters, and its slow hash.
async fn old_key(store: &PostgresStore, user: &User, prefix: &str) -> String {
    let key = format!("{prefix}-of-mine");
    let hash = KeyHash::bcrypt(&key, COST).unwrap();
    let record = KeyRecord::new(0, prefix, user.clone());
    store.insert_key(&StoredKey::new(record, hash), &Attribution::default()).await.unwrap();
    key
}

/// A store that counts how often it is asked.
#[derive(Clone)]
struct Counting {
    store: PostgresStore,
    asked: Arc<AtomicUsize>,
}

impl Counting {
    fn over(store: PostgresStore) -> Self {
        Self { store, asked: Arc::default() }
    }
}

impl KeyStore for Counting {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        self.asked.fetch_add(1, SeqCst);
        self.store.resolve(lookup).await
    }

    fn changes(&self, since: SystemTime) -> ChangeStream {
        self.store.changes(since)
    }

    fn has_cache_secret(&self) -> bool {
        self.store.has_cache_secret()
    }

    async fn cache_secret(&self) -> Result<Option<CacheSecret>, StoreError> {
        // Never at once, as the store itself.
        self.store.cache_secret().await
    }
}

static CHECKS: AtomicUsize = AtomicUsize::new(0);

struct CountChecks;

impl<S: tracing::Subscriber> layer::Layer<S> for CountChecks {
    fn on_new_span(
        &self,
        span: &tracing::span::Attributes<'_>,
        _: &tracing::Id,
        _: layer::Context<'_, S>,
    ) {
        if span.metadata().name() == "bcrypt_check" {
            CHECKS.fetch_add(1, SeqCst);
        }
    }
}

fn micros(begin: Instant, calls: usize) -> f64 {
    begin.elapsed().as_secs_f64() * 1e6 / calls as f64
}
