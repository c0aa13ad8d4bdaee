//! What a replica of 100,000 and of 1,000,000 keys costs, and what it saves.
//!
//! `cargo bench --bench replica` fills a PostgreSQL of its own, and measures: the time of a load, also while 100 keys a
//! second are changed; the memory of a key (allocated bytes after the load, divided by the keys); a look-up of a known
//! and of an unknown key by an authenticator without a local cache; the look-ups that reach the store, and the index
//! scans of PostgreSQL on the table of keys, during 1,000,000 unknown keys with valid checks; and the time from the
//! return of a revocation to the refusal on the last of three nodes. Another number of keys is the argument. The last
//! line is JSON.

mod figures;
#[path = "../tests/support/servers/mod.rs"]
#[allow(dead_code, unused_imports, unreachable_pub)]
mod servers;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant, SystemTime},
};

use figures::{median, percentile};
use serde_json::{Value, json};
use servers::Postgres;
use tokio::{runtime, time::sleep};
use tower_api_key::{
    Authenticator, Denial, KeyManager, KeyScheme, NewKey, PostgresStore, Replica, StoreError,
    denial::InvalidKey,
    record::UserId,
    store::{
        Answer, ChangeStream, KeySelection, KeyStore, KeysRead, Lookup, ReadOwner, ReplicaState,
    },
};

/// 1,000 users. The keys have ids like those of structured keys, and the rules of 20 plans.
const FILL: &str = "
    INSERT INTO users (email) SELECT 'user' || n || '@example.com' FROM generate_series(1, 1000) n;
    ALTER TABLE api_keys DISABLE TRIGGER USER;
    INSERT INTO api_keys (user_id, name, key_prefix, key_hash, scopes, rate_limit_per_minute, expires_at, created_by)
        SELECT n % 1000 + 1, 'key ' || n, 'tak_live_' || substr(md5(n::text), 1, 12),
            'sha256$' || md5(n::text) || md5('h' || n), '[\"chat:read\", \"chat:write\"]', n % 20 * 60,
            CASE WHEN n % 10 = 4 THEN now() + INTERVAL '90 days' END, 'admin@example.com'
        FROM generate_series(1, KEYS) n;
    ALTER TABLE api_keys ENABLE TRIGGER USER;
    VACUUM ANALYZE";

const ROUNDS: usize = 5;
const CALLS: usize = 20_000;
const UNKNOWN: usize = 1_000_000;
const REVOCATIONS: usize = 200;
const PATIENCE: Duration = Duration::from_secs(600);

fn main() {
    let numbers = std::env::args().filter_map(|number| number.parse().ok()).collect::<Vec<usize>>();
    let numbers = if numbers.is_empty() { vec![100_000, 1_000_000] } else { numbers };
    let figures: serde_json::Map<_, _> =
        numbers.into_iter().map(|keys| (format!("keys_{keys}"), measure(keys))).collect();
    println!("{}", Value::Object(figures));
}

