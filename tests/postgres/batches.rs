//! Look-ups that wait for a connection are read in one statement, and answered as if each were alone.

use std::{
    future::Future,
    pin::{Pin, pin},
    task::{Context, Waker},
    time::Duration,
};

use chrono::Utc;
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tower_api_key::{
    Authenticator, KeyManager, KeyScheme, NewKey, PostgresStore, StoreError,
    error::StoreErrorKind,
    key::{KeyFormat, KeyHash, MintedKey},
    record::{KeyRecord, User},
    store::{Answer, Attribution, KeyRepository, KeyStore, Lookup, StoredKey},
};

use crate::support::{
    database::{run, url_of_role},
    eventually::eventually,
    servers::Postgres,
    stores::question,
};

/// A server that logs its statements, and a store with one connection for look-ups.
struct Batches {
    server: Postgres,
    store: PostgresStore,
    manager: KeyManager<PostgresStore>,
    user: User,
}

impl Batches {
    async fn start() -> Self {
        let server = Postgres::with_settings(&["log_statement=all"]);
        let url = server.url();
        Self::at(server, &url).await
    }

    async fn at(server: Postgres, url: &str) -> Self {
        let store = one_connection(url);
        store.migrate().await.unwrap();
        let manager = KeyManager::new(store.clone());
        let user = manager.create_user("ada@example.com", "user").await.unwrap();
        Self { server, store, manager, user }
    }

    async fn issue(&self, name: &str) -> String {
        let key = NewKey::new(self.user.id.clone(), name);
        self.manager.issue(key).await.unwrap().expose_secret().to_owned()
    }

    async fn insert(&self, prefix: &str, key: &str, change: impl FnOnce(&mut KeyRecord)) {
        let mut record = KeyRecord::new(0, prefix, self.user.clone());
        change(&mut record);
        let key = StoredKey::new(record, KeyHash::bcrypt(key, 4).unwrap());
        self.store.insert_key(&key, &Attribution::default()).await.unwrap();
    }

    /// How many statements read one key, and how many read several.
    fn statements(&self) -> (usize, usize) {
        let log = self.server.log();
        let executed = |text| log.split("execute ").skip(1).filter(move |it| it.contains(text));
        (executed("SELECT NULL::text[] AS row").count(), executed("0::bigint AS latest").count())
    }
}

fn one_connection(url: &str) -> PostgresStore {
    let store = PostgresStore::builder(url).max_connections(1);
    store.statement_timeout(Duration::from_secs(20)).build().unwrap()
}

/// Holds the connection of a store by the second of two look-ups, which waits for a lock, until the lock is released.
struct HeldUp {
    lock: Client,
    observer: Client,
    first: JoinHandle<()>,
}

impl HeldUp {
    async fn by_lock(server: &Postgres, database: &str, store: &PostgresStore) -> Self {
        let url = server.database_url(database);
        let [lock, observer] =
            [crate::support::database::connect(&url).await, server.client().await];
        let (store, lookup) = (store.clone(), question(&crate::support::unknown_key()).await);
        // Preparing the statement takes the lock too, for a moment.
        store.resolve(&lookup).await.unwrap();
        lock.batch_execute("BEGIN; LOCK TABLE api_keys").await.unwrap();
        let first = tokio::spawn(async move {
            store.resolve(&lookup).await.unwrap();
        });
        let this = Self { lock, observer, first };
        this.are_waiting(1).await;
        this
    }

    async fn are_waiting(&self, count: i64) {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
        eventually("statements wait for a lock", async || {
            self.observer.query_one(waiting, &[]).await.unwrap().get::<_, i64>(0) == count
        })
        .await;
    }

    async fn release(self) {
        self.lock.batch_execute("COMMIT").await.unwrap();
        self.first.await.unwrap();
    }

