//! What nodes return while PostgreSQL is out of reach, with all keys in memory: valid keys, also those that a node has
//! never checked, revoked keys and unknown keys. Each answer is judged by the age of the last sync.

use std::{
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    time::{Duration, Instant},
};

use tower_api_key::{
    Authenticator, KeyManager, NewKey, PostgresStore, Replica,
    key::KeyHash,
    management::ImportedKey,
    record::UserId,
    store::{ReplicaState, ReplicaStatus},
};

use crate::support::{
    self,
    feed::{eventually, in_sync},
    history::{History, Reply},
    proxy::Proxy,
    servers::Postgres,
};

const MAX_STALENESS: Duration = Duration::from_secs(1);
const STALE_IF_ERROR: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(300);

/// A database with some keys, and nodes that reach it through a proxy each.
struct Fleet {
    postgres: Postgres,
    manager: KeyManager<PostgresStore>,
    owner: UserId,
    keys: Vec<Key>,
    nodes: Vec<Node>,
    history: History,
    /// Number of unknown keys so far. Each is a new one, so that no local cache has it.
    unknown: AtomicUsize,
}

struct Key {
    secret: String,
    id: i64,
    owner: i64,
}

struct Node {
    number: usize,
    authenticator: Authenticator,
    replica: Replica<PostgresStore>,
    proxy: Proxy,
}

// Keys, by what happens to them.
const VALID: usize = 0;
/// No node checks it before the outage.
const COLD: usize = 1;
const REVOKED: usize = 2;
const OWNER_INACTIVE: usize = 3;
const DELETED: usize = 4;
const REVOKED_BEFORE: usize = 5;
const KEYS: usize = 6;
/// The number of unknown keys in the history.
const UNKNOWN: usize = KEYS;

impl Fleet {
    /// Without nodes.
    async fn start() -> Self {
        let postgres = Postgres::start();
        let store = PostgresStore::new(&postgres.url()).unwrap();
        store.migrate().await.unwrap();
        let manager = KeyManager::new(store);
        let mut keys = Vec::new();
        let mut owner = None;
        for n in 0..KEYS {
            let user = manager.create_user(&format!("{n}@example.com"), "user").await.unwrap().id;
            let issued = manager.issue(NewKey::new(user.clone(), "k")).await.unwrap();
            keys.push(Key {
                secret: issued.expose_secret().to_owned(),
                id: issued.record().id.as_i64().unwrap(),
                owner: user.as_i64().unwrap(),
            });
            owner.get_or_insert(user);
        }
        let (owner, nodes, history) = (owner.unwrap(), Vec::new(), History::new());
        Self { postgres, manager, owner, keys, nodes, history, unknown: AtomicUsize::new(0) }
    }

    /// Adds a node with a local cache, and one without, whose replica answers each time.
    fn add_nodes(&mut self) {
        for capacity in [1000, 0] {
            self.nodes.push(self.node(capacity));
        }
    }

    fn node(&self, capacity: usize) -> Node {
        let proxy = Proxy::start(self.postgres.port());
        let url = proxy.url(&self.postgres.tcp_url("sslmode=disable"));
        let store = PostgresStore::builder(&url)
            .poll_interval(POLL)
            .timeout(Duration::from_secs(1))
            .connect_timeout(Duration::from_millis(500))
            .build()
            .unwrap();
        let replica = Replica::new(store).unwrap();
        let authenticator = Authenticator::builder(replica.clone())
            .max_staleness(MAX_STALENESS)
            .stale_if_error(STALE_IF_ERROR)
            .cache_capacity(capacity)
            .build();
        Node { number: self.nodes.len(), authenticator, replica, proxy }
    }

    fn each(&self, change: impl Fn(&Proxy)) {
        self.nodes.iter().for_each(|node| change(&node.proxy));
    }

