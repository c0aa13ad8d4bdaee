//! Nodes that share a Redis: each a store that counts how often it is queried, and a cache in front of it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant, SystemTime},
};

use chrono::{DateTime, NaiveDate, Utc};
use futures_util::StreamExt;
use tower_api_key::{
    Authenticator, Denial, KeyManager, MemoryStore, NewKey, RedisCache, SqliteStore, StoreError,
    authenticator::AuthenticatorBuilder,
    backend::RedisCacheBuilder,
    clock::{Clock, ManualClock},
    denial::InvalidKey,
    management::IssuedKey,
    record::{KeyId, KeyRecord, User, UserId},
    redis::{RedisServers, RedisState},
    store::{
        Answer, Attribution, AuditPage, CacheSecret, Change, ChangeStream, DailyUsage, Inserted,
        KeyFilter, KeyPage, KeyRepository, KeyStore, ListAudit, ListKeys, ListUsers, Lookup,
        StoredKey, UserPage,
    },
};

use super::{
    key_checker::Outcome,
    servers::{Redis, RedisCluster, RedisSentinel},
};

/// Waits until `done` is true; polls, and lets what runs in the background run.
pub async fn eventually(what: &str, done: impl AsyncFnMut() -> bool) {
    eventually_within(Duration::from_secs(10), what, done).await;
}

