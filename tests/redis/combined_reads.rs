//! Many look-ups at once: reads of Redis that wait are combined, and each look-up gets its own answer.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Waker},
    time::{Duration, Instant},
};

use tower_api_key::{
    AuthContext, Authenticator, Denial, SqliteStore, denial::InvalidKey, management::IssuedKey,
    redis::RedisState,
};

use crate::support::{fleet::*, servers::Redis, with_wrong_secret};

/// As many as may wait for the store below.
const KEYS: usize = 200;

/// Keys that Redis has, and a node whose local cache has none of them.
struct Burst {
    redis: Redis,
    keys: Keys<SqliteStore>,
    stored: Vec<IssuedKey>,
    node: Node<SqliteStore>,
}

impl Burst {
    async fn with(redis: Redis) -> Self {
        let keys = sqlite().await;
        let mut stored = Vec::new();
        for _ in 0..KEYS {
            stored.push(keys.issue().await);
        }
        let filler = keys.node(&redis);
        for key in &stored {
            filler.until_hit(key.expose_secret()).await;
        }
        let node = keys.node(&redis);
        // Connected, and in sync.
        node.until_hit(&keys.key).await;
        node.store.take_asked();
        Self { redis, keys, stored, node }
    }

    /// Authenticates all of them at once.
    async fn authenticate(
        &self,
        keys: impl IntoIterator<Item = String>,
    ) -> Vec<Result<AuthContext, Denial>> {
        let tasks: Vec<_> = keys
            .into_iter()
            .map(|key| {
                let authenticator = self.node.authenticator.clone();
                tokio::spawn(async move { authenticator.authenticate(&key).await })
            })
            .collect();
        futures_util::future::join_all(tasks).await.into_iter().map(Result::unwrap).collect()
    }

    fn all(&self) -> impl Iterator<Item = String> {
        self.stored.iter().map(|key| key.expose_secret().to_owned())
    }

    /// Asserts that each look-up has the record of its own key.
    fn are_their_own(&self, outcomes: &[Result<AuthContext, Denial>]) {
        assert_eq!(outcomes.len(), KEYS);
        for (key, outcome) in self.stored.iter().zip(outcomes) {
            assert_eq!(outcome.as_ref().unwrap().key().id, key.record().id);
        }
    }

    fn reads(&self) -> u64 {
        self.redis.command_counts().get("mget").copied().unwrap_or(0)
    }
}

#[tokio::test]
async fn many_reads_at_once_are_some_dozen_commands_and_each_gets_its_own_entries() {
    let burst = Burst::with(Redis::start()).await;
    let before = burst.reads();
    let outcomes = burst.authenticate(burst.all()).await;
    burst.are_their_own(&outcomes);
    let reads = burst.reads() - before;
    assert!(reads < 40, "{reads} commands");
    assert_eq!(burst.node.store.take_asked(), 0);
}

#[tokio::test]
async fn wrong_and_revoked_keys_among_many_are_denied() {
    let burst = Burst::with(Redis::start()).await;
    burst.keys.manager.revoke(&burst.stored[7].record().id).await.unwrap();
    burst.node.until_denied(burst.stored[7].expose_secret(), InvalidKey::Revoked).await;
    let keys = burst.all().enumerate().map(|(n, key)| match n % 50 {
        49 => with_wrong_secret(&key),
        _ => key,
    });
    for (n, outcome) in burst.authenticate(keys.collect::<Vec<_>>()).await.into_iter().enumerate() {
        match (n, outcome) {
            (7, outcome) => {
                assert!(matches!(outcome, Err(Denial::InvalidKey(InvalidKey::Revoked))))
            }
            (n, outcome) if n % 50 == 49 => {
                assert!(matches!(outcome, Err(Denial::InvalidKey(InvalidKey::WrongSecret))), "{n}");
            }
            (n, outcome) => assert_eq!(outcome.unwrap().key().id, burst.stored[n].record().id),
        }
    }
}

#[tokio::test]
async fn a_server_that_reads_one_slot_a_command_gets_commands_for_one_look_up() {
    // A part of a cluster, or a proxy in front of one, under one URL.
    let redis = Redis::with_settings(&["cluster-enabled=yes"]);
    redis.command(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]);
    eventually("the cluster", async || redis.command(&["CLUSTER", "INFO"]).contains("state:ok"))
        .await;
    let burst = Burst::with(redis).await;
    let outcomes = burst.authenticate(burst.all()).await;
    burst.are_their_own(&outcomes);
    assert!(burst.node.store.take_asked() > 0, "combined commands were rejected");
    assert_eq!(burst.node.cache.state(), RedisState::Up);

    let before = burst.reads();
    burst.are_their_own(&burst.authenticate(burst.all()).await);
    assert_eq!(burst.node.store.take_asked(), 0);
    assert_eq!(burst.reads() - before, KEYS as u64);
}