    async fn ask(&self, node: &Node, key: usize) -> Reply {
        let unknown;
        let secret = match self.keys.get(key) {
            Some(key) => &key.secret,
            None => {
                let number = self.unknown.fetch_add(1, SeqCst);
                unknown = support::unknown_key_with_id(&format!("{number:010}"));
                &unknown
            }
        };
        self.history.ask(node.number, &node.authenticator, key, secret).await
    }

    async fn revoke(&self, keys: &[usize]) {
        let admin = self.postgres.client().await;
        for key in keys {
            let Key { id, owner, .. } = self.keys[*key];
            let sql = match *key {
                OWNER_INACTIVE => format!("UPDATE users SET is_active = FALSE WHERE id = {owner}"),
                DELETED => format!("DELETE FROM api_keys WHERE id = {id}"),
                _ => format!("UPDATE api_keys SET is_active = FALSE WHERE id = {id}"),
            };
            self.history.revoke(*key, async { admin.batch_execute(&sql).await.unwrap() }).await;
        }
    }

    /// Waits until each node has all keys in memory, and has received every change that was made before.
    async fn is_loaded(&self) {
        for node in &self.nodes {
            // The first look-up starts the change feed.
            let _ = self.ask(node, UNKNOWN).await;
            in_sync(&node.authenticator).await;
            eventually("the replica to load", async || node.status().state == ReplicaState::Loaded)
                .await;
        }
    }

    /// Cuts the nodes off once they have read again what has changed, and checks that all answers are right.
    async fn answers_from_memory(&self, revoked: &[usize]) {
        eventually("what has changed to be read again", async || {
            self.each(Proxy::refuse);
            let mut is_in_memory = true;
            for node in &self.nodes {
                for key in 0..=UNKNOWN {
                    is_in_memory &= self.ask(node, key).await != Reply::Unavailable;
                }
            }
            if !is_in_memory {
                self.each(Proxy::pass);
                self.is_loaded().await;
            }
            is_in_memory
        })
        .await;
        self.is_right(revoked).await;
    }

    /// Checks that every key gets the right answer on each node.
    async fn is_right(&self, revoked: &[usize]) {
        for node in &self.nodes {
            for key in 0..=UNKNOWN {
                let is_denied = key == UNKNOWN || key == REVOKED_BEFORE || revoked.contains(&key);
                let expected = if is_denied { Reply::Denied } else { Reply::Accepted };
                assert_eq!(self.ask(node, key).await, expected, "node {}, key {key}", node.number);
            }
        }
    }
}

impl Node {
    fn status(&self) -> ReplicaStatus {
        self.replica.status()
    }

    fn age(&self) -> Duration {
        self.authenticator.health().last_sync.unwrap()
    }
}

/// How many answers there were of each kind while the database was away.
#[derive(Default, Debug)]
struct Seen {
    accepted_while_fresh: usize,
    accepted_while_stale: usize,
    unknown_denied: usize,
    unknown_unavailable: usize,
    expired: usize,
}