    /// Releases the connection, and holds up the batch that follows. Returns the client that holds it up.
    async fn hold_up_the_next(self, server: &Postgres) -> (Client, Client) {
        let next = server.client().await;
        let lock = tokio::spawn(async move {
            next.batch_execute("BEGIN; LOCK TABLE api_keys").await.unwrap();
            next
        });
        // The lock is granted to the first look-up, to this one, and to the batch, in this order.
        self.are_waiting(2).await;
        self.lock.batch_execute("COMMIT").await.unwrap();
        self.first.await.unwrap();
        let next = lock.await.unwrap();
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
        eventually("the batch waits for the lock", async || {
            self.observer.query_one(waiting, &[]).await.unwrap().get::<_, i64>(0) == 1
        })
        .await;
        (next, self.observer)
    }
}

/// Lets the tasks that were spawned before run until they wait. The runtime has one thread.
async fn settle() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

fn scheme() -> KeyScheme {
    KeyScheme::builder()
        .format(KeyFormat::first_chars(8).unwrap())
        .bcrypt_queue(1_000)
        .build()
        .unwrap()
}

fn asking(store: &PostgresStore) -> Authenticator {
    Authenticator::builder(store.clone()).scheme(scheme()).cache_capacity(0).build()
}

async fn outcome(authenticator: Authenticator, key: String) -> String {
    match authenticator.authenticate(&key).await {
        Ok(context) => format!("{:?} {:?}", context.secret(), context.key()),
        Err(denial) => format!("{denial:?}"),
    }
}

/// Authenticates all of them in one batch.
async fn batched(
    server: &Postgres,
    database: &str,
    store: &PostgresStore,
    keys: &[String],
) -> Vec<String> {
    let held = HeldUp::by_lock(server, database, store).await;
    let authenticator = asking(store);
    let tasks: Vec<_> =
        keys.iter().map(|key| tokio::spawn(outcome(authenticator.clone(), key.clone()))).collect();
    settle().await;
    held.release().await;
    let mut outcomes = Vec::new();
    for task in tasks {
        outcomes.push(task.await.unwrap());
    }
    outcomes
}

async fn alone(store: &PostgresStore, keys: &[String]) -> Vec<String> {
    let authenticator = asking(store);
    let mut outcomes = Vec::new();
    for key in keys {
        outcomes.push(outcome(authenticator.clone(), key.clone()).await);
    }
    outcomes
}

fn spawn(store: &PostgresStore, lookup: &Lookup) -> JoinHandle<Result<Answer, StoreError>> {
    let (store, lookup) = (store.clone(), lookup.clone());
    tokio::spawn(async move { store.resolve(&lookup).await })
}

#[tokio::test]
async fn each_look_up_of_a_batch_is_answered_as_if_it_were_alone() {
    let fixture = Batches::start().await;
    for n in 0..40 {
        let key = format!("valid-{n:02}-secret");
        fixture.insert(&key[..8], &key, |key| key.scopes = vec![format!("scope {n}")]).await;
    }
    fixture.insert("expired1", "expired1-secret", |key| key.expires_at = Some(Utc::now())).await;
    fixture.insert("revoked1", "revoked1-secret", |key| key.is_active = false).await;
    for n in 0..2 {
        fixture.insert("two-keys", &format!("two-keys-{n}"), |_| {}).await;
    }
    for n in 0..9 {
        fixture.insert("too-many", &format!("too-many-{n}"), |_| {}).await;
    }
    fixture.insert("current1", "current1-secret", |_| {}).await;
    fixture.insert("broken-1", "broken-1-secret", |_| {}).await;
    run(
        &fixture.server.client().await,
        "UPDATE api_keys SET previous_key_prefix = 'previous', previous_expires_at = now() + INTERVAL '1 h',
            previous_key_hash = (SELECT key_hash FROM api_keys WHERE key_prefix = 'valid-07')
            WHERE key_prefix = 'current1';
        UPDATE api_keys SET previous_key_prefix = 'two-keys', previous_expires_at = now() + INTERVAL '1 h',
            previous_key_hash = (SELECT key_hash FROM api_keys WHERE key_prefix = 'valid-08')
            WHERE key_prefix = 'valid-09';
        UPDATE api_keys SET allowed_ips = '[\"nowhere\"]' WHERE key_prefix = 'broken-1'",
    )
    .await;
    let mut keys: Vec<_> = (0..40).map(|n| format!("valid-{n:02}-secret")).collect();
    keys.extend(
        [
            "valid-00-wrong",
            "unknown1-secret",
            "expired1-secret",
            "revoked1-secret",
            "two-keys-0",
            "two-keys-1",
            "two-keys-2",
            "too-many-0",
            "too-many-8",
            "current1-secret",
            "previous-x",
            "broken-1-secret",
            "unknown\"-secret",
            "unknown\\-secret",
            "{unknown,-secret",
        ]
        .map(str::to_owned),
    );
    let expected = alone(&fixture.store, &keys).await;
    assert_eq!(
        expected.iter().filter(|outcome| outcome.contains("KeyRecord")).count(),
        44,
        "{expected:#?}"
    );
    assert_eq!(
        expected.iter().filter(|outcome| outcome.contains("BadRow")).count(),
        2,
        "{expected:#?}"
    );
    let (single, many) = fixture.statements();
    assert_eq!(many, 0, "look-ups that need not wait run alone");
    let outcomes = batched(&fixture.server, "postgres", &fixture.store, &keys).await;
    for ((key, expected), outcome) in keys.iter().zip(&expected).zip(&outcomes) {
        assert_eq!(outcome, expected, "{key}");
    }
    assert_eq!(fixture.statements(), (single + 2, 1));
}

