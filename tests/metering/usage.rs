//! What is used on keys: how it is gathered, and that every store counts it once.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, SystemTime},
};

use tower::{ServiceBuilder, ServiceExt};
use tower_api_key::{
    ApiKeyAuthLayer, AuthContext, Authenticator, KeyManager, MemoryStore, NewKey, PostgresStore,
    StoreError,
    clock::ManualClock,
    metering::Usage,
    record::{KeyId, Revision},
    store::{
        Answer, Attribution, Change, KeyRepository, KeyStore, KeyUsage, ListKeys, Lookup,
        UsageBatch,
    },
};

use crate::support::{
    self, bearer, eventually::eventually, every_store::on_every_store, feed::FeedRecorder, fixture,
    probe::probe, rule, servers::Postgres,
};

const SOON: Duration = Duration::from_millis(5);

fn used(key: &KeyId, requests: u64, tokens: u64, cost: i64) -> KeyUsage {
    let mut usage = KeyUsage::new(key.clone());
    (usage.requests, usage.tokens, usage.cost_micro_cents) = (requests, tokens, cost);
    usage
}

fn batch(writer: &str, sequence: u64, entries: impl IntoIterator<Item = KeyUsage>) -> UsageBatch {
    let mut batch = UsageBatch::new(writer, sequence, SystemTime::now());
    batch.entries = entries.into_iter().collect();
    batch
}

async fn new_key<R: KeyRepository + Clone>(store: &R) -> KeyId {
    let manager = KeyManager::new(store.clone());
    let keys = store.list_keys(&ListKeys::default()).await.unwrap().keys;
    let email = format!("ada{}@example.com", keys.len());
    let user = manager.create_user(&email, "user").await.unwrap();
    manager.issue(NewKey::new(user.id, "k")).await.unwrap().record().id.clone()
}

async fn totals<R: KeyRepository>(store: &R, key: &KeyId) -> (u64, u64, i64) {
    let usage = store.find_key(key).await.unwrap().unwrap().into_record().usage;
    (usage.requests, usage.tokens, usage.cost_micro_cents)
}

async fn a_batch_counts_once<R: KeyRepository + Clone>(store: R) {
    let (one, other) = (new_key(&store).await, new_key(&store).await);
    let first = batch("w", 1, [used(&other, 2, 20, 200), used(&one, 1, 10, 1_000_001)]);
    for _ in 0..3 {
        store.record_usage(&first).await.unwrap();
    }
    assert_eq!(totals(&store, &one).await, (1, 10, 1_000_001));
    assert_eq!(totals(&store, &other).await, (2, 20, 200));
    store.record_usage(&batch("w", 2, [used(&one, 1, 0, 1)])).await.unwrap();
    // An old one that was on its way for long, and the same number of another writer.
    store.record_usage(&first).await.unwrap();
    store.record_usage(&batch("v", 1, [used(&one, 0, 1, 0)])).await.unwrap();
    assert_eq!(totals(&store, &one).await, (2, 11, 1_000_002));
}

async fn sums_saturate<R: KeyRepository + Clone>(store: R) {
    let (key, other) = (new_key(&store).await, new_key(&store).await);
    for sequence in 1..=3 {
        let entries = [used(&key, u64::MAX, u64::MAX, 0), used(&other, 1, 1, 1)];
        store.record_usage(&batch("w", sequence, entries)).await.unwrap();
    }
    let (requests, tokens, _) = totals(&store, &key).await;
    assert!(requests >= i64::MAX as u64 && tokens >= i64::MAX as u64, "{requests} {tokens}");
    assert_eq!(totals(&store, &other).await, (3, 3, 3));
    // What is used is never negative.
    store.record_usage(&batch("w", 4, [used(&other, 0, 0, -5)])).await.unwrap();
    assert_eq!(totals(&store, &other).await, (3, 3, 3));
}

async fn keys_that_are_gone_are_skipped<R: KeyRepository + Clone>(store: R) {
    let key = new_key(&store).await;
    let gone = [KeyId::from(987_654), KeyId::from("a text"), KeyId::from(-1)];
    let entries = gone.iter().chain([&key]).map(|key| used(key, 1, 1, 1));
    store.record_usage(&batch("w", 1, entries)).await.unwrap();
    assert_eq!(totals(&store, &key).await, (1, 1, 1));
}