/// Asks for every key, each time at a known age, until every answer is expired.
async fn judge_until_expired(fleet: &Fleet, node: &Node) {
    let mut seen = Seen::default();
    let total = MAX_STALENESS + STALE_IF_ERROR;
    let deadline = Instant::now() + Duration::from_secs(30);
    while seen.expired < 2 * (UNKNOWN + 1) {
        assert!(Instant::now() < deadline, "{seen:?}");
        let answers = (0..=UNKNOWN).map(async |key| {
            let before = node.age();
            let reply = fleet.ask(node, key).await;
            (key, before, reply, node.age())
        });
        for (key, before, reply, after) in futures_util::future::join_all(answers).await {
            let label = format!("node {}, key {key}, {before:?}..{after:?}", node.number);
            let is_denied = matches!(key, UNKNOWN | REVOKED_BEFORE);
            let positive = if is_denied { Reply::Denied } else { Reply::Accepted };
            // A denial is not served beyond `max_staleness`.
            let limit = if is_denied { MAX_STALENESS } else { total };
            if after <= limit {
                assert_eq!(reply, positive, "{label}");
            } else if before > limit {
                assert_eq!(reply, Reply::Unavailable, "{label}");
            } else {
                assert!(reply == positive || reply == Reply::Unavailable, "{label}: {reply:?}");
            }
            match (key, reply) {
                (UNKNOWN, Reply::Denied) => seen.unknown_denied += 1,
                (UNKNOWN, Reply::Unavailable) => seen.unknown_unavailable += 1,
                (COLD, Reply::Accepted) if after <= MAX_STALENESS => seen.accepted_while_fresh += 1,
                (COLD, Reply::Accepted) if before > MAX_STALENESS => seen.accepted_while_stale += 1,
                _ => {}
            }
            seen.expired += usize::from(before > total);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    println!("node {}: {seen:?}", node.number);
    let Seen { accepted_while_fresh, accepted_while_stale, unknown_denied, .. } = seen;
    let counts = [accepted_while_fresh, accepted_while_stale, unknown_denied];
    assert!(counts.iter().all(|count| *count > 0) && seen.unknown_unavailable > 0, "{seen:?}");
}

/// Asks for all keys while the database comes back, until the nodes are in sync: no valid key is refused, and no revoked
/// key is accepted once it was refused.
async fn comes_back(fleet: &Fleet) {
    let back = async |node: &Node| {
        let begun = Instant::now();
        let mut refused = [false; UNKNOWN + 1];
        while node.age() >= begun.elapsed() || node.status().state != ReplicaState::Loaded {
            assert!(begun.elapsed() < Duration::from_secs(15), "node {} is cut off", node.number);
            for (key, refused) in refused.iter_mut().enumerate() {
                let reply = fleet.ask(node, key).await;
                let label = format!("node {}, key {key}: {reply:?}", node.number);
                match reply {
                    Reply::Accepted => {
                        assert!(key < REVOKED_BEFORE && !*refused, "{label}");
                    }
                    Reply::Denied => {
                        assert!(key >= REVOKED, "{label}");
                        *refused = true;
                    }
                    Reply::Unavailable => {}
                    Reply::Other(_) => panic!("{label}"),
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    futures_util::future::join_all(fleet.nodes.iter().map(back)).await;
}

/// What happens to keys while the database is away.
const REVOKES: [usize; 3] = [REVOKED, OWNER_INACTIVE, DELETED];

/// With `takes_changes`, keys are revoked during the outage; otherwise as soon as the database is back.
async fn outage(
    takes_changes: bool,
    breaks: impl AsyncFnOnce(&mut Fleet),
    heals: impl AsyncFnOnce(&mut Fleet),
) {
    let mut fleet = Fleet::start().await;
    fleet.add_nodes();
    fleet.is_loaded().await;
    for node in &fleet.nodes {
        assert_eq!(fleet.ask(node, VALID).await, Reply::Accepted);
    }
    fleet.revoke(&[REVOKED_BEFORE]).await;
    // Until the keys that have changed are read again, look-ups of them are passed on to the database.
    for node in &fleet.nodes {
        in_sync(&node.authenticator).await;
        assert_eq!(fleet.ask(node, REVOKED_BEFORE).await, Reply::Denied);
        eventually("the revoked key to be read again", async || node.status().keys == KEYS).await;
    }
    breaks(&mut fleet).await;
    if takes_changes {
        fleet.revoke(&REVOKES).await;
    }
    let judged = fleet.nodes.iter().map(|node| judge_until_expired(&fleet, node));
    futures_util::future::join_all(judged).await;
    heals(&mut fleet).await;
    if !takes_changes {
        fleet.revoke(&REVOKES).await;
    }
    comes_back(&fleet).await;
    fleet.is_right(&REVOKES).await;
    fleet.answers_from_memory(&REVOKES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_is_stopped() {
    outage(false, async |it| it.postgres.stop(), async |it| it.postgres.start_again()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_is_killed() {
    outage(false, async |it| it.postgres.kill(), async |it| it.postgres.start_again()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_is_frozen() {
    outage(false, async |it| it.postgres.freeze(), async |it| it.postgres.thaw()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_way_to_postgres_is_refused() {
    outage(true, async |it| it.each(Proxy::refuse), async |it| it.each(Proxy::pass)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_way_to_postgres_is_a_black_hole() {
    outage(true, async |it| it.each(Proxy::black_hole), async |it| it.each(Proxy::pass)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_start_without_postgres_load_once_it_is_there() {
    let mut fleet = Fleet::start().await;
    fleet.revoke(&[REVOKED_BEFORE]).await;
    fleet.postgres.stop();
    fleet.add_nodes();
    // Longer than the first pauses of the feed.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(1500) {
        for node in &fleet.nodes {
            for key in 0..=UNKNOWN {
                assert_eq!(fleet.ask(node, key).await, Reply::Unavailable, "key {key}");
            }
            assert_eq!((node.status().state, node.status().keys), (ReplicaState::Loading, 0));
            assert_eq!(node.status().lag, None);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    fleet.postgres.start_again();
    for node in &fleet.nodes {
        let loaded = tokio::time::timeout(Duration::from_secs(15), node.replica.loaded()).await;
        let loaded = loaded.unwrap();
        assert_eq!((loaded.state, loaded.keys), (ReplicaState::Loaded, KEYS));
    }
    fleet.is_loaded().await;
    fleet.is_right(&[]).await;
    fleet.answers_from_memory(&[]).await;
}

/// More than five pages of a load.
const MANY: usize = 5_500;

#[tokio::test(flavor = "multi_thread")]
async fn postgres_goes_away_in_the_middle_of_a_load() {
    let mut fleet = Fleet::start().await;
    fleet.revoke(&[REVOKED_BEFORE]).await;
    let hash = KeyHash::sha256("of no key");
    let fillers = (0..MANY).map(|n| {
        let key = NewKey::new(fleet.owner.clone(), "filler");
        ImportedKey::new(key, format!("fill{n:06}"), hash.clone())
    });
    fleet.manager.import(fillers).await.unwrap();
    // In the last page.
    let last = fleet.manager.issue(NewKey::new(fleet.owner.clone(), "last")).await.unwrap();
    let total = KEYS + MANY + 1;
    fleet.add_nodes();
    for node in &fleet.nodes {
        node.proxy.delay(Duration::from_millis(25));
        let _ = fleet.ask(node, UNKNOWN).await;
    }
    let cut = fleet.nodes.iter().map(async |node| {
        eventually("the first page", async || node.status().keys > 0).await;
        node.proxy.refuse();
        let ReplicaStatus { state, keys, .. } = node.status();
        assert!(
            state == ReplicaState::Loading && (KEYS..total).contains(&keys),
            "{keys}, {state:?}"
        );
    });
    futures_util::future::join_all(cut).await;
    // Keys of the first page change while the load is interrupted.
    fleet.revoke(&REVOKES).await;
    let new = fleet.manager.issue(NewKey::new(fleet.owner.clone(), "new")).await.unwrap();
    for node in &fleet.nodes {
        for key in 0..=UNKNOWN {
            assert_eq!(fleet.ask(node, key).await, Reply::Unavailable, "key {key}");
        }
        assert_eq!(node.status().state, ReplicaState::Loading);
    }
    fleet.each(Proxy::pass);
    comes_back_after_load(&fleet).await;
    fleet.is_right(&REVOKES).await;
    fleet.answers_from_memory(&REVOKES).await;
    for node in &fleet.nodes {
        for key in [&last, &new] {
            let secret = key.expose_secret();
            let reply = fleet.history.ask(node.number, &node.authenticator, VALID, secret).await;
            assert_eq!((reply, node.status().keys), (Reply::Accepted, total));
        }
    }
}

async fn comes_back_after_load(fleet: &Fleet) {
    for node in &fleet.nodes {
        eventually("the first sync", async || {
            let _ = fleet.ask(node, VALID).await;
            node.authenticator.health().last_sync.is_some()
        })
        .await;
    }
    comes_back(fleet).await;
}