#[tokio::test]
async fn while_redis_hangs_none_of_many_waits_for_longer_than_the_limit() {
    let limit = Duration::from_millis(100);
    let mut burst = Burst::with(Redis::start()).await;
    burst.node = Node::with(
        Counting::over(burst.keys.store.clone()),
        burst.redis.url(),
        |cache| cache.timeout(limit),
        |authenticator| authenticator,
    );
    burst.node.until_hit(&burst.keys.key).await;
    burst.redis.freeze();
    let began = Instant::now();
    let outcomes = burst.authenticate(burst.all()).await;
    let took = began.elapsed();
    burst.redis.thaw();
    burst.are_their_own(&outcomes);
    assert!(took < 20 * limit, "{took:?}");
    eventually("Redis is used again", async || burst.node.try_key(&burst.keys.key).await.1 == 0)
        .await;
}

#[tokio::test]
async fn look_ups_that_are_dropped_while_they_wait_leave_the_others_their_answers() {
    let burst = Burst::with(Redis::start()).await;
    burst.redis.freeze();
    let tasks: Vec<_> = burst
        .all()
        .map(|key| {
            let authenticator = burst.node.authenticator.clone();
            tokio::spawn(async move { authenticator.authenticate(&key).await })
        })
        .collect();
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
    for (n, task) in tasks.iter().enumerate() {
        if n % 3 == 0 {
            task.abort();
        }
    }
    burst.redis.thaw();
    for (n, task) in tasks.into_iter().enumerate() {
        match task.await {
            Ok(outcome) => assert_eq!(outcome.unwrap().key().id, burst.stored[n].record().id),
            Err(error) => assert!(error.is_cancelled() && n % 3 == 0),
        }
    }
    burst.are_their_own(&burst.authenticate(burst.all()).await);
}

/// Begins requests, which nothing polls afterwards.
fn begin<'a>(
    authenticator: &'a Authenticator,
    keys: &'a [String],
) -> Vec<Pin<Box<impl Future<Output = Result<AuthContext, Denial>> + use<'a>>>> {
    let begin = |key: &'a String| {
        let mut request = Box::pin(authenticator.authenticate(key));
        assert!(request.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        request
    };
    keys.iter().map(begin).collect()
}

/// A request may be waiting for something else, such as the body of another response, while Redis answers its look-up.
#[tokio::test]
async fn requests_that_are_not_polled_while_redis_answers_leave_the_others_their_answers() {
    let burst = Burst::with(Redis::start()).await;
    let authenticator = &burst.node.authenticator;
    let all: Vec<_> = burst.all().collect();
    // More than may send a command at once.
    let (not_polled, others) = all.split_at(KEYS / 4);
    let requests = begin(authenticator, not_polled);
    // Others wait for the same look-ups.
    for (key, outcome) in not_polled.iter().zip(burst.authenticate(not_polled.to_vec()).await) {
        assert!(outcome.is_ok(), "{key}");
    }
    let outcomes = burst.authenticate(others.to_vec()).await;
    for (outcome, key) in outcomes.iter().zip(&burst.stored[not_polled.len()..]) {
        assert_eq!(outcome.as_ref().unwrap().key().id, key.record().id);
    }
    for (request, key) in requests.into_iter().zip(&burst.stored) {
        assert_eq!(request.await.unwrap().key().id, key.record().id);
    }
    assert_eq!(burst.node.cache.state(), RedisState::Up);
}

/// The commands of requests that are not polled do not end. After a while, others are sent nevertheless.
#[tokio::test]
async fn commands_of_requests_that_are_not_polled_do_not_hold_up_others_for_long() {
    let burst = Burst::with(Redis::start()).await;
    let authenticator = &burst.node.authenticator;
    let all: Vec<_> = burst.all().collect();
    let (not_polled, others) = all.split_at(KEYS / 4);
    let requests = begin(authenticator, not_polled);
    // From the store below, if no command can be sent.
    let outcomes = burst.authenticate(others.to_vec()).await;
    assert!(outcomes.iter().all(Result::is_ok));
    eventually("commands are sent", async || {
        burst.node.store.take_asked();
        assert!(burst.authenticate([others[0].clone()]).await[0].is_ok());
        burst.node.store.take_asked() == 0
    })
    .await;
    assert_eq!(burst.node.cache.state(), RedisState::Up);
    for request in requests {
        assert!(request.await.is_ok());
    }
}
