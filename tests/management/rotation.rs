//! Rotation: both secrets are accepted in the grace period, on every node, and only one afterwards.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant, SystemTime},
};

use tower_api_key::{
    Authenticator, Denial, KeyManager, KeyScheme, MemoryStore, NewKey, PostgresStore, RedisCache,
    SqliteStore,
    clock::{Clock, ManualClock},
    denial::InvalidKey,
    key::{KeyFormat, KeyHash},
    management::{ImportedKey, IssuedKey, Rotation},
    rate_limit::{LocalRateLimiter, RateLimiter},
    record::{Budget, BudgetPeriod, KeyId, RateLimits, Secret},
    store::{KeyFilter, KeyStore, ListKeys},
};

use crate::support::{
    eventually::eventually,
    leaks::{published, values_of_redis},
    log,
    proxy::Proxy,
    servers::{Postgres, Redis},
    some_user,
};

const GRACE: Duration = Duration::from_secs(3600);

/// A store, a manager and a node with the same clock, and a key.
struct Setting {
    clock: Arc<ManualClock>,
    store: MemoryStore,
    manager: KeyManager<MemoryStore>,
    old: IssuedKey,
}

async fn setting() -> Setting {
    let clock = Arc::new(ManualClock::at(SystemTime::now()));
    let store = MemoryStore::with_clock(clock.clone());
    let manager = KeyManager::new(store.clone()).clock(clock.clone());
    let user = some_user(store.clone()).await;
    let old = manager.issue(NewKey::new(user, "k")).await.unwrap();
    Setting { clock, store, manager, old }
}

impl Setting {
    fn node(&self) -> Authenticator {
        Authenticator::builder(self.store.clone()).clock(self.clock.clone()).build()
    }

    async fn rotate(&self) -> IssuedKey {
        let how = Rotation::default().grace(GRACE);
        self.manager.rotate(&self.old.record().id, how).await.unwrap()
    }
}

async fn denial(node: &Authenticator, key: &IssuedKey) -> Option<InvalidKey> {
    match node.authenticate(key.expose_secret()).await {
        Ok(_) => None,
        Err(Denial::InvalidKey(reason)) => Some(reason),
        Err(other) => panic!("{other}"),
    }
}

#[tokio::test]
async fn the_previous_secret_ends_by_the_clock_without_an_event() {
    let setting = setting().await;
    let new = setting.rotate().await;
    let (caching, asking) = (setting.node(), setting.node());
    for key in [&setting.old, &new] {
        assert_eq!(denial(&caching, key).await, None);
    }
    setting.clock.advance(GRACE - Duration::from_nanos(1_000));
    for node in [&caching, &asking] {
        let caller = node.authenticate(setting.old.expose_secret()).await.unwrap();
        assert_eq!(caller.secret(), Secret::Previous);
    }
    setting.clock.advance(Duration::from_nanos(1_000));
    // The entry of the local cache is not served, and the store does not accept the secret.
    for node in [&caching, &asking, &setting.node()] {
        assert!(denial(node, &setting.old).await.is_some());
        assert_eq!(denial(node, &new).await, None);
    }
    // A clock that was ahead is corrected.
    let ahead = setting.node();
    assert_eq!(denial(&ahead, &setting.old).await, Some(InvalidKey::Rotated));
    setting.clock.set_wall(setting.clock.now() - Duration::from_secs(10));
    for node in [&ahead, &caching, &setting.node()] {
        assert_eq!(denial(node, &setting.old).await, None, "a corrected clock ends the denial");
    }
    setting.clock.set_wall(setting.clock.now() + Duration::from_secs(10));
    assert!(denial(&setting.node(), &setting.old).await.is_some());
}

#[tokio::test]
async fn a_node_whose_clock_is_behind_accepts_the_previous_secret_longer_by_the_difference() {
    let setting = setting().await;
    setting.rotate().await;
    let skew = Duration::from_secs(5);
    let behind = Arc::new(ManualClock::at(setting.clock.now() - skew));
    let node = Authenticator::builder(setting.store.clone()).clock(behind.clone()).build();
    let advance = |by| {
        setting.clock.advance(by);
        behind.advance(by);
    };
    assert_eq!(denial(&node, &setting.old).await, None);
    advance(GRACE);
    assert_eq!(denial(&node, &setting.old).await, None);
    advance(skew);
    assert!(denial(&node, &setting.old).await.is_some());
}

