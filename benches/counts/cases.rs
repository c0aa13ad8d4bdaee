//! The measured cases. Each benchmark function makes [`CALLS`] calls; what it needs is made before.
//!
//! Callgrind counts between the entry and the exit of a function that a `toggle-collect` pattern names. Code that is
//! private to the crate is reached by its public interface, and counted by the names of its functions ([`only`]). They
//! must not call each other. A case that counts nothing fails, so that a renamed function is noticed.

use std::{
    env,
    future::Future,
    hint::black_box,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
    time::{Duration, SystemTime},
};

use gungraun::{Callgrind, EntryPoint, LibraryBenchmarkConfig, prelude::*};
use http::HeaderValue;
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use tower::{Layer, Service, ServiceBuilder};
use tower_api_key::{
    ApiKeyAuthLayer, Authenticator, KeyManager, KeyScheme, MemoryStore, NewKey, RateLimitLayer,
    RedisCache, Replica, RequireLayer, SqliteStore, StoreError,
    clock::ManualClock,
    management::IssuedKey,
    middleware::{ApiKeyAuth, Guard},
    rate_limit::LocalRateLimiter,
    record::{KeyRecord, RateLimits, User, UserId},
    store::{
        Answer, CacheSecret, ChangeStream, KeyRepository, KeySelection, KeyStore, KeysRead, Lookup,
        ReadOwner,
    },
};

use super::{
    CALLS, REDIS_URL,
    call::{Call, Inner, request},
};

/// Keys of the default format, with valid checks. They are fixed, so that every run has the same instructions.
const KEY: &str = "tak_live_nqcwNe5uhl_bxyHzFMnAXW0VIZOJ7d6jp4MkJ8D";
const UNKNOWN: &str = "tak_live_2m1zgeSrVr_ts4fdjmPFYFeekU7e3iScJ3AdiBL";
/// A key whose check is wrong.
const MALFORMED: &str = "tak_live_nqcwNe5uhl_bxyHzFMnAXW0VIZOJ7d6jp4MkJ8E";

/// Requests with the same credential, for a service that is ready at once.
struct Calls<S> {
    service: S,
    requests: Vec<Call>,
}

impl<S: Service<Call> + Clone> Calls<S> {
    fn new(service: S, key: &str) -> Self {
        let field = HeaderValue::try_from(format!("Bearer {key}")).unwrap();
        let requests = (0..CALLS).map(|_| request(field.clone())).collect();
        let warm = Self { service: service.clone(), requests: vec![request(field)] };
        drop(warm.run());
        Self { service, requests }
    }

    fn run(mut self) -> Self {
        let mut cx = Context::from_waker(Waker::noop());
        for request in self.requests.drain(..) {
            let future = pin!(self.service.call(request));
            let Poll::Ready(response) = future.poll(&mut cx) else { panic!("a call waits") };
            drop(black_box(response));
        }
        self
    }
}

/// A store with one key.
struct OneKey;

impl KeyStore for OneKey {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        if lookup.expose_secret() != KEY {
            return lookup.verify([]).await;
        }
        let mut record = KeyRecord::new(1, lookup.id(), User::new(7, "ada@example.com"));
        record.scopes = ["chat:write", "models:read"].map(str::to_owned).to_vec();
        record.rate_limits = RateLimits::default().per_minute(1_000_000).per_day(100_000_000);
        Ok(lookup.assume_verified(record))
    }
}

fn clock() -> Arc<ManualClock> {
    Arc::new(ManualClock::at(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)))
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// A layer whose cache has a valid and a negative entry.
fn warm_layer() -> ApiKeyAuthLayer {
    let authenticator = Authenticator::builder(OneKey).clock(clock()).build();
    runtime().block_on(async {
        authenticator.authenticate(KEY).await.unwrap();
        authenticator.authenticate(UNKNOWN).await.unwrap_err();
    });
    ApiKeyAuthLayer::from(authenticator)
}

type Auth = ApiKeyAuth<Inner>;
type Guarded = ApiKeyAuth<Guard<Guard<Inner>>>;

fn behind_layer(key: &str) -> Calls<Auth> {
    Calls::new(warm_layer().layer(Inner), key)
}

fn behind_guards() -> Calls<Guarded> {
    let stack = ServiceBuilder::new()
        .layer(warm_layer())
        .layer(RequireLayer::scope("chat:write"))
        .layer(RateLimitLayer::new(LocalRateLimiter::with_clock(clock())))
        .service(Inner);
    Calls::new(stack, KEY)
}

#[library_benchmark]
#[bench::of(Calls::new(Inner, KEY))]
fn bare_service(calls: Calls<Inner>) -> Calls<Inner> {
    calls.run()
}

