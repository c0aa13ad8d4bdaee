//! Redis in front of a store: what it spares, what lies in it, and what it can't be made to do.

use std::{
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant, SystemTime},
};

use diesel::{Connection, SqliteConnection, connection::SimpleConnection};
use tower_api_key::{
    ApiKeyAuthLayer, Denial, KeyManager, MemoryStore, NewKey, RedisCache, SqliteStore, StoreError,
    backend::RedisCacheError,
    clock::{Clock, ManualClock},
    denial::{Forbidden, InvalidKey},
    key::KeyHash,
    management::IssuedKey,
    record::{Budget, BudgetPeriod, KeyRecord},
    redis::{RedisServers, RedisState},
    store::{
        Answer, Attribution, CacheSecret, DynKeyStore, KeyRepository, KeyStore, ListKeys, Lookup,
        StoredKey,
    },
};
use tracing_subscriber::util::SubscriberInitExt;

use crate::support::{
    self, checks::Checks, edit_key, fleet::*, key_checker::Outcome, servers::Redis,
    with_wrong_secret,
};

#[tokio::test]
async fn what_one_node_found_out_answers_another() {
    let (redis, keys) = (Redis::start(), sqlite().await);
    let [a, b] = [keys.node(&redis), keys.node(&redis)];
    let other = keys.issue().await;
    for node in [&a, &b] {
        node.until_hit(other.expose_secret()).await;
    }
    a.asks_the_store(&keys.key).await;
    eventually("it lies in Redis", async || exists(&redis, &keys.data(&redis))).await;
    assert_eq!(b.try_key(&keys.key).await, (Outcome::Passes, 0));
    assert_eq!(a.try_key(&keys.key).await, (Outcome::Passes, 0));
    assert_eq!(b.cache.state(), RedisState::Up);

    // Redis knows no more than that: another secret of the same id is for the store to judge.
    let wrong = with_wrong_secret(&keys.key);
    assert_eq!(b.try_key(&wrong).await, (Outcome::Invalid(InvalidKey::WrongSecret), 1));
    assert_eq!(b.try_key(&wrong).await, (Outcome::Invalid(InvalidKey::WrongSecret), 1));
    assert_eq!(b.try_key(&keys.key).await, (Outcome::Passes, 0));
}

