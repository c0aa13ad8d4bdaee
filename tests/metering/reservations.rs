//! Reservations on one node, by a clock that the test moves.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use tokio::task::JoinSet;
use tower::{Service, ServiceBuilder, ServiceExt, limit::ConcurrencyLimit};
use tower_api_key::{
    ApiKeyAuthLayer, AuthContext, Authenticator, Denial, KeyManager, MemoryStore, NewKey,
    StoreError,
    clock::ManualClock,
    denial::BudgetExceeded,
    middleware::BudgetLayer,
    record::{Budget, BudgetPeriod},
    store::{Answer, KeyRepository, KeyStore, Lease, LeaseRequest, Lookup, UsageBatch},
};

use crate::support::{
    self, Answer as Answered, bearer,
    eventually::{eventually, others_make},
    probe::{poll, poll_ready, probe},
    read,
};

const CENT: u64 = 1_000_000;
const SOON: Duration = Duration::from_millis(5);
const LEASE: Duration = Duration::from_secs(30);
/// Noon of a Monday.
const NOON: Duration = Duration::from_secs(20_415 * 86_400 + 43_200);

fn cents(limit_cents: u64, period: BudgetPeriod) -> Option<Budget> {
    Some(Budget { limit_cents, period })
}

/// A store whose ledger can fail, and that counts the requests for leases and the usage batches.
#[derive(Clone)]
struct Ledger {
    store: MemoryStore,
    lease_requests: Arc<AtomicUsize>,
    recorded: Arc<AtomicUsize>,
    is_down: Arc<AtomicBool>,
}

impl KeyStore for Ledger {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        self.store.resolve(lookup).await
    }

    async fn record_usage(&self, batch: &UsageBatch) -> Result<(), StoreError> {
        self.recorded.fetch_add(1, SeqCst);
        self.is_there()?;
        self.store.record_usage(batch).await
    }

    async fn lease(&self, ask: &LeaseRequest) -> Result<Lease, StoreError> {
        self.lease_requests.fetch_add(1, SeqCst);
        self.is_there()?;
        self.store.lease(ask).await
    }
}

impl Ledger {
    fn is_there(&self) -> Result<(), StoreError> {
        let is_down = self.is_down.load(SeqCst);
        if is_down { Err(StoreError::unavailable("it is away")) } else { Ok(()) }
    }
}

struct Node {
    /// Of the node and of the store.
    clock: Arc<ManualClock>,
    ledger: Ledger,
    authenticator: Authenticator,
    caller: AuthContext,
    key: String,
}

impl Node {
    async fn new(budget: Option<Budget>) -> Self {
        let clock = Arc::new(ManualClock::at(SystemTime::UNIX_EPOCH + NOON));
        let store = MemoryStore::with_clock(clock.clone());
        let manager = KeyManager::new(store.clone());
        let user = manager.create_user("ada@example.com", "user").await.unwrap();
        let new = NewKey::new(user.id, "k");
        let new = match budget {
            Some(budget) => new.budget(budget),
            None => new,
        };
        let key = manager.issue(new).await.unwrap().expose_secret().to_owned();
        let (lease_requests, recorded, is_down) = Default::default();
        let ledger = Ledger { store, lease_requests, recorded, is_down };
        let authenticator = Authenticator::builder(ledger.clone())
            .clock(clock.clone())
            .usage_interval(SOON)
            .lease_lifetime(LEASE)
            .build();
        let caller = authenticator.authenticate(&key).await.unwrap();
        Self { clock, ledger, authenticator, caller, key }
    }

    async fn spent(&self) -> i64 {
        let id = &self.caller.key().id;
        self.ledger.store.find_key(id).await.unwrap().unwrap().into_record().usage.cost_micro_cents
    }

    /// What another node is granted that wants this much and no less.
    async fn leased_elsewhere(&self, sequence: u64, amount: u64) -> i64 {
        let id = self.caller.key().id.clone();
        let mut ask = LeaseRequest::new(id, "another", sequence, amount as i64);
        ask.needed_micro_cents = ask.amount_micro_cents;
        self.ledger.store.lease(&ask).await.unwrap().amount_micro_cents
    }