#[tokio::test]
async fn a_previous_secret_and_both_keys_under_one_lookup_id_are_found_in_a_batch() {
    let fixture = Batches::start().await;
    // One row answers both look-ups.
    fixture.insert("current1", "current1-secret", |_| {}).await;
    let old = KeyHash::bcrypt("previous-secret", 4).unwrap().expose_hash();
    run(
        &fixture.server.client().await,
        &format!(
            "UPDATE api_keys SET previous_key_prefix = 'previous', previous_key_hash = '{old}',
                previous_expires_at = now() + INTERVAL '1 h'"
        ),
    )
    .await;
    let keys = ["current1-secret", "previous-secret"].map(str::to_owned);
    let outcomes = batched(&fixture.server, "postgres", &fixture.store, &keys).await;
    assert!(outcomes[0].starts_with("Current"), "{outcomes:#?}");
    assert!(outcomes[1].starts_with("Previous"), "{outcomes:#?}");
    assert_eq!(fixture.statements().1, 1);
}

#[tokio::test]
async fn ten_thousand_cold_keys_at_once_take_some_dozen_statements() {
    let server = Postgres::with_settings(&["log_statement=all"]);
    let url = server.url();
    let fixture = Batches::at(server, &url).await;
    let scheme = KeyScheme::default();
    let minted: Vec<_> = (0..10_000).map(|_| scheme.mint().unwrap()).collect();
    let stored = |(n, minted): (usize, &MintedKey)| {
        let mut record = KeyRecord::new(0, minted.lookup_id(), fixture.user.clone());
        record.name = format!("k{n}");
        StoredKey::new(record, minted.hash().clone())
    };
    let keys: Vec<_> = minted.iter().enumerate().take(9_900).map(stored).collect();
    fixture.store.insert_keys(&keys, &Attribution::default()).await.unwrap();
    // Without optimisation and beside other tests, this takes seconds.
    let store = PostgresStore::builder(&url).timeout(Duration::from_secs(15)).build().unwrap();
    let authenticator = Authenticator::builder(store).max_lookups(16_384).build();
    let tasks: Vec<_> = minted
        .iter()
        .map(|key| tokio::spawn(outcome(authenticator.clone(), key.expose_secret().to_owned())))
        .collect();
    for (n, task) in tasks.into_iter().enumerate() {
        let outcome = task.await.unwrap();
        let expected = if n < 9_900 { format!("\"k{n}\"") } else { "Unknown".to_owned() };
        assert!(outcome.contains(&expected), "{n}: {outcome}");
    }
    let (single, many) = fixture.statements();
    assert!(single + many <= 100 && many >= 39, "{single} + {many}");
}