#[library_benchmark]
#[bench::of(behind_layer(KEY))]
fn hit(calls: Calls<Auth>) -> Calls<Auth> {
    calls.run()
}

#[library_benchmark]
#[bench::of(behind_layer(UNKNOWN))]
fn negative_entry(calls: Calls<Auth>) -> Calls<Auth> {
    calls.run()
}

#[library_benchmark]
#[bench::of(behind_layer(MALFORMED))]
fn malformed_key(calls: Calls<Auth>) -> Calls<Auth> {
    calls.run()
}

#[library_benchmark]
#[bench::of(behind_guards())]
fn scope_and_rate_limit(calls: Calls<Guarded>) -> Calls<Guarded> {
    calls.run()
}

#[library_benchmark(config = only(&["tower_api_key::key::scheme::KeyScheme::parse"]))]
#[bench::of(KeyScheme::default())]
fn parse_key(scheme: KeyScheme) -> KeyScheme {
    for _ in 0..CALLS {
        black_box(scheme.inspect(black_box(KEY))).unwrap();
    }
    scheme
}

/// A key in a store, and a node that looks it up each time.
struct Stored<S> {
    runtime: Runtime,
    store: S,
    key: IssuedKey,
}

impl<S: KeyRepository + Clone> Stored<S> {
    fn new(store: S) -> Self {
        let runtime = runtime();
        let key = runtime.block_on(async {
            let manager = KeyManager::new(store.clone()).clock(clock());
            let user = manager.create_user("ada@example.com", "user").await.unwrap();
            let limits = RateLimits::default().per_minute(60).per_day(10_000);
            let new = NewKey::new(user.id, "laptop").scopes(["chat:write", "models:read"]);
            let endpoint = "POST /v1/chat".parse().unwrap();
            manager.issue(new.rate_limits(limits).allowed_endpoints([endpoint])).await.unwrap()
        });
        Self { runtime, store, key }
    }
}

fn in_sqlite() -> (TempDir, Stored<SqliteStore>) {
    let directory = tempfile::tempdir().unwrap();
    let store = SqliteStore::builder(directory.path().join("keys.db")).clock(clock());
    let store = store.open().unwrap();
    runtime().block_on(store.migrate()).unwrap();
    (directory, Stored::new(store))
}

// The whole way of a row from its text to a key.
#[library_benchmark(config = only(&["tower_api_key::backend::sql::row::decode"]))]
#[bench::of(in_sqlite())]
fn decode_sql_row(
    (directory, stored): (TempDir, Stored<SqliteStore>),
) -> (TempDir, Stored<SqliteStore>) {
    for _ in 0..CALLS {
        let id = &stored.key.record().id;
        black_box(stored.runtime.block_on(stored.store.find_key(id))).unwrap();
    }
    (directory, stored)
}

/// A node without a local cache, over a cache or a replica.
struct ColdNode {
    stored: Stored<MemoryStore>,
    authenticator: Authenticator,
    below: Arc<AtomicU64>,
}

/// Counts the look-ups that reach the store below.
#[derive(Clone)]
struct Counted(MemoryStore, Arc<AtomicU64>);

impl KeyStore for Counted {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        self.1.fetch_add(1, Relaxed);
        self.0.resolve(lookup).await
    }

    fn changes(&self, since: SystemTime) -> ChangeStream {
        self.0.changes(since)
    }

    fn can_read_keys(&self) -> bool {
        true
    }

    async fn read_keys(&self, selection: &KeySelection) -> Result<KeysRead, StoreError> {
        self.0.read_keys(selection).await
    }

    async fn read_owners(&self, owners: &[UserId]) -> Result<Vec<ReadOwner>, StoreError> {
        self.0.read_owners(owners).await
    }
}

impl ColdNode {
    fn behind_redis() -> Self {
        let clock = clock();
        let stored = Stored::new(MemoryStore::with_clock(clock.clone()));
        let below = Arc::new(AtomicU64::new(0));
        let store = Counted(stored.store.clone(), Arc::clone(&below));
        let cache = RedisCache::builder(store, env::var(REDIS_URL).unwrap())
            .secret(CacheSecret::new(1, [7; 32]))
            .clock(clock.clone())
            .build()
            .unwrap();
        let authenticator = Authenticator::builder(cache).clock(clock).cache_capacity(0).build();
        let this = Self { stored, authenticator, below };
        // The first look-ups connect, catch up with changes, and fill Redis.
        this.warm_up();
        this
    }

