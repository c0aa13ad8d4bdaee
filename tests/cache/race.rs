//! Resolver that were read before a revoke and come back after it, ten thousand at a time.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, SystemTime},
};

use tokio::{sync::watch, task::JoinSet};
use tower_api_key::{
    Authenticator, KeyManager, MemoryStore, NewKey, RedisCache, StoreError,
    management::IssuedKey,
    record::User,
    redis::RedisState,
    store::{Answer, Attribution, CacheSecret, ChangeStream, KeyRepository, KeyStore, Lookup},
};

use crate::support::{
    self,
    feed::{eventually, in_sync},
    servers::Redis,
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
}

impl KeyStore for Barrier {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        let inner = &self.0;
        let answer = inner.store.resolve(lookup).await?;
        if *inner.is_closed.borrow() {
            inner.held.fetch_add(1, SeqCst);
            let _ = inner.is_closed.subscribe().wait_for(|is_closed| !is_closed).await;
            inner.held.fetch_sub(1, SeqCst);
        }
        Ok(answer)
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
    match how {
        Revoke::Keys => {
            for key in &it.keys {
                it.manager.revoke(&key.record().id).await.unwrap();
            }
        }
        Revoke::Owners => {
            for user in &it.users {
                let mut user = user.clone();
                user.is_active = false;
                it.store.update_user(&user, &Attribution::default()).await.unwrap();
            }
        }
    }
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