async fn the_last_use_is_written_once_a_minute<R: KeyRepository + Clone>(store: R) {
    let key = new_key(&store).await;
    let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let mut sequence = 0;
    for (after, written) in [(0, 0), (1, 0), (59, 0), (60, 60), (61, 60), (200, 200), (100, 200)] {
        let at = start + Duration::from_secs(after);
        let mut usage = used(&key, 1, 0, 0);
        usage.last_used_at = Some(at);
        sequence += 1;
        let mut batch = batch("w", sequence, [usage]);
        batch.gathered_at = at;
        store.record_usage(&batch).await.unwrap();
        let record = store.find_key(&key).await.unwrap().unwrap().into_record();
        let expected = start + Duration::from_secs(written);
        assert_eq!(record.last_used_at, Some(expected.into()), "after {after} s");
    }
}

async fn usage_is_no_change<R: KeyRepository + Clone>(store: R) {
    let (key, other) = (new_key(&store).await, new_key(&store).await);
    let revoke = async |key| match store.revoke_key(key, &Attribution::default()).await.unwrap() {
        Some(Change::Prefix(_, Revision(revision))) => revision,
        change => panic!("{change:?}"),
    };
    let before = revoke(&other).await;
    let recorder = FeedRecorder::listen(store.changes(SystemTime::now() + Duration::from_secs(60)));
    recorder.all().await;
    let record = store.find_key(&key).await.unwrap().unwrap().into_record();
    let mut usage = used(&key, 1, 1, 1);
    usage.last_used_at = Some(SystemTime::now());
    store.record_usage(&batch("w", 1, [usage])).await.unwrap();
    assert_eq!(
        store.find_key(&key).await.unwrap().unwrap().into_record().updated_at,
        record.updated_at
    );
    assert!(recorder.all().await.is_empty());
    // Nothing has taken a number in between.
    assert_eq!(revoke(&key).await, before + 1);
    assert_eq!(recorder.take().await.len(), 1);
}

on_every_store! {
    a_batch_counts_once
    sums_saturate
    keys_that_are_gone_are_skipped
    the_last_use_is_written_once_a_minute
    usage_is_no_change
}

#[tokio::test]
async fn a_row_that_cannot_be_written_keeps_no_other_one_from_being_counted() {
    let server = Postgres::start();
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let keys = [new_key(&store).await, new_key(&store).await, new_key(&store).await];
    let refuse = format!(
        "ALTER TABLE api_keys ADD CHECK (id <> {} OR total_tokens < 5);
        ALTER TABLE api_keys ALTER total_requests TYPE INTEGER",
        keys[1]
    );
    server.client().await.batch_execute(&refuse).await.unwrap();
    for sequence in 1..=2 {
        let batch = batch("w", sequence, keys.iter().map(|key| used(key, 3_000_000_000, 10, 1)));
        store.record_usage(&batch).await.unwrap();
        store.record_usage(&batch).await.unwrap();
    }
    // A narrow column has its largest number.
    let expected = (i32::MAX as u64, 20, 2);
    assert_eq!(totals(&store, &keys[0]).await, expected);
    assert_eq!(totals(&store, &keys[1]).await, (0, 0, 0));
    assert_eq!(totals(&store, &keys[2]).await, expected);
}

#[tokio::test]
async fn narrow_columns_of_other_peoples_tables_stay_at_their_largest_number() {
    let server = Postgres::start();
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let key = new_key(&store).await;
    let client = server.client().await;
    // A domain that nobody may leave out, as well.
    let narrow = "CREATE DOMAIN department AS TEXT NOT NULL;
        ALTER TABLE api_keys ADD department department DEFAULT 'sales'";
    client.batch_execute(narrow).await.unwrap();
    let columns = [
        ("NUMERIC(10, 4)", "999999.9999"),
        ("NUMERIC(4)", "9999"),
        ("SMALLINT", "32767"),
        ("INTEGER", "2147483647"),
    ];
    for (sequence, (column, largest)) in (1..).zip(columns) {
        let change = format!("ALTER TABLE api_keys ALTER total_cost TYPE {column} USING 9998");
        client.batch_execute(&change).await.unwrap();
        let cost = 3_000_000_000 * 1_000_000;
        let mut usage = used(&key, 1, 10, cost);
        usage.last_used_at = Some(SystemTime::now());
        store.record_usage(&batch("w", sequence, [usage])).await.unwrap();
        let row = "SELECT total_cost::text, total_requests::bigint, last_used_at IS NOT NULL FROM api_keys";
        let row = client.query_one(row, &[]).await.unwrap();
        assert_eq!(row.get::<_, &str>(0), largest, "{column}");
        assert_eq!((row.get(1), row.get(2)), (sequence as i64, true), "{column}");
    }
}

