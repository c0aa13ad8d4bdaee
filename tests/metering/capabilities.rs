//! A capability that the store or the settings lack: 500, and one warning with the remedy.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use tower_api_key::{
    ApiKeyAuthLayer, AuthContext, Authenticator, Denial, KeyManager, MemoryStore, NewKey,
    StoreError,
    middleware::BudgetLayer,
    record::{Budget, BudgetPeriod},
    store::{Answer, KeyStore, Lease, LeaseRequest, Lookup, UsageBatch},
};

use crate::support::{
    self,
    eventually::eventually,
    log::{Log, capture},
    some_user,
    stores::Failing,
};

/// Keys that can be looked up, and leases where `has_leases` is set.
#[derive(Clone)]
struct Plain {
    keys: MemoryStore,
    has_leases: bool,
    /// Whether it is out of reach for usage. It records none in any case.
    is_down: Arc<AtomicBool>,
}

impl KeyStore for Plain {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        self.keys.resolve(lookup).await
    }

    async fn record_usage(&self, _: &UsageBatch) -> Result<(), StoreError> {
        match self.is_down.load(SeqCst) {
            true => Err(StoreError::unavailable("away")),
            false => Err(StoreError::unsupported("usage")),
        }
    }

    async fn lease(&self, request: &LeaseRequest) -> Result<Lease, StoreError> {
        match self.has_leases {
            true => self.keys.lease(request).await,
            false => Err(StoreError::unsupported("budget leases")),
        }
    }
}

/// A store with one key that has a budget of a cent a day.
async fn budgeted(has_leases: bool) -> (Plain, String) {
    let keys = MemoryStore::new();
    let user = some_user(keys.clone()).await;
    let new = NewKey::new(user, "k").budget(Budget { limit_cents: 1, period: BudgetPeriod::Daily });
    let issued = KeyManager::new(keys.clone()).issue(new).await.unwrap();
    (Plain { keys, has_leases, is_down: Arc::default() }, issued.expose_secret().to_owned())
}

async fn reserve(caller: &AuthContext) -> Denial {
    match caller.reserve(1).await {
        Ok(reservation) => panic!("{reservation:?}"),
        Err(denial) => denial,
    }
}

/// What the log has at the level `WARN`, of budgets.
fn warnings(log: &Log, of: &str) -> Vec<String> {
    log.lines().into_iter().filter(|line| line.contains(" WARN ") && line.contains(of)).collect()
}

#[tokio::test]
async fn a_store_without_leases_is_a_500_and_one_warning() {
    let (log, _guard) = capture();
    let (store, key) = budgeted(false).await;
    let node = Authenticator::new(store.clone());
    let caller = node.authenticate(&key).await.unwrap();
    for _ in 0..3 {
        let denial = reserve(&caller).await;
        assert!(matches!(denial, Denial::Unsupported(_)), "{denial:?}");
        assert_eq!((denial.status().as_u16(), denial.retry_after()), (500, None));
    }
    let warned = warnings(&log, "budget");
    assert_eq!(warned.len(), 1, "{}", log.text());
    assert!(warned[0].contains("KeyStore::lease"), "{}", warned[0]);
    let debug = log.lines().into_iter().filter(|line| line.contains("no budget can be reserved"));
    assert_eq!(debug.count(), 3);

    // One warning for each authenticator.
    let other = Authenticator::new(store);
    let caller = other.authenticate(&key).await.unwrap();
    reserve(&caller).await;
    assert_eq!(warnings(&log, "budget").len(), 2);
}

#[tokio::test]
async fn a_guard_in_front_of_a_store_without_leases_answers_500_without_a_retry_after() {
    let (store, key) = budgeted(false).await;
    let (log, _guard) = capture();
    let mut service = tower::ServiceBuilder::new()
        .layer(ApiKeyAuthLayer::new(store))
        .layer(BudgetLayer::new(1))
        .service_fn(|_: http::Request<http_body_util::Full<bytes::Bytes>>| async {
            Ok::<_, std::convert::Infallible>(http::Response::new(http_body_util::Full::<
                bytes::Bytes,
            >::default()))
        });
    for _ in 0..3 {
        let request = support::bearer(&key);
        let response = tower::Service::call(&mut service, request).await.unwrap();
        let answer = support::read(response).await;
        assert_eq!((answer.status(), answer.header("retry-after")), (500, None));
        assert!(answer.body.contains(r#""detail":"internal error""#), "{}", answer.body);
    }
    assert_eq!(warnings(&log, "budget").len(), 1, "{}", log.text());
}

#[tokio::test]
async fn an_authenticator_without_usage_reserves_nothing_and_the_warning_names_the_setting() {
    let (log, _guard) = capture();
    let (store, key) = budgeted(true).await;
    let node = Authenticator::builder(store).without_usage().build();
    let caller = node.authenticate(&key).await.unwrap();
    for _ in 0..3 {
        assert!(matches!(reserve(&caller).await, Denial::Unsupported(_)));
    }
    let warned = warnings(&log, "budget");
    assert_eq!(warned.len(), 1, "{}", log.text());
    assert!(warned[0].contains("without_usage()"), "{}", warned[0]);
}

#[tokio::test]
async fn a_store_that_records_no_usage_is_one_warning_and_lends_nothing_from_then_on() {
    let (log, _guard) = capture();
    let (store, key) = budgeted(true).await;
    let is_down = Arc::clone(&store.is_down);
    is_down.store(true, SeqCst);
    let node = Authenticator::builder(store).usage_interval(Duration::from_millis(1)).build();
    let before = node.authenticate(&key).await.unwrap();
    before.reserve(1).await.unwrap().settle(1);
    is_down.store(false, SeqCst);
    eventually("the flush", async || !warnings(&log, "record_usage").is_empty()).await;
    let after = node.authenticate(&key).await.unwrap();
    // Also from a context and a lease of the time before.
    for caller in [&before, &after, &before] {
        let denial = reserve(caller).await;
        assert!(matches!(denial, Denial::Unsupported(_)), "{denial:?}");
    }
    let usage = warnings(&log, "does not record usage");
    assert_eq!(usage.len(), 1, "{}", log.text());
    assert!(usage[0].contains("AuthenticatorBuilder::without_usage()"), "{}", usage[0]);
    let budget = warnings(&log, "no budget");
    assert_eq!(budget.len(), 1, "{}", log.text());
    assert!(budget[0].contains("KeyStore::record_usage"), "{}", budget[0]);

    node.shutdown().await;
    assert_eq!(reserve(&before).await.status().as_u16(), 503);
}

#[tokio::test]
async fn a_reservation_during_the_shutdown_is_a_503_whatever_the_store_can_do() {
    let (log, _guard) = capture();
    for has_leases in [false, true] {
        let (store, key) = budgeted(has_leases).await;
        let node = Authenticator::builder(store).without_usage().build();
        let caller = node.authenticate(&key).await.unwrap();
        node.shutdown().await;
        assert!(matches!(reserve(&caller).await, Denial::Unavailable(_)));
    }
    assert!(warnings(&log, "budget").is_empty());
}

#[tokio::test]
async fn a_store_that_can_not_look_a_key_up_is_a_500_and_one_warning() {
    let (log, _guard) = capture();
    let (_, key) = budgeted(true).await;
    let node = Authenticator::new(Failing(StoreError::unsupported("questions")));
    for _ in 0..3 {
        let denial = node.authenticate(&key).await.unwrap_err();
        assert_eq!((denial.status().as_u16(), denial.retry_after()), (500, None));
    }
    assert_eq!(warnings(&log, "questions").len(), 1, "{}", log.text());
}
