//! A key whose secret is replaced stays the same key: what it has spent and asked goes on counting.

use tower_api_key::{
    Authenticator, KeyManager, NewKey, PostgresStore,
    management::IssuedKey,
    rate_limit::{LocalRateLimiter, RateLimiter},
    record::{Budget, BudgetPeriod, RateLimits},
    store::KeyRepository,
};

use crate::support::servers::Postgres;

#[tokio::test]
async fn a_new_secret_keeps_limits_budget_and_usage() {
    let server = Postgres::start();
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap();
    let limits = RateLimits::default().per_day(3);
    let budget = Budget { limit_cents: 1, period: BudgetPeriod::Monthly };
    let new = || NewKey::new(user.id.clone(), "k").rate_limits(limits).budget(budget);
    let (first, second) =
        (manager.issue(new()).await.unwrap(), manager.issue(new()).await.unwrap());
    let (limiter, node) = (LocalRateLimiter::new(), Authenticator::new(store.clone()));
    let ask = async |key: &IssuedKey, cost: u64| {
        let caller = node.authenticate(key.expose_secret()).await.unwrap();
        let quota = limiter.count(&caller.key().id, caller.rate_limits()).await.unwrap();
        let held = caller.reserve(cost).await.map(|reservation| reservation.settle(cost));
        (caller.key().id.clone(), quota.is_allowed(), held.is_ok())
    };
    let id = first.record().id.clone();
    for _ in 0..2 {
        assert_eq!(ask(&first, 300_000).await, (id.clone(), true, true));
    }

    let rotate = format!(
        "WITH other AS (DELETE FROM api_keys WHERE id = {} RETURNING key_prefix, key_hash)
        UPDATE api_keys k SET key_prefix = other.key_prefix, key_hash = other.key_hash FROM other WHERE k.id = {id}",
        second.record().id
    );
    server.client().await.batch_execute(&rotate).await.unwrap();

    // 0.4 cents and one request are left.
    assert_eq!(ask(&second, 400_001).await, (id.clone(), true, false));
    assert_eq!(ask(&second, 400_000).await, (id.clone(), false, true));
    node.shutdown().await;
    let record = store.find_key(&id).await.unwrap().unwrap().into_record();
    assert_eq!(record.usage.cost_micro_cents, 1_000_000);
    // As many as were let in.
    assert_eq!(record.usage.requests, 4);
}