#[tokio::test]
async fn what_nobody_needs_any_more_is_taken_away() {
    let server = Postgres::start();
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let key = new_key(&store).await;
    let old_and_new = format!(
        "INSERT INTO api_key_usage_writers VALUES
            ('gone', 5, now() - INTERVAL '31 days'), ('there', 5, now() - INTERVAL '29 days');
        INSERT INTO api_key_leases VALUES
            ({key}, 'gone', 3, 0, now() - INTERVAL '2 days'), ({key}, 'there', 3, 9, now())"
    );
    let client = server.client().await;
    client.batch_execute(&old_and_new).await.unwrap();
    // The first batch of a writer.
    store.record_usage(&batch("w", 1, [used(&key, 1, 0, 0)])).await.unwrap();
    for (names, left) in [
        ("SELECT writer FROM api_key_usage_writers ORDER BY 1", &["there", "w"][..]),
        ("SELECT holder FROM api_key_leases", &["there"]),
    ] {
        let rows = client.query(names, &[]).await.unwrap();
        assert_eq!(rows.iter().map(|row| row.get(0)).collect::<Vec<&str>>(), left);
    }
}

#[tokio::test]
async fn days_are_kept_apart() {
    let server = Postgres::start();
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let key = new_key(&store).await;
    let midnight = SystemTime::UNIX_EPOCH + Duration::from_secs(20_000 * 86_400);
    for (sequence, at) in [
        (1, midnight - Duration::from_secs(5)),
        (2, midnight),
        (3, midnight + Duration::from_secs(5)),
    ] {
        let mut batch = batch("w", sequence, [used(&key, 1, 10, 100)]);
        batch.gathered_at = at;
        store.record_usage(&batch).await.unwrap();
    }
    let rows = server.client().await;
    let rows = rows
        .query(
            "SELECT day::text, requests, tokens, cost_micro_cents FROM api_key_usage ORDER BY day",
            &[],
        )
        .await
        .unwrap();
    let rows: Vec<(String, i64, i64, i64)> =
        rows.iter().map(|row| (row.get(0), row.get(1), row.get(2), row.get(3))).collect();
    let expected = [("2024-10-03".to_owned(), 1, 10, 100), ("2024-10-04".to_owned(), 2, 20, 200)];
    assert_eq!(rows, expected);
}

#[tokio::test]
async fn requests_that_are_let_in_count_and_handlers_add() {
    let fixture = fixture().await;
    let authenticator = Authenticator::builder(fixture.store.clone()).usage_interval(SOON).build();
    let limited = fixture.issue(|key| key.allowed_endpoints([rule("/elsewhere")])).await;
    let service = ServiceBuilder::new()
        .layer(ApiKeyAuthLayer::from(authenticator.clone()))
        .map_request(|request: http::Request<_>| {
            let caller = request.extensions().get::<AuthContext>().unwrap();
            caller.record_usage(Usage { tokens: 3, cost: 500 });
            caller.record_usage(Usage::tokens(4));
            request
        })
        .service(probe().0);
    for _ in 0..10 {
        let response = service.clone().oneshot(bearer(&fixture.key)).await.unwrap();
        assert_eq!(response.status(), 200);
        let response = service.clone().oneshot(bearer(limited.expose_secret())).await.unwrap();
        assert_eq!(response.status(), 403);
    }
    let caller = authenticator.authenticate(&fixture.key).await.unwrap();
    let id = caller.key().id.clone();
    eventually("it is written", async || totals(&fixture.store, &id).await == (11, 70, 5_000))
        .await;
    // What was denied counts for nothing.
    assert_eq!(totals(&fixture.store, &limited.record().id).await, (0, 0, 0));
    let last_used = fixture.store.find_key(&id).await.unwrap().unwrap().into_record().last_used_at;
    assert!(last_used.is_some());
    // Later, when the response has long begun; and at the end all that is left.
    caller.record_usage(Usage::tokens(u64::MAX));
    caller.record_usage(Usage::tokens(u64::MAX));
    authenticator.shutdown().await;
    assert_eq!(totals(&fixture.store, &id).await, (11, u64::MAX, 5_000));
    // A context of a test's own counts nowhere.
    AuthContext::unverified(caller.key().clone()).record_usage(Usage::cost(1));
}

/// Fails the first `failures` times, and keeps every batch that it receives.
#[derive(Clone)]
struct Flaky {
    store: MemoryStore,
    batches: Arc<Mutex<Vec<UsageBatch>>>,
    failures: usize,
    /// It fails no more.
    works: Arc<AtomicBool>,
}

