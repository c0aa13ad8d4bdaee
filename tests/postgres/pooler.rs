//! PostgreSQL behind PgBouncer, which gives one server connection to one client after the other.

use std::time::{Duration, SystemTime};

use tokio_postgres::{Client, NoTls, SimpleQueryMessage};
use tower_api_key::{
    Authenticator, KeyManager, NewKey, PostgresStore,
    record::{Budget, BudgetPeriod},
    store::{KeyRepository, KeyStore, KeyUsage, LeaseRequest, UsageBatch},
};

use crate::support::{
    feed::{eventually, in_sync},
    servers::{PgBouncer, Postgres},
};

async fn client(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// The first column of what a client gets without preparing anything.
async fn first(client: &Client, sql: &str) -> Vec<String> {
    let messages = client.simple_query(sql).await.unwrap();
    let rows = messages.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    rows.collect()
}

/// Writes down in which transactions usage and leases are written.
const AUDIT: &str = "
    CREATE TABLE seen (what TEXT);
    CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO seen VALUES (TG_TABLE_NAME || ' ' || current_setting('transaction_isolation')
            || ' ' || current_setting('statement_timeout'));
        RETURN NULL;
    END $$;
    CREATE TRIGGER see AFTER INSERT OR UPDATE ON api_key_leases EXECUTE FUNCTION see();
    CREATE TRIGGER see AFTER INSERT OR UPDATE ON api_key_usage EXECUTE FUNCTION see();";

async fn other_clients_of_the_pooler_keep_their_settings(settings: &str) {
    let server = Postgres::with_settings(&["default_transaction_isolation=repeatable read"]);
    let pooler = PgBouncer::start(&server, settings);
    let other = client(&pooler.url()).await;
    let builder = PostgresStore::builder(&pooler.url()).poll_interval(Duration::from_millis(50));
    let store = builder.build().unwrap();
    store.migrate().await.unwrap();
    let admin = server.client().await;
    admin.batch_execute(AUDIT).await.unwrap();

    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap();
    let budget = Budget { limit_cents: 100, period: BudgetPeriod::Total };
    let issued = manager.issue(NewKey::new(user.id, "k").budget(budget)).await.unwrap();
    let (key, id) = (issued.expose_secret(), issued.record().id.clone());
    let node = Authenticator::new(store.clone());
    assert!(node.authenticate(key).await.is_ok());
    in_sync(&node).await;
    let lease = store.lease(&LeaseRequest::new(id.clone(), "node", 1, 1000)).await.unwrap();
    assert_eq!(lease.amount_micro_cents, 1000);
    let mut usage = KeyUsage::new(id.clone());
    (usage.requests, usage.cost_micro_cents) = (1, 10);
    let mut batch = UsageBatch::new("node", 1, SystemTime::now());
    batch.entries.push(usage);
    store.record_usage(&batch).await.unwrap();
    let spent = store.find_key(&id).await.unwrap().unwrap().into_record().usage.cost_micro_cents;
    assert_eq!(spent, 10);

    for (setting, default) in
        [("statement_timeout", "0"), ("default_transaction_isolation", "repeatable read")]
    {
        assert_eq!(first(&other, &format!("SHOW {setting}")).await, [default], "{setting}");
    }
    let mut seen = first(&admin, "SELECT DISTINCT what FROM seen").await;
    seen.sort();
    assert_eq!(seen, ["api_key_leases read committed 2s", "api_key_usage read committed 2s"]);

    manager.revoke(&id).await.unwrap();
    eventually("the revoke is polled", async || node.authenticate(key).await.is_err()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_clients_of_a_pooler_keep_their_settings() {
    other_clients_of_the_pooler_keep_their_settings("").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_clients_of_a_pooler_that_ignores_start_up_options_keep_their_settings() {
    other_clients_of_the_pooler_keep_their_settings("ignore_startup_parameters = options").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_pooler_a_connection_has_the_settings_and_the_options_of_the_url() {
    let server = Postgres::with_settings(&["default_transaction_isolation=repeatable read"]);
    let url = server.tcp_url("options=-c%20work_mem%3D1234kB%20-c%20statement_timeout%3D7");
    let store = PostgresStore::builder(&url).statement_timeout(Duration::from_millis(2345));
    let store = store.build().unwrap();
    store.migrate().await.unwrap();
    let admin = server.client().await;
    let audit = AUDIT.replace(
        "' ' || current_setting('statement_timeout')",
        "' ' ||
        current_setting('statement_timeout') || ' ' || current_setting('work_mem')",
    );
    admin.batch_execute(&audit).await.unwrap();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap();
    let issued = manager.issue(NewKey::new(user.id, "k")).await.unwrap();
    let mut batch = UsageBatch::new("node", 1, SystemTime::now());
    let mut usage = KeyUsage::new(issued.record().id.clone());
    usage.requests = 1;
    batch.entries.push(usage);
    store.record_usage(&batch).await.unwrap();
    let seen = first(&admin, "SELECT DISTINCT what FROM seen ORDER BY 1").await;
    // The statement that counts usage has a part for leases.
    let settings = "read committed 2345ms 1234kB";
    assert_eq!(
        seen,
        ["api_key_leases", "api_key_usage"].map(|table| format!("{table} {settings}"))
    );
}
