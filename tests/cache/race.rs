//! Answers that were read before a revoke and arrive after it, ten thousand at a time.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, SystemTime},
};

use tokio::{sync::watch, task::JoinSet};
use tower_api_key::{
    Authenticator, KeyManager, MemoryStore, NewKey, PostgresStore, RedisCache, Replica,
    SqliteStore, StoreError,
    management::{IssuedKey, KeyPatch, Rotation},
    record::{User, UserId},
    redis::RedisState,
    store::{
        Answer, Attribution, CacheSecret, ChangeStream, KeyRepository, KeySelection, KeyStore,
        KeysRead, Lookup, ReadOwner, ReplicaState,
    },
};

use crate::support::{
    self,
    feed::{eventually, in_sync},
    history::{History, Reply, Rules},
    servers::{Postgres, Redis},
};

/// Reads an answer from the store below, and hands it out only when the barrier falls.
#[derive(Clone)]
struct Barrier(Arc<Inner>);

struct Inner {
    store: MemoryStore,
    is_closed: watch::Sender<bool>,
    /// Resolver that were read and are held.
    held: AtomicUsize,
    /// Whether changes are reported.
    has_feed: AtomicBool,
}

impl Barrier {
    fn new(store: MemoryStore, has_feed: bool) -> Self {
        Self(Arc::new(Inner {
            store,
            is_closed: watch::Sender::new(false),
            held: AtomicUsize::new(0),
            has_feed: AtomicBool::new(has_feed),
        }))
    }

    fn close(&self) {
        self.0.is_closed.send_replace(true);
    }

    fn open(&self) {
        self.0.is_closed.send_replace(false);
    }

    fn held(&self) -> usize {
        self.0.held.load(SeqCst)
    }

    async fn pass(&self) {
        let inner = &self.0;
        if *inner.is_closed.borrow() {
            inner.held.fetch_add(1, SeqCst);
            let _ = inner.is_closed.subscribe().wait_for(|is_closed| !is_closed).await;
            inner.held.fetch_sub(1, SeqCst);
        }
    }
}

impl KeyStore for Barrier {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        let inner = &self.0;
        let answer = inner.store.resolve(lookup).await?;
        self.pass().await;
        Ok(answer)
    }

    fn can_read_keys(&self) -> bool {
        self.0.store.can_read_keys()
    }

    async fn read_keys(&self, selection: &KeySelection) -> Result<KeysRead, StoreError> {
        let read = self.0.store.read_keys(selection).await?;
        self.pass().await;
        Ok(read)
    }

    async fn read_owners(&self, owners: &[UserId]) -> Result<Vec<ReadOwner>, StoreError> {
        let read = self.0.store.read_owners(owners).await?;
        self.pass().await;
        Ok(read)
    }

    fn changes(&self, since: SystemTime) -> ChangeStream {
        if self.0.has_feed.load(SeqCst) {
            self.0.store.changes(since)
        } else {
            ChangeStream::none()
        }
    }
}

struct Keys {
    store: MemoryStore,
    manager: KeyManager<MemoryStore>,
    users: Vec<User>,
    keys: Vec<IssuedKey>,
}

impl Keys {
    async fn revoke_all(&self, how: Revoke) {
        match how {
            Revoke::Keys => {
                for key in &self.keys {
                    self.manager.revoke(&key.record().id).await.unwrap();
                }
            }
            Revoke::Owners => {
                for user in &self.users {
                    let mut user = user.clone();
                    user.is_active = false;
                    self.store.update_user(&user, &Attribution::default()).await.unwrap();
                }
            }
        }
    }
}

async fn keys(count: usize) -> Keys {
    let store = MemoryStore::new();
    let manager = KeyManager::new(store.clone());
    let mut users = Vec::new();
    for n in 0..2 {
        users.push(manager.create_user(&format!("{n}@example.com"), "user").await.unwrap());
    }
    let mut keys = Vec::new();
    for n in 0..count {
        keys.push(manager.issue(NewKey::new(users[n % 2].id.clone(), "k")).await.unwrap());
    }
    Keys { store, manager, users, keys }
}

/// Asks for every key `times` times, all at once.
fn ask_all(node: &Authenticator, keys: &[IssuedKey], times: usize) -> JoinSet<bool> {
    let mut asked = JoinSet::new();
    for _ in 0..times {
        for key in keys {
            let (node, secret) = (node.clone(), key.expose_secret().to_owned());
            asked.spawn(async move { node.authenticate(&secret).await.is_ok() });
        }
    }
    asked
}