#[tokio::test]
async fn the_waiter_whose_turn_it_was_may_be_dropped_and_so_may_others() {
    let fixture = Batches::start().await;
    let mut lookups = Vec::new();
    for n in 0..3 {
        lookups.push(question(&fixture.issue(&format!("k{n}")).await).await);
    }
    let held = HeldUp::by_lock(&fixture.server, "postgres", &fixture.store).await;
    let tasks: Vec<_> = lookups.iter().map(|lookup| spawn(&fixture.store, lookup)).collect();
    settle().await;
    let (lock, _) = held.hold_up_the_next(&fixture.server).await;
    tasks[0].abort();
    tasks[2].abort();
    settle().await;
    lock.batch_execute("COMMIT").await.unwrap();
    let [first, second, third] = tasks.try_into().unwrap();
    assert!(second.await.unwrap().unwrap().record().is_some());
    assert!(first.await.unwrap_err().is_cancelled() && third.await.unwrap_err().is_cancelled());
    assert_eq!(fixture.statements(), (2, 1));
}

#[tokio::test]
async fn a_batch_that_all_have_left_frees_its_connection() {
    let fixture = Batches::start().await;
    let lookup = question(&fixture.issue("k").await).await;
    let held = HeldUp::by_lock(&fixture.server, "postgres", &fixture.store).await;
    let tasks: Vec<_> = (0..3).map(|_| spawn(&fixture.store, &lookup)).collect();
    settle().await;
    let (lock, _observer) = held.hold_up_the_next(&fixture.server).await;
    for task in tasks {
        task.abort();
        assert!(task.await.unwrap_err().is_cancelled());
    }
    // It waits for the same lock, on another connection.
    let next = spawn(&fixture.store, &lookup);
    settle().await;
    lock.batch_execute("COMMIT").await.unwrap();
    assert!(next.await.unwrap().unwrap().record().is_some());
    assert_eq!(fixture.statements(), (3, 0), "the batch was still being prepared");
}

#[tokio::test]
async fn each_look_up_of_a_batch_has_its_own_deadline() {
    let fixture = Batches::start().await;
    let key = fixture.issue("k").await;
    let store = PostgresStore::builder(&fixture.server.url())
        .max_connections(1)
        .timeout(Duration::from_secs(3))
        .statement_timeout(Duration::from_secs(20))
        .build()
        .unwrap();
    let lookup = question(&key).await;
    let held = HeldUp::by_lock(&fixture.server, "postgres", &store).await;
    let early = [spawn(&store, &lookup), spawn(&store, &lookup)];
    settle().await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let late = spawn(&store, &lookup);
    settle().await;
    let (lock, _observer) = held.hold_up_the_next(&fixture.server).await;
    for early in early {
        assert_eq!(early.await.unwrap().unwrap_err().kind(), StoreErrorKind::Timeout);
    }
    assert!(!late.is_finished());
    lock.batch_execute("COMMIT").await.unwrap();
    assert!(late.await.unwrap().unwrap().record().is_some());
    assert_eq!(fixture.statements().1, 1);
}

#[tokio::test]
async fn a_connection_that_ends_during_a_batch_is_retried_once_for_all() {
    let fixture = Batches::start().await;
    let lookup = question(&fixture.issue("k").await).await;
    let held = HeldUp::by_lock(&fixture.server, "postgres", &fixture.store).await;
    let tasks: Vec<_> = (0..3).map(|_| spawn(&fixture.store, &lookup)).collect();
    settle().await;
    let (lock, observer) = held.hold_up_the_next(&fixture.server).await;
    let waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
    let pid = async || {
        let row = observer.query_opt(waiting, &[]).await.unwrap();
        row.map_or(0, |row| row.get::<_, i32>(0))
    };
    let before = pid().await;
    observer.execute("SELECT pg_terminate_backend($1)", &[&before]).await.unwrap();
    eventually("the batch is sent again", async || ![0, before].contains(&pid().await)).await;
    lock.batch_execute("COMMIT").await.unwrap();
    for task in tasks {
        assert!(task.await.unwrap().unwrap().record().is_some());
    }
    assert_eq!(fixture.statements(), (2, 2));
}