    async fn denied(&self, estimate: u64) -> BudgetExceeded {
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
    assert_eq!(node.denied(100_001).await.resets_at, None);
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
    let lease_requests = node.ledger.lease_requests.load(SeqCst);
    for _ in 0..10 {
        node.caller.reserve(1_000).await.unwrap().settle(1_000);
    }
    assert_eq!(node.ledger.lease_requests.load(SeqCst), lease_requests);
    node.ledger.is_down.store(true, SeqCst);
    node.caller.reserve(1_000).await.unwrap().settle(1_000);
    // More than what is in hand.
    let denial = node.caller.reserve(900 * CENT).await.unwrap_err();
    assert!(matches!(denial, Denial::Unavailable(_)), "{denial:?}");
    assert_eq!(denial.status(), 503);
    node.ledger.is_down.store(false, SeqCst);
    eventually("all of it is charged", async || node.spent().await == 12_000).await;
}

#[tokio::test]
async fn the_shutdown_hands_back_what_is_not_used() {
    let node = Node::new(cents(4, BudgetPeriod::Total)).await;
    node.caller.reserve(CENT).await.unwrap().settle(CENT);
    node.authenticator.shutdown().await;
    assert_eq!(node.leased_elsewhere(1, 3 * CENT).await, 3 * CENT as i64);
}

#[tokio::test]
async fn a_key_without_a_budget_reserves_what_it_likes() {
    let node = Node::new(None).await;
    node.caller.reserve(u64::MAX).await.unwrap().settle(5);
    eventually("it is counted", async || node.spent().await == 5).await;
    assert_eq!(node.ledger.lease_requests.load(SeqCst), 0);
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
    let ask = async |grpc: bool| -> Answered {
        let mut request = bearer(&node.key);
        if grpc {
            request = support::grpc(request, "application/grpc");
        }
        read(service.clone().oneshot(request).await.unwrap()).await
    };
    for _ in 0..3 {
        assert_eq!(ask(false).await.status(), 200);
    }
    let denied = ask(false).await;
    assert_eq!(denied.status(), 429);
    let wait: u64 = denied.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=86_400).contains(&wait), "{wait}");
    assert!(denied.body.contains("too little left for this; it resets at 20"), "{}", denied.body);
    assert_eq!(ask(true).await.header("grpc-status"), Some("8"));
    eventually("three are charged", async || node.spent().await == 900_000).await;
}

#[tokio::test]
async fn a_request_that_is_given_up_before_the_inner_service_has_it_costs_nothing() {
    let node = Node::new(cents(1, BudgetPeriod::Daily)).await;
    let limit = ConcurrencyLimit::new(probe().0, 1);
    let mut holder = limit.clone();
    let mut service = ServiceBuilder::new()
        .layer(ApiKeyAuthLayer::from(node.authenticator.clone()))
        .layer(BudgetLayer::new(400_000))
        .service(limit);
    assert!(poll_ready::<_, Request<Full<Bytes>>>(&mut service).is_ready());
    let mut answer = service.call(bearer(&node.key));
    // There is no lease in hand, so that the permit is free while the lease is requested.
    assert!(poll_ready::<_, Request<Full<Bytes>>>(&mut holder).is_ready());
    // With two more of this cost, the budget would be used up if the first one were charged.
    let is_leased = || {
        assert!(poll(&mut answer).is_pending(), "called without a permit");
        node.ledger.lease_requests.load(SeqCst) == 1
    };
    others_make("the cost is reserved", is_leased).await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
        assert!(poll(&mut answer).is_pending(), "called without a permit");
    }
    drop(answer);
    drop(holder);
    for _ in 0..2 {
        let request = bearer(&node.key);
        assert_eq!(service.clone().oneshot(request).await.unwrap().status(), 200);
    }
    eventually("two are charged", async || node.spent().await == 800_000).await;
}

