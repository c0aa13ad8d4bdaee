//! Floods of well-formed keys that don't exist: everybody else is answered, and nothing grows.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use tokio::task::JoinSet;
use tower_api_key::{
    AuthContext, Authenticator, Denial, KeyManager, NewKey, PostgresStore, SqliteStore,
    denial::InvalidKey,
    error::StoreErrorKind,
    record::{Budget, BudgetPeriod},
    store::KeyRepository,
};

use crate::support::{
    eventually::eventually, fixture, probe::poll, servers::Postgres, stores::Held,
    unknown_key_with_id,
};

static GUESSES: AtomicUsize = AtomicUsize::new(0);

/// A well-formed key that was not presented before.
fn forged() -> String {
    unknown_key_with_id(&format!("{:010}", GUESSES.fetch_add(1, SeqCst)))
}

/// An address of the test's own in another /24 for each number.
fn network(n: usize) -> IpAddr {
    format!("10.{}.{}.1", n / 250 % 250, n % 250).parse().unwrap()
}

fn elsewhere() -> IpAddr {
    "198.51.100.7".parse().unwrap()
}

fn is_overloaded(outcome: &Result<AuthContext, Denial>) -> bool {
    matches!(outcome, Err(Denial::Unavailable(error)) if error.kind() == StoreErrorKind::Overloaded)
}

/// Forged keys from many tasks at once, as fast as they are answered; each second request is given up.
struct Flood {
    is_over: Arc<AtomicBool>,
    unknown: Arc<AtomicUsize>,
    turned_away: Arc<AtomicUsize>,
    tasks: JoinSet<()>,
}

impl Flood {
    fn begin(authenticator: &Authenticator, address: fn(usize) -> IpAddr) -> Self {
        let mut flood = Self {
            is_over: Arc::default(),
            unknown: Arc::default(),
            turned_away: Arc::default(),
            tasks: JoinSet::new(),
        };
        for task in 0..128 {
            let authenticator = authenticator.clone();
            let (unknown, turned_away) =
                (Arc::clone(&flood.unknown), Arc::clone(&flood.turned_away));
            let is_over = Arc::clone(&flood.is_over);
            flood.tasks.spawn(async move {
                let mut n = task;
                while !is_over.load(SeqCst) {
                    n += 128;
                    {
                        let key = forged();
                        let mut given_up =
                            Box::pin(authenticator.authenticate_from(&key, address(n)));
                        let _ = poll(&mut given_up);
                    }
                    match authenticator.authenticate_from(&forged(), address(n)).await {
                        Err(Denial::InvalidKey(_)) => unknown.fetch_add(1, SeqCst),
                        outcome if is_overloaded(&outcome) => turned_away.fetch_add(1, SeqCst),
                        // It waited behind the others for as long as a look-up may take.
                        Err(Denial::Unavailable(error))
                            if error.kind() == StoreErrorKind::Timeout =>
                        {
                            turned_away.fetch_add(1, SeqCst)
                        }
                        other => panic!("{other:?}"),
                    };
                    tokio::task::yield_now().await;
                }
            });
        }
        flood
    }

    /// Waits until it is at its height.
    async fn has_begun(&self) {
        eventually("the flood is turned away", async || self.turned_away.load(SeqCst) > 1000).await;
    }

    async fn end(mut self) {
        self.is_over.store(true, SeqCst);
        while let Some(task) = self.tasks.join_next().await {
            task.unwrap();
        }
        assert!(self.unknown.load(SeqCst) > 0, "no forged key was looked up");
    }
}

/// Longer than any of it takes on a busy machine, and shorter than the deadline of a query.
const SOON: Duration = Duration::from_secs(1);

async fn in_time<T>(what: &str, future: impl Future<Output = T>) -> T {
    let begun = Instant::now();
    let output = future.await;
    assert!(begun.elapsed() < SOON, "{what} took {:?}", begun.elapsed());
    output
}

async fn everybody_else_is_answered(
    store: impl KeyRepository + Clone,
    address: fn(usize) -> IpAddr,
) {
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap().id;
    let budget = Budget { limit_cents: 1000, period: BudgetPeriod::Total };
    let mut keys = Vec::new();
    for _ in 0..40 {
        keys.push(manager.issue(NewKey::new(user.clone(), "k").budget(budget)).await.unwrap());
    }
    let (cold, hot) = keys.split_at(20);
    let node = Authenticator::new(store.clone());
    let mut callers = Vec::new();
    for key in hot {
        callers.push(node.authenticate_from(key.expose_secret(), elsewhere()).await.unwrap());
    }
    let flood = Flood::begin(&node, address);
    flood.has_begun().await;

    for (n, key) in cold.iter().enumerate() {
        let from = format!("198.51.{n}.1").parse().unwrap();
        let request = node.authenticate_from(key.expose_secret(), from);
        assert!(in_time("a cold key", request).await.is_ok(), "of another network");
    }
    for caller in &callers {
        let hold = in_time("a reservation", caller.reserve(1_000_000)).await;
        hold.expect("a lease is granted").settle(1_000_000);
    }
    let (revoked, hot) = hot.split_at(10);
    for key in hot {
        // The answer is no longer used, but the key has been verified here.
        node.invalidate(&key.record().prefix);
        let request = node.authenticate_from(key.expose_secret(), address(1));
        let outcome = in_time("a known key", request).await;
        assert!(outcome.is_ok(), "from a flooding network: {outcome:?}");
    }
    for key in revoked {
        let id = &key.record().id;
        assert!(in_time("a read", store.find_key(id)).await.unwrap().is_some());
        in_time("a revocation", manager.revoke(id)).await.unwrap();
        let is_denied = eventually("the key is refused", async || {
            let outcome = node.authenticate_from(key.expose_secret(), elsewhere()).await;
            matches!(outcome, Err(Denial::InvalidKey(InvalidKey::Revoked)))
        });
        in_time("the change feed", is_denied).await;
    }
    let under_way = node.health().lookups_under_way;
    assert!(under_way <= 4096, "{under_way} look-ups");
    flood.end().await;
}