#[tokio::test]
async fn a_server_that_stops_during_a_batch_is_an_error_of_each_look_up() {
    let mut fixture = Batches::start().await;
    let lookup = question(&fixture.issue("k").await).await;
    let held = HeldUp::by_lock(&fixture.server, "postgres", &fixture.store).await;
    let tasks: Vec<_> = (0..3).map(|_| spawn(&fixture.store, &lookup)).collect();
    settle().await;
    let _lock = held.hold_up_the_next(&fixture.server).await;
    fixture.server.stop();
    for task in tasks {
        assert!(task.await.unwrap().unwrap_err().is_transient());
    }
}

#[tokio::test]
async fn a_revoke_during_a_batch_is_newer_than_its_answers() {
    let fixture = Batches::start().await;
    let [revoked, other] = [fixture.issue("revoked").await, fixture.issue("other").await];
    let [revoked, other] = [question(&revoked).await, question(&other).await];
    let held = HeldUp::by_lock(&fixture.server, "postgres", &fixture.store).await;
    let tasks = [spawn(&fixture.store, &revoked), spawn(&fixture.store, &other)];
    settle().await;
    let (lock, _observer) = held.hold_up_the_next(&fixture.server).await;
    // It is committed before the batch takes its snapshot, and after its look-ups have begun.
    run(&lock, "UPDATE api_keys SET is_active = FALSE WHERE name = 'revoked'; COMMIT").await;
    let [of_revoked, of_other] = tasks;
    let [of_revoked, of_other] =
        [of_revoked.await.unwrap().unwrap(), of_other.await.unwrap().unwrap()];
    assert!(!of_revoked.record().unwrap().is_active);
    assert!(of_other.record().unwrap().is_active);
}

#[tokio::test]
async fn a_statement_that_fails_for_one_key_fails_that_key_alone() {
    let fixture = Batches::start().await;
    let admin = fixture.server.client().await;
    for n in 0..5 {
        let key = format!("valid-{n:02}-secret");
        fixture.insert(&key[..8], &key, |_| {}).await;
    }
    run(
        &admin,
        "CREATE ROLE service LOGIN;
        GRANT ALL ON ALL TABLES IN SCHEMA public TO service;
        GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO service;
        CREATE FUNCTION may_read(prefix TEXT) RETURNS BOOLEAN LANGUAGE plpgsql AS $$ BEGIN
            IF prefix = 'valid-03' THEN RAISE EXCEPTION 'not this one'; END IF;
            RETURN TRUE;
        END $$;
        ALTER TABLE api_keys ENABLE ROW LEVEL SECURITY;
        CREATE POLICY readable ON api_keys USING (may_read(key_prefix));
        SET enable_seqscan = off;
        ALTER ROLE service SET enable_seqscan = off",
    )
    .await;
    let store = one_connection(&url_of_role(&fixture.server.url(), "service"));
    let keys: Vec<_> = (0..5).map(|n| format!("valid-{n:02}-secret")).collect();
    let outcomes = batched(&fixture.server, "postgres", &store, &keys).await;
    for (n, outcome) in outcomes.iter().enumerate() {
        match n {
            3 => assert!(outcome.contains("Unavailable"), "{outcome}"),
            _ => assert!(outcome.contains("KeyRecord"), "{outcome}"),
        }
    }
    assert_eq!(fixture.statements(), (2 + 5, 1));
}