fn measure(keys: usize) -> Value {
    let server = Postgres::with_settings(&["shared_buffers=512MB", "max_wal_size=4GB"]);
    let one_thread = runtime::Builder::new_current_thread().enable_all().build().unwrap();
    one_thread.block_on(fill(&server, keys));

    // All allocations are on this thread.
    let mut took = Duration::ZERO;
    let mut loaded = None;
    let memory = allocation_counter::measure(|| {
        let (replica, time) = one_thread.block_on(load(&server));
        (took, loaded) = (time, Some(replica));
    });
    let bytes_per_key = memory.bytes_current as f64 / keys as f64;
    let replica = loaded.unwrap();
    let reported = replica.status().bytes as f64 / keys as f64;
    println!(
        "{keys} keys: loaded in {:.2} s, {bytes_per_key:.0} bytes a key (reported: {reported:.0})",
        took.as_secs_f64()
    );
    one_thread.block_on(async { drop(replica) });
    drop(one_thread);

    let many = runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let busy = many.block_on(load_with_edits(&server, keys));
    println!("  loaded in {:.2} s while {:.0} keys a second were changed", busy.0, busy.1);
    let look_ups = many.block_on(look_ups(&server));
    println!(
        "  look-up of a known key {:.0} ns, of an unknown key {:.0} ns; {UNKNOWN} unknown keys: {} queries, \
         {} index scans, in {:.1} s",
        look_ups.known_ns,
        look_ups.unknown_ns,
        look_ups.queries,
        look_ups.index_scans,
        look_ups.took
    );
    let refusals = many.block_on(revocations(&server));
    let (median, p99) = (median(&refusals), percentile(&refusals, 0.99));
    println!("  revoke to refusal on the last of 3 nodes: median {median:.1} ms, p99 {p99:.1} ms");
    json!({
        "load_s": round(took.as_secs_f64()), "load_busy_s": round(busy.0), "edits_per_s": round(busy.1),
        "bytes_per_key": bytes_per_key.round(), "known_ns": look_ups.known_ns.round(),
        "unknown_ns": look_ups.unknown_ns.round(), "unknown_queries": look_ups.queries,
        "unknown_index_scans": look_ups.index_scans, "revoke_p50_ms": round(median), "revoke_p99_ms": round(p99),
    })
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

async fn fill(server: &Postgres, keys: usize) {
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let admin = server.client().await;
    for statement in FILL.replace("KEYS", &keys.to_string()).split(";\n") {
        admin.batch_execute(statement).await.unwrap();
    }
    // Restores the modes of the triggers.
    store.migrate().await.unwrap();
}

async fn load(server: &Postgres) -> (Replica<PostgresStore>, Duration) {
    let replica = Replica::builder(PostgresStore::new(&server.url()).unwrap());
    let replica = replica.max_keys(usize::MAX).build().unwrap();
    let begin = Instant::now();
    let status = tokio::time::timeout(PATIENCE, replica.loaded()).await.unwrap();
    assert_eq!(status.state, ReplicaState::Loaded);
    (replica, begin.elapsed())
}

/// Returns the seconds of a load, and the changes a second meanwhile.
async fn load_with_edits(server: &Postgres, keys: usize) -> (f64, f64) {
    let admin = server.client().await;
    let edits = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&edits);
    let editing = tokio::spawn(async move {
        let begin = Instant::now();
        for number in 0_usize.. {
            let due = begin + Duration::from_millis(10) * number as u32;
            tokio::time::sleep_until(due.into()).await;
            let key = number.wrapping_mul(7919) % keys + 1;
            let update = format!(
                "UPDATE api_keys SET name = name || '.' WHERE id = {key} AND length(name) < 40"
            );
            admin.batch_execute(&update).await.unwrap();
            let update =
                format!("UPDATE api_keys SET rate_limit_per_day = {number} WHERE id = {key}");
            admin.batch_execute(&update).await.unwrap();
            counted.fetch_add(1, SeqCst);
        }
    });
    let before = edits.load(SeqCst);
    let (replica, took) = load(server).await;
    let edited = edits.load(SeqCst) - before;
    editing.abort();
    drop(replica);
    (took.as_secs_f64(), edited as f64 / took.as_secs_f64())
}

/// A store that counts what reaches it.
struct Counting {
    store: PostgresStore,
    calls: Arc<AtomicUsize>,
}

impl KeyStore for Counting {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        self.calls.fetch_add(1, SeqCst);
        self.store.resolve(lookup).await
    }

    fn changes(&self, since: SystemTime) -> ChangeStream {
        self.store.changes(since)
    }

    fn can_read_keys(&self) -> bool {
        true
    }

    async fn read_keys(&self, selection: &KeySelection) -> Result<KeysRead, StoreError> {
        self.calls.fetch_add(1, SeqCst);
        self.store.read_keys(selection).await
    }

    async fn read_owners(&self, owners: &[UserId]) -> Result<Vec<ReadOwner>, StoreError> {
        self.calls.fetch_add(1, SeqCst);
        self.store.read_owners(owners).await
    }
}

struct LookUps {
    known_ns: f64,
    unknown_ns: f64,
    queries: usize,
    index_scans: i64,
    /// Seconds.
    took: f64,
}