#[tokio::test]
async fn the_denial_of_a_cached_previous_secret_names_the_rotation() {
    let setting = setting().await;
    let caching = setting.node();
    let context = caching.authenticate(setting.old.expose_secret()).await.unwrap();
    let new = setting.rotate().await;
    eventually("the node has received the rotation", async || {
        let caller = caching.authenticate(setting.old.expose_secret()).await.unwrap();
        caller.secret() == Secret::Previous
    })
    .await;
    // A stream that began with the secret goes on until its grace period ends.
    assert_eq!(context.recheck().await.unwrap().secret(), Secret::Previous);
    let caller = caching.authenticate(setting.old.expose_secret()).await.unwrap();
    assert!(caller.is_valid_at(setting.clock.now().into()));
    let end = new.grace().unwrap().ends_at;
    assert!(!caller.is_valid_at(end));
    setting.clock.advance(GRACE);
    assert!(context.recheck().await.is_err());
}

#[tokio::test]
async fn a_previous_secret_in_use_is_one_warning_a_day_that_names_the_key() {
    let (log, _guard) = log::capture();
    let setting = setting().await;
    setting.rotate().await;
    let node = setting.node();
    for _ in 0..3 {
        assert_eq!(denial(&node, &setting.old).await, None);
    }
    let warned = || {
        let lines = log.lines().into_iter();
        lines.filter(|line| line.contains("WARN") && line.contains("previous secret")).count()
    };
    assert_eq!(warned(), 1, "{}", log.text());
    let text = log.text();
    assert!(text.contains(&format!("key=\"{}\"", setting.old.record().id)), "{text}");
    assert!(!text.contains(setting.old.expose_secret()));
}

#[tokio::test]
async fn limits_budget_and_usage_are_those_of_the_key_for_both_secrets() {
    let setting = setting().await;
    let user = setting.old.record().user.id.clone();
    let budget = Budget { limit_cents: 1, period: BudgetPeriod::Monthly };
    let new = NewKey::new(user, "k").rate_limits(RateLimits::default().per_day(3)).budget(budget);
    let old = setting.manager.issue(new).await.unwrap();
    let (limiter, node) = (LocalRateLimiter::with_clock(setting.clock.clone()), setting.node());
    let spend = async |key: &IssuedKey, cost: u64| {
        let caller = node.authenticate(key.expose_secret()).await.unwrap();
        let quota = limiter.count(&caller.key().id, caller.rate_limits()).await.unwrap();
        let held = caller.reserve(cost).await.map(|reservation| reservation.settle(cost));
        (quota.is_allowed(), held.is_ok())
    };
    assert_eq!(spend(&old, 300_000).await, (true, true));
    let new = setting.manager.rotate(&old.record().id, Rotation::default()).await.unwrap();
    assert_eq!(spend(&new, 300_000).await, (true, true));
    assert_eq!(spend(&old, 400_001).await, (true, false));
    assert_eq!(spend(&new, 400_000).await, (false, true));
    node.shutdown().await;
    let record = setting.manager.find(&old.record().id).await.unwrap();
    assert_eq!((record.usage.requests, record.usage.cost_micro_cents), (4, 1_000_000));
}