#[tokio::test]
async fn a_row_that_is_not_utf8_fails_its_key_alone() {
    let server = Postgres::with_settings(&["log_statement=all"]);
    let create = "CREATE DATABASE ascii TEMPLATE template0 ENCODING 'SQL_ASCII'";
    server.client().await.batch_execute(create).await.unwrap();
    let url = server.database_url("ascii");
    let fixture = Batches::at(server, &url).await;
    for n in 0..3 {
        let key = format!("valid-{n:02}-secret");
        fixture.insert(&key[..8], &key, |_| {}).await;
    }
    let admin = crate::support::database::connect(&url).await;
    run(&admin, "UPDATE api_keys SET name = E'\\xff' WHERE key_prefix = 'valid-01'").await;
    let keys: Vec<_> = (0..3).map(|n| format!("valid-{n:02}-secret")).collect();
    let outcomes = batched(&fixture.server, "ascii", &fixture.store, &keys).await;
    assert!(outcomes[1].contains("invalid byte sequence"), "{outcomes:#?}");
    assert!(
        outcomes[0].contains("KeyRecord") && outcomes[2].contains("KeyRecord"),
        "{outcomes:#?}"
    );
    assert_eq!(fixture.statements(), (2 + 3, 1));
}

#[tokio::test]
async fn a_missing_table_is_an_error_of_each_look_up() {
    let fixture = Batches::start().await;
    let lookup = question(&fixture.issue("k").await).await;
    let held = HeldUp::by_lock(&fixture.server, "postgres", &fixture.store).await;
    let tasks: Vec<_> = (0..3).map(|_| spawn(&fixture.store, &lookup)).collect();
    settle().await;
    let (lock, _observer) = held.hold_up_the_next(&fixture.server).await;
    run(&lock, "ALTER TABLE users RENAME TO people; COMMIT").await;
    for task in tasks {
        assert_eq!(task.await.unwrap().unwrap_err().kind(), StoreErrorKind::Rejected);
    }
}