impl KeyStore for Flaky {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        self.store.resolve(lookup).await
    }

    async fn record_usage(&self, batch: &UsageBatch) -> Result<(), StoreError> {
        let batches = {
            let mut batches = self.batches.lock().unwrap();
            batches.push(batch.clone());
            batches.len()
        };
        if batches <= self.failures && !self.works.load(SeqCst) {
            // It has arrived all the same.
            self.store.record_usage(batch).await?;
            return Err(StoreError::unavailable("the answer was lost"));
        }
        self.store.record_usage(batch).await
    }
}

#[tokio::test]
async fn what_waits_over_midnight_is_of_the_day_on_which_it_was_used() {
    let fixture = fixture().await;
    let store = Flaky {
        store: fixture.store.clone(),
        batches: Arc::default(),
        failures: usize::MAX,
        works: Arc::default(),
    };
    let midnight = SystemTime::UNIX_EPOCH + Duration::from_secs(20_000 * 86_400);
    let clock = Arc::new(ManualClock::at(midnight - Duration::from_secs(60)));
    let node =
        Authenticator::builder(store.clone()).clock(clock.clone()).usage_interval(SOON).build();
    let caller = node.authenticate(&fixture.key).await.unwrap();
    let batches = || store.batches.lock().unwrap().clone();
    let is_taken = async || {
        let before = batches().len();
        eventually("what was used is taken", async || batches().len() > before + 1).await;
    };
    // The first batch is sent again and again; what comes after it waits.
    is_taken().await;
    caller.record_usage(Usage::tokens(1));
    is_taken().await;
    clock.advance(Duration::from_secs(120));
    caller.record_usage(Usage::tokens(2));
    is_taken().await;
    store.batches.lock().unwrap().clear();
    store.works.store(true, SeqCst);
    eventually("all is written", async || batches().len() >= 3).await;
    let batches = batches();
    let days: Vec<_> = batches[..3]
        .iter()
        .map(|batch| (batch.entries[0].tokens, batch.gathered_at < midnight))
        .collect();
    assert_eq!(days, [(0, true), (1, true), (2, false)]);
    assert!(batches[1].sent_at > midnight);
}

#[tokio::test]
async fn a_batch_that_was_sent_is_sent_again_as_it_is() {
    let fixture = fixture().await;
    let store = Flaky {
        store: fixture.store.clone(),
        batches: Arc::default(),
        failures: 3,
        works: Arc::default(),
    };
    let authenticator = Authenticator::builder(store.clone()).usage_interval(SOON).build();
    let caller = authenticator.authenticate(&fixture.key).await.unwrap();
    let id = caller.key().id.clone();
    let batches = || store.batches.lock().unwrap().clone();
    eventually("it was tried twice", async || batches().len() >= 2).await;
    caller.record_usage(Usage::tokens(5));
    eventually("all of it is written", async || totals(&store.store, &id).await == (1, 5, 0)).await;
    let batches = batches();
    let (first, last) = (&batches[0], batches.last().unwrap());
    // But for the time at which it is.
    let same = |batch: &UsageBatch| {
        let mut batch = batch.clone();
        batch.sent_at = first.sent_at;
        batch == *first
    };
    assert!(batches[..=3].iter().all(same), "{batches:#?}");
    assert!(batches.windows(2).all(|pair| pair[0].sent_at <= pair[1].sent_at));
    assert_eq!((first.sequence, last.sequence), (1, 2));
    assert_eq!(first.writer, last.writer);
    // The last use of a key is written once a minute.
    let has_last_use = |batch: &UsageBatch| batch.entries[0].last_used_at.is_some();
    assert!(has_last_use(first) && !has_last_use(last));
}

#[tokio::test]
async fn a_store_without_a_place_for_usage_and_a_node_that_records_none() {
    let fixture = fixture().await;
    let record = fixture.issue(|key| key).await.record().clone();
    let id = record.id.clone();
    let vouching = support::stores::Vouching(record);
    let authenticator = Authenticator::builder(vouching).usage_interval(SOON).build();
    let caller = authenticator.authenticate(&fixture.key).await.unwrap();
    caller.record_usage(Usage::tokens(1));
    authenticator.shutdown().await;

    let silent = Authenticator::builder(fixture.store.clone()).without_usage().build();
    let caller = silent.authenticate(&fixture.key).await.unwrap();
    caller.record_usage(Usage::tokens(1));
    silent.shutdown().await;
    assert_eq!(totals(&fixture.store, &caller.key().id).await, (0, 0, 0));
    assert_eq!(totals(&fixture.store, &id).await, (0, 0, 0));
}
