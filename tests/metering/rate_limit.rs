//! Rate limits of one process.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use tower::{ServiceBuilder, ServiceExt};
use tower_api_key::{
    ApiKeyAuthLayer, Denial, KeyManager, MemoryStore, NewKey, RateLimitLayer, StoreError,
    clock::ManualClock,
    rate_limit::{LocalRateLimiter, RateLimiter},
    record::{KeyId, Quota, RateLimits, RatePeriod, RateWindow},
};

use crate::support::{self, Answer, Fixture, bearer, fixture, probe::probe, read, some_user};

/// Midnight, and 12 s.
const START: Duration = Duration::from_secs(20_000 * 86_400 + 12);

fn clock() -> Arc<ManualClock> {
    Arc::new(ManualClock::at(SystemTime::UNIX_EPOCH + START))
}

fn limits(minute: Option<u64>, hour: Option<u64>, day: Option<u64>) -> RateLimits {
    let mut limits = RateLimits::default();
    (limits.per_minute, limits.per_hour, limits.per_day) = (minute, hour, day);
    limits
}

struct Limited {
    fixture: Fixture,
    layer: RateLimitLayer,
    clock: Arc<ManualClock>,
}

impl Limited {
    async fn new() -> Self {
        let clock = clock();
        let layer = RateLimitLayer::new(LocalRateLimiter::with_clock(clock.clone()));
        Self { fixture: fixture().await, layer, clock }
    }

    async fn key(&self, limits: RateLimits) -> String {
        let issued = self.fixture.issue(|key| key.rate_limits(limits)).await;
        issued.expose_secret().to_owned()
    }

    async fn ask(&self, key: &str) -> Answer {
        let service = ServiceBuilder::new()
            .layer(self.fixture.layer())
            .layer(self.layer.clone())
            .service(probe().0);
        read(service.oneshot(bearer(key)).await.unwrap()).await
    }
}

#[tokio::test]
async fn answers_say_what_is_left_and_a_denial_when_to_come_again() {
    let limited = Limited::new().await;
    let key = limited.key(limits(Some(2), None, Some(1000))).await;
    let first = limited.ask(&key).await;
    assert_eq!(first.status(), 200);
    let policy = r#""minute";q=2;w=60, "day";q=1000;w=86400"#;
    assert_eq!(first.header("ratelimit-policy"), Some(policy));
    let left = r#""minute";r=1;t=48, "day";r=999;t=86388"#;
    assert_eq!(first.header("ratelimit"), Some(left));
    assert_eq!(limited.ask(&key).await.status(), 200);

    limited.clock.advance(Duration::from_millis(500));
    let denied = limited.ask(&key).await;
    assert_eq!(denied.status(), 429);
    assert_eq!(denied.header("retry-after"), Some("48"));
    let left = r#""minute";r=0;t=48, "day";r=998;t=86388"#;
    assert_eq!(denied.header("ratelimit"), Some(left));
    assert_eq!(denied.header("ratelimit-policy"), Some(policy));
    assert_eq!(denied.header("content-type"), Some("application/problem+json"));
    assert!(matches!(denied.response.extensions().get(), Some(Denial::RateLimited(_))));

    limited.clock.advance(Duration::from_millis(47_500));
    assert_eq!(limited.ask(&key).await.status(), 200);
}