pub async fn eventually_within(
    patience: Duration,
    what: &str,
    mut done: impl AsyncFnMut() -> bool,
) {
    let deadline = Instant::now() + patience;
    while !done().await {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What Redis a fleet shares.
pub trait Shared {
    fn servers(&self) -> RedisServers;

    /// The answer to a command about the entry `name`, behind the back of the nodes.
    fn ask(&self, name: &str, words: &[&str]) -> String;

    /// How often commands of this name were executed for the nodes.
    fn count(&self, command: &str) -> u64;
}

impl Shared for Redis {
    fn servers(&self) -> RedisServers {
        self.url().into()
    }

    fn ask(&self, _: &str, words: &[&str]) -> String {
        self.command(words)
    }

    fn count(&self, command: &str) -> u64 {
        self.command_counts().get(command).copied().unwrap_or(0)
    }
}

impl Shared for RedisCluster {
    fn servers(&self) -> RedisServers {
        RedisServers::cluster(self.urls())
    }

    fn ask(&self, name: &str, words: &[&str]) -> String {
        self.command(name, words)
    }

    fn count(&self, command: &str) -> u64 {
        self.command_counts().get(command).copied().unwrap_or(0)
    }
}

impl Shared for RedisSentinel {
    fn servers(&self) -> RedisServers {
        RedisServers::sentinel(self.sentinel_urls(), self.master_name())
    }

    fn ask(&self, _: &str, words: &[&str]) -> String {
        self.command(words)
    }

    fn count(&self, command: &str) -> u64 {
        self.command_counts().get(command).copied().unwrap_or(0)
    }
}

/// Users and keys, and one of them.
pub struct Keys<S> {
    pub store: S,
    pub manager: KeyManager<S>,
    pub user: UserId,
    pub key: String,
    pub record: KeyRecord,
}

impl<S: KeyRepository + Clone> Keys<S> {
    pub async fn over(store: S) -> Self {
        let manager = KeyManager::new(store.clone());
        let user = super::some_user(store.clone()).await;
        let issued = manager.issue(NewKey::new(user.clone(), "laptop")).await.unwrap();
        let (key, record) = (issued.expose_secret().to_owned(), issued.record().clone());
        Self { store, manager, user, key, record }
    }

    /// Another key of the same user.
    pub async fn issue(&self) -> IssuedKey {
        self.manager.issue(NewKey::new(self.user.clone(), "another")).await.unwrap()
    }

    pub async fn revoke(&self) {
        self.manager.revoke(&self.record.id).await.unwrap();
    }

    /// Where the key's data lie.
    pub fn data(&self, redis: &impl Shared) -> String {
        data_of(redis, &self.record.prefix)
    }

    /// A node in front of the store.
    pub fn node(&self, redis: &impl Shared) -> Node<S> {
        Node::new(Counting::over(self.store.clone()), redis.servers())
    }
}

/// Keys in SQLite, which has a feed and a secret of its own.
pub async fn sqlite() -> Keys<SqliteStore> {
    let store = SqliteStore::in_memory().unwrap();
    store.migrate().await.unwrap();
    Keys::over(store).await
}

/// A store that counts how often it is queried, and can be made to misbehave.
#[derive(Clone)]
pub struct Counting<S> {
    pub store: S,
    asked: Arc<AtomicUsize>,
    fails: Arc<AtomicBool>,
    feed: Feed,
    secret: Secret,
}

#[derive(Clone)]
enum Feed {
    Stores,
    /// The same, with the time of this clock.
    By(Arc<ManualClock>),
    None,
}

#[derive(Clone)]
enum Secret {
    Stores,
    Given(CacheSecret),
    /// There is no answer until this is true, and then the store's.
    Late(Arc<AtomicBool>),
    /// The question fails until this is true, and then the store's.
    Failing(Arc<AtomicBool>),
}

impl<S: KeyStore> Counting<S> {
    pub fn over(store: S) -> Self {
        let (asked, fails) = Default::default();
        Self { store, asked, fails, feed: Feed::Stores, secret: Secret::Stores }
    }

    pub fn without_feed(self) -> Self {
        Self { feed: Feed::None, ..self }
    }

    pub fn by_clock(self, clock: &Arc<ManualClock>) -> Self {
        Self { feed: Feed::By(Arc::clone(clock)), ..self }
    }

    pub fn with_secret(self, secret: CacheSecret) -> Self {
        Self { secret: Secret::Given(secret), ..self }
    }

    /// The secret is there once this is true; until then the question waits.
    pub fn with_late_secret(self, is_there: &Arc<AtomicBool>) -> Self {
        Self { secret: Secret::Late(Arc::clone(is_there)), ..self }
    }

    /// The secret is there once this is true; until then the question fails.
    pub fn with_failing_secret(self, is_there: &Arc<AtomicBool>) -> Self {
        Self { secret: Secret::Failing(Arc::clone(is_there)), ..self }
    }

    /// Number of look-ups since this was last called.
    pub fn take_asked(&self) -> usize {
        self.asked.swap(0, SeqCst)
    }

    /// From now on every question fails, or none.
    pub fn fail(&self, fails: bool) {
        self.fails.store(fails, SeqCst);
    }
}

impl<S: KeyStore> KeyStore for Counting<S> {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        self.asked.fetch_add(1, SeqCst);
        if self.fails.load(SeqCst) {
            return Err(StoreError::unavailable("down"));
        }
        self.store.resolve(lookup).await
    }

    fn changes(&self, since: SystemTime) -> ChangeStream {
        match &self.feed {
            Feed::Stores => self.store.changes(since),
            Feed::None => ChangeStream::none(),
            Feed::By(clock) => {
                let clock = Arc::clone(clock);
                ChangeStream::new(self.store.changes(since).map(move |change| match change {
                    Change::Synced(_) => Change::Synced(clock.now()),
                    change => change,
                }))
            }
        }
    }

    fn has_cache_secret(&self) -> bool {
        self.store.has_cache_secret()
    }

    async fn cache_secret(&self) -> Result<Option<CacheSecret>, StoreError> {
        match &self.secret {
            Secret::Stores => {}
            Secret::Given(secret) => return Ok(Some(secret.clone())),
            Secret::Late(is_there) => {
                while !is_there.load(SeqCst) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
            Secret::Failing(is_there) => {
                tokio::task::yield_now().await;
                if !is_there.load(SeqCst) {
                    return Err(StoreError::unavailable("no secret yet"));
                }
            }
        }
        self.store.cache_secret().await
    }
}

impl<S: KeyRepository> KeyRepository for Counting<S> {
    async fn insert_user(
        &self,
        email: &str,
        role: &str,
        by: &Attribution,
    ) -> Result<User, StoreError> {
        self.store.insert_user(email, role, by).await
    }

    async fn find_user(&self, id: &UserId) -> Result<Option<User>, StoreError> {
        self.store.find_user(id).await
    }

    async fn find_user_by_email(&self, email: &str) -> Result<Option<User>, StoreError> {
        self.store.find_user_by_email(email).await
    }

    async fn list_users(&self, page: &ListUsers) -> Result<UserPage, StoreError> {
        self.store.list_users(page).await
    }

    async fn update_user(
        &self,
        user: &User,
        by: &Attribution,
    ) -> Result<Option<Change>, StoreError> {
        self.store.update_user(user, by).await
    }

    async fn delete_user(
        &self,
        id: &UserId,
        by: &Attribution,
    ) -> Result<Option<Change>, StoreError> {
        self.store.delete_user(id, by).await
    }

    async fn insert_key(&self, key: &StoredKey, by: &Attribution) -> Result<KeyRecord, StoreError> {
        self.store.insert_key(key, by).await
    }

    async fn insert_keys(
        &self,
        keys: &[StoredKey],
        by: &Attribution,
    ) -> Result<Vec<Inserted>, StoreError> {
        self.store.insert_keys(keys, by).await
    }

    async fn find_key(&self, id: &KeyId) -> Result<Option<StoredKey>, StoreError> {
        self.store.find_key(id).await
    }

    async fn list_keys(&self, page: &ListKeys) -> Result<KeyPage, StoreError> {
        self.store.list_keys(page).await
    }

    async fn replace_key(
        &self,
        old: &StoredKey,
        new: &StoredKey,
        by: &Attribution,
    ) -> Result<Option<KeyRecord>, StoreError> {
        self.store.replace_key(old, new, by).await
    }

    async fn revoke_key(&self, id: &KeyId, by: &Attribution) -> Result<Option<Change>, StoreError> {
        self.store.revoke_key(id, by).await
    }

    async fn revoke_keys(
        &self,
        filter: &KeyFilter,
        by: &Attribution,
    ) -> Result<Vec<(KeyId, Change)>, StoreError> {
        self.store.revoke_keys(filter, by).await
    }

    async fn delete_key(&self, id: &KeyId, by: &Attribution) -> Result<Option<Change>, StoreError> {
        self.store.delete_key(id, by).await
    }

    async fn list_usage(
        &self,
        key: &KeyId,
        from: NaiveDate,
        to: NaiveDate,
    ) -> Result<Vec<DailyUsage>, StoreError> {
        self.store.list_usage(key, from, to).await
    }

    async fn list_audit(&self, page: &ListAudit) -> Result<AuditPage, StoreError> {
        self.store.list_audit(page).await
    }

    async fn prune_audit(&self, before: DateTime<Utc>) -> Result<u64, StoreError> {
        self.store.prune_audit(before).await
    }
}

/// A node that caches nothing itself, so that Redis or the store has to answer every time.
pub struct Node<S: KeyStore> {
    pub cache: RedisCache<Counting<S>>,
    pub authenticator: Authenticator,
    pub store: Counting<S>,
}

impl<S: KeyStore + Clone> Node<S> {
    pub fn new(store: Counting<S>, servers: impl Into<RedisServers>) -> Self {
        Self::with(store, servers, |cache| cache, |authenticator| authenticator)
    }

    /// With settings, and a time limit that a busy machine does not run into.
    pub fn with(
        store: Counting<S>,
        servers: impl Into<RedisServers>,
        cache: impl FnOnce(RedisCacheBuilder<Counting<S>>) -> RedisCacheBuilder<Counting<S>>,
        authenticator: impl FnOnce(AuthenticatorBuilder) -> AuthenticatorBuilder,
    ) -> Self {
        let patient = RedisCache::builder(store.clone(), servers).timeout(Duration::from_secs(2));
        let cache = cache(patient).build().unwrap();
        let authenticator =
            authenticator(Authenticator::builder(cache.clone()).cache_capacity(0)).build();
        Self { cache, authenticator, store }
    }

    /// The outcome for the key, and the number of look-ups in the store for it.
    pub async fn try_key(&self, key: &str) -> (Outcome, usize) {
        self.store.take_asked();
        let outcome = match self.authenticator.authenticate(key).await {
            Ok(caller) if caller.user().email == "ada@example.com" => Outcome::Passes,
            Ok(caller) => panic!("somebody else: {caller:?}"),
            Err(Denial::MalformedCredential(reason)) => Outcome::Malformed(reason),
            Err(Denial::InvalidKey(reason)) => Outcome::Invalid(reason),
            Err(denial) => Outcome::Status(denial.status().as_u16()),
        };
        (outcome, self.store.take_asked())
    }

    /// Tries the key until Redis answers in place of the store. It has to pass every time.
    pub async fn until_hit(&self, key: &str) {
        self.until_hit_within(Duration::from_secs(10), key).await;
    }

    pub async fn until_hit_within(&self, patience: Duration, key: &str) {
        eventually_within(patience, "Redis answers", async || {
            let (outcome, asked) = self.try_key(key).await;
            assert_eq!(outcome, Outcome::Passes);
            asked == 0
        })
        .await;
    }

    /// Tries the key until it is denied for this. Until then it may pass and nothing else.
    pub async fn until_denied(&self, key: &str, reason: InvalidKey) {
        eventually("the key is refused", async || match self.try_key(key).await.0 {
            Outcome::Passes => false,
            outcome => outcome == Outcome::Invalid(reason) || panic!("{outcome:?}"),
        })
        .await;
    }

    /// The key passes, by an answer of the store.
    pub async fn asks_the_store(&self, key: &str) {
        assert_eq!(self.try_key(key).await, (Outcome::Passes, 1));
    }

    pub async fn until_state(&self, state: RedisState) {
        eventually("the state changes", async || self.cache.state() == state).await;
    }
}

/// The name of the entry with the keys under a prefix, of whichever database; where there is none, a name in its slot.
pub fn data_of(redis: &impl Shared, prefix: &str) -> String {
    let names = names_under(redis, prefix);
    let data = names.into_iter().find(|name| name.starts_with("api_key:data:"));
    data.unwrap_or_else(|| without_scope(prefix))
}

fn without_scope(prefix: &str) -> String {
    format!("api_key:data:{}", tag_of(prefix))
}

pub fn tag_of(prefix: &str) -> String {
    let hex: String = prefix.bytes().map(|byte| format!("{byte:02x}")).collect();
    format!("{{{hex}}}")
}

/// The names of all the entries about keys under a prefix.
pub fn names_under(redis: &impl Shared, prefix: &str) -> Vec<String> {
    let tag = tag_of(prefix);
    let all = redis.ask(&without_scope(prefix), &["KEYS", "api_key:*"]);
    let mut names: Vec<_> =
        all.lines().filter(|name| name.contains(&tag)).map(str::to_owned).collect();
    names.sort();
    names
}

/// Data and proof of the one key under a prefix.
pub fn both_under(redis: &impl Shared, prefix: &str) -> [String; 2] {
    let names = names_under(redis, prefix);
    let both: [String; 2] = names.try_into().expect("one entry of each kind");
    assert!(
        both[0].starts_with("api_key:data:") && both[1].starts_with("api_key:verified:"),
        "{both:?}"
    );
    both
}

/// Puts a copy of the entry aside, with its lifetime; it stays in the slot of a cluster.
pub fn keep(redis: &impl Shared, name: &str) {
    assert_eq!(redis.ask(name, &["COPY", name, &format!("kept:{name}"), "REPLACE"]), "1");
}

/// Puts the copy back, as somebody does who may write to Redis.
pub fn replay(redis: &impl Shared, name: &str) {
    assert_eq!(redis.ask(name, &["COPY", &format!("kept:{name}"), name, "REPLACE"]), "1");
    redis.ask(name, &["PERSIST", name]);
}

/// Replaces a value by what a Lua expression makes of it, `v`.
pub fn alter(redis: &impl Shared, name: &str, expression: &str) {
    let script = format!(
        "local v = redis.call('GET', KEYS[1]); redis.call('SET', KEYS[1], {expression}, 'KEEPTTL')"
    );
    assert_eq!(redis.ask(name, &["EVAL", &script, "1", name]), "(nil)");
}

/// The value in hexadecimal.
pub fn hex_of(redis: &impl Shared, name: &str) -> String {
    let script = "return (string.gsub(redis.call('GET', KEYS[1]), '.', function(c)
        return string.format('%02x', string.byte(c)) end))";
    redis.ask(name, &["EVAL", script, "1", name])
}

