//! Several databases and services on one Redis: each keeps to its own entries.

use std::time::Duration;

use tower_api_key::{
    KeyManager, MemoryStore, PostgresStore, SqliteStore,
    denial::InvalidKey,
    record::KeyId,
    store::{CacheSecret, KeyRepository, KeyStore},
};

use crate::support::{
    feed::eventually,
    fleet::{Counting, Keys, Node, names_under},
    key_checker::Outcome,
    log::capture,
    servers::{Postgres, Redis},
};

fn store(url: &str) -> PostgresStore {
    PostgresStore::builder(url).max_connections(2).build().unwrap()
}

fn node<S: KeyStore + Clone>(store: &S, redis: &Redis) -> Node<S> {
    Node::new(Counting::over(store.clone()), redis.url())
}

fn in_namespace<S: KeyStore + Clone>(store: &S, redis: &Redis, name: &str) -> Node<S> {
    Node::with(
        Counting::over(store.clone()),
        redis.url(),
        |it| it.namespace(name),
        |authenticator| authenticator,
    )
}

/// The key is revoked in one of two databases that have the same secrets, keys and revisions. Nodes of either start and
/// go on without a trace of the other.
async fn keep_apart<S: KeyStore + Clone>(redis: &Redis, revoked: &S, active: &S, keys: [&str; 2]) {
    let (log, _guard) = capture();
    let [key, other] = keys;
    let prefix = other.split('_').nth(2).expect("a structured key");
    for _ in 0..3 {
        let [theirs, ours] = [node(active, redis), node(revoked, redis)];
        theirs.until_hit(key).await;
        theirs.until_hit(other).await;
        ours.until_hit(other).await;
        for _ in 0..20 {
            assert_eq!(ours.try_key(key).await.0, Outcome::Invalid(InvalidKey::Revoked));
            // Nothing that the one writes takes an entry from the other.
            for (node, key) in [(&theirs, key), (&theirs, other), (&ours, other)] {
                assert_eq!(node.try_key(key).await, (Outcome::Passes, 0));
            }
        }
    }
    let names = names_under(redis, prefix);
    let data = names.iter().filter(|name| name.starts_with("api_key:data:")).count();
    assert_eq!(data, 2, "{names:?}");
    assert!(!log.text().contains("forged"), "{}", log.text());
}

/// Two keys, and the id of the first.
async fn two_keys<S: KeyRepository + Clone>(store: &S) -> ([String; 2], KeyId) {
    let keys = Keys::over(store.clone()).await;
    let other = keys.issue().await.expose_secret().to_owned();
    ([keys.key, other], keys.record.id)
}

async fn revoke<S: KeyRepository + Clone>(store: &S, id: &KeyId) {
    KeyManager::new(store.clone()).revoke(id).await.unwrap();
}

#[tokio::test]
async fn a_copy_of_a_database_and_its_original_keep_to_their_own_entries() {
    let (server, redis) = (Postgres::start(), Redis::start());
    let admin = server.client().await;
    admin.batch_execute("CREATE DATABASE a").await.unwrap();
    let original = store(&server.database_url("a"));
    original.migrate().await.unwrap();
    let (keys, id) = two_keys(&original).await;
    drop(original);
    eventually("the copy", async || {
        admin.batch_execute("CREATE DATABASE b TEMPLATE a").await.is_ok()
    })
    .await;
    let [original, copy] = ["a", "b"].map(|name| store(&server.database_url(name)));
    // It was in Redis before.
    node(&original, &redis).until_hit(&keys[0]).await;
    revoke(&original, &id).await;
    keep_apart(&redis, &original, &copy, [&keys[0], &keys[1]]).await;
}

#[tokio::test]
async fn two_schemas_of_a_database_keep_to_their_own_entries() {
    let (server, redis) = (Postgres::start(), Redis::start());
    let admin = server.client().await;
    let stores = ["one", "two"]
        .map(|name| store(&format!("{}?options=-c%20search_path%3D{name}", server.url())));
    for (name, store) in ["one", "two"].iter().zip(&stores) {
        admin.batch_execute(&format!("CREATE SCHEMA {name}")).await.unwrap();
        store.migrate().await.unwrap();
    }
    let (keys, id) = two_keys(&stores[0]).await;
    let copied = "INSERT INTO two.users SELECT * FROM one.users;
        INSERT INTO two.api_keys SELECT * FROM one.api_keys;
        DELETE FROM two.api_key_cache_secrets;
        INSERT INTO two.api_key_cache_secrets OVERRIDING SYSTEM VALUE
            SELECT * FROM one.api_key_cache_secrets";
    admin.batch_execute(copied).await.unwrap();
    revoke(&stores[0], &id).await;
    keep_apart(&redis, &stores[0], &stores[1], [&keys[0], &keys[1]]).await;
}

