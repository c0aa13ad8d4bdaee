//! Budgets: the ledger that every store keeps.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, SystemTime},
};

use tower_api_key::{
    Authenticator, Denial, KeyManager, NewKey, PostgresStore, SqliteStore,
    clock::{Clock, ManualClock},
    management::IssuedKey,
    record::{Budget, BudgetPeriod, KeyId},
    store::{KeyRepository, KeyStore, KeyUsage, Lease, LeaseRequest, ListKeys, UsageBatch},
};

use crate::support::{eventually::eventually, every_store::on_every_store, servers::Postgres};

const CENT: i64 = 1_000_000;

fn cents(limit_cents: u64, period: BudgetPeriod) -> Option<Budget> {
    Some(Budget { limit_cents, period })
}

async fn new_key<R: KeyRepository + Clone>(store: &R, budget: Option<Budget>) -> IssuedKey {
    let manager = KeyManager::new(store.clone());
    let keys = store.list_keys(&ListKeys::default()).await.unwrap().keys;
    let email = format!("ada{}@example.com", keys.len());
    let user = manager.create_user(&email, "user").await.unwrap();
    let new = NewKey::new(user.id, "k");
    let new = match budget {
        Some(budget) => new.budget(budget),
        None => new,
    };
    manager.issue(new).await.unwrap()
}

async fn lease(store: &impl KeyStore, key: &KeyId, by: &str, amount: i64, needed: i64) -> i64 {
    lease_for(store, key, by, amount, needed, Duration::from_secs(30)).await.amount_micro_cents
}

async fn lease_for(
    store: &impl KeyStore,
    key: &KeyId,
    by: &str,
    amount: i64,
    needed: i64,
    lifetime: Duration,
) -> Lease {
    static SEQUENCES: AtomicU64 = AtomicU64::new(1);
    let mut request = LeaseRequest::new(key.clone(), by, SEQUENCES.fetch_add(1, SeqCst), amount);
    (request.needed_micro_cents, request.lifetime) = (needed, lifetime);
    store.lease(&request).await.unwrap()
}

fn charge(writer: &str, sequence: u64, key: &KeyId, cost: i64, settled: i64) -> UsageBatch {
    let mut usage = KeyUsage::new(key.clone());
    (usage.cost_micro_cents, usage.settled_micro_cents) = (cost, settled);
    let mut batch = UsageBatch::new(writer, sequence, SystemTime::now());
    batch.entries = vec![usage];
    batch
}

async fn leases_and_costs_never_pass_the_limit<R: KeyRepository + Clone>(store: R) {
    let key = new_key(&store, cents(10, BudgetPeriod::Total)).await.record().id.clone();
    // What is needed, and a quarter of what is left then at most.
    assert_eq!(lease(&store, &key, "a", 100 * CENT, 2 * CENT).await, 4 * CENT);
    assert_eq!(lease(&store, &key, "b", 5 * CENT, 5 * CENT).await, 5 * CENT);
    // In place of what it has.
    assert_eq!(lease(&store, &key, "a", 3 * CENT, 3 * CENT).await, 3 * CENT);
    // What is settled leaves the lease for the period.
    store.record_usage(&charge("b", 1, &key, 4 * CENT, 4 * CENT)).await.unwrap();
    assert_eq!(lease(&store, &key, "c", 2 * CENT, 2 * CENT).await, 2 * CENT);
    assert_eq!(lease(&store, &key, "d", 1, 1).await, 0);
    // Whoever asks for more than there is keeps what it has.
    assert_eq!(lease(&store, &key, "a", 9 * CENT, 9 * CENT).await, 3 * CENT);
    // Handed back.
    assert_eq!(lease(&store, &key, "c", 0, 0).await, 0);
    assert_eq!(lease(&store, &key, "d", 2 * CENT, 2 * CENT).await, 2 * CENT);
    // Charged in full, past a lease as well; nothing is left then.
    store.record_usage(&charge("d", 1, &key, 50 * CENT, 50 * CENT)).await.unwrap();
    assert_eq!(lease(&store, &key, "a", CENT, CENT).await, 0);
}

async fn a_lease_expires_by_the_time_of_the_store<R: KeyRepository + Clone>(store: R) {
    let key = new_key(&store, cents(1, BudgetPeriod::Total)).await.record().id.clone();
    let life = Duration::from_secs(2);
    assert_eq!(lease_for(&store, &key, "a", CENT, CENT, life).await.amount_micro_cents, CENT);
    assert_eq!(lease(&store, &key, "b", CENT, CENT).await, 0);
    eventually("it has expired", async || lease(&store, &key, "b", CENT, CENT).await == CENT).await;
    assert_eq!(lease(&store, &key, "a", CENT, CENT).await, 0);
}