pub fn exists(redis: &impl Shared, name: &str) -> bool {
    redis.ask(name, &["EXISTS", name]) == "1"
}

/// What is left of an entry's lifetime, in ms.
pub fn left_of(redis: &impl Shared, name: &str) -> i64 {
    redis.ask(name, &["PTTL", name]).parse().unwrap()
}

/// What holds for every kind of Redis: the answer that one node cached serves another, for one command and no
/// script; and a revoked key stays denied though its entries are put back.
pub async fn nodes_share_what_they_know(redis: &impl Shared, keys: &Keys<SqliteStore>) {
    let [a, b] = [keys.node(redis), keys.node(redis)];
    let others = [keys.issue().await, keys.issue().await, keys.issue().await, keys.issue().await];
    // One at least for each master of a cluster.
    for node in [&a, &b] {
        for key in &others {
            node.until_hit(key.expose_secret()).await;
        }
    }
    let fresh = keys.issue().await;
    a.until_hit(fresh.expose_secret()).await;
    eventually("twenty hits are twenty commands", async || {
        let before = ["mget", "evalsha", "eval"].map(|name| redis.count(name));
        for _ in 0..20 {
            assert_eq!(b.try_key(fresh.expose_secret()).await, (Outcome::Passes, 0));
        }
        let after = ["mget", "evalsha", "eval"].map(|name| redis.count(name));
        assert_eq!(after[0] - before[0], 20);
        after[1..] == before[1..]
    })
    .await;

    let both = both_under(redis, &fresh.record().prefix);
    both.iter().for_each(|name| keep(redis, name));
    keys.manager.revoke(&fresh.record().id).await.unwrap();
    for node in [&a, &b] {
        node.until_denied(fresh.expose_secret(), InvalidKey::Revoked).await;
    }
    let late = keys.node(redis);
    for _ in 0..5 {
        both.iter().for_each(|name| replay(redis, name));
        for node in [&a, &b, &late] {
            let outcome = node.try_key(fresh.expose_secret()).await.0;
            assert_eq!(outcome, Outcome::Invalid(InvalidKey::Revoked));
        }
    }
    for key in &others {
        assert_eq!(b.try_key(key.expose_secret()).await, (Outcome::Passes, 0));
    }
    // Random bytes heal.
    let data = data_of(redis, &others[0].record().prefix);
    alter(redis, &data, "string.rep('x', 500)");
    assert_eq!(a.try_key(others[0].expose_secret()).await, (Outcome::Passes, 1));
    a.until_hit(others[0].expose_secret()).await;
}