    fn over_replica() -> Self {
        let clock = clock();
        let stored = Stored::new(MemoryStore::with_clock(clock.clone()));
        let below = Arc::new(AtomicU64::new(0));
        let store = Counted(stored.store.clone(), Arc::clone(&below));
        let replica = Replica::builder(store).clock(clock.clone()).build().unwrap();
        stored.runtime.block_on(replica.loaded());
        let authenticator = Authenticator::builder(replica).clock(clock).cache_capacity(0).build();
        let this = Self { stored, authenticator, below };
        this.warm_up();
        this
    }

    /// Makes look-ups until none reaches the store below.
    fn warm_up(&self) {
        while self.look_up() > 0 {
            // A look-up that does not wait lets no task run.
            self.stored.runtime.block_on(tokio::task::yield_now());
        }
    }

    /// Makes one look-up, and returns how many have reached the store below.
    fn look_up(&self) -> u64 {
        let before = self.below.load(Relaxed);
        let key = self.stored.key.expose_secret();
        self.stored.runtime.block_on(self.authenticator.authenticate(key)).unwrap();
        self.below.load(Relaxed) - before
    }
}

// The values of a hit in Redis: authenticated, decoded and made into an answer.
#[library_benchmark(config = only_after_start(&[
    "tower_api_key::backend::redis::entry::Entry::decode",
    "tower_api_key::backend::redis::answer",
]))]
#[bench::of(ColdNode::behind_redis())]
fn decode_redis_entry(node: ColdNode) -> ColdNode {
    for _ in 0..CALLS {
        assert_eq!(node.look_up(), 0);
    }
    node
}

// The values that a look-up in the store below writes to Redis.
#[library_benchmark(config = only_after_start(&[
    "tower_api_key::backend::redis::keys::Keys::new",
    "tower_api_key::backend::redis::keys::Keys::encode",
    "tower_api_key::backend::redis::entry::Entry::encode",
]))]
#[bench::of(ColdNode::behind_redis())]
fn encode_redis_entry(node: ColdNode) -> ColdNode {
    for _ in 0..CALLS {
        // No copy is used after a change made outside the store's knowledge.
        node.authenticator.invalidate(&node.stored.key.record().prefix);
        assert_eq!(node.look_up(), 1);
    }
    node
}

// The answer of a replica: found, decoded and verified.
#[library_benchmark(config = only_after_start(&[
    "tower_api_key::backend::replica::content::Content::find",
]))]
#[bench::of(ColdNode::over_replica())]
fn replica_hit(node: ColdNode) -> ColdNode {
    for _ in 0..CALLS {
        assert_eq!(node.look_up(), 0);
    }
    node
}

/// Counts only in these functions, not in the whole benchmark function.
fn only(functions: &[&str]) -> LibraryBenchmarkConfig {
    let mut config = LibraryBenchmarkConfig::default();
    config.tool(toggled(functions));
    config
}

/// Counts only in these functions, from the benchmark function on: what is made before it runs them a number of times
/// that depends on the network.
fn only_after_start(functions: &[&str]) -> LibraryBenchmarkConfig {
    let mut config = LibraryBenchmarkConfig::default();
    let mut callgrind = toggled(functions);
    callgrind.args(["--zero-before=*::__gungraun_wrapper_mod::*"]);
    config.tool(callgrind);
    config
}

fn toggled(functions: &[&str]) -> Callgrind {
    let mut callgrind = Callgrind::with_args(functions.iter().map(toggle));
    callgrind.entry_point(EntryPoint::None);
    callgrind
}

fn toggle(function: impl std::fmt::Display) -> String {
    format!("--toggle-collect={function}")
}

/// SHA-256 is not counted: it would hide changes of the rest.
fn without_sha256() -> LibraryBenchmarkConfig {
    let mut config = LibraryBenchmarkConfig::default();
    config.tool(Callgrind::with_args([toggle("sha2::sha256::compress256")]));
    config
}

/// Turns off the functions of glibc that only some processors have. Valgrind has no SHA instructions either.
fn same_on_all_processors() -> LibraryBenchmarkConfig {
    const OFF: &str =
        "glibc.cpu.hwcaps=-AVX2,-AVX_Fast_Unaligned_Load,-AVX512F,-AVX512VL,-ERMS,-FSRM";
    let mut config = LibraryBenchmarkConfig::default();
    config.env("GLIBC_TUNABLES", OFF).pass_through_env(REDIS_URL);
    config
}

library_benchmark_group!(
    name = requests,
    config = without_sha256(),
    benchmarks = [bare_service, hit, negative_entry, malformed_key, scope_and_rate_limit]
);

library_benchmark_group!(
    name = parts,
    benchmarks = [parse_key, decode_sql_row, decode_redis_entry, encode_redis_entry, replica_hit]
);

gungraun::main!(config = same_on_all_processors(), library_benchmark_groups = [requests, parts]);

pub(super) fn run() {
    main();
}
