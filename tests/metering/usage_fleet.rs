//! Usage of a fleet on one PostgreSQL: what is recorded is what stands there, whatever breaks in between.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant, SystemTime},
};

use tokio::task::JoinSet;
use tower_api_key::{
    Authenticator, KeyManager, NewKey, PostgresStore,
    management::IssuedKey,
    metering::Usage,
    record::KeyId,
    store::{KeyRepository, KeyStore, KeyUsage, UsageBatch},
};

use crate::support::{eventually::eventually, proxy::Proxy, servers::Postgres};

async fn store_with_keys(server: &Postgres, count: usize) -> (PostgresStore, Vec<IssuedKey>) {
    let store = PostgresStore::new(&server.tcp_url("")).unwrap();
    store.migrate().await.unwrap();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap();
    let mut keys = Vec::new();
    for _ in 0..count {
        keys.push(manager.issue(NewKey::new(user.id.clone(), "k")).await.unwrap());
    }
    (store, keys)
}

/// Requests, tokens and micro-cents of all keys, in the totals and in the days.
async fn sums(server: &Postgres) -> [(i64, i64, i64); 2] {
    let client = server.client().await;
    let sum = async |sql: &str| {
        let row = client.query_one(sql, &[]).await.unwrap();
        (row.get(0), row.get(1), row.get(2))
    };
    [
        sum("SELECT sum(total_requests)::bigint, sum(total_tokens)::bigint,
            (sum(total_cost) * 1000000)::bigint FROM api_keys")
        .await,
        sum("SELECT coalesce(sum(requests), 0)::bigint, coalesce(sum(tokens), 0)::bigint,
            coalesce(sum(cost_micro_cents), 0)::bigint FROM api_key_usage")
        .await,
    ]
}

const EVENTS: u64 = 1_000_000;
const KEYS: u64 = 1_000;
const NODES: u64 = 3;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_million_events_are_counted_exactly_through_restarts_and_lost_answers() {
    let mut server = Postgres::start();
    let (_, keys) = store_with_keys(&server, KEYS as usize).await;
    let keys: Arc<Vec<String>> =
        Arc::new(keys.iter().map(|key| key.expose_secret().to_owned()).collect());
    let mut nodes = Vec::new();
    for _ in 0..NODES {
        let proxy = Proxy::start(server.port());
        let store = PostgresStore::new(&proxy.url(&server.tcp_url(""))).unwrap();
        let authenticator = Authenticator::builder(store)
            .usage_interval(Duration::from_millis(100))
            .max_staleness(Duration::from_secs(600))
            .build();
        nodes.push((proxy, authenticator));
    }
    let mut work = JoinSet::new();
    // A third of the events comes before the first restart, another one before the second.
    let restarts = Arc::new(AtomicU64::new(0));
    for (_, node) in &nodes {
        let restarts = Arc::clone(&restarts);
        let mut callers = Vec::new();
        for key in keys.iter() {
            callers.push(node.authenticate(key).await.unwrap());
        }
        work.spawn(async move {
            let events = EVENTS.div_ceil(NODES);
            for event in 0..events {
                let at = event as usize * 7 % callers.len();
                callers[at].record_usage(Usage { tokens: 3, cost: 1_000_001 });
                // Over many intervals.
                if event % 2_000 == 0 {
                    tokio::time::sleep(Duration::from_millis(30)).await;
                    while event > (1 + restarts.load(SeqCst)) * events / 3 {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                }
            }
            events
        });
    }
    let flushed = async |least: i64| {
        eventually("usage arrives", async || sums(&server).await[0].1 > least).await;
    };
    flushed(0).await;
    for (proxy, _) in &nodes {
        // Of a batch, which names this in each entry.
        proxy.swallow_answer_to("is_last_used");
    }
    eventually("an answer is lost", async || nodes.iter().any(|(proxy, _)| proxy.swallowed() > 0))
        .await;
    for kills in [false, true] {
        if kills {
            server.kill()
        } else {
            server.stop()
        }
        restarts.fetch_add(1, SeqCst);
        tokio::time::sleep(Duration::from_millis(300)).await;
        server.start_again();
        let now = sums(&server).await[0].1;
        eventually("usage arrives again", async || sums(&server).await[0].1 > now).await;
    }
    let events: u64 = work.join_all().await.into_iter().sum();
    let swallowed: usize = nodes.iter().map(|(proxy, _)| proxy.swallowed()).sum();
    assert!(swallowed >= 1);
    for (_, node) in &nodes {
        node.shutdown().await;
    }
    let events = events as i64;
    let expected = ((NODES * KEYS) as i64, 3 * events, 1_000_001 * events);
    assert_eq!(sums(&server).await, [expected; 2], "{swallowed} answers were lost");
}

const CHILD: &str = "TOWER_API_KEY_TEST_NODE";

/// No test of its own: a node in a process of its own, for the one below to kill.
#[test]
#[ignore = "a part of another test"]
fn a_node_that_will_be_killed() {
    let Ok(settings) = std::env::var(CHILD) else { return };
    let (url, key) = settings.split_once(' ').unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = PostgresStore::new(url).unwrap();
        let node = Authenticator::builder(store).usage_interval(INTERVAL).build();
        let caller = node.authenticate(key).await.unwrap();
        for event in 1_u64.. {
            caller.record_usage(Usage::tokens(1));
            println!("recorded {event}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
}

const INTERVAL: Duration = Duration::from_millis(200);

#[tokio::test]
async fn a_node_that_is_killed_loses_its_last_interval_at_most() {
    let server = Postgres::start();
    let (store, keys) = store_with_keys(&server, 1).await;
    let mut node = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "usage_fleet::a_node_that_will_be_killed", "--ignored", "--nocapture"])
        .env(CHILD, format!("{} {}", server.tcp_url(""), keys[0].expose_secret()))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let out = BufReader::new(node.stdout.take().unwrap());
    // The time at which each event was recorded, as far as it was reported.
    let reader = std::thread::spawn(move || {
        let lines = out.lines().map_while(Result::ok);
        let events = lines.filter_map(|line| line.strip_prefix("recorded ")?.parse::<u64>().ok());
        events.map(|event| (event, Instant::now())).collect::<Vec<_>>()
    });
    let id = keys[0].record().id.clone();
    let tokens = async || store.find_key(&id).await.unwrap().unwrap().into_record().usage.tokens;
    eventually("many intervals are written", async || tokens().await > 4_000).await;
    node.kill().unwrap();
    node.wait().unwrap();
    let killed = Instant::now();
    let recorded = reader.join().unwrap();
    let written = tokens().await;
    let last = recorded.last().unwrap().0;
    assert!(written <= last + 1, "{written} of {last}: something counted twice");
    // The interval, and what a flush takes on a busy machine.
    let old = recorded.iter().filter(|(_, at)| killed - *at > INTERVAL + Duration::from_secs(3));
    let old = old.map(|(event, _)| *event).max().expect("it ran for longer than that");
    assert!(written >= old, "{written} of {last} are written, {old} of them long ago");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_of_the_same_keys_never_wait_for_each_other_in_a_ring() {
    const WRITERS: u64 = 10;
    const FLUSHES: u64 = 1_000;
    let server = Postgres::with_settings(&["deadlock_timeout=100ms"]);
    let (store, keys) = store_with_keys(&server, 100).await;
    let client = server.client().await;
    // In an order of rows that has nothing to do with the ids.
    client
        .batch_execute(
            "CREATE TABLE shuffled AS SELECT * FROM api_keys ORDER BY md5(id::text);
            DELETE FROM api_keys; INSERT INTO api_keys OVERRIDING SYSTEM VALUE SELECT * FROM shuffled;
            ANALYZE",
        )
        .await
        .unwrap();
    let ids: Arc<Vec<KeyId>> = Arc::new(keys.iter().map(|key| key.record().id.clone()).collect());
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let (store, ids) = (store.clone(), Arc::clone(&ids));
        writers.spawn(async move {
            let mut random = 0x9E37_79B9_7F4A_7C15 ^ (writer + 1);
            let mut next = move |below: u64| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random % below
            };
            let mut added = 0;
            for sequence in 1..=FLUSHES {
                let mut batch =
                    UsageBatch::new(format!("writer {writer}"), sequence, SystemTime::now());
                let mut at = next(100);
                for _ in 0..=next(30) {
                    // Every key at most once, in any order.
                    at = (at + 37) % 100;
                    let mut usage = KeyUsage::new(ids[at as usize].clone());
                    usage.tokens = 1;
                    added += 1;
                    batch.entries.push(usage);
                }
                store.record_usage(&batch).await.unwrap();
            }
            added
        });
    }
    let added: i64 = writers.join_all().await.into_iter().sum();
    let row = client.query_one(
        "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()",
        &[],
    );
    assert_eq!(row.await.unwrap().get::<_, i64>(0), 0);
    assert_eq!(sums(&server).await, [(0, added, 0); 2]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_use_is_written_once_a_minute_over_the_fleet() {
    let server = Postgres::start();
    let (_, keys) = store_with_keys(&server, 20).await;
    let client = server.client().await;
    client
        .batch_execute(
            "CREATE TABLE writes (id BIGINT);
            CREATE FUNCTION note() RETURNS TRIGGER LANGUAGE plpgsql AS $$
                BEGIN INSERT INTO writes VALUES (NEW.id); RETURN NULL; END $$;
            CREATE TRIGGER note AFTER UPDATE ON api_keys FOR EACH ROW
                WHEN (OLD.last_used_at IS DISTINCT FROM NEW.last_used_at) EXECUTE FUNCTION note()",
        )
        .await
        .unwrap();
    let mut nodes = JoinSet::new();
    for _ in 0..3 {
        let store = PostgresStore::new(&server.tcp_url("")).unwrap();
        let node = Authenticator::builder(store).usage_interval(Duration::from_millis(20)).build();
        let keys: Vec<_> = keys.iter().map(|key| key.expose_secret().to_owned()).collect();
        nodes.spawn(async move {
            for _ in 0..100 {
                for key in &keys {
                    node.authenticate(key).await.unwrap();
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            node.shutdown().await;
        });
    }
    nodes.join_all().await;
    let writes = client.query("SELECT id, count(*) FROM writes GROUP BY id", &[]).await.unwrap();
    assert_eq!(writes.len(), 20);
    assert!(writes.iter().all(|row| row.get::<_, i64>(1) == 1), "{writes:?}");
    assert_eq!(sums(&server).await[0].0, 3 * 100 * 20);
}