#[tokio::test]
async fn what_one_window_denies_is_counted_in_none() {
    let limited = Limited::new().await;
    let key = limited.key(limits(Some(1), Some(3), None)).await;
    for _ in 0..5 {
        limited.ask(&key).await;
    }
    // One was let in, four were denied by the minute.
    limited.clock.advance(Duration::from_secs(60));
    let answer = limited.ask(&key).await;
    assert_eq!(answer.status(), 200);
    assert!(answer.header("ratelimit").unwrap().contains(r#""hour";r=1"#));
    limited.clock.advance(Duration::from_secs(60));
    assert_eq!(limited.ask(&key).await.status(), 200);
    limited.clock.advance(Duration::from_secs(60));
    let denied = limited.ask(&key).await;
    assert_eq!(denied.status(), 429);
    // By the hour, not by the minute.
    assert_eq!(denied.header("retry-after"), Some("3408"));
    assert!(denied.header("ratelimit").unwrap().contains(r#""minute";r=1"#));
}

#[tokio::test]
async fn no_limit_and_unlimited_keys_pass_and_0_allows_nothing() {
    let limited = Limited::new().await;
    let free = limited.key(limits(None, None, None)).await;
    let answer = limited.ask(&free).await;
    assert_eq!((answer.status(), answer.header("ratelimit")), (200, None));
    let unlimited =
        limited.fixture.issue(|key| key.rate_limits(limits(Some(0), None, None)).unlimited());
    let unlimited = unlimited.await;
    assert_eq!(limited.ask(unlimited.expose_secret()).await.status(), 200);
    let nothing = limited.key(limits(Some(100), None, Some(0))).await;
    let denied = limited.ask(&nothing).await;
    assert_eq!(denied.status(), 429);
    assert!(denied.header("ratelimit").unwrap().starts_with(r#""minute";r=100"#));
}

#[tokio::test]
async fn keys_are_counted_apart_and_layers_of_one_limiter_together() {
    let limited = Limited::new().await;
    let one = limited.key(limits(Some(1), None, None)).await;
    let other = limited.key(limits(Some(1), None, None)).await;
    assert_eq!(limited.ask(&one).await.status(), 200);
    assert_eq!(limited.ask(&other).await.status(), 200);
    assert_eq!(limited.ask(&one).await.status(), 429);
}

#[tokio::test]
async fn a_clock_that_is_set_gives_nobody_more() {
    let limited = Limited::new().await;
    let key = limited.key(limits(Some(1), None, None)).await;
    assert_eq!(limited.ask(&key).await.status(), 200);
    for seconds in [0, 3_600, 10_000 * 86_400, 30_000 * 86_400] {
        limited.clock.set_wall(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(limited.ask(&key).await.status(), 429, "set to {seconds}");
    }
    limited.clock.advance(Duration::from_secs(48));
    assert_eq!(limited.ask(&key).await.status(), 200);
}

#[tokio::test]
async fn a_grpc_caller_gets_resource_exhausted() {
    let limited = Limited::new().await;
    let key = limited.key(limits(Some(0), None, None)).await;
    let request = support::grpc(bearer(&key), "application/grpc");
    let service = ServiceBuilder::new()
        .layer(limited.fixture.layer())
        .layer(limited.layer.clone())
        .service(probe().0);
    let answer = read(service.oneshot(request).await.unwrap()).await;
    assert_eq!(answer.header("grpc-status"), Some("8"));
    assert_eq!(answer.header("retry-after"), Some("48"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn exactly_the_limit_gets_through_from_many_threads() {
    let limiter = LocalRateLimiter::with_clock(clock());
    let key = KeyId::from(7);
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..200 {
        let (limiter, key) = (limiter.clone(), key.clone());
        callers.spawn(async move {
            let mut allowed = 0;
            for _ in 0..50 {
                let quota = limiter.count(&key, limits(Some(1_000), None, None)).await.unwrap();
                allowed += u64::from(quota.is_allowed());
            }
            allowed
        });
    }
    assert_eq!(callers.join_all().await.into_iter().sum::<u64>(), 1_000);
}

/// A limiter of somebody else's that has to wait, and one that can't say.
struct Slow(Option<u64>);

impl RateLimiter for Slow {
    async fn count(&self, _: &KeyId, _: RateLimits) -> Result<Quota, StoreError> {
        tokio::task::yield_now().await;
        let remaining = self.0.ok_or_else(|| StoreError::unavailable("it is away"))?;
        let resets_in = Duration::from_millis(1_500);
        let window = RateWindow { period: RatePeriod::Hour, limit: 5, remaining, resets_in };
        Ok(Quota::new(remaining > 0, [window]))
    }
}

#[tokio::test]
async fn each_key_gets_its_own_policy() {
    let limited = Limited::new().await;
    let mut keys = Vec::new();
    for limit in 10..110 {
        keys.push((limit, limited.key(limits(Some(limit), None, Some(100))).await));
    }
    for _ in 0..2 {
        for (limit, key) in &keys {
            let policy = format!(r#""minute";q={limit};w=60, "day";q=100;w=86400"#);
            assert_eq!(limited.ask(key).await.header("ratelimit-policy"), Some(&*policy));
        }
    }
}

#[tokio::test]
async fn the_largest_numbers_fit_into_the_fields() {
    let limited = Limited::new().await;
    let largest = i64::MAX.unsigned_abs();
    let key = limited.key(limits(Some(largest), Some(100), Some(largest))).await;
    let answer = limited.ask(&key).await;
    // As large as an integer of a structured field may be.
    let policy = "\"minute\";q=999999999999999;w=60, \"hour\";q=100;w=3600, \
        \"day\";q=999999999999999;w=86400";
    assert_eq!(answer.header("ratelimit-policy"), Some(policy));
    let left = answer.header("ratelimit").unwrap();
    assert!(left.starts_with(r#""minute";r=999999999999999;t="#), "{left}");
    assert!(left.contains(r#", "hour";r=99;t="#), "{left}");
}

#[tokio::test]
async fn a_limiter_may_wait_and_may_fail() {
    let store = MemoryStore::new();
    let user = some_user(store.clone()).await;
    let manager = KeyManager::new(store.clone());
    let new = NewKey::new(user, "k").rate_limits(limits(None, Some(5), None));
    let key = manager.issue(new).await.unwrap();
    for (left, status) in [(Some(3), 200), (Some(0), 429), (None, 503)] {
        let service = ServiceBuilder::new()
            .layer(ApiKeyAuthLayer::new(store.clone()))
            .layer(RateLimitLayer::new(Slow(left)))
            .service(probe().0);
        let answer = read(service.oneshot(bearer(key.expose_secret())).await.unwrap()).await;
        assert_eq!(answer.status(), status);
        if let Some(left) = left {
            let expected = format!(r#""hour";r={left};t=2"#);
            assert_eq!(answer.header("ratelimit"), Some(&*expected));
        }
    }
}
