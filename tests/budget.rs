//! Budgets: the ledger that every store keeps, and reservations on one node.

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, SystemTime},
};

use support::{
    Answer as Told, bearer, eventually::eventually, probe::probe, read, servers::Postgres,
};
use tower::{ServiceBuilder, ServiceExt};
use tower_api_key::*;

const CENT: i64 = 1_000_000;
const SOON: Duration = Duration::from_millis(5);

fn cents(limit_cents: u64, period: BudgetPeriod) -> Option<Budget> {
    Some(Budget { limit_cents, period })
}

async fn new_key<R: KeyRepository + Clone>(store: &R, budget: Option<Budget>) -> IssuedKey {
    let manager = KeyManager::new(store.clone());
    let keys = store.list_keys(&ListKeys::default()).await.unwrap();
    let email = format!("ada{}@example.com", keys.len());
    let user = manager.create_user(&email, "user").await.unwrap();
    let new = NewKey::new(user.id, "k");
    let new = match budget {
        Some(budget) => new.budget(budget),
        None => new,
    };
    manager.issue(new).await.unwrap()
}

async fn lease(store: &impl KeyStore, key: &KeyId, by: &str, asked: i64, needed: i64) -> i64 {
    lease_for(store, key, by, asked, needed, Duration::from_secs(30)).await.amount_micro_cents
}

async fn lease_for(
    store: &impl KeyStore,
    key: &KeyId,
    by: &str,
    asked: i64,
    needed: i64,
    lifetime: Duration,
) -> Lease {
    let mut ask = LeaseAsk::new(key.clone(), by, asked);
    (ask.needed_micro_cents, ask.lifetime) = (needed, lifetime);
    store.lease(&ask).await.unwrap()
}

fn charge(writer: &str, sequence: u64, key: &KeyId, cost: i64, settled: i64) -> UsageBatch {
    let mut usage = KeyUsage::new(key.clone());
    (usage.cost_micro_cents, usage.settled_micro_cents) = (cost, settled);
    let mut batch = UsageBatch::new(writer, sequence);
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
    let life = Duration::from_millis(300);
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

macro_rules! on_every_store {
    ($($behaviour:ident)*) => {
        mod memory {
            $(#[tokio::test] async fn $behaviour() { super::$behaviour(super::MemoryStore::new()).await; })*
        }
        mod sqlite {
            $(#[tokio::test] async fn $behaviour() {
                let store = super::SqliteStore::in_memory().unwrap();
                store.migrate().await.unwrap();
                super::$behaviour(store).await;
            })*
        }
        mod postgres {
            $(#[tokio::test] async fn $behaviour() {
                let server = super::Postgres::start();
                let store = super::PostgresStore::new(&server.url()).unwrap();
                store.migrate().await.unwrap();
                super::$behaviour(store).await;
            })*
        }
    };
}

on_every_store! {
    leases_and_costs_never_pass_the_limit
    a_lease_expires_by_the_time_of_the_store
    a_period_is_charged_by_its_days
    no_limit_a_limit_of_nothing_and_no_key
}

/// A store whose ledger can be away, and that counts how often it is asked for a lease.
#[derive(Clone)]
struct Ledger {
    store: MemoryStore,
    asked: Arc<AtomicUsize>,
    is_away: Arc<AtomicBool>,
}

impl KeyStore for Ledger {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        self.store.resolve(lookup).await
    }

    async fn record_usage(&self, batch: &UsageBatch) -> Result<(), StoreError> {
        self.is_there()?;
        self.store.record_usage(batch).await
    }

    async fn lease(&self, ask: &LeaseAsk) -> Result<Lease, StoreError> {
        self.asked.fetch_add(1, SeqCst);
        self.is_there()?;
        self.store.lease(ask).await
    }
}

impl Ledger {
    fn is_there(&self) -> Result<(), StoreError> {
        let is_away = self.is_away.load(SeqCst);
        if is_away { Err(StoreError::unavailable("it is away")) } else { Ok(()) }
    }
}

struct Node {
    ledger: Ledger,
    authenticator: Authenticator,
    caller: AuthContext,
    key: String,
}

impl Node {
    async fn new(budget: Option<Budget>) -> Self {
        let store = MemoryStore::new();
        let issued = new_key(&store, budget).await;
        let ledger = Ledger { store, asked: Arc::default(), is_away: Arc::default() };
        let authenticator = Authenticator::builder(ledger.clone()).usage_interval(SOON).build();
        let key = issued.expose_secret().to_owned();
        let caller = authenticator.authenticate(&key).await.unwrap();
        Self { ledger, authenticator, caller, key }
    }