#[tokio::test]
async fn without_the_store_holds_end_with_the_lease_whatever_the_clock_on_the_wall_says() {
    let node = Node::new(cents(1_000, BudgetPeriod::Monthly)).await;
    node.caller.reserve(1_000).await.unwrap().settle(1_000);
    node.ledger.is_down.store(true, SeqCst);
    node.clock.advance(LEASE - Duration::from_millis(1));
    node.caller.reserve(1_000).await.unwrap().settle(1_000);
    node.clock.advance(Duration::from_millis(1));
    node.clock.set_wall(SystemTime::UNIX_EPOCH + NOON - 2 * LEASE);
    let denial = node.caller.reserve(1_000).await.unwrap_err();
    assert!(matches!(denial, Denial::Unavailable(_)), "{denial:?}");
    node.ledger.is_down.store(false, SeqCst);
    // A request at the moment of a failure gets the failure.
    node.clock.advance(Duration::from_millis(1));
    node.caller.reserve(1_000).await.unwrap().settle(1_000);
    eventually("all of it is charged", async || node.spent().await == 3_000).await;
}

/// The risk that is stated: what a node had let through when it was cut off for longer than its lease lasts.
#[tokio::test]
async fn a_hold_that_outlives_its_lease_is_charged_in_full() {
    let node = Node::new(cents(1, BudgetPeriod::Daily)).await;
    let held = node.caller.reserve(400_000).await.unwrap();
    node.ledger.is_down.store(true, SeqCst);
    assert_eq!(node.leased_elsewhere(1, CENT).await, 0);
    node.clock.advance(LEASE);
    assert_eq!(node.leased_elsewhere(2, CENT).await, CENT as i64);
    held.settle(400_000);
    node.ledger.is_down.store(false, SeqCst);
    eventually("it is charged", async || node.spent().await == 400_000).await;
    // The lease of the other one still counts, and there is less than nothing left beside it.
    let midnight = SystemTime::UNIX_EPOCH + NOON + Duration::from_secs(43_200);
    assert_eq!(node.denied(1).await.resets_at, Some(midnight));
    assert_eq!(node.leased_elsewhere(3, CENT).await, 600_000);
}

#[tokio::test]
async fn a_hold_over_the_end_of_a_period_counts_for_the_new_one() {
    let node = Node::new(cents(1, BudgetPeriod::Daily)).await;
    let midnight = SystemTime::UNIX_EPOCH + NOON + Duration::from_secs(43_200);
    node.clock.advance(Duration::from_secs(43_190));
    node.caller.reserve(300_000).await.unwrap().settle(300_000);
    eventually("it is charged", async || node.spent().await == 300_000).await;
    let held = node.caller.reserve(600_000).await.unwrap();
    assert_eq!(node.denied(100_001).await.resets_at, Some(midnight));
    node.clock.advance(Duration::from_secs(20));
    // What was spent the day before does not count any more; what is held does.
    let tomorrow = midnight + Duration::from_secs(86_400);
    assert_eq!(node.denied(400_001).await.resets_at, Some(tomorrow));
    node.caller.reserve(150_000).await.unwrap().settle(150_000);
    held.settle(600_000);
    eventually("both are charged", async || node.spent().await == 1_050_000).await;
    assert_eq!(node.denied(250_001).await.resets_at, Some(tomorrow));
    node.caller.reserve(250_000).await.unwrap().settle(250_000);
    assert_eq!(node.denied(1).await.resets_at, Some(tomorrow));
}

#[tokio::test]
async fn costs_of_the_largest_number_leave_nothing_to_spend() {
    let node = Node::new(cents(1_000, BudgetPeriod::Total)).await;
    let (first, second) =
        (node.caller.reserve(1).await.unwrap(), node.caller.reserve(1).await.unwrap());
    node.ledger.is_down.store(true, SeqCst);
    // Each is in a batch of its own.
    first.settle(u64::MAX);
    let tried = node.ledger.recorded.load(SeqCst);
    eventually("it is sent", async || node.ledger.recorded.load(SeqCst) > tried + 1).await;
    second.settle(u64::MAX);
    let tried = node.ledger.recorded.load(SeqCst);
    eventually("it waits", async || node.ledger.recorded.load(SeqCst) > tried + 1).await;
    node.ledger.is_down.store(false, SeqCst);
    let tried = node.ledger.recorded.load(SeqCst);
    eventually("both are written", async || node.ledger.recorded.load(SeqCst) > tried + 1).await;
    assert_eq!(node.spent().await, i64::MAX);
    node.clock.advance(Duration::from_secs(1));
    node.denied(1).await;
}

