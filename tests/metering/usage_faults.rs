//! What the database rejects while usage is written: a fault of a row is that row's alone, and everything else delays
//! the batch, in whatever language the server speaks.

use std::time::{Duration, SystemTime};

use tower_api_key::{
    Authenticator, KeyManager, NewKey, PostgresStore,
    metering::Usage,
    record::{Budget, BudgetPeriod, KeyId},
    store::{Attribution, KeyRepository, KeyStore, KeyUsage, LeaseRequest, UsageBatch},
};

use crate::support::{eventually::eventually, servers::Postgres};

/// Servers with messages in English and, where the system has it, in German.
async fn servers() -> Vec<Postgres> {
    let mut servers = vec![Postgres::start()];
    let Some(german) = Postgres::in_german() else {
        eprintln!("skipped in German: the package `locales` is missing");
        return servers;
    };
    let error = german.client().await.batch_execute("SELECT 1 / 0").await.unwrap_err();
    let message = error.as_db_error().unwrap().message().to_owned();
    if message == "Division durch Null" {
        servers.push(german);
    } else {
        eprintln!("skipped in German: the server has no translations ({message})");
    }
    servers
}

async fn store(server: &Postgres, role: &str) -> PostgresStore {
    let url = server.url().replacen("app@", &format!("{role}@"), 1);
    PostgresStore::builder(&url).max_connections(2).build().unwrap()
}

/// A store, and some keys in it.
async fn keys_in(server: &Postgres, count: usize) -> (PostgresStore, Vec<KeyId>) {
    let store = store(server, "app").await;
    store.migrate().await.unwrap();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap().id;
    let mut keys = Vec::new();
    for _ in 0..count {
        let budget = Budget { limit_cents: 100, period: BudgetPeriod::Total };
        let new = NewKey::new(user.clone(), "k").budget(budget);
        keys.push(manager.issue(new).await.unwrap().record().id.clone());
    }
    (store, keys)
}

fn batch(sequence: u64, keys: &[KeyId]) -> UsageBatch {
    let mut batch = UsageBatch::new("w", sequence, SystemTime::now());
    batch.entries = keys
        .iter()
        .map(|key| {
            let mut usage = KeyUsage::new(key.clone());
            (usage.requests, usage.tokens, usage.cost_micro_cents) = (1, 10, 100);
            usage
        })
        .collect();
    batch
}

async fn totals(store: &PostgresStore, key: &KeyId) -> (u64, u64, i64) {
    let usage = store.find_key(key).await.unwrap().unwrap().into_record().usage;
    (usage.requests, usage.tokens, usage.cost_micro_cents)
}

/// Requests and micro-cents in the days.
async fn charged(server: &Postgres, key: &KeyId) -> (i64, i64) {
    let sum = format!(
        "SELECT coalesce(sum(requests), 0)::bigint, coalesce(sum(cost_micro_cents), 0)::bigint
        FROM api_key_usage WHERE api_key_id = {key}"
    );
    let row = server.client().await.query_one(&sum, &[]).await.unwrap();
    (row.get(0), row.get(1))
}

#[tokio::test]
async fn usage_of_a_key_whose_row_is_locked_arrives_later_in_any_language() {
    for server in servers().await {
        let (owner, keys) = keys_in(&server, 3).await;
        let mut other = server.client().await;
        let role =
            "CREATE ROLE service LOGIN SUPERUSER; ALTER ROLE service SET lock_timeout = '200ms'";
        other.batch_execute(role).await.unwrap();
        let store = store(&server, "service").await;
        let lock = other.transaction().await.unwrap();
        let row = format!("SELECT FROM api_keys WHERE id = {} FOR UPDATE", keys[1]);
        lock.execute(&row, &[]).await.unwrap();

        // The whole batch, because a part of it would not be counted twice.
        let error = store.record_usage(&batch(1, &keys)).await.unwrap_err();
        assert!(error.is_transient(), "{error:?}");
        for key in &keys {
            assert_eq!((totals(&owner, key).await.0, charged(&server, key).await.0), (0, 0));
        }
        // So is a lease, and an edit.
        let request = LeaseRequest::new(keys[1].clone(), "w", 1, 100);
        let error = store.lease(&request).await.unwrap_err();
        assert!(error.is_transient(), "{error:?}");
        let error = store.revoke_key(&keys[1], &Attribution::default()).await.unwrap_err();
        assert!(error.is_transient(), "{error:?}");
        lock.rollback().await.unwrap();
        for _ in 0..2 {
            store.record_usage(&batch(1, &keys)).await.unwrap();
        }
        for key in &keys {
            assert_eq!(totals(&owner, key).await, (1, 10, 100));
            assert_eq!(charged(&server, key).await, (1, 100));
        }
    }
}