#[tokio::test]
async fn a_copy_of_an_sqlite_file_keeps_to_its_own_entries() {
    let (folder, redis) = (tempfile::tempdir().unwrap(), Redis::start());
    let [first, second] = ["first.db", "second.db"].map(|name| folder.path().join(name));
    let original = SqliteStore::open(&first).unwrap();
    original.migrate().await.unwrap();
    let (keys, id) = two_keys(&original).await;
    for suffix in ["", "-wal"] {
        let of = |path: &std::path::Path| format!("{}{suffix}", path.display());
        std::fs::copy(of(&first), of(&second)).unwrap();
    }
    let copy = SqliteStore::open(&second).unwrap();
    revoke(&original, &id).await;
    keep_apart(&redis, &original, &copy, [&keys[0], &keys[1]]).await;
    // The path is what counts, whichever way it is written.
    let same = SqliteStore::open(folder.path().join(".").join("first.db")).unwrap();
    // Of this key alone: tombstones of the other one may still be written.
    let prefix = keys[1].split('_').nth(2).expect("a structured key");
    let names = || names_under(&redis, prefix);
    let before = names();
    node(&same, &redis).until_hit(&keys[1]).await;
    assert_eq!(names(), before);
}

#[tokio::test]
async fn nodes_in_one_namespace_share_entries_and_those_in_another_have_their_own() {
    let (redis, store) = (Redis::start(), SqliteStore::in_memory().unwrap());
    store.migrate().await.unwrap();
    let keys = Keys::over(store.clone()).await;
    let names = || names_under(&redis, &keys.record.prefix).len();
    for (name, count) in [("blue", 2), ("green", 4), ("blue", 4), ("", 6), ("{green}", 8)] {
        let node = in_namespace(&store, &redis, name);
        node.until_hit(&keys.key).await;
        assert_eq!(names(), count, "{name}");
    }
    // The secret changes, the names do not; and the one from before is still good.
    let old = CacheSecret::new(1, [1; 32]);
    let new = CacheSecret::new(2, [2; 32]).with_previous(old.clone());
    let with = |secret: CacheSecret| {
        let store = Counting::over(store.clone()).with_secret(secret);
        Node::with(store, redis.url(), |it| it.namespace("red"), |authenticator| authenticator)
    };
    with(old).until_hit(&keys.key).await;
    assert_eq!(names(), 10);
    let node = with(new);
    node.until_hit(&keys.key).await;
}

#[tokio::test]
async fn changes_are_published_within_a_namespace() {
    let (redis, keys) = (Redis::start(), Keys::over(MemoryStore::new()).await);
    let (log, _guard) = capture();
    let hour = Duration::from_secs(3600);
    let node = |name: &str, secret: u8| {
        let store = Counting::over(keys.store.clone()).without_feed();
        let secret = CacheSecret::new(1, [secret; 32]);
        let cache =
            |it: tower_api_key::backend::RedisCacheBuilder<_>| it.secret(secret).namespace(name);
        Node::with(store, redis.url(), cache, |authenticator| authenticator.max_staleness(hour))
    };
    let [a, b, stranger] = [node("a", 1), node("a", 1), node("b", 2)];
    for node in [&a, &b, &stranger] {
        node.until_hit(&keys.key).await;
    }
    let channels = async || redis.command(&["PUBSUB", "CHANNELS", "api_key:changes:*"]);
    eventually("two channels", async || channels().await.lines().count() == 2).await;
    let manager = KeyManager::new(a.cache.clone());
    manager.revoke(&keys.record.id).await.unwrap();
    b.until_denied(&keys.key, InvalidKey::Revoked).await;
    assert!(!log.text().contains("forged"), "{}", log.text());
}

#[tokio::test]
async fn a_role_that_may_not_read_the_system_identifier_still_uses_redis() {
    let (server, redis) = (Postgres::start(), Redis::start());
    let owner = store(&server.url());
    owner.migrate().await.unwrap();
    let (keys, _) = two_keys(&owner).await;
    let admin = server.client().await;
    let role =
        "REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC; CREATE ROLE service LOGIN;
        GRANT ALL ON ALL TABLES IN SCHEMA public TO service;";
    admin.batch_execute(role).await.unwrap();
    let service = store(&server.url().replacen("app@", "service@", 1));
    node(&service, &redis).until_hit(&keys[0]).await;
}