async fn look_ups(server: &Postgres) -> LookUps {
    let store = PostgresStore::new(&server.url()).unwrap();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("known@example.com", "user").await.unwrap().id;
    let mut known = Vec::new();
    for _ in 0..1_000 {
        let issued = manager.issue(NewKey::new(user.clone(), "known")).await.unwrap();
        known.push(issued.expose_secret().to_owned());
    }
    let calls = Arc::<AtomicUsize>::default();
    let counting = Counting { store, calls: Arc::clone(&calls) };
    let replica = Replica::builder(counting).max_keys(usize::MAX).build().unwrap();
    replica.loaded().await;
    let node = Authenticator::builder(replica).cache_capacity(0).without_usage().build();
    in_sync(&node, &known[0], &calls).await;

    let scheme = KeyScheme::default();
    let unknown = || scheme.mint().unwrap().expose_secret().to_owned();
    let (mut known_ns, mut unknown_ns) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        for at in 0..CALLS {
            node.authenticate(&known[at % known.len()]).await.unwrap();
        }
        known_ns.push(begin.elapsed().as_nanos() as f64 / CALLS as f64);
        let tokens: Vec<_> = (0..CALLS).map(|_| unknown()).collect();
        let begin = Instant::now();
        for token in &tokens {
            node.authenticate(token).await.unwrap_err();
        }
        unknown_ns.push(begin.elapsed().as_nanos() as f64 / CALLS as f64);
    }
    let sql = server.client().await;
    let scans = async || -> i64 {
        // Statistics of a session are reported when it was idle for ten seconds.
        sleep(Duration::from_secs(12)).await;
        let select = "SELECT coalesce(idx_scan, 0) + coalesce(seq_scan, 0) FROM pg_stat_user_tables WHERE relname = 'api_keys'";
        sql.query_one(select, &[]).await.unwrap().get(0)
    };
    let (before, scans_before) = (calls.load(SeqCst), scans().await);
    let begin = Instant::now();
    for _ in 0..UNKNOWN {
        let denial = node.authenticate(&unknown()).await.unwrap_err();
        assert!(matches!(denial, Denial::InvalidKey(InvalidKey::Unknown)), "{denial:?}");
    }
    let took = begin.elapsed().as_secs_f64();
    LookUps {
        known_ns: median(&known_ns),
        unknown_ns: median(&unknown_ns),
        queries: calls.load(SeqCst) - before,
        index_scans: scans().await - scans_before,
        took,
    }
}

/// Waits until look-ups are answered from memory.
async fn in_sync(node: &Authenticator, token: &str, calls: &AtomicUsize) {
    let begin = Instant::now();
    loop {
        let before = calls.load(SeqCst);
        node.authenticate(token).await.unwrap();
        if calls.load(SeqCst) == before {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "the replica is never in sync");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Returns the milliseconds from the return of each revocation until the last of three nodes refuses the key.
async fn revocations(server: &Postgres) -> Vec<f64> {
    let store = PostgresStore::new(&server.url()).unwrap();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("revoked@example.com", "user").await.unwrap().id;
    let mut keys = Vec::new();
    for _ in 0..REVOCATIONS {
        keys.push(manager.issue(NewKey::new(user.clone(), "revoked")).await.unwrap());
    }
    let mut nodes = Vec::new();
    for _ in 0..3 {
        let store = PostgresStore::builder(&server.url()).max_connections(2).build().unwrap();
        let replica = Replica::builder(store).max_keys(usize::MAX).build().unwrap();
        replica.loaded().await;
        nodes.push(Authenticator::builder(replica).without_usage().build());
    }
    for node in &nodes {
        for key in &keys {
            node.authenticate(key.expose_secret()).await.unwrap();
        }
    }
    let mut times = Vec::new();
    for key in &keys {
        manager.revoke(&key.record().id).await.unwrap();
        let begin = Instant::now();
        for node in &nodes {
            while node.authenticate(key.expose_secret()).await.is_ok() {
                assert!(begin.elapsed() < PATIENCE, "the key is never refused");
                sleep(Duration::from_micros(200)).await;
            }
        }
        times.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    times
}
