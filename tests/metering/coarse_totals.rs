//! Costs of less than a cent in adopted columns that have whole cents.

use std::time::SystemTime;

use tower_api_key::{
    KeyManager, NewKey, PostgresStore,
    record::{Budget, BudgetPeriod, KeyId},
    store::{KeyRepository, KeyStore, KeyUsage, LeaseRequest, UsageBatch},
};

use crate::support::servers::Postgres;

const HALF_A_CENT: i64 = 500_000;

/// A store with such a column, and a key with a budget.
async fn key_in(server: &Postgres, column: &str) -> (PostgresStore, KeyId) {
    let tables = format!(
        "DROP DOMAIN IF EXISTS cents; CREATE DOMAIN cents AS NUMERIC(10, 2);
        CREATE TABLE users (id SERIAL PRIMARY KEY, email TEXT);
        CREATE TABLE api_keys (id SERIAL PRIMARY KEY, user_id INTEGER, key_prefix TEXT, key_hash TEXT,
            total_cost {column})"
    );
    server.client().await.batch_execute(&tables).await.unwrap();
    let store = PostgresStore::builder(&server.url()).max_connections(2).build().unwrap();
    store.migrate().await.unwrap();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap().id;
    let budget = Budget { limit_cents: 15, period: BudgetPeriod::Total };
    let issued = manager.issue(NewKey::new(user, "k").budget(budget)).await.unwrap();
    (store, issued.record().id.clone())
}

async fn charge(store: &PostgresStore, key: &KeyId, sequence: u64, cost: i64) {
    let mut usage = KeyUsage::new(key.clone());
    (usage.cost_micro_cents, usage.settled_micro_cents) = (cost, cost);
    let mut batch = UsageBatch::new("node", sequence, SystemTime::now());
    batch.entries.push(usage);
    store.record_usage(&batch).await.unwrap();
}

/// How many half cents a budget of 15 cents lets through.
async fn half_cents_in_fifteen_cents(store: &PostgresStore, key: &KeyId) -> u64 {
    for sequence in 1.. {
        let mut request = LeaseRequest::new(key.clone(), "node", sequence, HALF_A_CENT);
        request.needed_micro_cents = HALF_A_CENT;
        if store.lease(&request).await.unwrap().amount_micro_cents < HALF_A_CENT {
            return sequence - 1;
        }
        charge(store, key, sequence, HALF_A_CENT).await;
    }
    unreachable!("a budget has an end")
}

#[tokio::test]
async fn fifteen_cents_are_fifteen_cents_and_thousands_of_half_cents_never_drift() {
    let columns = [
        ("INTEGER", 2_002, "1001"),
        ("NUMERIC(10, 2)", 2_002, "1001.00"),
        ("cents", 202, "101.00"),
        ("NUMERIC(24, 6)", 202, "101.000001"),
        ("DOUBLE PRECISION", 202, "101.000001"),
    ];
    for (column, half_cents, total) in columns {
        let server = Postgres::start();
        let (store, key) = key_in(&server, column).await;
        assert_eq!(half_cents_in_fifteen_cents(&store, &key).await, 30, "{column}");
        let spent = async || {
            store.find_key(&key).await.unwrap().unwrap().into_record().usage.cost_micro_cents
        };
        assert_eq!(spent().await, 15_000_000, "{column}");
        // And one that is not a half.
        for sequence in 31..=half_cents {
            charge(&store, &key, sequence, HALF_A_CENT).await;
        }
        charge(&store, &key, half_cents + 1, 1).await;
        assert_eq!(spent().await, half_cents as i64 * HALF_A_CENT + 1, "{column}");
        let row = server.client().await;
        let row = row
            .query_one("SELECT total_cost::text, total_cost_rest FROM api_keys", &[])
            .await
            .unwrap();
        let is_exact = total.ends_with('1') && total.contains('.');
        assert_eq!((row.get(0), row.get(1)), (total, i64::from(!is_exact)), "{column}");
    }
}