async fn a_period_is_charged_by_its_days<R: KeyRepository + Clone>(store: R) {
    let now = SystemTime::now();
    let day = Duration::from_secs(86_400);
    for period in [BudgetPeriod::Daily, BudgetPeriod::Weekly, BudgetPeriod::Monthly] {
        let key = new_key(&store, cents(10, period)).await.record().id.clone();
        for (sequence, ago) in [(1, 40 * day), (2, Duration::ZERO)] {
            let mut batch = charge(&format!("{period:?}"), sequence, &key, 6 * CENT, 0);
            batch.gathered_at = now - ago;
            store.record_usage(&batch).await.unwrap();
        }
        let granted = lease_for(&store, &key, "a", 4 * CENT, 4 * CENT, day).await;
        assert_eq!(granted.amount_micro_cents, 4 * CENT, "{period:?}");
        let left = granted.resets_at.unwrap().duration_since(now).unwrap();
        assert!(left <= 31 * day, "{period:?} ends in {left:?}");
        assert_eq!(lease(&store, &key, "b", 1, 1).await, 0, "{period:?}");
    }
    let key = new_key(&store, cents(10, BudgetPeriod::Total)).await.record().id.clone();
    let mut batch = charge("total", 1, &key, 6 * CENT, 0);
    batch.gathered_at = now - 400 * day;
    store.record_usage(&batch).await.unwrap();
    let granted = lease_for(&store, &key, "a", 5 * CENT, 5 * CENT, day).await;
    assert_eq!((granted.amount_micro_cents, granted.resets_at), (0, None));
}

/// A file of SQLite with a clock that stands at noon, 1970-01-01.
async fn sqlite_at_noon(folder: &tempfile::TempDir) -> (SqliteStore, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::at(SystemTime::UNIX_EPOCH + Duration::from_secs(43_200)));
    let file = folder.path().join("keys.db");
    let store = SqliteStore::builder(file).clock(clock.clone()).open().unwrap();
    store.migrate().await.unwrap();
    (store, clock)
}

#[tokio::test]
async fn a_budget_period_on_sqlite_ends_by_the_clock_of_the_store() {
    let folder = tempfile::tempdir().unwrap();
    let (store, clock) = sqlite_at_noon(&folder).await;
    let issued = new_key(&store, cents(1, BudgetPeriod::Daily)).await;
    let node = Authenticator::builder(store.clone()).clock(clock.clone()).build();
    let caller = node.authenticate(issued.expose_secret()).await.unwrap();
    caller.reserve(1_000_000).await.unwrap().settle(1_000_000);
    node.shutdown().await;

    let id = &issued.record().id;
    let granted = lease_for(&store, id, "other", CENT, 1, Duration::from_secs(30)).await;
    let midnight = SystemTime::UNIX_EPOCH + Duration::from_secs(86_400);
    assert_eq!((granted.amount_micro_cents, granted.resets_at), (0, Some(midnight)));
    clock.advance(Duration::from_secs(43_200) - Duration::from_nanos(1));
    assert_eq!(lease(&store, id, "other", CENT, 1).await, 0);
    clock.advance(Duration::from_nanos(1));
    assert_eq!(lease(&store, id, "other", CENT, CENT).await, CENT);
}

#[tokio::test]
async fn a_lease_on_sqlite_expires_by_the_clock_of_the_store() {
    let folder = tempfile::tempdir().unwrap();
    let (store, clock) = sqlite_at_noon(&folder).await;
    let key = new_key(&store, cents(1, BudgetPeriod::Total)).await.record().id.clone();
    let granted = lease_for(&store, &key, "a", CENT, CENT, Duration::from_secs(30)).await;
    assert_eq!(granted.expires_at, clock.now() + Duration::from_secs(30));
    clock.advance(Duration::from_millis(29_999));
    assert_eq!(lease(&store, &key, "b", CENT, CENT).await, 0);
    clock.advance(Duration::from_millis(1));
    assert_eq!(lease(&store, &key, "b", CENT, CENT).await, CENT);
}

async fn no_limit_a_limit_of_nothing_and_no_key<R: KeyRepository + Clone>(store: R) {
    let free = new_key(&store, None).await.record().id.clone();
    assert_eq!(lease(&store, &free, "a", 5 * CENT, 5 * CENT).await, 5 * CENT);
    let nothing = new_key(&store, cents(0, BudgetPeriod::Daily)).await.record().id.clone();
    assert_eq!(lease(&store, &nothing, "a", 1, 1).await, 0);
    assert_eq!(lease(&store, &KeyId::from(987_654), "a", 1, 1).await, 0);
    assert_eq!(lease(&store, &KeyId::from("a text"), "a", 1, 1).await, 0);
    let huge = new_key(&store, cents(i64::MAX as u64, BudgetPeriod::Total)).await;
    let granted = lease(&store, &huge.record().id, "a", i64::MAX, 1).await;
    assert!(granted >= i64::MAX / 4, "{granted}");
}