#[tokio::test]
async fn a_hit_is_one_command_and_no_new_connection() {
    let (redis, keys) = (Redis::start(), sqlite().await);
    let node = keys.node(&redis);
    node.until_hit(&keys.key).await;
    let connections = || {
        let list = redis.command(&["CLIENT", "LIST"]);
        let others = list.lines().filter(|line| !line.contains("cmd=client"));
        others.map(|line| line.split(' ').next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let before = connections();
    assert_eq!(before.len(), 1, "{before:?}");
    // Deletes of what was issued may still be under way at first.
    eventually("twenty hits are twenty commands", async || {
        redis.command(&["CONFIG", "RESETSTAT"]);
        for _ in 0..20 {
            assert_eq!(node.try_key(&keys.key).await, (Outcome::Passes, 0));
        }
        let mut counts = redis.command_counts();
        counts.retain(|name, _| name != "config|resetstat");
        assert_eq!(counts.get("mget"), Some(&20), "{counts:?}");
        counts.len() == 1
    })
    .await;

    // A hundred at once share it, too.
    let others = futures_util::future::join_all((0..100).map(|_| keys.issue())).await;
    let tries = others.iter().map(|key| node.authenticator.authenticate(key.expose_secret()));
    assert!(futures_util::future::join_all(tries).await.iter().all(Result::is_ok));
    assert_eq!(connections(), before);
}

#[tokio::test]
async fn scripts_go_by_their_digest_and_by_their_text_only_to_a_server_that_forgot_them() {
    let (redis, keys) = (Redis::start(), sqlite().await);
    let node = keys.node(&redis);
    // Deletes and fills may say it at the same time, before either is through.
    node.until_hit(&keys.key).await;
    let rewrite = async || {
        let before = ["evalsha", "eval"].map(|name| redis.count(name));
        redis.command(&["DEL", &keys.data(&redis)]);
        node.until_hit(&keys.key).await;
        let after = ["evalsha", "eval"].map(|name| redis.count(name));
        [after[0] - before[0], after[1] - before[1]]
    };
    eventually("no deletes are under way", async || rewrite().await == [1, 0]).await;
    for _ in 0..5 {
        assert_eq!(rewrite().await, [1, 0]);
    }
    redis.command(&["SCRIPT", "FLUSH"]);
    assert_eq!(rewrite().await, [1, 1]);
    assert_eq!(rewrite().await, [1, 0]);
}

#[tokio::test]
async fn neither_keys_nor_their_hashes_lie_in_redis() {
    let redis = Redis::start();
    let checks = Checks::alone().await;
    let keys = sqlite().await;
    let bcrypt = "oldkey-1234-of-mine";
    let hash = import(&keys, "oldkey-1", bcrypt).await.expose_hash();
    let node = old_and_new(&keys, &redis);
    for key in [keys.key.as_str(), bcrypt] {
        node.until_hit(key).await;
    }
    drop(checks);
    let names = redis.command(&["KEYS", "*"]);
    assert_eq!(names.lines().count(), 4, "{names}");
    let mut everything = hex(names.as_bytes());
    for name in names.lines() {
        assert!(left_of(&redis, name) > 0, "{name} is immortal");
        everything += &hex_of(&redis, name);
    }
    let digest = |key: &str| KeyHash::sha256(key).expose_hash().replace("sha256$", "");
    let secret_half = &keys.key[keys.key.len() - 28..];
    let secrets = [&keys.key, secret_half, bcrypt, "1234-of-mine", &hash, &hash[7..], "$2b$"];
    for secret in secrets {
        assert!(!everything.contains(&hex(secret.as_bytes())), "{secret} lies in Redis");
    }
    for digest in
        [digest(&keys.key), digest(bcrypt), digest(&KeyHash::sha256(&keys.key).expose_hash())]
    {
        // As bytes, and as text in either case.
        assert!(!everything.contains(&digest), "a digest lies in Redis");
        assert!(!everything.contains(&hex(digest.as_bytes())), "a digest lies in Redis");
        assert!(!everything.contains(&hex(digest.to_uppercase().as_bytes())));
    }
    assert!(everything.contains(&hex(b"ada@example.com")), "the dump shows nothing");
}

#[tokio::test]
async fn entries_have_the_documented_names_and_lifetimes() {
    let (redis, keys) = (Redis::start(), sqlite().await);
    keys.node(&redis).until_hit(&keys.key).await;
    let [data, verified] = both_under(&redis, &keys.record.prefix);
    let parts: Vec<_> = verified["api_key:verified:".len()..].split(':').collect();
    let [scope, tag, digest] = parts.try_into().expect("scope, lookup id and key");
    assert!(scope.len() == 16 && scope.bytes().all(|b| b.is_ascii_hexdigit()), "{scope}");
    assert_eq!(tag, tag_of(&keys.record.prefix));
    assert_eq!(data, format!("api_key:data:{scope}:{tag}"));
    assert!(digest.len() == 32 && digest.bytes().all(|b| b.is_ascii_hexdigit()), "{digest}");
    let left = [&data, &verified].map(|name| left_of(&redis, name));
    assert!((290_000..=300_000).contains(&left[0]), "{left:?}");
    assert!((3_590_000..=3_600_000).contains(&left[1]), "{left:?}");
}

#[tokio::test]
async fn a_key_that_ends_soon_is_cached_no_longer_than_it_lives() {
    let redis = Redis::start();
    let clock = Arc::new(ManualClock::at(SystemTime::now()));
    let keys = Keys::over(MemoryStore::new()).await;
    let expiry = clock.now() + Duration::from_secs(10);
    let new = NewKey::new(keys.user.clone(), "short").expires_at(expiry.into());
    let short = keys.manager.issue(new).await.unwrap();
    let [a, b] = [manual(&keys, &redis, &clock), manual(&keys, &redis, &clock)];
    for node in [&a, &b] {
        node.until_hit(short.expose_secret()).await;
    }
    let [data, verified] = both_under(&redis, &short.record().prefix);
    assert!((1..=10_000).contains(&left_of(&redis, &data)));

    // Not even if Redis is made to keep it.
    for name in [&data, &verified] {
        redis.command(&["PERSIST", name]);
    }
    clock.advance(Duration::from_millis(9_990));
    assert_eq!(a.try_key(short.expose_secret()).await.0, Outcome::Passes);
    clock.advance(Duration::from_millis(10));
    for node in [&a, &b] {
        let outcome = node.try_key(short.expose_secret()).await.0;
        assert_eq!(outcome, Outcome::Invalid(InvalidKey::Expired));
    }
}

#[tokio::test]
async fn a_copy_of_a_key_that_is_not_valid_yet_lets_it_in_when_it_becomes_valid() {
    let redis = Redis::start();
    let clock = Arc::new(ManualClock::at(SystemTime::now()));
    let keys = Keys::over(MemoryStore::new()).await;
    let start = clock.now() + Duration::from_secs(10);
    let new = NewKey::new(keys.user.clone(), "early").not_before(start.into());
    let early = keys.manager.issue(new).await.unwrap();
    let early = early.expose_secret();
    let [a, b, c] = [(); 3].map(|()| manual(&keys, &redis, &clock));
    let not_yet = Outcome::Invalid(InvalidKey::NotYetValid);
    assert_eq!(a.try_key(early).await, (not_yet, 1));
    // The answer is in Redis, as that of a valid key is.
    eventually("Redis answers", async || b.try_key(early).await == (not_yet, 0)).await;

    clock.advance(Duration::from_secs(9));
    for node in [&a, &b] {
        assert_eq!(node.try_key(early).await, (not_yet, 0));
    }
    // A node that has not caught up with the changes does not use Redis.
    a.try_key(&keys.key).await;
    c.until_hit(&keys.key).await;
    // No change is notified.
    clock.advance(Duration::from_secs(1));
    for node in [&a, &b, &c] {
        assert_eq!(node.try_key(early).await, (Outcome::Passes, 0));
    }
}

#[tokio::test]
async fn a_revoked_key_stays_denied_by_all_nodes_though_its_entries_are_put_back() {
    let (redis, keys) = (Redis::start(), sqlite().await);
    let other = keys.issue().await;
    let [a, b] = [keys.node(&redis), keys.node(&redis)];
    for key in [other.expose_secret(), &keys.key] {
        a.until_hit(key).await;
        b.until_hit(key).await;
    }
    let both = both_under(&redis, &keys.record.prefix);
    both.iter().for_each(|name| keep(&redis, name));
    keys.revoke().await;
    for node in [&a, &b] {
        node.until_denied(&keys.key, InvalidKey::Revoked).await;
    }
    // One that knew nothing of it when it started.
    let c = keys.node(&redis);
    for _ in 0..20 {
        both.iter().for_each(|name| replay(&redis, name));
        for node in [&a, &b, &c] {
            let outcome = node.try_key(&keys.key).await.0;
            assert_eq!(outcome, Outcome::Invalid(InvalidKey::Revoked));
        }
    }
    for node in [&a, &b, &c] {
        node.until_hit(other.expose_secret()).await;
        let outcome = node.try_key(&keys.key).await.0;
        assert_eq!(outcome, Outcome::Invalid(InvalidKey::Revoked));
    }
}

#[tokio::test]
async fn the_keys_of_a_deactivated_owner_stay_denied_though_their_entries_are_put_back() {
    let (redis, keys) = (Redis::start(), sqlite().await);
    let [a, b] = [keys.node(&redis), keys.node(&redis)];
    for node in [&a, &b] {
        node.until_hit(&keys.key).await;
    }
    let both = both_under(&redis, &keys.record.prefix);
    both.iter().for_each(|name| keep(&redis, name));
    let mut owner = keys.record.user.clone();
    owner.is_active = false;
    keys.store.update_user(&owner, &Attribution::default()).await.unwrap();
    for node in [&a, &b] {
        node.until_denied(&keys.key, InvalidKey::OwnerInactive).await;
    }
    let c = keys.node(&redis);
    for _ in 0..20 {
        both.iter().for_each(|name| replay(&redis, name));
        for node in [&a, &b, &c] {
            let outcome = node.try_key(&keys.key).await.0;
            assert_eq!(outcome, Outcome::Invalid(InvalidKey::OwnerInactive));
        }
    }
    owner.is_active = true;
    keys.store.update_user(&owner, &Attribution::default()).await.unwrap();
    for node in [&a, &b, &c] {
        eventually("it passes again", async || node.try_key(&keys.key).await.0 == Outcome::Passes)
            .await;
        node.until_hit(&keys.key).await;
    }
}

#[tokio::test]
async fn a_hash_that_is_changed_by_hand_voids_what_was_verified() {
    let redis = Redis::start();
    let (keys, mut hand, _folder) = in_a_file().await;
    let node = keys.node(&redis);
    node.until_hit(&keys.key).await;
    let both = both_under(&redis, &keys.record.prefix);
    both.iter().for_each(|name| keep(&redis, name));

    let rotated = with_wrong_secret(&keys.key);
    let hash = KeyHash::sha256(&rotated).expose_hash();
    hand.run(&format!("UPDATE api_keys SET key_hash = '{hash}' WHERE id = {}", keys.record.id));
    node.until_denied(&keys.key, InvalidKey::WrongSecret).await;
    node.until_hit(&rotated).await;

    for name in &both {
        // The proof alone, and then both.
        let newer = both.iter().rev().take_while(|other| *other != name).chain([name]);
        newer.for_each(|name| replay(&redis, name));
        let outcome = node.try_key(&keys.key).await.0;
        assert_eq!(outcome, Outcome::Invalid(InvalidKey::WrongSecret));
        node.until_hit(&rotated).await;
    }
}

#[tokio::test]
async fn a_proof_spares_the_slow_check_once_the_data_have_ended() {
    let redis = Redis::start();
    let checks = Checks::alone().await;
    let keys = sqlite().await;
    let key = "oldkey-1234-of-mine";
    import(&keys, "oldkey-1", key).await;
    let [a, b] = [old_and_new(&keys, &redis), old_and_new(&keys, &redis)];
    for node in [&a, &b] {
        node.until_hit(&keys.key).await;
    }
    a.asks_the_store(key).await;
    assert_eq!(checks.take(), 1);
    a.until_hit(key).await;
    assert_eq!(checks.take(), 0);
    for _ in 0..3 {
        redis.command(&["DEL", &data_of(&redis, "oldkey-1")]);
        b.asks_the_store(key).await;
        b.until_hit(key).await;
    }
    assert_eq!(checks.take(), 0, "slow checks of a key that was proven");

    let wrong = "oldkey-1234-of-yours";
    assert_eq!(b.try_key(wrong).await, (Outcome::Invalid(InvalidKey::WrongSecret), 1));
    assert_eq!(checks.take(), 1);
    let [_, verified] = both_under(&redis, "oldkey-1");
    redis.command(&["DEL", &data_of(&redis, "oldkey-1"), &verified]);
    b.asks_the_store(key).await;
    assert_eq!(checks.take(), 1);
}

#[tokio::test]
async fn keys_that_share_a_prefix_each_hit() {
    let redis = Redis::start();
    let checks = Checks::alone().await;
    let keys = sqlite().await;
    let mine = ["oldkey-1-a", "oldkey-1-b", "oldkey-1-c"];
    for key in mine {
        import(&keys, "oldkey-1", key).await;
    }
    let node = old_and_new(&keys, &redis);
    for key in mine {
        node.until_hit(key).await;
    }
    for key in mine {
        assert_eq!(node.try_key(key).await, (Outcome::Passes, 0), "{key}");
    }
    assert_eq!(names_under(&redis, "oldkey-1").len(), 4);

    // Each is its own record's, and stands or falls alone.
    let all = keys.store.list_keys(&ListKeys::default()).await.unwrap().keys;
    let of = |key: &str| all.iter().find(|record| key.ends_with(&*record.name)).unwrap();
    for key in mine {
        assert_eq!(node.authenticator.authenticate(key).await.unwrap().key().id, of(key).id);
    }
    keys.manager.revoke(&of("oldkey-1-b").id).await.unwrap();
    node.until_denied("oldkey-1-b", InvalidKey::Revoked).await;
    for key in ["oldkey-1-a", "oldkey-1-c"] {
        node.until_hit(key).await;
    }
    let outcome = node.try_key("oldkey-1-b").await.0;
    assert_eq!(outcome, Outcome::Invalid(InvalidKey::Revoked));
    drop(checks);
}

#[tokio::test]
async fn a_handler_sees_the_same_whether_redis_or_the_store_answered() {
    let redis = Redis::start();
    let keys = Keys::over(MemoryStore::new()).await;
    let mut record = KeyRecord::new(0, "", keys.record.user.clone());
    record.name = "\u{1f511} \"quoted\" \0 {braces}".to_owned();
    record.permissions = vec!["read".to_owned(), String::new()];
    record.scopes = vec!["chat:write".to_owned()];
    record.rate_limits.per_minute = Some(u64::MAX);
    record.rate_limits.per_day = Some(0);
    record.allowed_models = vec!["gpt-*".to_owned()];
    record.allowed_endpoints = vec![support::rule("POST /v1/chat/{id}"), support::rule("/health")];
    record.allowed_ips = vec!["10.0.0.0/8".parse().unwrap(), "2001:db8::/32".parse().unwrap()];
    record.is_unlimited = true;
    record.budget = Some(Budget { limit_cents: u64::MAX, period: BudgetPeriod::Weekly });
    record.expires_at = Some("2999-12-31T23:59:59.123456789Z".parse().unwrap());
    record.not_before = Some("2001-12-31T23:59:59.123456789Z".parse().unwrap());
    record.metadata =
        serde_json::json!({"π": [0.1, 1e300, -0.0, i64::MIN, u64::MAX, null, {"a": ""}]});
    let key = keys.issue().await;
    record.prefix = key.record().prefix.clone();
    record.id = key.record().id.clone();
    edit_key(&keys.store, &record, None).await.unwrap();

    let node = secret_node(&keys, &redis);
    let address = "10.1.2.3".parse().unwrap();
    let ask = async || {
        node.store.take_asked();
        let caller =
            node.authenticator.authenticate_from(key.expose_secret(), address).await.unwrap();
        (caller.key().clone(), node.store.take_asked())
    };
    let texts = ["12", "hello", "", "null"].map(serde_json::Value::from);
    for metadata in texts.into_iter().chain([true.into(), 12.into(), record.metadata.clone()]) {
        record.metadata = metadata;
        edit_key(&keys.store, &record, None).await.unwrap();
        let is_seen = async || ask().await.0.metadata == record.metadata;
        eventually("the edit is seen", is_seen).await;
        eventually("Redis answers", async || ask().await.1 == 0).await;
        assert_eq!(
            ask().await.0,
            keys.store.find_key(&record.id).await.unwrap().unwrap().into_record()
        );
    }

    // Its rules hold for an answer from Redis, too.
    let elsewhere = "192.0.2.1".parse().unwrap();
    let denial =
        node.authenticator.authenticate_from(key.expose_secret(), elsewhere).await.unwrap_err();
    assert!(matches!(denial, Denial::Forbidden(Forbidden::Address)), "{denial:?}");
    assert_eq!(node.store.take_asked(), 0);
}

#[tokio::test]
async fn redis_answers_while_the_store_is_down_and_what_it_does_not_know_is_no_401() {
    let (redis, keys) = (Redis::start(), sqlite().await);
    let node = keys.node(&redis);
    node.until_hit(&keys.key).await;
    node.store.fail(true);
    for _ in 0..10 {
        assert_eq!(node.try_key(&keys.key).await, (Outcome::Passes, 0));
    }
    let other = keys.issue().await;
    assert_eq!(node.try_key(other.expose_secret()).await, (Outcome::Status(503), 1));
    assert_eq!(node.try_key(&with_wrong_secret(&keys.key)).await, (Outcome::Status(503), 1));
    node.store.fail(false);
    node.until_hit(other.expose_secret()).await;
}

#[tokio::test]
async fn a_change_to_a_store_without_a_feed_reaches_other_nodes_through_redis() {
    let redis = Redis::start();
    let keys = Keys::over(MemoryStore::new()).await;
    let [a, b] = [feedless(&keys, &redis), feedless(&keys, &redis)];
    let manager = KeyManager::new(a.cache.clone());
    let other = keys.issue().await;
    for node in [&a, &b] {
        // Nothing from before it listens is trusted for a second.
        node.until_hit(&keys.key).await;
        node.until_hit(other.expose_secret()).await;
    }
    assert_eq!(listeners(&redis), 2);
    let both = both_under(&redis, &keys.record.prefix);
    both.iter().for_each(|name| keep(&redis, name));

    let asked = Instant::now();
    manager.revoke(&keys.record.id).await.unwrap();
    b.until_denied(&keys.key, InvalidKey::Revoked).await;
    assert!(asked.elapsed() < Duration::from_millis(500), "it took {:?}", asked.elapsed());
    both.iter().for_each(|name| replay(&redis, name));
    for node in [&a, &b] {
        // The node that made the change, too, receives it.
        node.until_denied(&keys.key, InvalidKey::Revoked).await;
        for _ in 0..5 {
            let outcome = node.try_key(&keys.key).await.0;
            assert_eq!(outcome, Outcome::Invalid(InvalidKey::Revoked));
        }
        assert_eq!(node.try_key(other.expose_secret()).await, (Outcome::Passes, 0));
    }

    let mut owner = keys.record.user.clone();
    owner.is_active = false;
    a.cache.update_user(&owner, &Attribution::default()).await.unwrap();
    b.until_denied(other.expose_secret(), InvalidKey::OwnerInactive).await;
}

#[tokio::test]
async fn forged_messages_change_nothing() {
    let redis = Redis::start();
    let keys = Keys::over(MemoryStore::new()).await;
    let node = Node::with(
        Counting::over(keys.store.clone()).without_feed(),
        redis.servers(),
        |cache| cache.secret(secret()),
        |authenticator| authenticator.cache_capacity(100).max_staleness(Duration::from_secs(3600)),
    );
    let [first, last] = [keys.issue().await, keys.issue().await];
    let manager = KeyManager::new(node.cache.clone());
    let receives_revoke_of = async |marker: &IssuedKey| {
        node.until_hit(marker.expose_secret()).await;
        manager.revoke(&marker.record().id).await.unwrap();
        node.until_denied(marker.expose_secret(), InvalidKey::Revoked).await;
    };
    node.until_hit(&keys.key).await;
    eventually("it listens", async || listeners(&redis) == 1).await;
    // A subscription invalidates what was cached before it.
    receives_revoke_of(&first).await;
    node.until_hit(&keys.key).await;

    let (prefix, user) = (&keys.record.prefix, keys.user.as_i64().unwrap());
    let huge = "x".repeat(8 << 20);
    let deep = "[".repeat(100_000);
    let reply = [
        String::new(),
        "garbage".to_owned(),
        format!("{{\"Prefix\":[\"{prefix}\",99]}}"),
        format!("{{\"Prefix\":[\"{prefix}\",99]}}{}", "x".repeat(32)),
        format!("{{\"Owner\":[{user},99]}}{}", "\0".repeat(32)),
        "x".repeat(31),
        "\0".repeat(32),
        deep,
        huge,
    ];
    let publish = |message: &str| redis.command(&["PUBLISH", "api_key:changes", message]);
    for message in &reply {
        assert_eq!(publish(message), "1");
    }
    for channel in ["api_key:change", "api_key:*", "__redis__:invalidate"] {
        redis.command(&["PUBLISH", channel, &reply[2]]);
    }
    // It arrives after all of them.
    receives_revoke_of(&last).await;
    assert_eq!(node.try_key(&keys.key).await, (Outcome::Passes, 0));
}

#[tokio::test]
async fn a_node_that_received_no_change_for_a_while_asks_anew() {
    let redis = Redis::start();
    let keys = Keys::over(MemoryStore::new()).await;
    let node = Node::with(
        Counting::over(keys.store.clone()).without_feed(),
        redis.servers(),
        |cache| cache.secret(secret()),
        |authenticator| authenticator.cache_capacity(100).max_staleness(Duration::from_secs(3600)),
    );
    node.until_hit(&keys.key).await;
    eventually("it listens", async || listeners(&redis) == 1).await;
    node.until_hit(&keys.key).await;
    // A revoke without a change event, and a connection that was lost meanwhile.
    keys.revoke().await;
    redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    node.until_denied(&keys.key, InvalidKey::Revoked).await;
}

#[tokio::test]
async fn a_store_without_a_secret_is_rejected_until_one_is_given() {
    let redis = Redis::start();
    let keys = Keys::over(MemoryStore::new()).await;
    let error = RedisCache::new(keys.store.clone(), redis.url()).unwrap_err();
    assert_eq!(error, RedisCacheError::NoSecret);
    assert!(error.to_string().contains("RedisCacheBuilder::secret"), "{error}");
    for store in
        [DynKeyStore::new(keys.store.clone()), DynKeyStore::new(Arc::new(keys.store.clone()))]
    {
        let error = RedisCache::new(store, redis.url()).unwrap_err();
        assert_eq!(error, RedisCacheError::NoSecret);
    }
    secret_node(&keys, &redis).until_hit(&keys.key).await;
    // Through pointers, a store's own secret is found all the same.
    let keys = sqlite().await;
    RedisCache::new(DynKeyStore::new(keys.store.clone()), redis.url()).unwrap();
    let cache = RedisCache::new(Arc::new(keys.store.clone()), redis.url()).unwrap();
    // A cache in front of a store is a store.
    RedisCache::new(cache, redis.url()).unwrap();
}

#[tokio::test]
async fn until_the_secret_is_known_redis_is_a_miss() {
    let (redis, keys) = (Redis::start(), sqlite().await);
    let is_there = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let store = || Counting::over(keys.store.clone());
    let late = Node::new(store().with_late_secret(&is_there[0]), redis.servers());
    let failing = Node::new(store().with_failing_secret(&is_there[1]), redis.servers());
    for _ in 0..10 {
        late.asks_the_store(&keys.key).await;
        failing.asks_the_store(&keys.key).await;
    }
    assert!(!exists(&redis, &keys.data(&redis)));
    is_there.iter().for_each(|is_there| is_there.store(true, SeqCst));
    late.until_hit(&keys.key).await;
    failing.until_hit(&keys.key).await;
}

#[tokio::test]
async fn entries_of_the_secret_from_before_count_and_those_of_an_unknown_one_do_not() {
    let redis = Redis::start();
    let (keys, mut hand, _folder) = in_a_file().await;
    let warm = keys.issue().await;
    let before = keys.node(&redis);
    before.until_hit(&keys.key).await;
    let written = hex_of(&redis, &keys.data(&redis));

    hand.run("INSERT INTO api_key_cache_secrets (secret) VALUES (randomblob(32))");
    let after = keys.node(&redis);
    after.until_hit(warm.expose_secret()).await;
    assert_eq!(after.try_key(&keys.key).await, (Outcome::Passes, 0));
    assert_eq!(hex_of(&redis, &keys.data(&redis)), written);

    hand.run("INSERT INTO api_key_cache_secrets (secret) VALUES (randomblob(32))");
    let later = keys.node(&redis);
    later.until_hit(warm.expose_secret()).await;
    redis.command(&["CONFIG", "RESETSTAT"]);
    later.asks_the_store(&keys.key).await;
    assert!(exists(&redis, &keys.data(&redis)));
    later.until_hit(&keys.key).await;
    assert!(["del", "unlink", "getdel", "expire"].iter().all(|name| redis.count(name) == 0));
    // Nobody is locked out meanwhile.
    assert_eq!(before.try_key(&keys.key).await.0, Outcome::Passes);
    assert_eq!(after.try_key(&keys.key).await.0, Outcome::Passes);
}

#[tokio::test]
async fn a_proof_from_before_the_secret_was_changed_spares_the_slow_check() {
    let redis = Redis::start();
    let checks = Checks::alone().await;
    let (keys, mut hand, _folder) = in_a_file().await;
    let key = "oldkey-1234-of-mine";
    import(&keys, "oldkey-1", key).await;
    old_and_new(&keys, &redis).until_hit(key).await;
    hand.run("INSERT INTO api_key_cache_secrets (secret) VALUES (randomblob(32))");
    let after = old_and_new(&keys, &redis);
    after.until_hit(&keys.key).await;
    checks.take();
    redis.command(&["DEL", &data_of(&redis, "oldkey-1")]);
    after.asks_the_store(key).await;
    assert_eq!(
        checks.take(),
        0,
        "slow checks of a key that was proven under the secret from before"
    );
}

#[test]
fn an_url_that_cannot_be_used_is_rejected_and_not_shown() {
    let build = |servers: RedisServers| {
        let cache = RedisCache::builder(MemoryStore::new(), servers).secret(secret()).build();
        cache.map(drop).unwrap_err()
    };
    let bad = [
        "",
        "hunter2",
        "http://u:hunter2@host/",
        "redis://:hunter2@host:port/",
        "redis://:hunter2@",
    ];
    let sound = "redis://:hunter2@localhost/";
    let mut servers: Vec<RedisServers> = bad.iter().map(|&url| url.into()).collect();
    for url in bad {
        servers.push(RedisServers::cluster([url]));
        servers.push(RedisServers::cluster([sound, url]));
        servers.push(RedisServers::sentinel([url], "master"));
        servers.push(RedisServers::sentinel([sound], "master").nodes_like(url));
    }
    servers.push(RedisServers::cluster(Vec::<String>::new()));
    servers.push(RedisServers::sentinel(Vec::<String>::new(), "master"));
    for servers in servers {
        let shown = format!("{servers:?}");
        let error = build(servers);
        assert!(matches!(error, RedisCacheError::Url(_)), "{error:?}");
        assert!(error.to_string().starts_with("the Redis URL can't be used"), "{error}");
        for text in [shown, format!("{error:?} {error}")] {
            assert!(!text.contains("hunter2") && !text.contains("host"), "{text}");
        }
    }
}

#[tokio::test]
async fn the_password_is_shown_nowhere() {
    // Forwards the records of the `log` crate, which are searched as well.
    let _forwarded = tracing_subscriber::registry().set_default();
    let (log, _guard) = support::log::capture();
    let redis = Redis::with_settings(&["requirepass=hunter2"]);
    let keys = sqlite().await;
    let node = keys.node(&redis);
    node.until_hit(&keys.key).await;
    let wrong = redis.url().replace("hunter2", "hunter3");
    let locked_out = Node::new(Counting::over(keys.store.clone()), wrong.as_str());
    eventually("Redis is found out of reach", async || {
        locked_out.asks_the_store(&keys.key).await;
        locked_out.cache.state() == RedisState::Down
    })
    .await;
    let builder = RedisCache::builder(Silent, wrong.as_str()).secret(secret());
    let shown = format!(
        "{:?} {builder:?} {:?} {:?} {}",
        RedisCache::builder(Silent, redis.url()).secret(secret()).build().unwrap(),
        RedisServers::from(redis.url()),
        secret(),
        log.text()
    );
    assert!(!shown.contains("hunter") && !shown.contains(&wrong), "{shown}");
    assert!(log.text().contains("Redis can't be reached"), "{}", log.text());
}

/// A store to print.
#[derive(Debug)]
struct Silent;

impl KeyStore for Silent {
    async fn resolve(&self, lookup: &Lookup) -> Result<Answer, StoreError> {
        lookup.verify([]).await
    }
}

#[tokio::test]
async fn passwords_unix_sockets_and_database_numbers_are_in_the_url() {
    let redis = Redis::with_settings(&["requirepass=s%e&s:a@me"]);
    let keys = sqlite().await;
    let (port, socket) = (redis.port(), redis.socket());
    let password = "s%25e%26s%3Aa%40me";
    let urls = [
        (0, format!("redis://:{password}@127.0.0.1:{port}")),
        (3, format!("redis://default:{password}@localhost:{port}/3")),
        (5, format!("redis+unix://{}?db=5&pass={password}", socket.display())),
    ];
    for (database, url) in urls {
        let node = Node::new(Counting::over(keys.store.clone()), url.as_str());
        node.until_hit(&keys.key).await;
        let sizes = redis.command(&["INFO", "keyspace"]);
        assert!(sizes.contains(&format!("db{database}:keys=2,")), "{sizes}");
    }
}

#[tokio::test]
async fn tls_takes_a_certificate_that_the_system_trusts_and_no_other() {
    const URL: &str = "REDIS_TESTS_TLS_URL";
    const TRUSTS: &str = "REDIS_TESTS_TLS_TRUSTS";
    // What the system trusts is read once from the environment: this test runs itself as a child.
    if let Ok(url) = std::env::var(URL) {
        let keys = sqlite().await;
        let node = Node::new(Counting::over(keys.store.clone()), url);
        if std::env::var(TRUSTS).unwrap() == "yes" {
            node.until_hit(&keys.key).await;
        } else {
            eventually("Redis is found out of reach", async || {
                node.asks_the_store(&keys.key).await;
                node.cache.state() == RedisState::Down
            })
            .await;
            for _ in 0..20 {
                node.asks_the_store(&keys.key).await;
            }
        }
        return;
    }
    let (root, certificate, key) = certificate_for("127.0.0.1");
    let (other, ..) = certificate_for("127.0.0.1");
    let (elsewhere_root, elsewhere, elsewhere_key) = certificate_for("redis.example.com");
    let redis = Redis::with_tls(&certificate, &key, &root);
    let misnamed = Redis::with_tls(&elsewhere, &elsewhere_key, &elsewhere_root);
    let folder = tempfile::tempdir().unwrap();
    let cases = [(&redis, root, "yes"), (&redis, other, "no"), (&misnamed, elsewhere_root, "no")];
    for (at, (redis, trusted, expected)) in cases.into_iter().enumerate() {
        let file = folder.path().join(format!("{at}.pem"));
        std::fs::write(&file, trusted).unwrap();
        redis.command(&["CONFIG", "RESETSTAT"]);
        let test = "cache::tls_takes_a_certificate_that_the_system_trusts_and_no_other";
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env("SSL_CERT_FILE", &file)
            .env(URL, redis.url())
            .env(TRUSTS, expected)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&child.stdout).into_owned();
        assert!(child.status.success() && text.contains("1 passed"), "{at} {child:?}");
        let clients = redis.command(&["INFO", "commandstats"]);
        assert_eq!(clients.contains("cmdstat_mget"), expected == "yes", "{clients}");
    }
}

#[tokio::test]
async fn nothing_goes_on_once_the_last_handle_is_gone() {
    let redis = Redis::start();
    let clients = || {
        let list = redis.command(&["CLIENT", "LIST"]);
        list.lines().filter(|line| !line.contains("cmd=client")).count()
    };
    let keys = Keys::over(MemoryStore::new()).await;
    let node = feedless(&keys, &redis);
    node.until_hit(&keys.key).await;
    eventually("it listens", async || listeners(&redis) == 1).await;
    let layer = ApiKeyAuthLayer::from(node.authenticator.clone());
    drop(node);
    assert_eq!(support::send(&layer, support::bearer(&keys.key)).await.status(), 200);
    assert_eq!(clients(), 2);
    drop(layer);
    eventually("all connections are closed", async || clients() == 0).await;
}

#[test]
fn a_cache_outlives_the_runtime_that_it_was_first_used_on() {
    let redis = Redis::start();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let first = runtime();
    let keys = first.block_on(sqlite());
    let node = keys.node(&redis);
    first.block_on(node.until_hit(&keys.key));
    drop(first);
    let second = runtime();
    second.block_on(node.until_hit(&keys.key));
    second.block_on(keys.revoke());
    second.block_on(node.until_denied(&keys.key, InvalidKey::Revoked));
}

fn secret() -> CacheSecret {
    CacheSecret::new(1, *b"hunter2-hunter2-hunter2-hunter2-")
}

/// A node with a given secret, for a store that has none.
fn secret_node(keys: &Keys<MemoryStore>, redis: &Redis) -> Node<MemoryStore> {
    let store = Counting::over(keys.store.clone());
    Node::with(
        store,
        redis.servers(),
        |cache| cache.secret(secret()),
        |authenticator| authenticator,
    )
}

/// The same, with a clock that is moved by hand, the store's time included.
fn manual(keys: &Keys<MemoryStore>, redis: &Redis, clock: &Arc<ManualClock>) -> Node<MemoryStore> {
    let store = Counting::over(keys.store.clone()).by_clock(clock);
    let cache =
        |it: tower_api_key::backend::RedisCacheBuilder<_>| it.secret(secret()).clock(clock.clone());
    Node::with(store, redis.servers(), cache, |authenticator| authenticator.clock(clock.clone()))
}

/// A node whose store emits no change event by itself.
fn feedless(keys: &Keys<MemoryStore>, redis: &Redis) -> Node<MemoryStore> {
    let store = Counting::over(keys.store.clone()).without_feed();
    let hour = Duration::from_secs(3600);
    Node::with(
        store,
        redis.servers(),
        |it| it.secret(secret()),
        |authenticator| authenticator.max_staleness(hour),
    )
}

/// A node for new keys, and for old ones by their first 8 characters.
fn old_and_new<S: KeyRepository + Clone>(keys: &Keys<S>, redis: &Redis) -> Node<S> {
    let scheme = support::old_and_new_keys().build().unwrap();
    let store = Counting::over(keys.store.clone());
    Node::with(store, redis.servers(), |cache| cache, |authenticator| authenticator.scheme(scheme))
}

/// Stores a key under its first characters and a bcrypt hash, as another service may have done.
async fn import<S: KeyRepository>(keys: &Keys<S>, prefix: &str, key: &str) -> KeyHash {
    let mut record = KeyRecord::new(0, prefix, keys.record.user.clone());
    record.name = key.chars().last().unwrap().to_string();
    let hash = KeyHash::bcrypt(key, 4).unwrap();
    keys.store
        .insert_key(&StoredKey::new(record, hash.clone()), &Attribution::default())
        .await
        .unwrap();
    hash
}

/// Somebody with SQL at hand.
struct ByHand(SqliteConnection);

impl ByHand {
    fn run(&mut self, sql: &str) {
        self.0.batch_execute(sql).unwrap();
    }
}

async fn in_a_file() -> (Keys<SqliteStore>, ByHand, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys.db");
    let store = SqliteStore::open(&file).unwrap();
    store.migrate().await.unwrap();
    let mut hand = ByHand(SqliteConnection::establish(file.to_str().unwrap()).unwrap());
    hand.run("PRAGMA busy_timeout = 5000");
    (Keys::over(store).await, hand, folder)
}

fn listeners(redis: &Redis) -> usize {
    let answer = redis.command(&["PUBSUB", "NUMSUB", "api_key:changes"]);
    answer.lines().nth(1).unwrap().parse().unwrap()
}

/// An authority, and a certificate for `name` with its key, in PEM.
fn certificate_for(name: &str) -> (String, String, String) {
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let mut authority = rcgen::CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    authority.distinguished_name.push(rcgen::DnType::CommonName, "the authority");
    let root = authority.self_signed(&authority_key).unwrap().pem();
    let issuer = rcgen::Issuer::new(authority, authority_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
    let certificate = certificate.signed_by(&key, &issuer).unwrap().pem();
    (root, certificate, key.serialize_pem())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
