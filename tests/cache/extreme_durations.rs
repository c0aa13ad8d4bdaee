//! Every duration that can be set, at its least and at its most.

use std::time::Duration;

use tower_api_key::{
    Authenticator, KeyManager, NewKey, PostgresStore, RedisCache, SqliteStore,
    metering::Usage,
    rate_limit::{RateLimiter, RedisRateLimiter},
    record::{Budget, BudgetPeriod, KeyId, RateLimits},
    store::{KeyRepository, KeyStore, LeaseRequest},
};

use crate::support::{
    feed::eventually,
    servers::{Postgres, Redis},
};

fn authenticator(store: impl KeyStore, duration: Duration) -> Authenticator {
    Authenticator::builder(store)
        .max_staleness(duration)
        .stale_if_error(duration)
        .usage_interval(duration)
        .lease_lifetime(duration)
        .build()
}

/// Uses what is built as a service does. With no time at all, an answer may be a 503.
async fn use_it<R: KeyRepository + Clone>(store: R, key: &str, budget: &KeyId, duration: Duration) {
    let node = authenticator(store.clone(), duration);
    for _ in 0..2 {
        match node.authenticate(key).await {
            Ok(caller) => {
                caller.record_usage(Usage { tokens: 10, cost: 1 });
                if let Ok(reservation) = caller.reserve(1).await {
                    reservation.settle(1);
                }
            }
            Err(denial) => {
                assert_eq!((duration, denial.status().as_u16()), (Duration::ZERO, 503));
            }
        }
    }
    let mut ask = LeaseRequest::new(budget.clone(), "node", 1, 1);
    ask.lifetime = duration;
    let _ = store.lease(&ask).await;
    if duration == Duration::MAX {
        let is_synced = async || node.health().last_sync.is_some();
        eventually("the feed is in sync", is_synced).await;
    }
    node.shutdown().await;
}

async fn issue<R: KeyRepository + Clone>(store: &R) -> (String, KeyId) {
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap();
    let budget = Budget { limit_cents: 100, period: BudgetPeriod::Total };
    let issued = manager.issue(NewKey::new(user.id, "k").budget(budget)).await.unwrap();
    (issued.expose_secret().to_owned(), issued.record().id.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_longest_and_the_shortest_durations_break_nothing() {
    let (server, redis) = (Postgres::start(), Redis::start());
    let postgres = PostgresStore::new(&server.url()).unwrap();
    postgres.migrate().await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.db");
    let sqlite = SqliteStore::open(&file).unwrap();
    sqlite.migrate().await.unwrap();
    let in_postgres = issue(&postgres).await;
    let in_sqlite = issue(&sqlite).await;
    for duration in [Duration::MAX, Duration::ZERO] {
        let store = PostgresStore::builder(&server.url())
            .timeout(duration)
            .connect_timeout(duration)
            .statement_timeout(duration)
            .poll_interval(duration)
            .build()
            .unwrap();
        assert_eq!(store.migrate().await.is_ok(), duration == Duration::MAX);
        let cached = RedisCache::builder(store.clone(), redis.url()).timeout(duration);
        use_it(store, &in_postgres.0, &in_postgres.1, duration).await;
        use_it(cached.build().unwrap(), &in_postgres.0, &in_postgres.1, duration).await;

        if let Ok(store) = SqliteStore::builder(&file).timeout(duration).open() {
            let _ = store.migrate().await;
            use_it(store, &in_sqlite.0, &in_sqlite.1, duration).await;
        }
        let limiter = RedisRateLimiter::builder(redis.url()).timeout(duration).build().unwrap();
        let limits = RateLimits::default().per_minute(5);
        assert!(limiter.count(&in_postgres.1, limits).await.is_ok());
    }
}