async fn a_lease_request_that_comes_late_changes_nothing<R: KeyRepository + Clone>(store: R) {
    let key = new_key(&store, cents(10, BudgetPeriod::Daily)).await.record().id.clone();
    let request = async |by: &str, sequence, amount| {
        let mut request = LeaseRequest::new(key.clone(), by, sequence, amount);
        request.needed_micro_cents = amount;
        store.lease(&request).await.unwrap()
    };
    let granted = request("a", 2, 6 * CENT).await;
    // The one before it, which was on its way for long, and the same again.
    for (sequence, amount) in [(1, 0), (1, 9 * CENT), (2, CENT)] {
        let lease = request("a", sequence, amount).await;
        assert_eq!(lease.amount_micro_cents, 6 * CENT);
        let differs = lease.expires_at.duration_since(granted.expires_at).unwrap_or_default();
        assert!(differs <= Duration::from_millis(1), "it has been renewed by {differs:?}");
    }
    assert_eq!(request("b", 1, 5 * CENT).await.amount_micro_cents, 0);
    assert_eq!(request("b", 1, 4 * CENT).await.amount_micro_cents, 0);
    assert_eq!(request("b", 2, 4 * CENT).await.amount_micro_cents, 4 * CENT);
    // What was handed back stays handed back.
    assert_eq!(request("a", 4, 0).await.amount_micro_cents, 0);
    assert_eq!(request("a", 3, 6 * CENT).await.amount_micro_cents, 0);
    assert_eq!(request("c", 1, 6 * CENT).await.amount_micro_cents, 6 * CENT);
}

async fn nothing_is_reserved_for_nothing_where_nothing_is_left<R: KeyRepository + Clone>(store: R) {
    let nothing = new_key(&store, cents(0, BudgetPeriod::Daily)).await;
    let node = Authenticator::new(store);
    let caller = node.authenticate(nothing.expose_secret()).await.unwrap();
    let denial = caller.reserve(0).await.unwrap_err();
    assert!(matches!(denial, Denial::BudgetExceeded(_)), "{denial:?}");
}

async fn what_a_node_with_a_wrong_clock_spends_is_charged_to_the_stores_day<R>(store: R)
where
    R: KeyRepository + Clone,
{
    let issued = new_key(&store, cents(1, BudgetPeriod::Daily)).await;
    let day = Duration::from_secs(86_400);
    for wrong in [SystemTime::now() - 3 * day, SystemTime::now() + 3 * day] {
        let clock = Arc::new(ManualClock::at(wrong));
        let node = Authenticator::builder(store.clone()).clock(clock).build();
        let caller = node.authenticate(issued.expose_secret()).await.unwrap();
        caller.reserve(400_000).await.unwrap().settle(400_000);
        node.shutdown().await;
    }
    let id = &issued.record().id;
    assert_eq!(lease(&store, id, "other", 200_001, 200_001).await, 0);
    assert_eq!(lease(&store, id, "other", 200_000, 200_000).await, 200_000);
}

on_every_store! {
    leases_and_costs_never_pass_the_limit
    a_lease_expires_by_the_time_of_the_store
    a_period_is_charged_by_its_days
    no_limit_a_limit_of_nothing_and_no_key
    a_lease_request_that_comes_late_changes_nothing
    nothing_is_reserved_for_nothing_where_nothing_is_left
    what_a_node_with_a_wrong_clock_spends_is_charged_to_the_stores_day
}

#[tokio::test]
async fn two_who_wait_for_one_lock_are_not_granted_the_same() {
    let server = Postgres::start();
    let mut admin = server.client().await;
    // The default of a database that is shared with others.
    let default = "ALTER DATABASE postgres SET default_transaction_isolation = 'repeatable read'";
    admin.batch_execute(default).await.unwrap();
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let key = new_key(&store, cents(1, BudgetPeriod::Total)).await.record().id.clone();
    let transaction = admin.transaction().await.unwrap();
    transaction.batch_execute("SELECT FROM api_keys FOR UPDATE").await.unwrap();
    let requests = ["a", "b"].map(|by| {
        let (store, key) = (store.clone(), key.clone());
        tokio::spawn(async move { lease(&store, &key, by, CENT, CENT).await })
    });
    let watch = server.client().await;
    eventually("both wait", async || {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
        watch.query_one(waiting, &[]).await.unwrap().get::<_, i64>(0) == 2
    })
    .await;
    transaction.rollback().await.unwrap();
    let mut granted = 0;
    for request in requests {
        granted += request.await.unwrap();
    }
    assert_eq!(granted, CENT);
}