/// Three nodes with Redis between them, under load with both secrets.
#[tokio::test(flavor = "multi_thread")]
async fn no_request_fails_during_a_rotation_and_the_previous_secret_ends_on_every_node() {
    let (postgres, redis) = (Postgres::start(), Redis::start());
    let store = PostgresStore::new(&postgres.url()).unwrap();
    store.migrate().await.unwrap();
    rotates_under_load(&postgres, &redis, &store, Kind::Structured).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_fails_while_a_legacy_key_becomes_structured() {
    let (postgres, redis) = (Postgres::start(), Redis::start());
    let store = PostgresStore::new(&postgres.url()).unwrap();
    store.migrate().await.unwrap();
    rotates_under_load(&postgres, &redis, &store, Kind::Legacy).await;
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Structured,
    Legacy,
}

fn scheme() -> KeyScheme {
    let structured = KeyFormat::structured("tak", "live").unwrap();
    let scheme = KeyScheme::builder().format(structured);
    let scheme = scheme.format(KeyFormat::first_chars(8).unwrap());
    scheme.pepper("a pepper of sixteen bytes").build().unwrap()
}

async fn rotates_under_load(postgres: &Postgres, redis: &Redis, store: &PostgresStore, kind: Kind) {
    const LOAD_GRACE: Duration = Duration::from_secs(4);
    let manager = KeyManager::new(store.clone()).scheme(scheme());
    let user = some_user(store.clone()).await;
    let new = NewKey::new(user, "k");
    let (id, old) = match kind {
        Kind::Structured => {
            let issued = manager.issue(new).await.unwrap();
            (issued.record().id.clone(), issued.expose_secret().to_owned())
        }
        Kind::Legacy => {
            let key = "legacy00-secret-of-another-service";
            let hash = KeyHash::bcrypt(key, 4).unwrap();
            manager.import([ImportedKey::new(new, "legacy00", hash)]).await.unwrap();
            let listed = manager.list(&ListKeys::default()).await.unwrap().keys;
            (listed[0].id.clone(), key.to_owned())
        }
    };
    let to_postgres = [(); 3].map(|()| Proxy::start(postgres.port()));
    let nodes: Vec<_> = to_postgres
        .iter()
        .map(|proxy| node(PostgresStore::new(&proxy.url(&postgres.tcp_url(""))).unwrap(), redis))
        .collect();
    let nodes = Arc::new(nodes);
    let (stop, failures) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let load = |key: String| {
        let (nodes, stop, failures) = (nodes.clone(), stop.clone(), failures.clone());
        tokio::spawn(async move {
            let mut requests = 0_u64;
            while !stop.load(SeqCst) {
                for node in &*nodes {
                    if let Err(denial) = node.authenticate(&key).await {
                        failures.fetch_add(1, SeqCst);
                        eprintln!("{denial}");
                    }
                    requests += 1;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            requests
        })
    };
    let with_old = load(old.clone());
    tokio::time::sleep(Duration::from_millis(300)).await;

    let rotated_at = Instant::now();
    let new = manager.rotate(&id, Rotation::default().grace(LOAD_GRACE)).await.unwrap();
    assert_eq!(new.record().id, id);
    let with_new = load(new.expose_secret().to_owned());
    tokio::time::sleep(
        LOAD_GRACE.saturating_sub(rotated_at.elapsed() + Duration::from_millis(1_500)),
    )
    .await;
    stop.store(true, SeqCst);
    let requests = [with_old.await.unwrap(), with_new.await.unwrap()];
    assert!(requests.iter().all(|count| *count > 100), "{requests:?}");
    assert_eq!(failures.load(SeqCst), 0, "of {requests:?}");

    // One node is cut off from the database, and ends the grace period all the same.
    for node in &*nodes {
        assert_eq!(node.authenticate(&old).await.unwrap().secret(), Secret::Previous);
    }
    to_postgres[2].refuse();
    tokio::time::sleep(
        (LOAD_GRACE + Duration::from_millis(100)).saturating_sub(rotated_at.elapsed()),
    )
    .await;
    for (at, node) in nodes.iter().enumerate() {
        let denied = node.authenticate(&old).await;
        assert!(denied.is_err(), "node {at} accepts the previous secret");
        node.authenticate(new.expose_secret()).await.unwrap();
    }
}

fn node(store: impl KeyStore, redis: &Redis) -> Authenticator {
    let cache = RedisCache::new(store, redis.url()).unwrap();
    Authenticator::builder(cache).scheme(scheme()).build()
}

/// A node that is cut off from the store learns of a change only from Redis.
#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_or_deleted_key_is_announced_in_redis_under_both_lookup_ids() {
    let (folder, redis) = (tempfile::tempdir().unwrap(), Redis::start());
    let store = SqliteStore::open(folder.path().join("keys.db")).unwrap();
    store.migrate().await.unwrap();
    let messages = published(&redis.url()).await;
    let cache = RedisCache::new(store.clone(), redis.url()).unwrap();
    assert!(cache.prepare(Duration::from_secs(10)).await);
    let manager = KeyManager::new(cache.clone()).scheme(scheme());
    let user = some_user(store.clone()).await;
    let hash = KeyHash::bcrypt("legacy-secret", 4).unwrap();
    // More than a page of keys.
    let keys = (0..1_200).map(|n| {
        ImportedKey::new(NewKey::new(user.clone(), "k"), format!("legacy{n:04}"), hash.clone())
    });
    manager.import(keys).await.unwrap();
    let rotated = async |at: u64| {
        let how = Rotation::default().grace(GRACE);
        let issued = manager.rotate(&KeyId::from(at.cast_signed() + 1), how).await.unwrap();
        messages.lock().unwrap().clear();
        (issued.record().id.clone(), [issued.record().prefix.clone(), format!("legacy{at:04}")])
    };
    let announced = async |ids: &[String]| {
        eventually("a message for each lookup id", async || {
            let text = String::from_utf8_lossy(&messages.lock().unwrap()).into_owned();
            ids.iter().all(|id| text.contains(&format!("\"{id}\"")))
        })
        .await;
        assert!(cache.flush(Duration::from_secs(10)).await);
        let stored = String::from_utf8_lossy(&values_of_redis(&redis.url()).await).into_owned();
        for id in ids {
            let hex: String = id.bytes().map(|byte| format!("{byte:02x}")).collect();
            assert!(stored.contains(&hex), "a tombstone of {id}");
        }
    };
    let (id, ids) = rotated(0).await;
    manager.revoke(&id).await.unwrap();
    announced(&ids).await;
    let (id, ids) = rotated(1).await;
    manager.delete(&id).await.unwrap();
    announced(&ids).await;
    let ((_, first), (_, last)) = (rotated(2).await, rotated(1_199).await);
    assert_eq!(manager.revoke_all(&KeyFilter::default().owner(user)).await.unwrap().len(), 1_198);
    announced(&[first, last].concat()).await;
}