#[tokio::test]
async fn a_dropped_look_up_leaves_the_queue() {
    let fixture = Batches::start().await;
    let lookup = question(&fixture.issue("k").await).await;
    let held = HeldUp::by_lock(&fixture.server, "postgres", &fixture.store).await;
    {
        let mut left: Pin<&mut dyn Future<Output = _>> = pin!(fixture.store.resolve(&lookup));
        assert!(left.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    }
    let last = spawn(&fixture.store, &lookup);
    settle().await;
    held.release().await;
    assert!(last.await.unwrap().unwrap().record().is_some());
    assert_eq!(fixture.statements(), (3, 0), "one look-up alone is no batch");
}

/// A request may be waiting for something else, such as the body of another response, while its look-up gets its turn.
#[tokio::test]
async fn requests_that_are_not_polled_while_they_wait_keep_no_connection_and_are_answered() {
    let fixture = Batches::start().await;
    let mut keys = Vec::new();
    for n in 0..8 {
        keys.push(fixture.issue(&n.to_string()).await);
    }
    let held = HeldUp::by_lock(&fixture.server, "postgres", &fixture.store).await;
    let authenticator = Authenticator::builder(fixture.store.clone()).cache_capacity(0).build();
    let mut requests: Vec<_> =
        keys[..6].iter().map(|key| Box::pin(authenticator.authenticate(key))).collect();
    for request in &mut requests {
        assert!(request.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    }
    let other = tokio::spawn(outcome(authenticator.clone(), keys[6].clone()));
    settle().await;
    held.release().await;
    assert!(other.await.unwrap().starts_with("Current"));
    // The batch has ended, and so has the one after it.
    assert!(outcome(authenticator.clone(), keys[7].clone()).await.starts_with("Current"));
    for request in requests {
        assert!(tokio::time::timeout(Duration::from_secs(1), request).await.unwrap().is_ok());
    }
}

#[tokio::test]
async fn a_batch_uses_indexes_with_and_without_statistics() {
    let server = Postgres::with_settings(&[
        "session_preload_libraries=auto_explain",
        "auto_explain.log_min_duration=0",
        "autovacuum=off",
        "log_statement=all",
    ]);
    let url = server.url();
    let fixture = Batches::at(server, &url).await;
    let admin = fixture.server.client().await;
    let lookup = question(&fixture.issue("k").await).await;
    let ask = async || {
        let store = one_connection(&url);
        // A prepared statement gets a plan for any values after five executions.
        for _ in 0..8 {
            let tasks: Vec<_> = (0..40).map(|_| spawn(&store, &lookup)).collect();
            for task in tasks {
                assert!(task.await.unwrap().unwrap().record().is_some());
            }
        }
    };
    run(
        &admin,
        "SET auto_explain.log_min_duration = -1;
        INSERT INTO users (email) SELECT 'u' || n FROM generate_series(1, 5000) n;
        INSERT INTO api_keys (user_id, name, key_prefix, key_hash, previous_key_prefix)
            SELECT n % 5000 + 1, 'k', 'prefix' || n, 'hash' || n, CASE WHEN n % 10 = 0 THEN 'before' || n END
            FROM generate_series(1, 50000) n",
    )
    .await;
    ask().await;
    run(&admin, "ANALYZE").await;
    ask().await;
    let log = fixture.server.log();
    let plans: Vec<_> =
        log.split("plan:").skip(1).filter(|plan| plan.contains("asked.number AS asked")).collect();
    assert!(plans.len() >= 16, "{}", plans.len());
    for plan in plans {
        let plan = plan.split("LOG:").next().unwrap();
        assert!(plan.contains("Tid Scan on api_keys k"), "{plan}");
        for scan in ["Seq Scan on api_keys", "Seq Scan on api_key_changes"] {
            assert!(!plan.contains(scan), "{plan}");
        }
    }
}

#[tokio::test]
async fn adopted_tables_of_other_types_answer_the_same_in_a_batch() {
    for types in [
        "id INTEGER PRIMARY KEY, user_id INTEGER, name VARCHAR(50), key_prefix VARCHAR(20), key_hash VARCHAR(200),
            is_active BOOLEAN, permissions JSON, scopes JSON, allowed_ips JSON, budget_limit_cents INTEGER,
            budget_type VARCHAR(10), expires_at TIMESTAMP",
        "id BIGINT PRIMARY KEY, user_id INTEGER, name TEXT, key_prefix TEXT, key_hash TEXT, is_active BOOLEAN,
            permissions JSONB, scopes TEXT[], allowed_ips TEXT[], budget_limit_cents BIGINT, budget_type period,
            expires_at TIMESTAMPTZ",
    ] {
        let server = Postgres::with_settings(&["log_statement=all"]);
        let admin = server.client().await;
        run(
            &admin,
            &format!(
                "CREATE TYPE period AS ENUM ('monthly', 'total');
                CREATE TABLE users (id INTEGER PRIMARY KEY, email VARCHAR(100));
                INSERT INTO users VALUES (1, 'ada@example.com');
                CREATE TABLE api_keys ({types})"
            ),
        )
        .await;
        let lists = if types.contains("TEXT[]") {
            ["'{a,b}'", "'{}'"]
        } else {
            ["'[\"a\", \"b\"]'", "'[]'"]
        };
        let mut keys = Vec::new();
        for n in 0..10 {
            let key = format!("sk-{n:05}-secret");
            let hash = KeyHash::bcrypt(&key, 4).unwrap().expose_hash();
            let [scopes, ips] = lists;
            let insert = format!(
                "INSERT INTO api_keys VALUES ({n}, 1, 'name {n}', '{}', '{hash}', TRUE, '{{\"chat\": {{\"read\": true}}}}',
                    {scopes}, {ips}, {n}, 'monthly', now() + INTERVAL '1 day')",
                &key[..8]
            );
            run(&admin, &insert).await;
            keys.push(key);
        }
        let store = one_connection(&server.url());
        store.migrate().await.unwrap();
        let expected = alone(&store, &keys).await;
        assert!(expected.iter().all(|outcome| outcome.contains("chat:read")), "{expected:#?}");
        assert_eq!(batched(&server, "postgres", &store, &keys).await, expected);
        assert!(server.log().contains("asked.number AS asked"));
    }
}
