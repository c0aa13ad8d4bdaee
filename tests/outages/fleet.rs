//! What callers see when PostgreSQL, Redis or the way to them break, while keys are revoked: each row of the
//! table "When things break", against real servers, with three nodes under load. Every answer is judged.

use std::{sync::Arc, time::Duration};

use tokio::task::JoinSet;
use tower_api_key::{
    ApiKeyAuthLayer, Authenticator, KeyManager, NewKey, PostgresStore, RedisCache,
    redis::RedisState,
};

use crate::support::{
    self,
    feed::eventually,
    history::{History, Reply, Rules},
    proxy::Proxy,
    servers::{Postgres, Redis},
};

const MAX_STALENESS: Duration = Duration::from_secs(1);
const STALE_IF_ERROR: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(300);
/// A revoke reaches a node that is connected, on a machine that is busy.
const CONNECTED: Duration = Duration::from_secs(1);
/// A node that was cut off finds its way back: the pause between two attempts, and the attempt.
const BACK: Duration = Duration::from_secs(4);
const CUT_OFF: Duration =
    MAX_STALENESS.saturating_add(STALE_IF_ERROR).saturating_add(Duration::from_millis(300));

// Keys, by what happens to them.
const VALID: usize = 0;
const COLD: usize = 2;
const REVOKED: usize = 3;
const OWNER_INACTIVE: usize = 4;
const DELETED: usize = 5;
const REVOKED_BEFORE: usize = 6;
const KEYS: usize = 7;

/// Three nodes with proxies of their own. The last one has no local cache, so that Redis is queried each time.
struct Fleet {
    postgres: Postgres,
    redis: Redis,
    admin: tokio_postgres::Client,
    nodes: Arc<Vec<Node>>,
    keys: Arc<Vec<Key>>,
    history: Arc<History>,
}

struct Node {
    authenticator: Authenticator,
    cache: RedisCache<PostgresStore>,
    to_postgres: Proxy,
    to_redis: Proxy,
}

struct Key {
    secret: String,
    prefix: String,
    id: i64,
    owner: i64,
}

const UNCACHED: usize = 2;

impl Fleet {
    async fn start() -> Self {
        let (postgres, redis) = (Postgres::start(), Redis::start());
        let store = PostgresStore::new(&postgres.url()).unwrap();
        store.migrate().await.unwrap();
        let manager = KeyManager::new(store);
        let mut keys = Vec::new();
        for n in 0..KEYS {
            let owner = manager.create_user(&format!("{n}@example.com"), "user").await.unwrap().id;
            let issued = manager.issue(NewKey::new(owner.clone(), "k")).await.unwrap();
            keys.push(Key {
                secret: issued.expose_secret().to_owned(),
                prefix: issued.record().prefix.clone(),
                id: issued.record().id.as_i64().unwrap(),
                owner: owner.as_i64().unwrap(),
            });
        }
        let admin = postgres.client().await;
        let nodes = (0..3).map(|n| node(&postgres, &redis, n == UNCACHED)).collect();
        let history = Arc::new(History::new());
        let fleet =
            Self { postgres, redis, admin, nodes: Arc::new(nodes), keys: Arc::new(keys), history };
        fleet.warm().await;
        fleet
    }

    async fn warm(&self) {
        for key in (0..KEYS).filter(|key| *key != COLD) {
            // Not a tombstone, which the insert of a key leaves too.
            let name: String = self.keys[key].prefix.bytes().map(|b| format!("{b:02x}")).collect();
            let pattern = format!("api_key:data:*{{{name}}}");
            eventually("an entry in Redis", async || {
                for (n, node) in self.nodes.iter().enumerate() {
                    self.history.ask(n, &node.authenticator, key, &self.keys[key].secret).await;
                }
                let name = self.redis.command(&["KEYS", &pattern]);
                self.redis.command(&["GET", name.trim()]).starts_with("tak1s")
            })
            .await;
        }
        self.in_sync().await;
        self.revoke(REVOKED_BEFORE).await;
    }

    async fn in_sync(&self) {
        for node in &*self.nodes {
            support::feed::in_sync(&node.authenticator).await;
        }
    }

    async fn revoke(&self, key: usize) {
        let Key { id, owner, .. } = self.keys[key];
        let sql = match key {
            OWNER_INACTIVE => format!("UPDATE users SET is_active = FALSE WHERE id = {owner}"),
            DELETED => format!("DELETE FROM api_keys WHERE id = {id}"),
            _ => format!("UPDATE api_keys SET is_active = FALSE WHERE id = {id}"),
        };
        let change = async { self.admin.batch_execute(&sql).await.unwrap() };
        self.history.revoke(key, change).await;
    }