async fn postgres() -> (Postgres, PostgresStore) {
    let server = Postgres::start();
    let store = PostgresStore::new(&server.url()).unwrap();
    store.migrate().await.unwrap();
    (server, store)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgresql_all_others_are_answered_while_one_network_floods() {
    let (_server, store) = postgres().await;
    everybody_else_is_answered(store, |_| network(1)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgresql_all_others_are_answered_while_a_thousand_networks_flood() {
    let (_server, store) = postgres().await;
    everybody_else_is_answered(store, |n| network(n % 1000)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_sqlite_all_others_are_answered_while_one_network_floods() {
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(folder.path().join("keys.db")).unwrap();
    store.migrate().await.unwrap();
    everybody_else_is_answered(store, |_| network(1)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_sqlite_in_memory_all_others_are_answered_while_a_thousand_networks_flood() {
    let store = SqliteStore::in_memory().unwrap();
    store.migrate().await.unwrap();
    everybody_else_is_answered(store, |n| network(n % 1000)).await;
}

#[tokio::test]
async fn look_ups_of_requests_that_were_given_up_are_dropped_while_they_wait() {
    let server = Postgres::start();
    let store = PostgresStore::builder(&server.url())
        .max_connections(1)
        .statement_timeout(Duration::from_secs(60))
        .timeout(Duration::from_secs(60))
        .build()
        .unwrap();
    store.migrate().await.unwrap();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap().id;
    let key = manager.issue(NewKey::new(user, "k")).await.unwrap();
    let admin = server.client().await;
    admin.batch_execute("BEGIN; LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE").await.unwrap();

    let node = Authenticator::new(store);
    let mut first = Box::pin(node.authenticate_from(key.expose_secret(), elsewhere()));
    assert!(poll(&mut first).is_pending());
    // The connection is in use. A client in a transaction sees the same activity again and again.
    let watcher = server.client().await;
    eventually("the look-up waits for the lock", async || {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
        watcher.query_one(waiting, &[]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    let begun = Instant::now();
    for n in 0..20_000 {
        let key = forged();
        let mut request = Box::pin(node.authenticate_from(&key, network(n)));
        let _ = poll(&mut request);
        let under_way = node.health().lookups_under_way;
        assert!(under_way <= 4096, "{under_way} look-ups");
    }
    eventually("those that wait are dropped", async || node.health().lookups_under_way == 1).await;
    assert!(begun.elapsed() < Duration::from_secs(10), "none ran into its deadline of 15 s");
    admin.batch_execute("ROLLBACK").await.unwrap();
    assert!(first.await.is_ok(), "that one was under way");
}

#[tokio::test]
async fn a_request_that_joins_a_look_up_whose_caller_has_gone_is_answered() {
    let server = Postgres::start();
    let store = PostgresStore::builder(&server.url()).max_connections(1).build().unwrap();
    store.migrate().await.unwrap();
    let manager = KeyManager::new(store.clone());
    let user = manager.create_user("ada@example.com", "user").await.unwrap().id;
    let node = Authenticator::new(store);
    for _ in 0..200 {
        let (mut keys, mut requests) = (Vec::new(), JoinSet::new());
        for _ in 0..3 {
            keys.push(manager.issue(NewKey::new(user.clone(), "k")).await.unwrap());
        }
        for key in &keys {
            let mut given_up = Box::pin(node.authenticate(key.expose_secret()));
            let _ = poll(&mut given_up);
            drop(given_up);
            let (node, key) = (node.clone(), key.expose_secret().to_owned());
            requests.spawn(async move { node.authenticate(&key).await.map(drop) });
        }
        for outcome in requests.join_all().await {
            assert!(outcome.is_ok(), "{outcome:?}");
        }
    }
}

#[tokio::test]
async fn past_the_bound_of_look_ups_a_request_is_a_503_and_keys_that_are_known_have_room() {
    let fixture = fixture().await;
    let store = Held::new(fixture.store.clone());
    let node = Authenticator::builder(store.clone()).max_lookups(8).build();
    let mut known = Box::pin(node.authenticate(&fixture.key));
    assert!(poll(&mut known).is_pending());
    store.is_asked(1).await;
    store.let_one_go();
    let prefix = known.await.unwrap().key().prefix.clone();

    let mut waiting = JoinSet::new();
    for n in 0..6 {
        let node = node.clone();
        waiting.spawn(async move { node.authenticate_from(&forged(), network(n)).await });
    }
    store.is_asked(6).await;
    assert_eq!(node.health().lookups_under_way, 6);
    let outcome = node.authenticate_from(&forged(), elsewhere()).await;
    assert!(is_overloaded(&outcome), "{outcome:?}");
    assert_eq!(outcome.unwrap_err().status(), 503);

    node.invalidate(&prefix);
    let mut known = Box::pin(node.authenticate(&fixture.key));
    assert!(poll(&mut known).is_pending(), "a known key is looked up");
    for _ in 0..7 {
        store.let_one_go();
    }
    assert!(known.await.is_ok());
    waiting.join_all().await;
    assert_eq!(node.health().lookups_under_way, 0);
}