/// A store without a feed: a change made on one node reaches another through Redis.
pub async fn nodes_notify_each_other(redis: &impl Shared) {
    let keys = Keys::over(MemoryStore::new()).await;
    let node = || {
        let store = Counting::over(keys.store.clone()).without_feed();
        let secret = CacheSecret::new(1, [7; 32]);
        let hour = Duration::from_secs(3600);
        Node::with(
            store,
            redis.servers(),
            |it| it.secret(secret),
            |authenticator| authenticator.max_staleness(hour),
        )
    };
    let [a, b] = [node(), node()];
    for node in [&a, &b] {
        node.until_hit(&keys.key).await;
    }
    let manager = KeyManager::new(a.cache.clone());
    manager.revoke(&keys.record.id).await.unwrap();
    let asked = Instant::now();
    for node in [&a, &b] {
        node.until_denied(&keys.key, InvalidKey::Revoked).await;
    }
    assert!(asked.elapsed() < Duration::from_millis(1500), "it took {:?}", asked.elapsed());
}

/// The keys are tried over and over for as long as something goes on: valid ones pass every time, the
/// revoked one never.
pub async fn while_it_goes_on<T>(
    node: &Node<SqliteStore>,
    valid: &[&str],
    revoked: &str,
    goes_on: impl FnOnce() -> T + Send + 'static,
) -> T
where
    T: Send + 'static,
{
    let going_on = tokio::task::spawn_blocking(goes_on);
    let mut tries = 0;
    while !going_on.is_finished() || tries == 0 {
        for key in valid {
            assert_eq!(node.try_key(key).await.0, Outcome::Passes);
        }
        assert_eq!(node.try_key(revoked).await.0, Outcome::Invalid(InvalidKey::Revoked));
        tries += 1;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    going_on.await.unwrap()
}