#[tokio::test]
async fn nothing_is_reserved_after_the_shutdown() {
    let node = Node::new(cents(1_000, BudgetPeriod::Total)).await;
    node.caller.reserve(CENT).await.unwrap().settle(CENT);
    node.authenticator.shutdown().await;
    let denial = node.caller.reserve(1).await.unwrap_err();
    assert!(matches!(denial, Denial::Unavailable(_)), "{denial:?}");
    assert_eq!(node.leased_elsewhere(1, 999 * CENT).await, 999 * CENT as i64);
}

/// A ledger whose answers get lost, and that carries out some asks only after it was given up on.
#[derive(Clone)]
struct Unreliable {
    store: MemoryStore,
    lease_requests: Arc<AtomicUsize>,
}

impl KeyStore for Unreliable {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        self.store.resolve(lookup).await
    }

    async fn record_usage(&self, batch: &UsageBatch) -> Result<(), StoreError> {
        self.store.record_usage(batch).await?;
        self.answer(()).await
    }

    async fn lease(&self, ask: &LeaseRequest) -> Result<Lease, StoreError> {
        if self.lease_requests.load(SeqCst) % 5 == 3 {
            let (store, ask) = (self.store.clone(), ask.clone());
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(100)).await;
                store.lease(&ask).await.unwrap();
            });
            self.lease_requests.fetch_add(1, SeqCst);
            return Err(StoreError::unavailable("it takes too long"));
        }
        let lease = self.store.lease(ask).await?;
        self.answer(lease).await
    }
}

impl Unreliable {
    /// Takes its time, so that usage is written while a lease is on its way.
    async fn answer<T>(&self, answer: T) -> Result<T, StoreError> {
        tokio::time::sleep(Duration::from_millis(10)).await;
        let is_lost = self.lease_requests.fetch_add(1, SeqCst) % 5 == 1;
        if is_lost { Err(StoreError::unavailable("the answer is lost")) } else { Ok(answer) }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_and_late_answers_never_let_more_through_than_there_is() {
    const LIMIT: u64 = 40 * CENT;
    let store = MemoryStore::new();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap();
    let budget = Budget { limit_cents: LIMIT / CENT, period: BudgetPeriod::Total };
    let key = manager.issue(NewKey::new(user.id, "k").budget(budget)).await.unwrap();
    let ledger = Unreliable { store: store.clone(), lease_requests: Arc::default() };
    // What is held and what was settled.
    let exposed = Arc::new(AtomicU64::new(0));
    let mut spenders = JoinSet::new();
    let mut nodes = Vec::new();
    for _ in 0..3 {
        let node = Authenticator::builder(ledger.clone()).usage_interval(SOON).build();
        let caller = node.authenticate(key.expose_secret()).await.unwrap();
        nodes.push(node);
        for spender in 0..50_u64 {
            let (caller, exposed) = (caller.clone(), Arc::clone(&exposed));
            spenders.spawn(async move {
                let mut denied = 0;
                while denied < 50 {
                    let estimate = 10_000 + 1_000 * spender;
                    let Ok(reservation) = caller.reserve(estimate).await else {
                        denied += 1;
                        tokio::time::sleep(Duration::from_millis(10)).await;
                        continue;
                    };
                    let now = exposed.fetch_add(estimate, SeqCst) + estimate;
                    assert!(now <= LIMIT, "{now} are let through");
                    tokio::time::sleep(Duration::from_millis(spender)).await;
                    let cost = estimate / (1 + spender % 3);
                    // Before it is there for others.
                    exposed.fetch_sub(estimate - cost, SeqCst);
                    reservation.settle(cost);
                }
            });
        }
    }
    spenders.join_all().await;
    for node in nodes {
        node.shutdown().await;
    }
    let exposed = exposed.load(SeqCst);
    assert!(exposed > LIMIT * 9 / 10, "{exposed}");
    let record = store.find_key(&key.record().id).await.unwrap().unwrap().into_record();
    assert_eq!(record.usage.cost_micro_cents as u64, exposed);
}