async fn accepted(node: &Authenticator, keys: &[IssuedKey]) -> usize {
    let mut count = 0;
    for key in keys {
        count += usize::from(node.authenticate(key.expose_secret()).await.is_ok());
    }
    count
}

async fn received(node: &Authenticator) {
    // A write is received at once; the pulse is a second.
    in_sync(node).await;
}

#[derive(Clone, Copy, PartialEq)]
enum Revoke {
    Keys,
    Owners,
}

/// Holds the answers to `count` look-ups between the read and the answer, revokes all the keys meanwhile,
/// and returns how many requests of after that were accepted.
async fn accepted_after_a_race(count: usize, how: Revoke, has_feed: bool) -> usize {
    let it = keys(count).await;
    let store = Barrier::new(it.store.clone(), has_feed);
    // Those from before and those from after the revoke are under way at the same time.
    let node = Authenticator::builder(store.clone()).max_lookups(4 * count).build();
    let _ = node.authenticate(&support::unknown_key()).await;
    if has_feed {
        received(&node).await;
    }
    store.close();
    let before = ask_all(&node, &it.keys, 1);
    eventually("all to be held", async || store.held() == count).await;
    it.revoke_all(how).await;
    if has_feed {
        received(&node).await;
    }
    // These arrive after the revoke; they must not join those that are held.
    let after = ask_all(&node, &it.keys, 2);
    tokio::task::yield_now().await;
    store.open();
    // A request from before may get either answer.
    before.join_all().await;
    let joined = after.join_all().await.into_iter().filter(|is_ok| *is_ok).count();
    let once_more = accepted(&node, &it.keys).await;
    joined + once_more
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_answers_from_before_a_revoke_serve_nobody_after_it() {
    assert_eq!(accepted_after_a_race(10_000, Revoke::Keys, true).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_from_before_their_owners_were_deactivated_serve_nobody_after_it() {
    assert_eq!(accepted_after_a_race(2_000, Revoke::Owners, true).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_word_of_the_revoke_the_same_race_does_serve_them() {
    let accepted = accepted_after_a_race(300, Revoke::Keys, false).await;
    assert!(accepted >= 300, "{accepted}: the race is none, and the tests above show nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_the_store_does_not_report_but_an_operator_does_is_the_same() {
    let it = keys(500).await;
    let store = Barrier::new(it.store.clone(), false);
    let node = Authenticator::builder(store.clone()).build();
    store.close();
    let before = ask_all(&node, &it.keys, 1);
    eventually("all to be held", async || store.held() == 500).await;
    for key in &it.keys {
        it.manager.revoke(&key.record().id).await.unwrap();
        node.invalidate(&key.record().prefix);
    }
    let after = ask_all(&node, &it.keys, 2);
    tokio::task::yield_now().await;
    store.open();
    before.join_all().await;
    assert_eq!(after.join_all().await.into_iter().filter(|is_ok| *is_ok).count(), 0);
    assert_eq!(accepted(&node, &it.keys).await, 0);
}

fn entry_of(key: &IssuedKey) -> String {
    let hex: String = key.record().prefix.bytes().map(|byte| format!("{byte:02x}")).collect();
    format!("api_key:data:{{{hex}}}")
}

/// Node A, which receives nothing, reads, and holds what it read; node B receives the revoke, and leaves
/// tombstones in Redis, every other one of which is lost; then A goes on, and fills Redis with what it had
/// read. Returns how often B, and a node that starts then, let somebody in.
async fn accepted_after_late_fills(redis: &Redis) -> [usize; 2] {
    // No more than fills may be under way.
    let it = keys(200).await;
    let node = |store: Barrier| {
        let cache = RedisCache::builder(store, redis.url().as_str())
            .timeout(Duration::from_secs(2))
            .secret(CacheSecret::new(1, [7; 32]))
            .build()
            .unwrap();
        // No local cache: whatever is served comes from below.
        let node = Authenticator::builder(cache.clone()).cache_capacity(0).build();
        (node, cache)
    };
    let is_connected = async |(node, cache): &(Authenticator, RedisCache<Barrier>)| {
        eventually("Redis to be asked", async || {
            let _ = node.authenticate(&support::unknown_key()).await;
            node.invalidate("zzzzzzzzzz");
            cache.state() == RedisState::Up
        })
        .await;
    };
    let at_a = Barrier::new(it.store.clone(), false);
    let (a, b) = (node(at_a.clone()), node(Barrier::new(it.store.clone(), true)));
    is_connected(&a).await;
    is_connected(&b).await;
    received(&b.0).await;
    at_a.close();
    let before = ask_all(&a.0, &it.keys, 1);
    eventually("all to be held", async || at_a.held() == it.keys.len()).await;
    for key in &it.keys {
        it.manager.revoke(&key.record().id).await.unwrap();
    }
    received(&b.0).await;
    let there = |key: &IssuedKey| redis.command(&["GET", &entry_of(key)]);
    eventually("the tombstones", async || {
        it.keys.iter().all(|key| there(key).starts_with("tak1t"))
    })
    .await;
    // B's good manners may have come before the revoke's turn: the making of a key leaves one, too.
    tokio::time::sleep(Duration::from_millis(300)).await;
    for key in it.keys.iter().step_by(2) {
        redis.command(&["DEL", &entry_of(key)]);
    }
    at_a.open();
    assert!(before.join_all().await.contains(&true), "A hears of nothing");
    let is_stale = |key: &&IssuedKey| there(key).starts_with("tak1s");
    let stale = || it.keys.iter().filter(is_stale).count();
    eventually("fills of what was read before", async || stale() >= it.keys.len() / 2).await;
    assert_eq!(stale(), it.keys.len() / 2, "a tombstone is not overwritten");
    let starting = node(Barrier::new(it.store.clone(), true));
    is_connected(&starting).await;
    received(&starting.0).await;
    // Whoever asks first puts the truth in its place: each is the first to ask for a half of them.
    let mut served = [0; 2];
    for (n, (node, _)) in [&b, &starting].into_iter().enumerate() {
        for key in it.keys.iter().skip(2 * n).step_by(4) {
            served[n] += usize::from(node.authenticate(key.expose_secret()).await.is_ok());
        }
    }
    for (n, (node, _)) in [&b, &starting].into_iter().enumerate() {
        served[n] += accepted(node, &it.keys).await;
    }
    served
}

#[tokio::test(flavor = "multi_thread")]
async fn fills_of_redis_that_come_late_serve_nobody() {
    assert_eq!(accepted_after_late_fills(&Redis::start()).await, [0, 0]);
}

/// When the read of a replica is held.
#[derive(Clone, Copy, PartialEq)]
enum Held {
    /// It is the first page of the load.
    Load,
    /// It is the first read of keys that have changed after the load.
    Change,
}

/// Holds a read of a replica, and the look-ups that are passed on to the store, revokes all the keys meanwhile, and
/// returns how many requests of after that were accepted.
async fn accepted_after_a_race_with_a_replica(count: usize, held: Held, how: Revoke) -> usize {
    let it = keys(count).await;
    let store = Barrier::new(it.store.clone(), true);
    let replica = Replica::new(store.clone()).unwrap();
    let node = Authenticator::builder(replica.clone()).max_lookups(4 * count).build();
    if held == Held::Load {
        store.close();
    } else {
        replica.loaded().await;
        assert_eq!(accepted(&node, &it.keys).await, count);
        store.close();
        for key in &it.keys {
            support::edit_key(&it.store, key.record(), None).await.unwrap().unwrap();
        }
        received(&node).await;
    }
    let before = ask_all(&node, &it.keys, 1);
    // The replica has one read under way at a time.
    eventually("all to be held", async || store.held() == count + 1).await;
    it.revoke_all(how).await;
    received(&node).await;
    let after = ask_all(&node, &it.keys, 2);
    tokio::task::yield_now().await;
    store.open();
    before.join_all().await;
    let joined = after.join_all().await.into_iter().filter(|is_ok| *is_ok).count();
    let once_more = accepted(&node, &it.keys).await;
    eventually("all to be loaded", async || {
        let status = replica.status();
        status.state == ReplicaState::Loaded && status.keys == count
    })
    .await;
    // A node that starts now has no minimum revisions of its own.
    let starting = Authenticator::new(replica);
    joined + once_more + accepted(&node, &it.keys).await + accepted(&starting, &it.keys).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_replica_read_before_a_revoke_serves_no_request_after_it() {
    for held in [Held::Load, Held::Change] {
        for how in [Revoke::Keys, Revoke::Owners] {
            assert_eq!(accepted_after_a_race_with_a_replica(1_500, held, how).await, 0);
        }
    }
}

const RACED: usize = 40;
/// Number of keys that change before the nodes are waited for.
const AT_ONCE: usize = 10;
/// A change reaches a node that is connected, on a machine that is busy.
const CONNECTED: Duration = Duration::from_secs(1);

/// Edits, rotates and revokes keys, one after another, while three nodes with a replica each check all of them all the
/// time. Once a node has received a change, it serves nothing older.
async fn replicas_follow_every_change<S, R>(repository: R, stores: [S; 3])
where
    S: KeyStore,
    R: KeyRepository + Clone,
{
    let manager = KeyManager::new(repository);
    let mut keys = Vec::new();
    for n in 0..RACED {
        let owner = manager.create_user(&format!("{n}@example.com"), "user").await.unwrap().id;
        keys.push(Arc::new(manager.issue(NewKey::new(owner, "k")).await.unwrap()));
    }
    let replicas = stores.map(|store| Replica::new(store).unwrap());
    // One with a local cache in front of the replica.
    let mut capacities = [1000, 0, 0].into_iter();
    let nodes = replicas.each_ref().map(|replica| {
        let builder = Authenticator::builder(replica.clone());
        builder.cache_capacity(capacities.next().unwrap()).build()
    });
    for (node, replica) in nodes.iter().zip(&replicas) {
        let _ = node.authenticate(&support::unknown_key()).await;
        received(node).await;
        replica.loaded().await;
    }
    let all_received = async || {
        futures_util::future::join_all(nodes.iter().map(received)).await;
    };
    let history = Arc::new(History::new());
    let mut load = JoinSet::new();
    for (n, node) in nodes.iter().enumerate() {
        for half in 0..2 {
            let (node, history, keys) = (node.clone(), Arc::clone(&history), keys.clone());
            load.spawn(async move {
                loop {
                    for (key, issued) in keys.iter().enumerate().skip(half).step_by(2) {
                        history.ask(n, &node, key, issued.expose_secret()).await;
                    }
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            });
        }
    }
    let asked =
        async |n: usize, key: usize, secret: &str| history.ask(n, &nodes[n], key, secret).await;
    for round in 0..RACED / AT_ONCE {
        let changed = || keys.iter().enumerate().skip(round * AT_ONCE).take(AT_ONCE);
        for (_, issued) in changed() {
            let patch = KeyPatch::default().name("edited");
            manager.update(&issued.record().id, &patch, None).await.unwrap();
        }
        all_received().await;
        for node in &nodes {
            for (key, issued) in changed() {
                let caller = node.authenticate(issued.expose_secret()).await.unwrap();
                assert_eq!(caller.key().name, "edited", "key {key}");
            }
        }
        let mut rotated = Vec::new();
        for (key, issued) in changed() {
            let (id, owner) = (&issued.record().id, &issued.record().user.id);
            let revoke = async {
                match key % 4 {
                    0 => manager.revoke(id).await.unwrap(),
                    1 => drop(manager.deactivate_user(owner).await.unwrap()),
                    2 => manager.delete(id).await.unwrap(),
                    _ => {
                        let how = Rotation::default().grace(Duration::ZERO);
                        rotated.push(manager.rotate(id, how).await.unwrap());
                    }
                }
            };
            history.revoke(key, revoke).await;
        }
        all_received().await;
        for (n, node) in nodes.iter().enumerate() {
            for (key, issued) in changed() {
                let reply = asked(n, key, issued.expose_secret()).await;
                assert_eq!(reply, Reply::Denied, "node {n}, key {key}");
            }
            for new in &rotated {
                let new = node.authenticate(new.expose_secret()).await.unwrap();
                assert_eq!(new.key().name, "edited");
            }
        }
    }
    load.shutdown().await;
    println!("{}", history.summary());
    let answers = history.count(&Reply::Accepted, Duration::ZERO, history.now());
    assert!(answers > 1000, "there was no load: {answers}");
    history.check(&Rules {
        bound: &|_| CONNECTED,
        may_be_unavailable: &|_| false,
        healed: Duration::MAX - CONNECTED,
        connected: CONNECTED,
        slowest: Duration::from_secs(3),
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_of_sqlite_serve_no_key_after_its_revoke_was_received() {
    let folder = tempfile::tempdir().unwrap();
    let open = || SqliteStore::open(folder.path().join("keys.db")).unwrap();
    let store = open();
    store.migrate().await.unwrap();
    replicas_follow_every_change(store, std::array::from_fn(|_| open())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_of_postgres_serve_no_key_after_its_revoke_was_received() {
    let server = Postgres::start();
    // Changes arrive by notifications; each poll is a sync.
    let open = || {
        let store = PostgresStore::builder(&server.url());
        store.poll_interval(Duration::from_millis(300)).build().unwrap()
    };
    let store = open();
    store.migrate().await.unwrap();
    replicas_follow_every_change(store, std::array::from_fn(|_| open())).await;
}