    async fn spent(&self) -> i64 {
        let id = &self.caller.key().id;
        self.ledger.store.find_key(id).await.unwrap().unwrap().usage.cost_micro_cents
    }

    async fn refused(&self, estimate: u64) -> BudgetExceeded {
        match self.caller.reserve(estimate).await {
            Err(Denial::BudgetExceeded(exceeded)) => exceeded,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_reservation_is_settled_or_dropped_once() {
    let node = Node::new(cents(1, BudgetPeriod::Total)).await;
    node.caller.reserve(400_000).await.unwrap().settle(100_000);
    drop(node.caller.reserve(200_000).await.unwrap());
    eventually("both are charged", async || node.spent().await == 300_000).await;
    let held = node.caller.reserve(600_000).await.unwrap();
    assert_eq!(node.refused(100_001).await.resets_at, None);
    // Past the estimate: it was used, so it is charged.
    held.settle(650_000);
    eventually("it is charged", async || node.spent().await == 950_000).await;
    node.caller.reserve(50_000).await.unwrap().settle(0);
    assert!(matches!(node.caller.reserve(u64::MAX).await, Err(Denial::BudgetExceeded(_))));
    node.caller.reserve(0).await.unwrap().settle(0);
    node.authenticator.shutdown().await;
    assert_eq!(node.spent().await, 950_000);
}

#[tokio::test]
async fn a_lease_in_hand_serves_without_asking_and_outlives_the_store() {
    let node = Node::new(cents(1_000, BudgetPeriod::Monthly)).await;
    node.caller.reserve(1_000).await.unwrap().settle(1_000);
    let asked = node.ledger.asked.load(SeqCst);
    for _ in 0..10 {
        node.caller.reserve(1_000).await.unwrap().settle(1_000);
    }
    assert_eq!(node.ledger.asked.load(SeqCst), asked);
    node.ledger.is_away.store(true, SeqCst);
    node.caller.reserve(1_000).await.unwrap().settle(1_000);
    // More than what is in hand.
    let denial = node.caller.reserve(900 * CENT as u64).await.unwrap_err();
    assert!(matches!(denial, Denial::Unavailable(_)), "{denial:?}");
    assert_eq!(denial.status(), 503);
    node.ledger.is_away.store(false, SeqCst);
    eventually("all of it is charged", async || node.spent().await == 12_000).await;
}

#[tokio::test]
async fn the_shutdown_hands_back_what_is_not_used() {
    let node = Node::new(cents(4, BudgetPeriod::Total)).await;
    node.caller.reserve(CENT as u64).await.unwrap().settle(CENT as u64);
    node.authenticator.shutdown().await;
    let id = &node.caller.key().id;
    assert_eq!(lease(&node.ledger.store, id, "other", 3 * CENT, 3 * CENT).await, 3 * CENT);
}

#[tokio::test]
async fn a_key_without_a_budget_reserves_what_it_likes() {
    let node = Node::new(None).await;
    node.caller.reserve(u64::MAX).await.unwrap().settle(5);
    eventually("it is counted", async || node.spent().await == 5).await;
    assert_eq!(node.ledger.asked.load(SeqCst), 0);
    AuthContext::unverified(node.caller.key().clone()).reserve(7).await.unwrap().settle(7);
    let nobody = Authenticator::builder(node.ledger.store.clone()).without_usage().build();
    nobody.authenticate(&node.key).await.unwrap().reserve(7).await.unwrap().settle(7);
    node.authenticator.shutdown().await;
    assert_eq!(node.spent().await, 5);
}

#[tokio::test]
async fn a_fixed_cost_is_charged_for_each_request() {
    let node = Node::new(cents(1, BudgetPeriod::Daily)).await;
    let service = ServiceBuilder::new()
        .layer(ApiKeyAuthLayer::from(node.authenticator.clone()))
        .layer(BudgetLayer::new(300_000))
        .service(probe().0);
    let ask = async |grpc: bool| -> Told {
        let mut request = bearer(&node.key);
        if grpc {
            request.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
        }
        read(service.clone().oneshot(request).await.unwrap()).await
    };
    for _ in 0..3 {
        assert_eq!(ask(false).await.status(), 200);
    }
    let refused = ask(false).await;
    assert_eq!(refused.status(), 429);
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=86_400).contains(&wait), "{wait}");
    assert!(refused.body.contains("is used up until 20"), "{}", refused.body);
    assert_eq!(ask(true).await.header("grpc-status"), Some("8"));
    eventually("three are charged", async || node.spent().await == 900_000).await;
}