#[tokio::test]
async fn a_node_writes_what_it_gathered_during_a_lock_once_the_lock_is_gone() {
    for server in servers().await {
        let (owner, keys) = keys_in(&server, 1).await;
        let mut other = server.client().await;
        let role =
            "CREATE ROLE service LOGIN SUPERUSER; ALTER ROLE service SET lock_timeout = '50ms'";
        other.batch_execute(role).await.unwrap();
        let user = owner.find_key(&keys[0]).await.unwrap().unwrap().into_record().user.id;
        let issued = KeyManager::new(owner.clone()).issue(NewKey::new(user, "k")).await.unwrap();
        let node = Authenticator::builder(store(&server, "service").await)
            .usage_interval(Duration::from_millis(10))
            .build();
        let caller = node.authenticate(issued.expose_secret()).await.unwrap();
        let id = issued.record().id.clone();
        let lock = other.transaction().await.unwrap();
        lock.execute(&format!("SELECT FROM api_keys WHERE id = {id} FOR UPDATE"), &[])
            .await
            .unwrap();
        caller.record_usage(Usage { tokens: 3, cost: 500 });
        let observer = server.client().await;
        let waiters = async || {
            let waits = "SELECT count(*) FROM pg_stat_activity
                WHERE wait_event_type = 'Lock' AND usename = 'service'";
            observer.query_one(waits, &[]).await.unwrap().get::<_, i64>(0)
        };
        for attempt in 0..3 {
            eventually("a flush waits for the lock", async || waiters().await > 0).await;
            caller.record_usage(Usage { tokens: 1 << attempt, cost: 100 });
            eventually("the flush has failed", async || waiters().await == 0).await;
        }
        assert_eq!(charged(&server, &id).await, (0, 0));
        lock.rollback().await.unwrap();
        eventually("all is counted", async || totals(&owner, &id).await.1 == 10).await;
        node.shutdown().await;
        assert_eq!(charged(&server, &id).await.1, 800);
    }
}

#[tokio::test]
async fn a_missing_table_delays_usage_and_loses_none() {
    for server in servers().await {
        let (store, keys) = keys_in(&server, 2).await;
        let other = server.client().await;
        let mut sequence = 0;
        for (broken, whole) in [
            (
                "ALTER TABLE api_key_usage RENAME TO gone",
                "ALTER TABLE gone RENAME TO api_key_usage",
            ),
            (
                "CREATE FUNCTION missing() RETURNS TRIGGER LANGUAGE plpgsql AS
                    'BEGIN SELECT 1 FROM nowhere; RETURN NEW; END';
                CREATE TRIGGER missing BEFORE UPDATE ON api_keys
                    FOR EACH ROW EXECUTE FUNCTION missing()",
                "DROP FUNCTION missing CASCADE",
            ),
        ] {
            sequence += 1;
            other.batch_execute(broken).await.unwrap();
            assert!(store.record_usage(&batch(sequence, &keys)).await.is_err(), "{broken}");
            other.batch_execute(whole).await.unwrap();
            for key in &keys {
                assert_eq!(totals(&store, key).await.0, sequence - 1, "{broken}");
            }
            store.record_usage(&batch(sequence, &keys)).await.unwrap();
            for key in &keys {
                assert_eq!(totals(&store, key).await.0, sequence);
                assert_eq!(charged(&server, key).await.0, sequence as i64);
            }
        }
    }
}

#[tokio::test]
async fn a_row_that_rejects_its_totals_is_charged_and_the_others_are_counted_in_any_language() {
    for server in servers().await {
        let (store, keys) = keys_in(&server, 3).await;
        let other = server.client().await;
        for (number, refuse) in [
            "ALTER TABLE api_keys ADD CONSTRAINT refuse CHECK (id <> $KEY OR total_tokens < 5)",
            "ALTER TABLE api_keys DROP CONSTRAINT refuse;
            CREATE FUNCTION refuse() RETURNS TRIGGER LANGUAGE plpgsql AS
                'BEGIN IF NEW.id = $KEY THEN RAISE EXCEPTION ''no''; END IF; RETURN NEW; END';
            CREATE TRIGGER refuse BEFORE UPDATE OF total_tokens ON api_keys
                FOR EACH ROW EXECUTE FUNCTION refuse()",
        ]
        .into_iter()
        .enumerate()
        {
            let times = number as u64 + 1;
            let refuse = refuse.replace("$KEY", &keys[1].to_string());
            other.batch_execute(&refuse).await.unwrap();
            for _ in 0..2 {
                store.record_usage(&batch(times, &keys)).await.unwrap();
            }
            for (at, key) in keys.iter().enumerate() {
                let counted =
                    if at == 1 { (0, 0, 0) } else { (times, times * 10, times as i64 * 100) };
                assert_eq!(totals(&store, key).await, counted, "{refuse}");
                assert_eq!(charged(&server, key).await, (times as i64, times as i64 * 100));
            }
        }
    }
}