    fn load(&self) -> JoinSet<()> {
        let mut load = JoinSet::new();
        for n in 0..self.nodes.len() {
            for key in (0..KEYS).filter(|key| *key != COLD) {
                let (nodes, keys) = (Arc::clone(&self.nodes), Arc::clone(&self.keys));
                let history = Arc::clone(&self.history);
                load.spawn(async move {
                    loop {
                        history.ask(n, &nodes[n].authenticator, key, &keys[key].secret).await;
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                });
            }
        }
        load
    }

    fn each(&self, change: impl Fn(&Node)) {
        self.nodes.iter().for_each(change);
    }
}

fn node(postgres: &Postgres, redis: &Redis, is_uncached: bool) -> Node {
    let (to_postgres, to_redis) = (Proxy::start(postgres.port()), Proxy::start(redis.port()));
    let store = PostgresStore::builder(&to_postgres.url(&postgres.tcp_url("sslmode=disable")))
        .poll_interval(POLL)
        .timeout(Duration::from_secs(1))
        .connect_timeout(Duration::from_millis(500))
        .build()
        .unwrap();
    let cache = RedisCache::new(store, to_redis.url(&redis.url()).as_str()).unwrap();
    let authenticator = Authenticator::builder(cache.clone())
        .max_staleness(MAX_STALENESS)
        .stale_if_error(STALE_IF_ERROR)
        .cache_capacity(if is_uncached { 0 } else { 1000 })
        .build();
    Node { authenticator, cache, to_postgres, to_redis }
}

/// What a row of the table allows.
#[derive(Clone, Copy)]
struct Row {
    /// The nodes that can't ask the store meanwhile.
    without_postgres: [bool; 3],
    /// The nodes that can't ask Redis meanwhile.
    without_redis: [bool; 3],
    /// How long it lasts.
    lasts: Duration,
    /// Whether PostgreSQL takes no changes meanwhile: they are made right after it is back.
    takes_no_changes: bool,
    /// Whether Redis is back in use at the end, at once.
    redis_comes_back: bool,
}

const REDIS: Row = Row {
    without_postgres: [false; 3],
    without_redis: [true; 3],
    lasts: Duration::from_millis(900),
    takes_no_changes: false,
    redis_comes_back: true,
};
const POSTGRES: Row = Row {
    without_postgres: [true; 3],
    without_redis: [false; 3],
    lasts: Duration::from_millis(1800),
    takes_no_changes: false,
    redis_comes_back: true,
};
const BOTH: Row = Row { without_redis: [true; 3], ..POSTGRES };

async fn when(row: Row, breaks: impl AsyncFnOnce(&mut Fleet), heals: impl AsyncFnOnce(&mut Fleet)) {
    let mut fleet = Fleet::start().await;
    let mut load = fleet.load();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let broken_at = fleet.history.now();
    breaks(&mut fleet).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let revokes = [REVOKED, OWNER_INACTIVE, DELETED];
    if !row.takes_no_changes {
        for key in revokes {
            fleet.revoke(key).await;
        }
    }
    // In no cache.
    let asked = async |n: usize| {
        let secret = &fleet.keys[COLD].secret;
        fleet.history.ask(n, &fleet.nodes[n].authenticator, COLD, secret).await
    };
    let cold = tokio::join!(asked(0), asked(1), asked(2));
    for (n, reply) in [cold.0, cold.1, cold.2].into_iter().enumerate() {
        let expected = if row.without_postgres[n] { Reply::Unavailable } else { Reply::Accepted };
        assert_eq!(reply, expected, "a cold key, node {n}");
    }
    tokio::time::sleep(row.lasts).await;
    heals(&mut fleet).await;
    let healed = fleet.history.now();
    if row.takes_no_changes {
        for key in revokes {
            fleet.revoke(key).await;
        }
    }
    fleet.in_sync().await;
    if row.redis_comes_back {
        for node in &*fleet.nodes {
            eventually("Redis to be in use", async || {
                let _ = node.authenticator.authenticate(&fleet.keys[VALID].secret).await;
                node.authenticator.invalidate("nobody");
                node.cache.state() != RedisState::Down
            })
            .await;
        }
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    load.shutdown().await;
    let history = &fleet.history;
    let meanwhile = history.count(&Reply::Accepted, broken_at, healed);
    assert!(meanwhile > 50, "there was no load: {meanwhile}; {}", history.summary());

    // With everything as it should be, everybody knows, a node that starts now too.
    let starting = node(&fleet.postgres, &fleet.redis, false);
    let starting_again = node(&fleet.postgres, &fleet.redis, true);
    for round in 0..3 {
        let nodes = fleet.nodes.iter().chain([&starting, &starting_again]);
        for (n, node) in nodes.enumerate() {
            for (key, Key { secret, .. }) in fleet.keys.iter().enumerate() {
                let expected = if key < REVOKED { Reply::Accepted } else { Reply::Denied };
                let reply = history.ask(n, &node.authenticator, key, secret).await;
                assert_eq!(reply, expected, "round {round}, node {n}, key {key}");
            }
        }
        // The new nodes trust Redis from here on.
        support::feed::in_sync(&starting.authenticator).await;
        support::feed::in_sync(&starting_again.authenticator).await;
    }

    let bound =
        |n: usize| if row.without_postgres.get(n) == Some(&true) { CUT_OFF } else { CONNECTED };
    let until = healed + BACK;
    let rules = Rules {
        bound: &bound,
        may_be_unavailable: &|it| {
            let is_out = row.without_postgres.get(it.node) == Some(&true)
                && (broken_at..until).contains(&it.ended);
            let is_cached = it.key < COLD
                && !(it.node == UNCACHED && row.without_redis[UNCACHED])
                // Then they are older than they may be.
                && row.lasts < MAX_STALENESS + STALE_IF_ERROR;
            is_out && !is_cached
        },
        healed: if row.without_postgres.contains(&true) { healed + BACK } else { healed },
        connected: CONNECTED,
        slowest: Duration::from_secs(3),
    };
    println!("{}", history.summary());
    history.check(&rules);
}

fn nothing_more(_: &mut Fleet) -> std::future::Ready<()> {
    std::future::ready(())
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_is_stopped() {
    when(REDIS, async |it| it.redis.stop(), async |it| it.redis.start_again()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_is_killed_and_comes_back_empty() {
    when(REDIS, async |it| it.redis.kill(), async |it| it.redis.start_again()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_is_frozen() {
    when(REDIS, async |it| it.redis.freeze(), async |it| it.redis.thaw()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_comes_back_with_what_it_held_before_the_revokes() {
    let up = Row { without_redis: [false; 3], lasts: Duration::from_millis(300), ..REDIS };
    when(up, async |it| it.redis.save_snapshot(), async |it| it.redis.start_again_from_snapshot())
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_forgets_everything() {
    let up = Row { without_redis: [false; 3], lasts: Duration::from_millis(300), ..REDIS };
    let flush = async |it: &mut Fleet| {
        it.redis.command(&["FLUSHALL"]);
    };
    when(up, flush, nothing_more).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_takes_no_writes() {
    let up = Row { without_redis: [false; 3], ..REDIS };
    let full = async |it: &mut Fleet| {
        it.redis.command(&["CONFIG", "SET", "maxmemory", "1"]);
    };
    let empty = async |it: &mut Fleet| {
        it.redis.command(&["CONFIG", "SET", "maxmemory", "0"]);
    };
    when(up, full, empty).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_way_to_redis_is_a_black_hole() {
    let pass = async |it: &mut Fleet| it.each(|node| node.to_redis.pass());
    when(REDIS, async |it| it.each(|node| node.to_redis.black_hole()), pass).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_way_to_redis_is_slow() {
    let slow = |it: &mut Fleet| it.each(|node| node.to_redis.delay(Duration::from_millis(300)));
    when(REDIS, async |it| slow(it), async |it| it.each(|node| node.to_redis.pass())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_way_to_redis_corrupts_what_it_carries() {
    let pass = async |it: &mut Fleet| it.each(|node| node.to_redis.pass());
    when(REDIS, async |it| it.each(|node| node.to_redis.corrupt()), pass).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_to_redis_are_reset() {
    when(REDIS, async |it| it.each(|node| node.to_redis.reset()), nothing_more).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_is_stopped() {
    let row = Row { takes_no_changes: true, ..POSTGRES };
    when(row, async |it| it.postgres.stop(), start_postgres).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_is_killed() {
    let row = Row { takes_no_changes: true, ..POSTGRES };
    when(row, async |it| it.postgres.kill(), start_postgres).await;
}

async fn start_postgres(fleet: &mut Fleet) {
    fleet.postgres.start_again();
    fleet.admin = fleet.postgres.client().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_is_frozen() {
    let row = Row { takes_no_changes: true, ..POSTGRES };
    when(row, async |it| it.postgres.freeze(), async |it| it.postgres.thaw()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_way_to_postgres_is_a_black_hole() {
    let pass = async |it: &mut Fleet| it.each(|node| node.to_postgres.pass());
    when(POSTGRES, async |it| it.each(|node| node.to_postgres.black_hole()), pass).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_way_to_postgres_is_refused() {
    let pass = async |it: &mut Fleet| it.each(|node| node.to_postgres.pass());
    when(POSTGRES, async |it| it.each(|node| node.to_postgres.refuse()), pass).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_way_to_postgres_is_slow() {
    // Slower than a poll, faster than the deadline.
    let row = Row { without_postgres: [false; 3], without_redis: [false; 3], ..POSTGRES };
    let slow = |it: &mut Fleet| it.each(|node| node.to_postgres.delay(Duration::from_millis(40)));
    when(row, async |it| slow(it), async |it| it.each(|node| node.to_postgres.pass())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_to_postgres_are_reset() {
    let row = Row { without_postgres: [false; 3], without_redis: [false; 3], ..POSTGRES };
    when(row, async |it| it.each(|node| node.to_postgres.reset()), nothing_more).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_are_out_of_reach() {
    let cut = |it: &mut Fleet| {
        it.each(|node| (node.to_postgres.black_hole(), node.to_redis.black_hole()).0);
    };
    let pass = |it: &mut Fleet| it.each(|node| (node.to_postgres.pass(), node.to_redis.pass()).0);
    when(BOTH, async |it| cut(it), async |it| pass(it)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_are_killed() {
    let row = Row { takes_no_changes: true, ..BOTH };
    let kill = async |it: &mut Fleet| {
        it.postgres.kill();
        it.redis.kill();
    };
    let start = async |it: &mut Fleet| {
        it.redis.start_again();
        start_postgres(it).await;
    };
    when(row, kill, start).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_node_is_cut_off_from_both_while_the_others_go_on() {
    let row = Row {
        without_postgres: [true, false, false],
        without_redis: [true, false, false],
        lasts: MAX_STALENESS + STALE_IF_ERROR + Duration::from_millis(800),
        ..POSTGRES
    };
    let cut =
        |it: &mut Fleet| (it.nodes[0].to_postgres.refuse(), it.nodes[0].to_redis.black_hole()).0;
    let pass = |it: &mut Fleet| (it.nodes[0].to_postgres.pass(), it.nodes[0].to_redis.pass()).0;
    when(row, async |it| cut(it), async |it| pass(it)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_key_while_postgres_is_down_is_answered_with_retry_after() {
    let mut fleet = Fleet::start().await;
    fleet.postgres.stop();
    let layer = ApiKeyAuthLayer::from(fleet.nodes[0].authenticator.clone());
    let secret = &fleet.keys[COLD].secret;
    let answer = support::send(&layer, support::bearer(secret)).await;
    assert_eq!((answer.status(), answer.header("www-authenticate")), (503, None));
    assert!(answer.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
    assert!(
        !answer.body.contains("postgres") && !answer.body.contains("127.0.0.1"),
        "{}",
        answer.body
    );
    let request = support::grpc(support::bearer(secret), "application/grpc");
    let answer = support::send(&layer, request).await;
    assert_eq!((answer.status(), answer.header("grpc-status")), (200, Some("14")));
    // What is cached is served.
    let answer = support::send(&layer, support::bearer(&fleet.keys[VALID].secret)).await;
    assert_eq!(answer.status(), 200);
}

#[test]
fn the_history_checker_finds_what_it_looks_for() {
    use support::history::Answered;
    let second = Duration::from_secs;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let history = History::new();
    runtime.block_on(history.revoke(1, async {}));
    let rules = |healed| Rules {
        bound: &|_| Duration::from_secs(4),
        may_be_unavailable: &|it: &Answered| it.key == 2,
        healed,
        connected: Duration::from_secs(1),
        slowest: Duration::from_secs(3),
    };
    let judged = |key, began, took, reply: Reply, healed| {
        history.forget_answers();
        let (began, took) = (second(began), second(took));
        history.note(Answered { node: 0, key, began, ended: began + took, reply });
        history.violations(&rules(second(healed))).len()
    };
    let other = || Reply::Other("500".to_owned());
    for (key, began, took, reply, healed, expected) in [
        (0, 9, 0, Reply::Accepted, 9, 0),
        (0, 9, 0, Reply::Denied, 9, 1),
        (0, 9, 0, other(), 9, 1),
        (0, 9, 0, Reply::Unavailable, 9, 1),
        (2, 9, 0, Reply::Unavailable, 9, 0),
        (0, 9, 4, Reply::Accepted, 9, 1),
        // Revoked at 0.
        (1, 3, 0, Reply::Accepted, 9, 0),
        (1, 3, 3, Reply::Accepted, 9, 0),
        (1, 5, 0, Reply::Accepted, 9, 1),
        (1, 3, 0, Reply::Accepted, 1, 1),
        (1, 3, 0, Reply::Denied, 9, 0),
    ] {
        let label = format!("{key} {began} {took} {reply:?} {healed}");
        assert_eq!(judged(key, began, took, reply, healed), expected, "{label}");
    }
}
